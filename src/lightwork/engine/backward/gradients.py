"""Gradients, from autograd into partial sums.

A worker folds its micro-batches like a binary counter. As soon as autograd has finished the gradient of a parameter, a
hook adds to it the partial sums of this worker that are its siblings in the tree, while the gradient is still in the
cache, writes the result into a free slot, and lets the gradient go. The siblings stay as they were until the board has
the new sum: a worker killed in the middle of a fold has lost one micro-batch, not its earlier ones.

A slot has 4 bytes for each element of the layout. The gradient of a single micro-batch lies there in the type of the
working weight, a sum of two or more in fp32, a parameter always at the same place. With wire format bf16 everything
is rounded to it as it is made, and a slot has 2 bytes for each element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from lightwork.engine.backward.outbox import Outbox
from lightwork.errors import UsageError
from lightwork.spec.layout import Span, span_of, spans_of
from lightwork.spec.tree import Node, fold
from lightwork.state.residency import Residency
from lightwork.state.weights import DTYPES, Weights, like
from lightwork.store.elements import UnitElements
from lightwork.store.regions import SharedMemory


class Slots:
    """The partial sums of all workers of the host, as flat tensors."""

    def __init__(self, memory: SharedMemory, weights: Weights, num_slots: int, wire: torch.dtype) -> None:
        self._memory = memory
        self.device = memory.device
        self._layout = weights.layout
        self._num_slots = num_slots
        self.wire = wire
        self._dtypes = [DTYPES[p.dtype] for p in self._layout.parameters]
        self._views: dict[tuple[int, int, bool, int], torch.Tensor] = {}
        self._flat: torch.Tensor | None = None
        self._units: list[tuple[UnitElements, UnitElements]] = []  # by slot: for single micro-batches, and for sums
        self.are_elsewhere = memory.device.has_own_memory and not memory.is_on_device("partial sums")
        if memory.in_units("partial sums"):
            make = memory.units_of("partial sums")
            for _ in range(num_slots):
                sums = make([wire] * len(self._dtypes))
                self._units.append((sums if self.are_elsewhere else make(self.leaf_dtypes), sums))
        else:
            self._flat = memory.tensor("partial sums", wire)

    @staticmethod
    def num_bytes(world_size: int, num_slots: int, numel: int, wire: torch.dtype) -> int:
        """Return the bytes that the slots of all workers reserve."""
        return world_size * num_slots * numel * wire.itemsize

    def dtype(self, node: Node, parameter: int) -> torch.dtype:
        """Return the type of a parameter in the partial sum `node`."""
        is_sum = node.end - node.first > 1
        is_wide = is_sum or self.wire is not torch.float32 or (self.are_elsewhere and bool(self._units))
        return self.wire if is_wide else self._dtypes[parameter]

    @property
    def leaf_dtypes(self) -> list[torch.dtype]:
        """The types of the parameters' gradients of a single micro-batch."""
        return [self.dtype(LEAF, parameter) for parameter in range(len(self._dtypes))]

    def take(self, slot: int, node: Node) -> None:
        """Take room in a slot for the partial sum `node`; on a device, that of another kind of node goes."""
        if self._units:
            is_sum = node.end - node.first > 1
            wanted, other = self._units[slot][is_sum], self._units[slot][not is_sum]
            for bucket in self._layout.buckets:  # one unit each; frozen parameters have none
                span = span_of(self._layout, self._layout.blocks[bucket.first_block])
                if other is not wanted:
                    other.release(span.start, span.end)
                wanted.take(span.start, span.end)

    def elements(self, rank: int, slot: int, node: Node, parameter: int, start: int, end: int) -> torch.Tensor:
        """Return elements `start` to `end` of a parameter in the partial sum `node` of `rank`, flat."""
        offset = self._layout.offsets[parameter]
        if self._units:
            return self._units[slot][node.end - node.first > 1].view(offset + start, offset + end)
        first = (rank * self._num_slots + slot) * self._layout.numel + offset
        dtype, flat = self.dtype(node, parameter), self._mapped()
        if dtype is self.wire:
            return flat[first + start : first + end]
        whole = flat[first : first + self._layout.parameters[parameter].numel]
        return whole.view(dtype)[start:end]

    def stretch(self, rank: int, slot: int, node: Node, start: int, end: int) -> torch.Tensor:
        """Return elements `start` to `end` of the layout in a partial sum, which are all in the wire format there."""
        if self._units:
            return self._units[slot][node.end - node.first > 1].view(start, end)
        first = (rank * self._num_slots + slot) * self._layout.numel
        return self._mapped()[first + start : first + end]

    def span(self, rank: int, slot: int, node: Node, span: Span) -> torch.Tensor:
        """Return the elements of a span in a partial sum, flat; of several blocks, if all have the wire format there.

        The views are kept in a host's memory: making one costs as much as a sum.
        """
        first = span.blocks[0]
        key = (rank, slot, node.end - node.first > 1, span.start)
        view = self._views.get(key)
        if view is None or view.numel() != span.numel:
            if len(span.blocks) == 1:
                view = self.elements(rank, slot, node, first.parameter, first.start, first.end)
            else:
                view = self.stretch(rank, slot, node, span.start, span.end)
            if not self._units:
                self._views[key] = view
        return view

    def operand(self, rank: int, slot: int, node: Node, span: Span) -> torch.Tensor:
        """Return the same where it can be added up: from the host, a copy."""
        view = self.span(rank, slot, node, span)
        return self.device.copied(view) if self.are_elsewhere else view

    def release(self, rank: int, slot: int, bucket: int) -> None:
        """Give back the memory of a bucket in a partial sum (where it lies in memory; `Residency` sees to the disk)."""
        if self._memory.is_on_disk("partial sums") or (self._units and self.are_elsewhere):
            return
        first = (rank * self._num_slots + slot) * self._layout.numel
        for span in spans_of(self._layout, self._layout.buckets[bucket]):
            if self._units:
                for region in self._units[slot]:
                    region.release(span.start, span.end)
            else:
                start, end = ((first + element) * self.wire.itemsize for element in (span.start, span.end))
                self._memory.release("partial sums", start, end)

    def _mapped(self) -> torch.Tensor:
        if self._flat is None:
            raise ValueError("the partial sums lie in units")
        return self._flat


