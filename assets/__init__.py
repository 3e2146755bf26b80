"""The embedded base: a small pretrained pipeline, and the steps that make it from a seed."""
