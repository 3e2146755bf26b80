"""Find, load, check, convert and save Stable Diffusion pipelines."""
