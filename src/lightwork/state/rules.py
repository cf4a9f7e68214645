"""How the values that micro-batches leave in a buffer become one.

Every micro-batch starts from the buffer as the step begins, `start`, and leaves a leaf. A rule makes one value of the
leaves: by the type of the buffer, unless a module of torch's own means something else by it, or the user names a rule.

    mean         the leaves' mean, weighted as the losses are: right for moving averages
    sum          start and the leaves' increments: right for counters
    first, last, maximum, minimum
    cumulative   of batch normalisation with momentum=None, which averages over all batches so far: each micro-batch
                 counts as one, as in a plain loop over them

Where a rule by type would spoil what a module keeps (a queue and its pointer, say), this shows in what micro-batches
leave, and is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightwork.errors import SpecError, UsageError
from lightwork.spec.spec import BufferRule
from lightwork.spec.tree import combine

#: What torch's modules for quantisation-aware training keep: ranges, and what they last made of them.
_OF_OBSERVERS: dict[str, BufferRule] = {
    "min_val": "minimum",
    "max_val": "maximum",
    "scale": "last",
    "zero_point": "last",
    "fake_quant_enabled": "last",
    "observer_enabled": "last",
}

Leaves = Sequence[torch.Tensor | None]  #: by micro-batch; None for one that counts for nothing


def default_rule(module: nn.Module, key: str, tensor: torch.Tensor) -> BufferRule | None:
    """Return the rule of a module's buffer for which the user names none; None where there is none."""
    if type(module).__module__.startswith("torch.ao.") and not type(module).__name__.startswith("MovingAverage"):
        rule = _OF_OBSERVERS.get(key)
        if rule is not None:
            return rule
    if tensor.is_floating_point():
        return "mean"
    return "sum" if tensor.dtype != torch.bool and not tensor.is_complex() else None


def is_of_torch(module: nn.Module) -> bool:
    """Return whether a module's buffers mean what they mean in torch's own."""
    return isinstance(module, _NormBase) or type(module).__module__.startswith("torch.")


def counts_batches(module: nn.Module, key: str) -> bool:
    """Return whether a buffer is an average over all batches so far, which `num_batches_tracked` counts."""
    return isinstance(module, _NormBase) and module.momentum is None and key in ("running_mean", "running_var")


def refuse_synchronised(model: nn.Module) -> None:
    """Raise SpecError for batch normalisation over the processes of a group, which would depend on the team."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise SpecError(
                f"module {name} is a SyncBatchNorm and torch.distributed is initialised: its statistics would be of "
                "whatever the other processes compute at the moment, and other ones for each team. Use BatchNorm, "
                "whose statistics are a micro-batch's; for those of more samples, a larger micro_batch."
            )


def check_leaf(name: str, start: torch.Tensor, leaf: torch.Tensor) -> None:
    """Raise UsageError when a micro-batch has written some rows of a table alone: it is no moving average."""
    if leaf.dim() < 2 or not leaf.is_floating_point():
        return
    changed = leaf != start
    for axis in range(leaf.dim()):
        others = [other for other in range(leaf.dim()) if other != axis]
        written = changed.any(dim=others) if others else changed
        if 0 < int(written.sum()) < len(written):
            raise UsageError(
                f"buffer {name} {tuple(leaf.shape)} was written in part by a micro-batch ({int(written.sum())} of "
                f"{len(written)} along dimension {axis}), as a queue or a memory bank is. The default rule would take "
                f"the mean of what the micro-batches of a step leave there. {_advice(name)}"
            )


def check_count(name: str, start: torch.Tensor, leaves: Leaves) -> None:
    """Raise UsageError when an integer buffer went down in a micro-batch: it is no counter."""
    for leaf in leaves:
        if leaf is not None and bool((leaf.long() < start.long()).any()):
            raise UsageError(
                f"buffer {name} went down in a micro-batch, from {_some(start)} to {_some(leaf)}, as a pointer that "
                "wraps does. The default rule for integers adds up the increments of all micro-batches of a step. "
                f"{_advice(name)}"
            )


def check_flag(name: str, start: torch.Tensor, num_micro_batches: int, *, is_training: bool) -> None:
    """Raise UsageError when an integer was set to 1 by each micro-batch of one step, and not counted on in the next."""
    is_integer = not start.is_floating_point() and start.dtype != torch.bool
    if is_training and is_integer and start.numel() == 1 and int(start) == num_micro_batches:
        raise UsageError(
            f"buffer {name} was set to 1 in one step and not written in the next, as a flag is. The default rule for "
            f"integers added up its {num_micro_batches} micro-batches' increments: it is {num_micro_batches} now. Name "
            f"a rule: distribute(..., buffers={{{name!r}: 'maximum'}}); 'sum' says that the default is meant."
        )


def _advice(name: str) -> str:
    return (
        f"Name a rule: distribute(..., buffers={{{name!r}: 'last'}}) keeps the last micro-batch's (with the same for "
        "the buffers that belong to it); 'mean' or 'sum' says that the default is meant. With "
        "micro_batch=global_batch there is one micro-batch, and no rule."
    )


def _some(tensor: torch.Tensor) -> str:
    return ", ".join(str(value) for value in tensor.reshape(-1)[:3].tolist())


def cumulative(start: torch.Tensor, leaves: Leaves, count: torch.Tensor, counts: Leaves) -> torch.Tensor:
    """Return the average over all batches so far.

    A leaf is (count x start + the sum of its own batches) / counts; these sums are added up.
    """
    before = start.double() * count.double()
    total, num_batches = before, count.double()
    for leaf, counted in zip(leaves, counts, strict=True):
        if leaf is not None and counted is not None and bool(counted != count):
            total = total + (leaf.double() * counted.double() - before)
            num_batches = num_batches + (counted - count).double()
    return total / num_batches


def combined(
    rule: BufferRule | None, start: torch.Tensor, leaves: Leaves, weights: Sequence[float], micro_batch_size: int
) -> torch.Tensor:
    """Return the step's value of a buffer, from its leaves in the fixed tree."""
    present = [leaf for leaf in leaves if leaf is not None]
    if len(present) == 1:
        return present[0]
    match rule:
        case "first":
            return present[0]
        case "last":
            return present[-1]
        case "maximum" | "minimum":
            best = combine(leaves, torch.maximum if rule == "maximum" else torch.minimum)
        case "sum":
            # In 64 bits: not every integer type can be added. They wrap as the type itself would.
            dtype = start.dtype if start.is_floating_point() else torch.int64
            origin = start.to(dtype)
            increments = [None if leaf is None else leaf.to(dtype) - origin for leaf in leaves]
            total = combine(increments, operator.add)
            best = None if total is None else origin + total
        case _:
            # In double precision, relative to a full micro-batch: exact for a single full one.
            shares = [weight / micro_batch_size for weight in weights]
            scaled = [
                None if leaf is None else leaf.double() * share for leaf, share in zip(leaves, shares, strict=True)
            ]
            total = combine(scaled, operator.add)
            of_all = combine(shares, operator.add)
            best = None if total is None or not of_all else total / of_all
    if best is None:
        raise ValueError("no micro-batch left a value for a buffer")
    return best
