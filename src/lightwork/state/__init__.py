"""What a run keeps from step to step: weights, the optimizer's state, buffers, and where they lie."""
