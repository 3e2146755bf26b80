"""What is measured beside the peers: each module prints JSON."""
