"""Partial sums between hosts."""
