"""What tests share: tiny networks and runs, and real processes to start and to kill."""
