"""Measurements in comparison with the peers: each module prints JSON."""
