"""Samples: their order, how they are fetched and collated, and loading ahead of training."""
