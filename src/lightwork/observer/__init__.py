"""Seeing a run, live and afterwards: reads the files of a run directory, and nothing else."""
