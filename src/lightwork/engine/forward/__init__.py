"""The surroundings of forward: precision, weights that are fetched, activations."""
