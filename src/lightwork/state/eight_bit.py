"""Optimizer state in 8 bits: a byte for each element, and a scale for each `GROUP` of them.

A first moment is rounded to multiples of its group's scale, from -127 to 127. Of a second moment the square root is
kept, from 0 to 255 and rounded up: it divides the step, and a small one rounded to nothing would blow the step up.

Scales are powers of two, the smallest that reach the group's largest element. So a value that was rounded once is
rounded to itself: state that is saved and loaded again is the same to the bit.
"""

from __future__ import annotations

import torch

#: Elements with one scale.
GROUP = 256

#: Entries of the state of torch's optimizers that are sums or means of squares.
SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"})


def num_scales(numel: int) -> int:
    """Return the scales of a block of `numel` elements."""
    return -(-numel // GROUP)


def round_into(values: torch.Tensor, scales: torch.Tensor, source: torch.Tensor, *, square: bool) -> None:
    """Round `source` into `values` and `scales`.

    Shapes: `values` (uint8) and `source` (fp32) flat and of one size; `scales` fp32, `num_scales` of it.
    """
    roots = source.sqrt() if square else source
    groups = torch.nn.functional.pad(roots, (0, -roots.numel() % GROUP)).view(-1, GROUP)
    levels, bits = (255.0, 8) if square else (127.0, 7)
    mantissa, exponent = torch.frexp(groups.abs().amax(dim=1))
    exponent = exponent - bits + (mantissa > levels / 2.0**bits).to(exponent.dtype)
    scales.copy_(torch.ldexp(torch.ones_like(mantissa), exponent))
    parts = groups / scales[:, None]
    rounded = parts.ceil_() if square else parts.round_().add_(128.0)
    values.copy_(rounded.view(-1)[: values.numel()])


def restore_into(target: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, *, square: bool) -> None:
    """Write the rounded values into `target`, fp32 and of the size of `values`."""
    target.copy_(values)
    if not square:
        target.sub_(128.0)
    whole = target.numel() // GROUP * GROUP
    target[:whole].view(-1, GROUP).mul_(scales[: whole // GROUP, None])
    if whole < target.numel():
        target[whole:].mul_(scales[-1])
    if square:
        target.square_()
