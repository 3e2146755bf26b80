"""Whole experiments of several commands: the demo, and Table 4."""
