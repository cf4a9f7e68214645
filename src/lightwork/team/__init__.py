"""The team: where a worker finds it, who is alive, and the claims board: who has which micro-batch."""
