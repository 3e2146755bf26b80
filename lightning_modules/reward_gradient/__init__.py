"""The parts of DRaFT: sampling that gradients go back through, and what it costs."""
