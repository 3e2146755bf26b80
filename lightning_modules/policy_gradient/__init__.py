"""The parts of DDPO: rollout, advantages, loss, and what guards them."""
