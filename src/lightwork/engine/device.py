"""Where a worker computes: a CPU, whose memory is the host's, or a GPU with a memory of its own.

Work on a GPU is begun here and done later, in *queues* (CUDA's streams): that of computation, which is current in user
code, and those in which tensors come from the host, leave for it, and are exchanged with other workers. A *mark* is a
place in a queue, for which another queue, or the host, can wait.

    cpu         everything is done when the call returns; marks are None
    cuda        as said above
    rehearsal   what the engine does for a GPU (memory in units, staging, queues by name), with a CPU in its place: to
                try a plan where there is no GPU; its bits are the CPU's
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, final

import torch

from lightwork.errors import MemoryFull, SpecError
from lightwork.spec.layout import Cut, cut_for_cpus, cut_for_gpus
from lightwork.units import format_bytes

#: The queues beside that of computation.
Queue = Literal["in", "out", "exchange"]

#: A place in a queue; None where everything before it is done.
Mark = torch.cuda.Event | None


class Device(ABC):
    """What a worker computes on."""

    #: As torch names it.
    place: torch.device
    #: Whether computation sees a memory other than the host's.
    has_own_memory: bool
    #: How parameters are cut for it.
    cut: Cut

    @abstractmethod
    def queue(self, name: Queue) -> AbstractContextManager[None]:
        """Let what is begun inside run in another queue than computation."""

    @abstractmethod
    def mark(self) -> Mark:
        """Return where the current queue is."""

    @abstractmethod
    def wait(self, mark: Mark) -> None:
        """Let what the current queue is given from now on begin when `mark` is reached."""

    @abstractmethod
    def synchronize(self, mark: Mark) -> None:
        """Return when `mark` is reached."""

    @abstractmethod
    def seed(self, value: int) -> None:
        """Seed its random numbers. The host's are `random`'s."""

    @abstractmethod
    def random_state(self) -> torch.Tensor | None:
        """Return the state of its random numbers, if they are not the host's."""

    @abstractmethod
    def set_random_state(self, state: torch.Tensor | None) -> None:
        """Put a state back."""

    @abstractmethod
    def host_buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return host memory that it reads and writes by itself, flat and without values."""

    @abstractmethod
    def lock(self, memory: torch.Tensor, what: str) -> None:
        """Let it read and write host memory by itself, without a copy by the CPU in between.

        Raises: MemoryFull when the host will not keep that much in place.
        """

    @abstractmethod
    def unlock(self, memory: torch.Tensor) -> None:
        """Let go of memory that was locked."""

    @abstractmethod
    def norms_squared(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the squared L2 norm of each, fp32; to be read later."""

    @abstractmethod
    def limit(self, num_bytes: int) -> None:
        """Take no more of its memory than this."""

    def is_here(self, tensor: torch.Tensor) -> bool:
        """Return whether computation can read a tensor."""
        return tensor.device.type == self.place.type

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a batch's tensor where computation can read it; one that is there as it is."""
        return tensor

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor of the host, made in the current queue."""
        return tensor

    def foreach_copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        """Copy each source into its target, in one call where that is one kernel."""
        if targets:
            torch._foreach_copy_(targets, sources)


class Cpu(Device):
    """The host itself."""

    place = torch.device("cpu")
    has_own_memory = False

    def __init__(self) -> None:
        self.cut = cut_for_cpus()

    def queue(self, name: Queue) -> AbstractContextManager[None]:
        """Change nothing: calls are done when they return."""
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        """Return None."""
        return None

    def wait(self, mark: Mark) -> None:
        """Return."""

    def synchronize(self, mark: Mark) -> None:
        """Return."""

    def seed(self, value: int) -> None:
        """Do nothing: its random numbers are the host's."""

    def random_state(self) -> torch.Tensor | None:
        """Return None."""
        return None

    def set_random_state(self, state: torch.Tensor | None) -> None:
        """Do nothing."""

    def host_buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return memory."""
        return torch.empty(numel, dtype=dtype)

    def lock(self, memory: torch.Tensor, what: str) -> None:
        """Do nothing."""

    def unlock(self, memory: torch.Tensor) -> None:
        """Do nothing."""

    def norms_squared(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return dot products: the fastest on a CPU (see the lab log)."""
        return [torch.dot(tensor, tensor) for tensor in tensors]

    def limit(self, num_bytes: int) -> None:
        """Do nothing."""


@final
class Rehearsal(Cpu):
    """A CPU in a GPU's place."""

    #: The CPU, under a name by which tests tell what lies in which memory.
    place = torch.device("cpu", 0)
    has_own_memory = True

    def __init__(self) -> None:
        # Blocks as on a CPU, because the norm's bits depend on them.
        self.cut = replace(cut_for_cpus(), whole_parameters=True)

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy, as if there were two memories."""
        return tensor.clone()

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy."""
        return tensor.clone()


@final
class Cuda(Device):
    """One GPU. Work is deterministic from here on, in the whole process."""

    has_own_memory = True

    def __init__(self, index: int) -> None:
        self.cut = cut_for_gpus()
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

    def wait(self, mark: Mark) -> None:
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

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy it, in the queue of what comes in."""
        if tensor.is_cuda:
            return tensor.to(self.place)
        source = tensor if tensor.is_pinned() else tensor.pin_memory()
        with self.queue("in"):
            there = source.to(self.place, non_blocking=True)
            mark = self.mark()
        self.wait(mark)
        there.record_stream(torch.cuda.current_stream(self.place))
        return there

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy it."""
        return tensor.to(self.place, non_blocking=True)


def open_device(kind: str, local_rank: int) -> Device:
    """Return the device of the worker `local_rank` of its machine: workers take the machine's GPUs in turn.

    Raises: SpecError when there is none.
    """
    if kind == "cpu":
        return Cpu()
    if kind == "rehearsal":
        return Rehearsal()
    count = torch.cuda.device_count()
    if count == 0:
        built = "finds no GPU (see nvidia-smi, and CUDA_VISIBLE_DEVICES)"
        reason = built if torch.version.cuda or torch.version.hip else "is built for CPUs alone"
        raise SpecError(
            f"device='cuda' needs a GPU, and this PyTorch ({torch.__version__}) {reason}. Leave device out to train on "
            "CPUs, or try the plan with device='rehearsal'."
        )
    return Cuda(local_rank % count)
