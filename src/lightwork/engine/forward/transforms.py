"""The transforms of torch.func: `grad`, `vjp`, `jvp`, `jacrev`, `vmap` and what is made of them.

Within one of them every tensor that is made belongs to the transform, and what autograd saves can not have hooks:
within `grad`, `vjp` and `jacrev` torch refuses them, and those of the others would be called outside.
"""

from __future__ import annotations

import contextlib

from torch._C._functorch import peek_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


def is_transformed() -> bool:
    """Return whether a transform of torch.func is at work."""
    return peek_interpreter_stack() is not None


def outside_transforms() -> contextlib.AbstractContextManager[object]:
    """Let what is done belong to no transform."""
    return temporarily_clear_interpreter_stack() if is_transformed() else contextlib.nullcontext()
