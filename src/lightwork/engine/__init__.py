"""One training step: weights, gradients, buffers, random state and the optimizer, carried out as the board assigns."""
