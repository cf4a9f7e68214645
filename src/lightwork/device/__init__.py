"""What a worker computes on: the host's CPU, or a GPU with a memory of its own."""
