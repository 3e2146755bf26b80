"""What everything else builds on: errors, files, hashes, checkpoints, randomness."""
