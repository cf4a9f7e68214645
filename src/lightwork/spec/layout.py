"""Where parameters lie in flat memory, and how they are cut for the update. Depends on model and spec alone.

Every parameter starts at a multiple of `ALIGNMENT` elements. A *block* is a range of one parameter, the unit of the
optimizer, cut at multiples of the block's size from the parameter's start. A *bucket* is a few neighbouring blocks of
one parameter group, the unit that a worker claims in an update. A *span* is one block, or small neighbours in a bucket
that are added up as one.

    [Note: bits and addresses]
    A kernel works on vectors, and on what is left over one by one, and the two may round differently. Where the vectors
    begin depends on the address: the bits of a matrix product, of a dot product and so of a norm change with it. So
    whatever is computed with lies at multiples of 64 bytes, as in plain PyTorch: parameters in every precision,
    batches, buffers, state, and each span of a gradient of which the norm is taken. A block begins at such a multiple
    within its parameter and ends at the parameter's true end, unpadded, so that what is left over is the same as in an
    update of the whole parameter. Norms are sums over blocks: another cut is another sum, which is why the cut
    depends on the kind of device alone.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

#: Elements; 64 bytes of the narrowest type, bf16. See [Note: bits and addresses].
ALIGNMENT = 32

#: Elements of a block: its gradient, weight and two moments are 2 MiB, which the outer caches keep between passes.
#: 128 Ki against 64 Ki saved 3 ms of an update of 27 M parameters (2-core EPYC, 2026-11).
BLOCK = 128 * 1024

#: Elements of a bucket: large enough that the claim does not show, small enough to share an update evenly.
BUCKET = 1024 * 1024

#: The same on a GPU, where a kernel's start takes as long as 100 thousand elements (an estimate, not measured here).
GPU_BLOCK = 4 * 1024 * 1024
GPU_BUCKET = 16 * 1024 * 1024


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the model, as the layout needs it."""

    name: str
    shape: tuple[int, ...]
    dtype: str  #: of the working weight, such as "float32"
    group: int | None  #: index of the optimizer's parameter group; None: not trained
    whole: bool = False  #: its optimizer reads the whole parameter, so it is one uncut block

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """The elements `start` to `end` of one parameter."""

    parameter: int
    start: int
    end: int


@dataclass(frozen=True)
class Bucket:
    """Blocks of one parameter group that are updated in one call: `first_block` to `end_block` of the layout."""

    group: int
    first_block: int
    end_block: int


@dataclass(frozen=True)
class Layout:
    """The flat memory of a model's parameters."""

    parameters: tuple[ParameterSpec, ...]
    offsets: tuple[int, ...]  #: first element of each parameter
    numel: int  #: elements in all, with the gaps
    blocks: tuple[Block, ...]
    buckets: tuple[Bucket, ...]
    longest_span: int  #: elements of neighbouring blocks that are treated as one

    def blocks_of(self, bucket: int) -> tuple[Block, ...]:
        """Return the blocks of a bucket, in order."""
        return self.blocks[self.buckets[bucket].first_block : self.buckets[bucket].end_block]

    def block_indices(self, bucket: int) -> range:
        """Return the numbers of a bucket's blocks."""
        return range(self.buckets[bucket].first_block, self.buckets[bucket].end_block)

    def range_of(self, parameter: int) -> tuple[int, int]:
        """Return the first element of a parameter, and its end, without the gap after it."""
        start = self.offsets[parameter]
        return start, start + self.parameters[parameter].numel

    def buckets_of(self, parameter: int) -> tuple[int, ...]:
        """Return the buckets in which a parameter's blocks lie; none for a frozen one."""
        return self._buckets_of[parameter]

    def parameter_at(self, element: int) -> int:
        """Return the parameter in which an element lies, or after which it is a gap."""
        return bisect.bisect_right(self.offsets, element) - 1

    @cached_property
    def _buckets_of(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.parameters]
        for bucket in range(len(self.buckets)):
            for parameter in sorted({block.parameter for block in self.blocks_of(bucket)}):
                found[parameter].append(bucket)
        return tuple(map(tuple, found))

    def fingerprint(self) -> str:
        """Return a hash that two workers with the same model, optimizer groups and precision share."""
        return hashlib.sha256(repr((self.parameters, self.offsets)).encode()).hexdigest()


