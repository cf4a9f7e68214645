"""Frozen data and arithmetic: the job, its plan, the layout of parameters, the tree, the assignment. No I/O."""
