"""The end of a step: partial sums become gradients, gradients become weights, bucket by bucket.

What has its home elsewhere comes here, and the next bucket's meanwhile. Then, for each block, while it is in the
cache: add the partial sums of all workers in the fixed tree, divide by the total weight, clip, take the optimizer's
step, write the working weights. And what came leaves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lightwork.engine.backward.slots import LEAF, Slots, is_leaf, present_nodes
from lightwork.engine.clipping import Clipping
from lightwork.engine.exchange.sums import Adder
from lightwork.engine.forward.fetching import Fetching
from lightwork.spec.layout import ALIGNMENT, Span, span_of, spans_of
from lightwork.spec.tree import Node, Sum, sum_of, without_absent
from lightwork.state.hashes import StateHashes
from lightwork.state.journal import Journal
from lightwork.state.optimizer import BlockOptimizer
from lightwork.state.places import Visits
from lightwork.state.weights import Weights


@dataclass(frozen=True)
class StepMap:
    """Where the partial sums of a step lie, and what they are to be divided by. The same on every worker."""

    num_micro_batches: int
    places: dict[Node, tuple[int, int]]  #: place of the worker on its host, and slot
    touched: tuple[memoryview, ...]  #: by micro-batch, a byte for each parameter
    divisor: float  #: total weight over micro-batch size; 0 when the whole batch has no weight
    scale: float  #: of clipping, 1 for none


#: A span, its place in the scratch memory, and those of its blocks.
_Space = tuple[Span, torch.Tensor, list[tuple[Span, torch.Tensor]]]


class Updater:
    """Measures and updates buckets."""

    def __init__(
        self,
        weights: Weights,
        slots: Slots,
        optimizer: BlockOptimizer,
        parts: Visits,
        fetching: Fetching,
        *,
        clipping: Clipping,
        journal: Journal,
        masters_are_weights: bool,
    ) -> None:
        """`parts` brings masters and state that have their home elsewhere, `fetching` working weights that do."""
        self._clipping = clipping
        self.journal = journal
        self.hashes = StateHashes()  #: of nothing, unless others are given
        device = self._device = slots.device
        self._parts = parts
        self._fetching = fetching
        self._masters_are_weights = masters_are_weights
        self.reduce_seconds = 0.0  #: spent on sums in this step
        self._weights = weights
        self._layout = weights.layout
        self._slots = slots
        self._optimizer = optimizer
        spans = [spans_of(self._layout, bucket) for bucket in self._layout.buckets]
        largest = max((sum(_aligned(s.numel) for s in of_bucket) for of_bucket in spans), default=0)
        self._scratch = torch.empty(largest, dtype=torch.float32, device=device.place)
        self._spaces = [list(self._lay_out(of_bucket)) for of_bucket in spans]
        self._adder = Adder(slots.wire, device.place)
        longest = max((s.numel for of_bucket in spans for s in of_bucket), default=0)
        self._sum = torch.empty(longest, dtype=slots.wire, device=device.place)
        self._map: StepMap | None = None
        self._tree: Sum = Node(0, 1)
        self._everywhere = b""  # by parameter: whether every micro-batch touched it
        self._anywhere = b""  # ... any one
        self._has_leaves = True  # whether a worker holds the gradient of a single micro-batch

    def begin_step(self, step: int) -> None:
        """Be in `step`."""
        self.reduce_seconds = 0.0
        self.journal.begin_step(step)
        self.hashes.begin_step(step)

    def begin(self, step_map: StepMap) -> None:
        """Use `step_map` from now on. Clipping alone leaves the sums as they are."""
        known, self._map = self._map, step_map
        if known is not None and known.places is step_map.places:
            return
        self._tree = sum_of(Node(0, step_map.num_micro_batches), step_map.places)
        rows = [bytes(row) for row in step_map.touched]
        self._everywhere = bytes(map(min, *rows)) if len(rows) > 1 else rows[0]
        self._anywhere = bytes(map(max, *rows)) if len(rows) > 1 else rows[0]
        self._has_leaves = any(map(is_leaf, step_map.places))

    def measure(self, bucket: int) -> list[torch.Tensor]:
        """Return the squared L2 norm of the gradient of each block that has one, to be read later."""
        squares = self._norms_squared(self._gradients(bucket))
        self._slots.drop_bucket(bucket)
        return squares

    def update(self, bucket: int, *, following: int) -> list[torch.Tensor]:
        """Update a bucket, and return as `measure`; `following` is probably updated next."""
        self._bring(bucket, following)
        squares = self._apply(bucket, self._gradients(bucket))
        self._slots.drop_bucket(bucket)
        return squares

    def update_of_one(
        self, bucket: int, leaves: Sequence[torch.Tensor | None], divisor: float, *, following: int
    ) -> list[torch.Tensor]:
        """Update a bucket, where one micro-batch is the whole step, and return as `measure`.

        `leaves` are that micro-batch's gradients of each block, flat; None where it did not touch the parameter.
        """
        self._bring(bucket, following)
        spaces = [out for _, _, parts in self._spaces[bucket] for _, out in parts]
        gradients = [
            None if leaf is None else _divided(leaf, divisor, out) for leaf, out in zip(leaves, spaces, strict=True)
        ]
        return self._apply(bucket, gradients)

    def _bring(self, bucket: int, following: int) -> None:
        """Let what an update reads come here; see [Note: coming and leaving]."""
        self._parts.ask(bucket)
        self._parts.ask(following)
        if self._masters_are_weights:
            self._fetching.bring_for_update(bucket, values=True)
        self._parts.arrive(bucket)

    def _gradients(self, bucket: int) -> list[torch.Tensor | None]:
        """Return the mean gradient of each block of a bucket, flat; None where no micro-batch touched the parameter."""
        start = time.perf_counter()
        step_map = self._current()
        gradients: list[torch.Tensor | None] = []
        for span, space, parts in self._spaces[bucket]:
            if step_map.divisor and self._is_uniform(span):
                self._average(self._tree, span, space)
                gradients += [out for _, out in parts]
            else:
                gradients += [self._gradient(part, out) for part, out in parts]
        self.reduce_seconds += time.perf_counter() - start
        return gradients

    def _norms_squared(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        return self._device.norms_squared([gradient for gradient in gradients if gradient is not None])

    def _apply(self, bucket: int, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Take the optimizer's step, write the working weights, and let what came leave; return squared norms."""
        squared = self._norms_squared(gradients)
        if self._map is not None and self._map.scale != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(self._map.scale)
        if not self._masters_are_weights:
            # What goes home is the whole bucket: values of blocks that this update does not write are brought.
            self._fetching.bring_for_update(bucket, values=any(gradient is None for gradient in gradients))
        first = self._layout.buckets[bucket].first_block
        for granule in self.journal.granules(bucket):
            if self.journal.begin(granule):
                self._apply_to(bucket, range(first + granule.first, first + granule.end), gradients)
                self.journal.end(granule)
            self.hashes.take(bucket, granule)
        self._parts.leave(bucket, written=True)
        self._fetching.leave_updated(bucket)
        return squared

    def _apply_to(self, bucket: int, indices: range, gradients: Sequence[torch.Tensor | None]) -> None:
        """Update neighbouring blocks of a bucket, of which `gradients` has those of all."""
        first = self._layout.buckets[bucket].first_block
        blocks = self._layout.blocks[indices.start : indices.stop]
        own = gradients[indices.start - first : indices.stop - first]
        for block, gradient in zip(blocks, own, strict=True):
            if gradient is not None:
                self._clipping.clip(block, gradient)
        self._optimizer.update_blocks(bucket, indices, own)
        self._weights.write_working([b for b, gradient in zip(blocks, own, strict=True) if gradient is not None])

    def _current(self) -> StepMap:
        if self._map is None:
            raise ValueError("no step map: begin() comes before buckets")
        return self._map

    def _lay_out(self, spans: Sequence[Span]) -> Iterator[_Space]:
        """Give each span of a bucket, and each of its blocks, its place in the scratch memory."""
        at = 0
        for span in spans:
            space = self._scratch[at : at + span.numel]
            at += _aligned(span.numel)
            parts = [span_of(self._layout, block) for block in span.blocks]
            yield span, space, [(part, space[part.start - span.start : part.end - span.start]) for part in parts]

    def _is_uniform(self, span: Span) -> bool:
        """Return whether the span's partial sums can be added as one: there everywhere, in the wire format."""
        wire = self._slots.wire
        if self._has_leaves and any(self._slots.dtype(LEAF, b.parameter) is not wire for b in span.blocks):
            return False
        return all(self._everywhere[b.parameter] for b in span.blocks)

    def _gradient(self, span: Span, out: torch.Tensor) -> torch.Tensor | None:
        """Put the mean gradient of a span of one block into `out`; None where there is none."""
        step_map = self._current()
        parameter = span.blocks[0].parameter
        if not self._anywhere[parameter] or step_map.divisor == 0:
            return None
        tree: Sum | None = self._tree
        if not self._everywhere[parameter]:
            tree = without_absent(self._tree, present_nodes(step_map.touched, parameter))
        if tree is None:
            return None
        self._average(tree, span, out)
        return out

    def _average(self, tree: Sum, span: Span, out: torch.Tensor) -> None:
        places = self._current().places
        space = out if self._slots.wire is torch.float32 else self._sum[: span.numel]
        total = self._adder.add_up(tree, lambda node: self._slots.operand(*places[node], node, span), space)
        _divided(total, self._current().divisor, out)


def _aligned(numel: int) -> int:
    """Return the elements that a span takes in the scratch memory; see [Note: bits and addresses] in `spec/layout`."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def _divided(total: torch.Tensor, divisor: float, out: torch.Tensor) -> torch.Tensor:
    """Put total / divisor into `out`, fp32, which may be `total` itself."""
    if total.dtype is torch.float32 and divisor != 1.0:
        return torch.div(total, divisor, out=out)
    if total.data_ptr() != out.data_ptr():
        out.copy_(total)
    return out if divisor == 1.0 else out.div_(divisor)
