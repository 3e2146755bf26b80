"""RL4Med-DDPO: align Stable Diffusion with its prompts by reinforcement learning."""

from importlib.metadata import version

__version__ = version("rl4med-ddpo")
