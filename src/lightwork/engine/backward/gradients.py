"""Gradients, from autograd into partial sums.

A worker folds its micro-batches like a binary counter. As soon as autograd has finished the gradient of a parameter, a
hook adds to it the partial sums of this worker that are its siblings in the tree, while the gradient is still in the
cache, writes the result into a free slot, and lets the gradient go ([Note: lifetime of a partial sum] in `slots`).

    [Note: the order of a hook]
    A gradient is folded, or packed for its way, before anybody is told of it. Then fetched weights hear that operations
    before this gradient are done; and then who sends or updates complete buckets, because that may wait for others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.hooks import RemovableHandle

from lightwork.engine.backward.leaves import LeafNorms
from lightwork.engine.backward.outbox import CompleteBuckets
from lightwork.engine.backward.slots import Slots, is_leaf
from lightwork.engine.backward.withheld import Withheld, WithheldGradient
from lightwork.engine.forward.fetching import Fetching
from lightwork.errors import UsageError
from lightwork.spec.tree import Node, fold
from lightwork.state.parameters import like
from lightwork.state.weights import Weights

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_LOW = (1 << 61) - 1


@dataclass
class Fold:
    """The fold in progress: a micro-batch's gradients become a sum, with what was held beside it in the tree."""

    node: Node  #: that of the sum
    slot: int  #: in which the sum is made
    freed: tuple[int, ...]  #: slots whose sums go into it
    leaves_at_once: bool  #: the gradients go to the outbox, not into the slot
    target: list[torch.Tensor]  #: by parameter
    siblings: list[tuple[list[torch.Tensor], bytes]]  #: by parameter, and which of them are present
    touched: bytearray = field(default_factory=bytearray)  #: by parameter: whether its gradient is there
    outbox: CompleteBuckets | None = None
    is_open: bool = field(default=False, init=False)  #: whether backward runs
    is_done: bool = field(default=False, init=False)