@dataclass(frozen=True)
class Cut:
    """How parameters are cut, which may depend on the kind of device."""

    block: int  #: elements
    bucket: int  #: elements
    whole_parameters: bool = False  #: no parameter lies in two buckets, and no bucket holds weights of two types


def cut_for(device: str) -> Cut:
    """Return how parameters are cut for workers on this kind of device.

    On a GPU a bucket is an allocation, so that it holds whole parameters of one type. A rehearsal does likewise, with a
    CPU's sizes, because the bits of a norm depend on the blocks.
    """
    if device == "cuda":
        return Cut(GPU_BLOCK, GPU_BUCKET, whole_parameters=True)
    return Cut(BLOCK, BUCKET, whole_parameters=device == "rehearsal")


def lay_out(parameters: Sequence[ParameterSpec], cut: Cut | None = None) -> Layout:
    """Return the layout of `parameters`, in the order given; cut for CPUs unless `cut` is given."""
    cut = cut or cut_for("cpu")
    offsets: list[int] = []
    end = 0
    for parameter in parameters:
        offsets.append(end)
        end += -(-parameter.numel // ALIGNMENT) * ALIGNMENT
    blocks = [block for index, parameter in enumerate(parameters) for block in _cut(index, parameter, cut.block)]
    # Blocks of one group together, so that a bucket is one call of that group's optimizer.
    blocks.sort(key=lambda block: _kind(parameters, block, cut))
    buckets = tuple(_bundle(parameters, blocks, cut))
    return Layout(tuple(parameters), tuple(offsets), end, tuple(blocks), buckets, cut.block)


def _cut(index: int, parameter: ParameterSpec, block: int) -> Iterable[Block]:
    if parameter.group is None or parameter.numel == 0:
        return
    size = parameter.numel if parameter.whole else block
    for start in range(0, parameter.numel, size):
        yield Block(index, start, min(start + size, parameter.numel))


def _group(parameters: Sequence[ParameterSpec], block: Block) -> int:
    group = parameters[block.parameter].group
    if group is None:
        raise ValueError(f"{parameters[block.parameter].name} is in no parameter group and has no blocks")
    return group


def _kind(parameters: Sequence[ParameterSpec], block: Block, cut: Cut) -> tuple[int, str]:
    """Return what the blocks of a bucket have in common."""
    return _group(parameters, block), parameters[block.parameter].dtype if cut.whole_parameters else ""


def _bundle(parameters: Sequence[ParameterSpec], blocks: Sequence[Block], cut: Cut) -> Iterable[Bucket]:
    first, size = 0, 0
    for position, block in enumerate(blocks):
        group, kind = _group(parameters, blocks[first]), _kind(parameters, blocks[first], cut)
        following = block.end - block.start
        if cut.whole_parameters:
            following = parameters[block.parameter].numel if block.start == 0 else -size  # what is begun is kept
        if size and (size + following > cut.bucket or _kind(parameters, block, cut) != kind):
            yield Bucket(group, first, position)
            first, size = position, 0
        size += block.end - block.start
    if blocks:
        yield Bucket(_group(parameters, blocks[first]), first, len(blocks))


@dataclass(frozen=True)
class Span:
    """Where neighbouring blocks of one bucket lie in the flat memory: `start` to `end`, with the gaps between them."""

    start: int
    end: int
    blocks: tuple[Block, ...]

    @property
    def numel(self) -> int:
        """The number of elements, gaps included."""
        return self.end - self.start


def span_of(layout: Layout, block: Block) -> Span:
    """Return where one block lies."""
    start = layout.offsets[block.parameter] + block.start
    return Span(start, start + block.end - block.start, (block,))


def spans_of(layout: Layout, bucket: Bucket) -> list[Span]:
    """Return where a bucket's blocks lie, small neighbours joined as far as they are no longer than a large block."""
    spans: list[Span] = []
    for block in layout.blocks[bucket.first_block : bucket.end_block]:
        span = span_of(layout, block)
        last = spans[-1] if spans else None
        if last and span.start - last.end < ALIGNMENT and span.end - last.start <= layout.longest_span:
            spans[-1] = Span(last.start, span.end, last.blocks + span.blocks)
        else:
            spans.append(span)
    return spans
