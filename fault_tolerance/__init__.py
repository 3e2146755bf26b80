"""What keeps a run's work when processes are killed, disks fill up and machines go."""
