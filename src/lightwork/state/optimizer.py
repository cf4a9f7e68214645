"""The script's optimizers, carried out on blocks of the shared weights.

An element-wise optimizer (a list of known classes) gives the same bits on a block as on the whole parameter, because
blocks are cut at multiples of the kernels' vector width. Any other, known (Muon, Adafactor) or not, gets whole
parameters. Either way the class itself does the arithmetic: each bucket has a *shadow*, a copy of the user's optimizer
object whose parameters are the bucket's blocks and whose state lies in shared memory (`moments`), so that whoever is
free can update any bucket. Hyper-parameters are read from the user's object before every call: schedulers work as
usual.

Where a class has a fused implementation it is used, unless the user chose one (`fused=False`, `foreach=True`).

Whether a class may be carried out so is observed before the first step, and again whenever a setting is switched on or
off (`observation`). What it does later than that, and a team can not share, is refused when it does it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import optim

from lightwork.errors import SpecError
from lightwork.spec.layout import Block, span_of
from lightwork.state.moments import Moments
from lightwork.state.observation import observe
from lightwork.state.optimizers import Optimizers, Switches, has_plain_adam_kernel, is_elementwise, should_fuse
from lightwork.state.parameters import like
from lightwork.state.shadow import bare_step, shadow_of
from lightwork.state.weights import Weights

#: Elements of a parameter on which a count of steps in a group advances.
_COUNTED_ON = (4, 4)


def _fused_adam(
    group: dict[str, Any],
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    state: dict[str, list[torch.Tensor]],
) -> None:
    """Do what `step` of Adam and AdamW does with `fused=True`, of which a small update spends three quarters in Python.

    (Two-layer perceptron, 2026-11: 190 us by `step`, 45 by this.)
    """
    torch._foreach_add_(state["step"], 1)
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    kernel(
        parameters,
        gradients,
        state["exp_avg"],
        state["exp_avg_sq"],
        state.get("max_exp_avg_sq", []),
        state["step"],
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
    )


class BlockOptimizer:
    """Updates buckets of the shared weights, with the shared state."""

    def __init__(self, optimizers: Optimizers, weights: Weights, moments: Moments) -> None:
        self._optimizers = optimizers
        self._switches = optimizers.switches()
        self._weights = weights
        self._layout = weights.layout
        self.moments = moments
        self._shadows: dict[int, tuple[optim.Optimizer, list[torch.Tensor]]] = {}
        self._lists: dict[range, tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]] = {}  # by blocks

    def check_settings(self) -> None:
        """Raise SpecError when a setting was switched on or off that the optimizer can not be shared with.

        To be called when settings have changed, before a step is taken with them.
        """
        switches = self._optimizers.switches()
        if switches == self._switches:
            return
        for number, now in observe(self._optimizers, self.moments.device, anew=True).items():
            new = sorted(now.entries - self.moments.may_have(number))
            if new:
                name = type(self._optimizers.owner(number)).__name__
                raise SpecError(
                    f"{name} keeps state {new[0]!r} with the settings that it has now, and did not when the run began: "
                    f"{_difference(self._switches[number], switches[number])}. There is no room for it. Switch it on "
                    "before distribute, with a small value where it grows later; or close the run and call distribute "
                    "again."
                )
        self._switches = switches

    def count_step(self) -> None:
        """Let the settings advance that the class's own `step` changes, such as a count of steps. Every worker does."""
        for number in sorted(self.moments.counted):
            group = self._optimizers.group(number)
            scratch = torch.zeros(_COUNTED_ON, dtype=torch.float32, device=self.moments.device)
            scratch.grad = torch.ones_like(scratch)
            optimizer = self._optimizers.owner(number)
            shadow = shadow_of(optimizer, group, [scratch])
            with torch.no_grad():
                bare_step(optimizer)(shadow)
            group.update({k: v for k, v in shadow.param_groups[0].items() if k not in ("params", "fused")})

    def update_blocks(self, bucket: int, blocks: range, gradients: Sequence[torch.Tensor | None]) -> None:
        """Take one optimizer step on `blocks` of `bucket`; `gradients`, one for each, flat or None to skip it.

        To be called without autograd (`torch.no_grad`).

        Shapes: as the blocks, or the whole parameter's.
        """
        touched = []
        if self.moments.in_8_bits:
            touched = [index for index, gradient in zip(blocks, gradients, strict=True) if gradient is not None]
        for index in touched:
            self.moments.widen(index)
        self._update(bucket, blocks, gradients)
        for index in touched:
            self.moments.round_widened(index)

    def _update(self, bucket: int, blocks: range, gradients: Sequence[torch.Tensor | None]) -> None:
        spec = self._layout.buckets[bucket]
        optimizer, group = self._optimizers.owner(spec.group), self._optimizers.group(spec.group)
        moments = self.moments
        present = [gradient for gradient in gradients if gradient is not None]
        is_new = 0 in moments.flags(blocks)
        if len(present) == len(gradients) and not is_new and has_plain_adam_kernel(optimizer, group):
            parameters, state = self._lists_of(blocks)
            _fused_adam(group, parameters, present, state)
            return
        if len(present) < len(gradients) and spec.group in moments.restless:
            block = self._layout.blocks[blocks[next(i for i, gradient in enumerate(gradients) if gradient is None)]]
            raise SpecError(
                f"parameter {self._layout.parameters[block.parameter].name} got no gradient in this step, and "
                f"{type(optimizer).__name__} changes such a parameter all the same (a decay of weights, say), which a "
                "team does not. Begin the loop of step() with `if p.grad is None: continue`, as torch's own do, or "
                "freeze the parameter by requires_grad_(False) before the optimizer is made."
            )
        shadow, tensors = self._shadow(bucket)
        # Blocks with the same state in a call of their own: a fused kernel takes its list for new or old as a whole.
        alike: dict[bytes, list[int]] = defaultdict(list)
        for index, gradient in zip(blocks, gradients, strict=True):
            if gradient is not None:
                alike[moments.flags(range(index, index + 1))].append(index)
        first = spec.first_block
        for flags, chosen in sorted(alike.items(), reverse=True):
            shadow.param_groups[0]["params"] = [tensors[index - first] for index in chosen]
            for index in chosen:
                tensor, gradient = tensors[index - first], gradients[index - blocks.start]
                tensor.grad = like(gradient, tensor) if gradient is not None else None
                self._attach(shadow, tensor, index, flags)
            bare_step(optimizer)(shadow)
            for index in chosen:
                tensors[index - first].grad = None
                self._keep(shadow, tensors[index - first], index)
        if not is_elementwise(optimizer):
            self._check_shadow(shadow, group, spec.group)

    def _check_shadow(self, shadow: optim.Optimizer, group: Mapping[str, Any], number: int) -> None:
        """Raise SpecError when a class that is not known has done in this step what the scratch steps did not show."""
        if number in self.moments.counted:
            return
        now = shadow.param_groups[0]
        kept = {"params"} | {n for n in group if n != "params" and (now[n] is group[n] or now[n] == group[n])}
        changed = [name for name in now if name not in kept]
        if changed:
            raise SpecError(
                f"{type(shadow).__name__} has changed {changed[0]!r} of its parameter groups in step(), and not in the "
                "scratch steps before the run, so that it can not be shared by a team. Use an optimizer that keeps its "
                "state in optimizer.state[parameter]."
            )

    def forget(self) -> None:
        """Begin with new shadows: state was written from elsewhere, and may be gone. Every worker does."""
        self._shadows.clear()

    def _shadow(self, index: int) -> tuple[optim.Optimizer, list[torch.Tensor]]:
        bucket = self._layout.buckets[index]
        optimizer, group = self._optimizers.owner(bucket.group), self._optimizers.group(bucket.group)
        if index not in self._shadows:
            tensors = [self._block_tensor(block) for block in self._layout.blocks_of(index)]
            self._shadows[index] = shadow_of(optimizer, group, tensors), tensors
        shadow, tensors = self._shadows[index]
        fresh = {**group, "params": tensors}
        if should_fuse(optimizer, group, on_gpu=tensors[0].is_cuda):
            fresh["fused"] = True
        shadow.param_groups[0] = fresh
        return shadow, tensors

    def _block_tensor(self, block: Block) -> torch.Tensor:
        if self._layout.parameters[block.parameter].whole:
            flat = self._weights.masters_here.view(*self._layout.range_of(block.parameter))
            return like(flat, self._weights.parameters[block.parameter])
        span = span_of(self._layout, block)
        return self._weights.masters_here.view(span.start, span.end)

    def _attach(self, shadow: optim.Optimizer, tensor: torch.Tensor, index: int, flags: bytes) -> None:
        """Make the shadow see the shared state of a block that any worker may have updated last."""
        if not any(flags):
            shadow.state.pop(tensor, None)
            return
        state = shadow.state[tensor]
        for (entry, view), is_made in zip(self.moments.views_of(index), flags, strict=True):
            if not is_made:
                state.pop(entry.name, None)
            elif entry.number is not None:
                state[entry.name] = entry.number(view.item())
            elif entry.name not in state:
                state[entry.name] = view

    def _keep(self, shadow: optim.Optimizer, tensor: torch.Tensor, index: int) -> None:
        """Put what the optimizer made outside the shared state (at a block's first update, or anew at each) into it."""
        state = shadow.state[tensor]
        views = self.moments.views_of(index)
        for entry, view in views:
            value = state.get(entry.name)
            if value is None or value is view:
                continue
            if entry.number is not None:
                view.fill_(value)
            else:
                view.copy_(value)
                state[entry.name] = view
        made = [state.get(entry.name) is not None for entry, _ in views]
        self.moments.set_flags(range(index, index + 1), bytes(made))
        if sum(made) < len(state) and sum(made) < sum(value is not None for value in state.values()):
            known = {entry.name for entry, _ in views}
            new = next(name for name, value in state.items() if value is not None and name not in known)
            raise SpecError(
                f"{type(shadow).__name__} has begun to keep state {new!r}, and did not in the scratch steps before the "
                "run, so that there is no room for it. Use an optimizer that makes its state in its first steps."
            )

    def tensors_of(self, blocks: range) -> list[torch.Tensor]:
        """Return some blocks and what is kept of them by now, where an update sees them."""
        tensors = [self._block_tensor(self._layout.blocks[index]) for index in blocks]
        for index in blocks:
            made = self.moments.flags(range(index, index + 1))
            tensors += [view for (_, view), is_made in zip(self.moments.views_of(index), made, strict=True) if is_made]
        return tensors

    def _lists_of(self, indices: range) -> tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]:
        """Return some blocks and each entry of their state, block by block."""
        lists = self._lists.get(indices)
        if lists is None:
            state: dict[str, list[torch.Tensor]] = defaultdict(list)
            for index in indices:
                for entry, view in self.moments.views_of(index):
                    state[entry.name].append(view)
            blocks = [self._block_tensor(self._layout.blocks[index]) for index in indices]
            lists = self._lists[indices] = blocks, dict(state)
        return lists


def _difference(before: Switches, after: Switches) -> str:
    """Say which settings were switched."""
    then = dict(before)
    return ", ".join(f"{name} is {'on' if value else 'off'}" for name, value in after if then.get(name) != value)
