"""Gradients, from autograd into partial sums."""
