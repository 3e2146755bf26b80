"""The diffusion model: the sampler's transitions, adapters, and the loss of fine-tuning."""