#: Stands for any single micro-batch.
LEAF = Node(0, 1)


class Fold(NamedTuple):
    """A fold in progress: the slots whose sums go into the new one, its slot, and its node."""

    freed: tuple[int, ...]
    slot: int
    node: Node


class Gradients:
    """This worker's side of the slots: hooks on its parameters and the fold in progress."""

    def __init__(
        self,
        rank: int,
        weights: Weights,
        slots: Slots,
        num_slots: int,
        residency: Residency,
        folded: Callable[[int], None] | None = None,
    ) -> None:
        """`folded` is told of each parameter whose gradient backward has made."""
        self._residency = residency
        self._folded = folded
        self._rank = rank
        self._weights = weights
        self._slots = slots
        self._num_slots = num_slots
        self._names = [p.name for p in weights.layout.parameters]
        self._views: dict[tuple[int, bool], list[torch.Tensor]] = {}
        self._held: dict[Node, tuple[int, bytes]] = {}  # slot, and which parameters are present
        self._open = False
        self._hooks: dict[int, RemovableHandle] = {}
        self.touched = bytearray(len(self._names))  #: by parameter: whether the fold in progress has its gradient
        self._outbox: Outbox | None = None
        self._target: list[torch.Tensor] = []
        self._leaves_at_once = False  # whether the gradients of the fold in progress go to the outbox
        self._siblings: list[tuple[list[torch.Tensor], bytes]] = []

    def begin_step(self) -> None:
        """Forget the partial sums of the step before, and listen to parameters that have become trainable."""
        self._held.clear()
        for index, parameter in enumerate(self._weights.parameters):
            if parameter.requires_grad and index not in self._hooks:
                hook = parameter.register_post_accumulate_grad_hook(self._hook(index))  # type: ignore[no-untyped-call]
                self._hooks[index] = hook

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def begin(self, index: int, num_micro_batches: int, outbox: Outbox | None = None) -> Fold:
        """Begin to fold the gradients of micro-batch `index`.

        `outbox` is told of each parameter, for who sends buckets that are complete.
        """
        chain, node = fold(index, num_micro_batches, self._held)
        used = {slot for slot, _ in self._held.values()}
        slot = next(s for s in range(self._num_slots) if s not in used)
        self.touched = bytearray(len(self._names))
        self._outbox = outbox
        self._leaves_at_once = outbox is not None and not chain
        if not self._leaves_at_once:
            self._slots.take(slot, node)
            self._target = self._parameter_views(slot, node)
        self._siblings = [(self._parameter_views(self._held[n][0], n), self._held[n][1]) for n in chain]
        if outbox is not None:
            outbox.begin(i for i, parameter in enumerate(self._weights.parameters) if parameter.requires_grad)
        return Fold(tuple(self._held[n][0] for n in chain), slot, node)

    def places(self, now: Fold) -> dict[Node, int]:
        """Return the slot of each partial sum that is held, as it will be after the fold in progress."""
        rest = {node: slot for node, (slot, _) in self._held.items() if slot not in now.freed}
        return {**rest, now.node: now.slot}

    def run(self, backward: Callable[[], None] | None) -> None:
        """Call `backward` and fold the gradients that it makes. None: there are none.

        What went into the sum stays held until `commit`.
        """
        try:
            if backward is not None:
                self._open = True
                backward()
            self._carry_untouched()
        except BaseException:
            if self._outbox is not None:
                self._outbox.abandon()
            raise
        finally:
            self._open = False
        if self._outbox is not None:
            self._outbox.complete()

    def commit(self, now: Fold, touched: memoryview) -> None:
        """Take the sum that `run` made in place of those that went into it; `touched` gets the leaf's parameters."""
        touched[:] = self.touched
        present = bytes(self.touched)
        for _, theirs in self._siblings:
            present = bytes(map(max, present, theirs)) if 0 in present else present
        for held in [node for node, (slot, _) in self._held.items() if slot in now.freed]:
            del self._held[held]
        self._held[now.node] = (now.slot, present)

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        trained = self._weights.layout.parameters[index].group is not None

        def receive(parameter: torch.Tensor) -> bool:
            """Fold the gradient; return whether the outbox has it."""
            gradient = parameter.grad
            parameter.grad = None
            if not self._open:
                raise UsageError(
                    "loss.backward() was called on a distributed model. Call step.backward(loss) "
                    "instead: it scales the loss "
                    "and adds the gradients of all workers."
                )
            if gradient is None or not trained:
                return False
            if self.touched[index]:
                raise UsageError(
                    f"parameter {self._names[index]} received its gradient in two pieces within one "
                    "backward. This happens "
                    "with re-entrant activation checkpointing: pass use_reentrant=False."
                )
            self.touched[index] = 1
            if self._outbox is not None and self._leaves_at_once:
                self._outbox.put(index, gradient, parameter)
                self._residency.folded(index)
                return True
            siblings = [views[index] for views, present in self._siblings if present[index]]
            if not self._residency.enabled:
                self._fold(self._target[index], gradient, siblings)
                return False
            for rows in self._residency.pieces(gradient):
                self._fold(self._target[index][rows], gradient[rows], [sibling[rows] for sibling in siblings])
                self._residency.folded(index, rows)
            self._residency.folded(index)
            return False

        def receive_and_tell(parameter: torch.Tensor) -> None:
            with torch._C.DisableTorchFunction():  # modes are for user code, which backward may run again
                is_put = receive(parameter)
            if self._folded is not None:
                self._folded(index)
            if self._outbox is not None and not is_put:
                self._outbox.folded(index)

        return receive_and_tell

    def _fold(self, target: torch.Tensor, gradient: torch.Tensor, siblings: Sequence[torch.Tensor]) -> None:
        """Put the sum of a gradient and this worker's sums beside it in the tree into `target`."""
        if self._slots.are_elsewhere:  # added up here, and kept there
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

    def _carry_untouched(self) -> None:
        """Where this micro-batch has no gradient, the new sum is that of its siblings."""
        if not self._siblings or 0 not in self.touched:
            return
        for index, touched in enumerate(self.touched):
            if touched:
                continue
            present = [views[index] for views, present in self._siblings if present[index]]
            for position, view in enumerate(present):
                if position == 0:
                    self._target[index].copy_(view)
                else:
                    self._target[index].add_(view)

    def _parameter_views(self, slot: int, node: Node) -> list[torch.Tensor]:
        leaf = node.end - node.first == 1
        views = self._views.get((slot, leaf))
        if views is None:
            views = [
                like(self._slots.elements(self._rank, slot, node, index, 0, parameter.numel()), parameter)
                if self._weights.layout.parameters[index].group is not None
                else parameter.new_empty(0)
                for index, parameter in enumerate(self._weights.parameters)
            ]
            self._views[slot, leaf] = views
        return views


def present_nodes(touched: Sequence[memoryview], parameter: int) -> Callable[[Node], bool]:
    """Return whether a node holds a sum for `parameter`: whether any of its micro-batches touched it."""
    return lambda node: any(touched[leaf][parameter] for leaf in range(node.first, node.end))
