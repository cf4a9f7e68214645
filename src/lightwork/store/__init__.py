"""Stores keep bytes: the memory that the workers of a host share."""
