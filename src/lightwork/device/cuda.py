"""A GPU, by torch.cuda: queues are streams, marks are events."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch

from lightwork.device.base import Device, Mark, Queue, Walk
from lightwork.device.cpu import Cpu, Rehearsal
from lightwork.errors import MemoryFull, SpecError
from lightwork.units import format_bytes


@final
class Cuda(Device):
    """One GPU. Work is deterministic from here on, in the whole process."""

    has_own_memory = True
    is_late = True

    def __init__(self, index: int) -> None:
        self.place = torch.device("cuda", index)
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.set_device(self.place)
        self._queues = {
            name: torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]
            for name in ("in", "out", "exchange")
        }
        self._generator = torch.cuda.default_generators[index]
        # Products of one shape always take one way: that is what "the same bits" rests on.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False

    @contextlib.contextmanager
    def queue(self, name: Queue) -> Iterator[None]:
        """Enter a stream."""
        with torch.cuda.stream(self._queues[name]):
            yield

    def mark(self) -> Mark:
        """Record an event."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.place))
        return event

    def wait_for_mark(self, mark: Mark) -> None:
        """Let the current stream wait for an event."""
        if mark is not None:
            torch.cuda.current_stream(self.place).wait_event(mark)

    def synchronize(self, mark: Mark) -> None:
        """Wait for an event."""
        if mark is not None:
            mark.synchronize()

    def seed(self, value: int) -> None:
        """Seed the device's generator."""
        self._generator.manual_seed(value)

    def random_state(self) -> torch.Tensor | None:
        """Return the generator's state, which lies on the host."""
        return self._generator.get_state()

    def set_random_state(self, state: torch.Tensor | None) -> None:
        """Put it back."""
        if state is not None:
            self._generator.set_state(state)

    def host_buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return page-locked memory, which torch keeps for the next one."""
        return torch.empty(numel, dtype=dtype, pin_memory=True)

    def lock(self, memory: torch.Tensor, what: str) -> None:
        """Page-lock it."""
        num_bytes = memory.numel() * memory.itemsize
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = runtime.cudaHostRegister(memory.data_ptr(), num_bytes, 0)
        if int(status) != 0:
            raise MemoryFull(
                f"{format_bytes(num_bytes)} of host memory for {what} could not be page-locked ({status}). Raise the "
                "limit of locked memory (`ulimit -l`, or --ulimit memlock=-1 for a container), free memory, or offload "
                "less."
            )

    def unlock(self, memory: torch.Tensor) -> None:
        """Wait for what is on its way, and give the pages back."""
        torch.cuda.synchronize(self.place)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        runtime.cudaHostUnregister(memory.data_ptr())

    def norms_squared(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return them by two calls."""
        if not tensors:
            return []
        norms = list(torch._foreach_norm(list(tensors), 2))
        return list(torch._foreach_mul(norms, norms))

    def limit(self, num_bytes: int) -> None:
        """Tell torch's allocator, which raises torch.OutOfMemoryError above it."""
        total = torch.cuda.get_device_properties(self.place).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), self.place)

    def bring_batch(self, batch: Any, walk: Walk) -> Any:
        """Copy it, in the queue of what comes in."""
        return walk(batch, self._brought)

    def _brought(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda:
            return tensor.to(self.place)
        source = tensor if tensor.is_pinned() else tensor.pin_memory()
        with self.queue("in"):
            there = source.to(self.place, non_blocking=True)
            mark = self.mark()
        self.wait_for_mark(mark)
        there.record_stream(torch.cuda.current_stream(self.place))
        return there

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy it."""
        return tensor.to(self.place, non_blocking=True)


def open_device(kind: str, local_rank: int) -> Device:
    """Return the device of the worker `local_rank` of its machine: workers take the machine's GPUs in turn.

    Raises: SpecError when there is none.
    """
    on_host = {"cpu": Cpu, "rehearsal": Rehearsal}.get(kind)
    if on_host is not None:
        return on_host()
    count = torch.cuda.device_count()
    if count == 0:
        built = "finds no GPU (see nvidia-smi, and CUDA_VISIBLE_DEVICES)"
        reason = built if torch.version.cuda or torch.version.hip else "is built for CPUs alone"
        raise SpecError(
            f"device='cuda' needs a GPU, and this PyTorch ({torch.__version__}) {reason}. Leave device out to train on "
            "CPUs, or try the plan with device='rehearsal'."
        )
    return Cuda(local_rank % count)
