"""The model's buffers, such as BatchNorm's running statistics.

Every micro-batch starts from the buffers of the step; what they become is combined in the fixed tree when the step
ends (`rules`): floating ones by weighted mean, integer ones as start plus the summed increments, or as the spec's
`buffers` says by name. Large ones, such as masks, are compared only if PyTorch counted a write; small ones always,
because batch normalisation writes its statistics without counting.

What a step makes of them is written beside them first, and copied in their place once all of it is there: a worker that
is killed over it leaves what another one can do again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightwork.errors import SpecError, UsageError
from lightwork.spec.spec import BufferRule
from lightwork.state.parameters import plain_name
from lightwork.state.rules import (
    check_count,
    check_flag,
    check_leaf,
    combined,
    counts_batches,
    cumulative,
    default_rule,
    is_of_torch,
)
from lightwork.store.regions import Regions

_ALIGNMENT = 64  # bytes; [Note: bits and addresses] in `spec/layout`

#: The count of updates goes up to its next multiple when values are published, so that the rest counts steps.
_PUBLISHED = 1 << 32

#: Elements up to which a buffer is compared with the step's value rather than by its count of writes.
_SMALL = 64 * 1024


@dataclass
class _Buffer:
    name: str
    module: nn.Module
    key: str
    tensor: torch.Tensor  #: the module's own
    rule: BufferRule | None
    start: torch.Tensor  #: as the step begins, shared
    version: int = 0  #: PyTorch's count of writes at the last restore
    generation: int = 0  #: the shared count of updates seen here


def buffer_bytes(model: nn.Module) -> int:
    """Return the bytes of all buffers, each aligned."""
    return sum(-(-b.numel() * b.element_size() // _ALIGNMENT) * _ALIGNMENT for b in model.buffers())


def count_buffers(model: nn.Module) -> int:
    """Return the number of buffers, each once."""
    return sum(1 for _ in model.buffers())


def refuse_odd_buffers(model: nn.Module) -> None:
    """Raise SpecError for a buffer that is more than an array of numbers."""
    for name, buffer in model.named_buffers():
        kind = "nested" if buffer.is_nested else "quantized" if buffer.is_quantized else None
        if kind is not None or buffer.layout is not torch.strided:
            raise SpecError(
                f"buffer {name} is {kind or buffer.layout}, and the workers share buffers as plain arrays. Register it "
                "dense (tensor.to_dense(), .dequantize(), padded), or keep it as a plain attribute, if it is constant."
            )


class Buffers:
    """One worker's buffers and their shared values."""

    def __init__(self, model: nn.Module, rules: Mapping[str, BufferRule], memory: Regions) -> None:
        rules = {plain_name(name): rule for name, rule in rules.items()}
        self._memory = memory
        # To compare values, the host would wait for a device: there whatever may be written counts as written.
        self._compares = not memory.device.is_late
        self._num_bytes = buffer_bytes(model)
        self._named = frozenset(rules)
        self._offsets: list[int] = []  # of each, in bytes
        self._buffers = self._collect(model, rules)
        count = len(self._buffers)
        words = memory.region("buffer generations").cast("q")
        self._generations, self._next_generations = words[:count], words[count : 2 * count]  # next: 0 for unchanged
        self._combined = words[2 * count :]  # 1 + the last step of which what is beside the buffers is whole
        self._changed = memory.region("buffers changed")  # [micro-batch][buffer]
        unknown = set(rules) - {b.name for b in self._buffers}
        if unknown:
            raise SpecError(
                f"buffers names {', '.join(sorted(unknown))}, which the model does not have. It has "
                f"{', '.join(b.name for b in self._buffers[:5]) or 'none'}."
            )

    @staticmethod
    def values_bytes(model: nn.Module, num_micro_batches: int) -> dict[str, int]:
        """Return the bytes of the regions of values, by name."""
        size = buffer_bytes(model)
        return {"buffers": size, "buffers of a step": size, "buffers of micro-batches": num_micro_batches * size}

    @staticmethod
    def flag_bytes(model: nn.Module, num_micro_batches: int) -> dict[str, int]:
        """Return the bytes of the regions of flags, by name."""
        count = count_buffers(model)
        return {"buffers changed": num_micro_batches * count, "buffer generations": 8 * (2 * count + 1)}

    def _collect(self, model: nn.Module, rules: Mapping[str, BufferRule]) -> list[_Buffer]:
        found: list[_Buffer] = []
        seen: set[int] = set()
        at = 0
        for module_name, module in model.named_modules(remove_duplicate=True):
            for key, tensor in module._buffers.items():
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                name = plain_name(f"{module_name}.{key}" if module_name else key)
                start = self._memory.tensor("buffers", tensor.dtype, at, tensor.numel()).view(tensor.shape)
                found.append(
                    _Buffer(name, module, key, tensor, rules.get(name) or default_rule(module, key, tensor), start)
                )
                self._offsets.append(at)
                at += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        return found

    def publish(self) -> None:
        """Make this worker's buffers the shared ones. One worker does, while the others wait."""
        for index, buffer in enumerate(self._buffers):
            buffer.start.copy_(_of_same_form(buffer).detach())
            self._generations[index] = (self._generations[index] // _PUBLISHED + 1) * _PUBLISHED

    def restore(self) -> None:
        """Bring this worker's buffers to the shared values, where they differ."""
        for index, buffer in enumerate(self._buffers):
            if buffer.generation != self._generations[index] or self._was_written(buffer):
                self._reset(buffer)
                buffer.generation = self._generations[index]

    def put_back(self) -> str | None:
        """Put every buffer back as `restore` left it; return the name of one that was written, if there is one."""
        written = None
        for index, buffer in enumerate(self._buffers):
            is_old = buffer.generation != self._generations[index]
            if is_old or self._differs(buffer):
                written = written if is_old else buffer.name
                self._reset(buffer)
                buffer.generation = self._generations[index]
        return written

    def check_unwritten(self, when: str) -> None:
        """Raise UsageError when user code has written a buffer since `restore`.

        Not seen on a device: what batch normalisation writes without counting; its count of batches is.
        """
        for index, buffer in enumerate(self._buffers):
            if buffer.generation != self._generations[index]:
                self._reset(buffer)
                buffer.generation = self._generations[index]
            elif self._differs(buffer):
                raise UsageError(
                    f"buffer {buffer.name} was written {when}. Buffers are what forward makes of them before "
                    "step.backward, the same on all workers: put other writes into `with run.edit():` between steps, "
                    "which applies them once. (A forward in train mode writes buffers, too: run it before "
                    "step.backward, or in eval mode, or use run.evaluate.)"
                )

    def capture(self, micro_batch: int, *, of_many: bool, check: bool) -> None:
        """Store what forward of micro-batch `micro_batch` made of the buffers; with `check`, look whether a rule fits.

        They stay so until `restore`: backward may need them, and may write them again where it recomputes. `of_many`
        says whether the step has more than one micro-batch.

        Raises: UsageError for a buffer that no rule combines, or that changed its shape.
        """
        count = len(self._buffers)
        row = self._changed[micro_batch * count : (micro_batch + 1) * count]
        for index, buffer in enumerate(self._buffers):
            changed = self._was_written(buffer)
            row[index] = changed
            if not changed:
                continue
            now = _of_same_form(buffer)
            if buffer.rule is None and of_many:
                raise UsageError(
                    f"buffer {buffer.name} ({buffer.start.dtype}) was written in a micro-batch, and no rule combines "
                    f"the micro-batches' values. Name one: distribute(..., buffers={{{buffer.name!r}: 'last'}})."
                )
            leaf = self._leaf(index, micro_batch).copy_(now.detach())
            if (
                check
                and of_many
                and buffer.rule == "mean"
                and self._is_by_default(buffer)
                and not is_of_torch(buffer.module)
            ):
                check_leaf(buffer.name, buffer.start, leaf)

    def differing(self, micro_batch: int) -> str | None:
        """Return the name of a buffer of which forward has made other values than another worker's of `micro_batch`."""
        count = len(self._buffers)
        row = self._changed[micro_batch * count : (micro_batch + 1) * count]
        for index, buffer in enumerate(self._buffers):
            changed = self._was_written(buffer)
            if changed != row[index] or (changed and not _equal(_of_same_form(buffer), self._leaf(index, micro_batch))):
                return buffer.name
        return None

    def combine(self, step: int, weights: Sequence[float], micro_batch_size: int) -> None:
        """Make the buffers of `step` of what its micro-batches left, in the fixed tree. One worker does, at its end.

        `weights` are those of the micro-batches; one of weight 0 counts for nothing.
        """
        if not self._buffers:
            return
        if self._combined[0] != step + 1:
            self._combine(weights, micro_batch_size)
            self._combined[0] = step + 1
        for index, buffer in enumerate(self._buffers):
            if self._next_generations[index]:
                buffer.start.copy_(self._value_beside(index))
                self._generations[index] = self._next_generations[index]

    def forget(self) -> None:
        """Forget which step was combined, as steps come that were there before. Nobody is in a step."""
        self._combined[0] = 0

    def _combine(self, weights: Sequence[float], micro_batch_size: int) -> None:
        """Write what a step makes of the buffers beside them."""
        count = len(self._buffers)
        rows = [self._changed[m * count : (m + 1) * count] for m in range(len(weights))]
        changed = [
            index for index in range(count) if any(rows[m][index] and weight for m, weight in enumerate(weights))
        ]
        for index, buffer in enumerate(self._buffers):
            is_set_once = self._generations[index] % _PUBLISHED == 1 and index not in changed
            if is_set_once and self._is_by_default(buffer) and not is_of_torch(buffer.module) and len(weights) > 1:
                check_flag(buffer.name, buffer.start, len(weights), is_training=buffer.module.training)
        for index in range(count):
            self._next_generations[index] = self._generations[index] + 1 if index in changed else 0
            if index in changed:
                self._value_beside(index).copy_(self._value_of(index, rows, weights, micro_batch_size))

    def _value_of(
        self, index: int, rows: Sequence[memoryview], weights: Sequence[float], micro_batch_size: int
    ) -> torch.Tensor:
        buffer, leaves = self._buffers[index], self._leaves(index, rows, weights)
        if self._is_by_default(buffer) and sum(leaf is not None for leaf in leaves) > 1:
            counter = self._counter_of(buffer)
            if counter is not None:
                of_counter = self._leaves(counter, rows, weights)
                return cumulative(buffer.start, leaves, self._buffers[counter].start, of_counter)
            if buffer.rule == "sum" and not is_of_torch(buffer.module):
                check_count(buffer.name, buffer.start, leaves)
        return combined(buffer.rule, buffer.start, leaves, weights, micro_batch_size)

    def _leaves(self, index: int, rows: Sequence[memoryview], weights: Sequence[float]) -> list[torch.Tensor | None]:
        """Return what each micro-batch left in a buffer; None for those of weight 0."""
        start = self._buffers[index].start
        return [
            (self._leaf(index, m) if rows[m][index] else start) if weight else None for m, weight in enumerate(weights)
        ]

    def _is_by_default(self, buffer: _Buffer) -> bool:
        return buffer.name not in self._named

    def _counter_of(self, buffer: _Buffer) -> int | None:
        """Return the buffer that counts the batches over which another one is an average, if there is one."""
        if not counts_batches(buffer.module, buffer.key):
            return None
        for index, other in enumerate(self._buffers):
            if other.module is buffer.module and other.key == "num_batches_tracked" and self._is_by_default(other):
                return index
        return None

    def changes(self, micro_batches: range) -> bytes:
        """Return what these micro-batches, of this host, left in the buffers."""
        parts = [self._parts(m) for m in micro_batches]
        return b"".join(bytes(row) + leaves.cpu().numpy().tobytes() for row, leaves in parts)

    def take_changes(self, micro_batches: range, received: bytes) -> None:
        """Write down what another host's micro-batches left."""
        at = 0
        for m in micro_batches:
            row, leaves = self._parts(m, received[at : at + len(self._buffers)])
            row[:] = received[at : at + len(row)]
            at += len(row)
            if len(leaves):
                leaves.copy_(torch.frombuffer(bytearray(received[at : at + len(leaves)]), dtype=torch.uint8))
            at += len(leaves)

    def values_at_home(self) -> torch.Tensor:
        """Return the values of all buffers as the step starts, as bytes."""
        return self._memory.tensor("buffers")

    def _parts(self, micro_batch: int, row: bytes | None = None) -> tuple[memoryview, torch.Tensor]:
        """Return the row of changes of a micro-batch and, if there is any (by `row`, unless None), its buffers."""
        count = len(self._buffers)
        own = self._changed[micro_batch * count : (micro_batch + 1) * count]
        size = self._num_bytes if any(own if row is None else row) else 0
        region = self._memory.tensor("buffers of micro-batches")
        return own, region[micro_batch * self._num_bytes : micro_batch * self._num_bytes + size]

    def values(self) -> dict[str, torch.Tensor]:
        """Return the shared buffers by name."""
        return {buffer.name: buffer.start for buffer in self._buffers}

    def _leaf(self, index: int, micro_batch: int) -> torch.Tensor:
        return self._value_in("buffers of micro-batches", index, micro_batch * self._num_bytes)

    def _value_beside(self, index: int) -> torch.Tensor:
        return self._value_in("buffers of a step", index)

    def _value_in(self, region: str, index: int, first: int = 0) -> torch.Tensor:
        start = self._buffers[index].start
        return self._memory.tensor(region, start.dtype, first + self._offsets[index], start.numel()).view(start.shape)

    def _was_written(self, buffer: _Buffer) -> bool:
        if not self._compares and _is_small(buffer) and buffer.rule is not None and buffer.module.training:
            return True
        return self._differs(buffer)

    def _differs(self, buffer: _Buffer) -> bool:
        if buffer.module._buffers.get(buffer.key) is not buffer.tensor:
            return True
        if self._compares and _is_small(buffer):
            return not _equal(buffer.tensor, buffer.start)
        return buffer.tensor._version != buffer.version

    def _reset(self, buffer: _Buffer) -> None:
        with torch.no_grad():
            buffer.tensor.copy_(buffer.start)
        buffer.module._buffers[buffer.key] = buffer.tensor
        buffer.version = buffer.tensor._version


def _of_same_form(buffer: _Buffer) -> torch.Tensor:
    """Return what the module has under the buffer's name.

    Raises: UsageError when that is of another type or shape than it was.
    """
    now = buffer.module._buffers.get(buffer.key)
    if now is None or now.shape != buffer.start.shape or now.dtype != buffer.start.dtype:
        raise UsageError(
            f"buffer {buffer.name} changed from {buffer.start.dtype} {tuple(buffer.start.shape)} to "
            f"{'None' if now is None else f'{now.dtype} {tuple(now.shape)}'}. Buffers keep type and shape: give it its "
            "final form before lightwork.distribute (run one batch through the model, say)."
        )
    return now


def _is_small(buffer: _Buffer) -> bool:
    return buffer.tensor.numel() <= _SMALL


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same values, NaN being one."""
    if torch.equal(one, other):
        return True
    return not one.isfinite().all() and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
