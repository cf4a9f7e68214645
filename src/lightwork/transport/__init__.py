"""Transports move bytes between workers, and wake them."""