class Gradients:
    """This worker's side of the slots: hooks on its parameters, and the fold in progress."""

    def __init__(self, local_rank: int, weights: Weights, slots: Slots, num_slots: int, fetching: Fetching) -> None:
        """`num_slots` are for this worker's partial sums; `fetching` hears of each gradient."""
        self._local_rank = local_rank
        self._weights = weights
        self._slots = slots
        self._num_slots = num_slots
        self._fetching = fetching
        self._names = [p.name for p in weights.layout.parameters]
        self._views: dict[tuple[int, bool], list[torch.Tensor]] = {}
        self._held: dict[Node, tuple[int, bytes]] = {}  # slot, and which parameters are present
        self._hooks: dict[int, RemovableHandle] = {}
        self._withheld = Withheld(self._weights.parameters, self._names)
        self._fold: Fold | None = None
        self.leaves: LeafNorms | None = None  #: who looks at gradients of single micro-batches
        #: Whether a gradient that comes now is of another run's loss, which goes through this model.
        self.others_in_backward: Callable[[], bool] = lambda: False

    @property
    def is_open(self) -> bool:
        """Whether gradients are being taken."""
        return self._fold is not None and self._fold.is_open

    def begin_step(self) -> None:
        """Forget the partial sums of the step before, and listen to parameters that have become trainable."""
        self._held.clear()
        self._fold = None
        self.listen()

    def listen(self) -> None:
        """Listen to parameters that have become trainable."""
        for index, parameter in enumerate(self._weights.parameters):
            if parameter.requires_grad and index not in self._hooks:
                hook = parameter.register_post_accumulate_grad_hook(self._hook(index))  # type: ignore[no-untyped-call]
                self._hooks[index] = hook
                self._withheld.add(index)

    def close(self) -> None:
        """Take the hooks off the parameters, and what stands in for gradients."""
        self._withheld.close()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    @property
    def is_folded(self) -> bool:
        """Whether the micro-batch in hand has been folded."""
        return self._fold is not None and self._fold.is_done

    @property
    def in_hand(self) -> Fold:
        """The fold in progress."""
        if self._fold is None:
            raise ValueError("begin_fold() comes before what is done with it")
        return self._fold

    def begin_fold(self, index: int, num_micro_batches: int, outbox: CompleteBuckets | None = None) -> Fold:
        """Begin to fold the gradients of micro-batch `index`.

        `outbox` is told of each parameter, for who sends buckets that are complete.
        """
        chain, node = fold(index, num_micro_batches, self._held)
        slot = self._free_slot()
        leaves_at_once = outbox is not None and not chain
        if not leaves_at_once:
            self._slots.take_room(slot, node)
        self._fold = Fold(
            node=node,
            slot=slot,
            freed=tuple(self._held[n][0] for n in chain),
            leaves_at_once=leaves_at_once,
            target=[] if leaves_at_once else self._parameter_views(slot, node),
            siblings=[(self._parameter_views(self._held[n][0], n), self._held[n][1]) for n in chain],
            touched=bytearray(len(self._names)),
            outbox=outbox,
        )
        if outbox is not None:
            outbox.expect(i for i, parameter in enumerate(self._weights.parameters) if parameter.requires_grad)
        return self._fold

    def begin_alone(self, index: int) -> None:
        """Begin to take the gradients of micro-batch `index` for a look at them, added to none; then `drop`."""
        node, slot = Node(index, index + 1), self._free_slot()
        self._slots.take_room(slot, node)
        self._fold = Fold(
            node=node,
            slot=slot,
            freed=(),
            leaves_at_once=False,
            target=self._parameter_views(slot, node),
            siblings=[],
            touched=bytearray(len(self._names)),
        )

    def signature(self) -> list[int] | None:
        """Return a number for the bits of each gradient of the micro-batch in hand; None where others are added."""
        now = self.in_hand
        if now.siblings or now.leaves_at_once:
            return None
        return [_number_of(view) if there else 0 for view, there in zip(now.target, now.touched, strict=True)]

    def drop(self) -> None:
        """Leave nothing of the micro-batch in hand."""
        self._fold = None

    def places(self) -> dict[Node, int]:
        """Return the slot of each partial sum that is held, as it will be after the fold in progress."""
        now = self.in_hand
        rest = {node: slot for node, (slot, _) in self._held.items() if slot not in now.freed}
        return {**rest, now.node: now.slot}

    def run_fold(self, backward: Callable[[], None] | None) -> None:
        """Call `backward` and fold the gradients that it makes. None: there are none.

        The sums that went into the new one stay held until `commit`: [Note: lifetime of a partial sum].
        """
        now = self.in_hand
        try:
            if backward is not None:
                self._withheld.make_way()
                now.is_open = True
                backward()
                self._withheld.stand_in()
            self._carry_untouched(now)
        except BaseException:
            if now.outbox is not None:
                now.outbox.abandon()
            raise
        finally:
            now.is_open = False
        if now.outbox is not None:
            now.outbox.complete()
        now.is_done = True

    def commit(self, touched: memoryview) -> Fold:
        """Take the sum that `run_fold` made in place of those that went into it, and return the fold.

        `touched` gets the parameters of the micro-batch.
        """
        now = self.in_hand
        touched[:] = now.touched
        present = bytes(now.touched)
        for _, theirs in now.siblings:
            present = bytes(map(max, present, theirs)) if 0 in present else present
        for held in [node for node, (slot, _) in self._held.items() if slot in now.freed]:
            del self._held[held]
        self._held[now.node] = (now.slot, present)
        self._fold = None
        return now

    def _free_slot(self) -> int:
        """Return a slot that holds no sum: there always is one, for the sum being made."""
        used = {slot for slot, _ in self._held.values()}
        return next(slot for slot in range(self._num_slots) if slot not in used)

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        """Return what is called with a parameter whose gradient is there; see [Note: the order of a hook]."""
        trained = self._weights.layout.parameters[index].group is not None

        def receive(parameter: torch.Tensor) -> None:
            with torch._C.DisableTorchFunction():  # modes are for user code, which backward may run again
                now, gradient = self._taken(index, parameter)
                if now is None:
                    self._fetching.has_gradient(index)
                    return
                is_packed = gradient is not None and trained and self._receive(now, index, gradient, parameter)
            self._fetching.has_gradient(index)
            if now.outbox is not None and not is_packed:
                now.outbox.count_folded(index)

        return receive

    def _taken(self, index: int, parameter: torch.Tensor) -> tuple[Fold | None, torch.Tensor | None]:
        """Return the fold in progress and the gradient of a parameter, which lets go of it; no fold: it is left out."""
        gradient, now = parameter.grad, self._fold
        is_ours = now is not None and now.is_open
        if not is_ours and self.others_in_backward():
            if not isinstance(gradient, WithheldGradient):
                parameter.grad = None
            return None, None
        parameter.grad = None
        if now is None or not is_ours:
            raise UsageError(
                "loss.backward() was called on a distributed model. Call step.backward(loss) instead: it scales the "
                "loss and adds the gradients of all workers. For the gradient of inputs alone: "
                "torch.autograd.grad(loss, inputs)."
            )
        return now, gradient

    def _receive(self, now: Fold, index: int, gradient: torch.Tensor, parameter: torch.Tensor) -> bool:
        """Fold a gradient, or pack it; return whether it is packed, and so counted."""
        if now.touched[index]:
            raise UsageError(
                f"parameter {self._names[index]} received its gradient in two pieces within one backward. This "
                "happens with re-entrant activation checkpointing: pass use_reentrant=False."
            )
        if gradient.layout is not torch.strided:
            raise UsageError(
                f"parameter {self._names[index]} has got a sparse gradient, as F.embedding(..., sparse=True) makes it. "
                "Leave sparse=True out: sums over workers are dense."
            )
        now.touched[index] = 1
        if self.leaves is not None:
            self.leaves.take(index, gradient, parameter)
        if now.outbox is not None and now.leaves_at_once:
            now.outbox.pack(index, gradient, parameter)
            return True
        siblings = [views[index] for views, present in now.siblings if present[index]]
        if not self._slots.any_on_disk:
            self._put_sum(index, now.target[index], gradient, siblings)
            return False
        for rows in self._slots.pieces(index, gradient):
            self._put_sum(index, now.target[index][rows], gradient[rows], [sibling[rows] for sibling in siblings])
            self._slots.drop_rows(index, rows)
        return False

    def _put_sum(
        self, index: int, target: torch.Tensor, gradient: torch.Tensor, siblings: Sequence[torch.Tensor]
    ) -> None:
        """Put the sum of a gradient and this worker's sums beside it in the tree into `target`."""
        if self._slots.is_elsewhere(index):  # added up here, and kept there
            here = torch.empty_like(gradient, dtype=target.dtype)
            self._add(here, gradient, [self._slots.device.copied(sibling) for sibling in siblings])
            target.copy_(here, non_blocking=True)
        else:
            self._add(target, gradient, siblings)

    def _add(self, target: torch.Tensor, gradient: torch.Tensor, siblings: Sequence[torch.Tensor]) -> None:
        if not siblings:
            target.copy_(gradient)
        elif self._slots.wire is not torch.float32:
            target.copy_(gradient)  # every node is rounded, the leaf too
            for sibling in siblings:
                torch.add(sibling, target, out=target)
        else:
            if gradient.dtype is torch.float32:
                torch.add(siblings[0], gradient, out=target)
            else:  # `add` with `out` would round to the operands' type first
                target.copy_(siblings[0]).add_(gradient)
            for sibling in siblings[1:]:
                target.add_(sibling)

    def _carry_untouched(self, now: Fold) -> None:
        """Where this micro-batch has no gradient, the new sum is that of its siblings."""
        if not now.siblings or 0 not in now.touched:
            return
        for index, touched in enumerate(now.touched):
            if touched:
                continue
            present = [views[index] for views, present in now.siblings if present[index]]
            for position, view in enumerate(present):
                if position == 0:
                    now.target[index].copy_(view)
                else:
                    now.target[index].add_(view)

    def _parameter_views(self, slot: int, node: Node) -> list[torch.Tensor]:
        key = (slot, is_leaf(node))
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = [
                like(self._slots.parameter_view(self._local_rank, slot, node, index), parameter)
                if self._weights.layout.parameters[index].group is not None
                else parameter.new_empty(0)
                for index, parameter in enumerate(self._weights.parameters)
            ]
        return views


def _number_of(values: torch.Tensor) -> int:
    """Return a positive number for the bits of a tensor: of their sum as integers."""
    bits = values.detach().contiguous().view(_INTEGERS[values.element_size()])
    return (int(bits.sum(dtype=torch.int64)) & _LOW) << 1 | 1
