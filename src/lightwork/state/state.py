"""The trained state: weights, the optimizer's state, buffers, the loss scale and hyper-parameters, as items by name.

One protocol for whoever wants it by name (`run.save`, `load`, `edit`, `digest`, `state_dict`). It is collective: every
worker makes the same calls in the same order, `meet` being the call in which all of them meet.

    reading    all values go home; which blocks have state is known to all; all meet. Then the items, in order:
        walk       pieces of up to `WINDOW` bytes: with sharded state they come from their owners, all meet, whoever
                   wants reads, all meet, and they are given back. Pages of what lies on disk are let go.
    load       (leaders) all values go home; items are written, master and working weight at once, and what other
               hosts own is given back; buffers are published. All meet; each accepts what is there.
    edit       reading, into weights of each worker's own; the first leader's go back, to all hosts.

So one window of the state is in memory beside what training needs, and no copy of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from lightwork.state.buffers import Buffers
from lightwork.state.extra import ExtraState, is_extra
from lightwork.state.items import SEPARATOR, Item, Moment, Piece, Plain, Weight, windows
from lightwork.state.optimizer import BlockOptimizer
from lightwork.state.optimizer_state import OptimizerState
from lightwork.state.optimizers import Optimizers
from lightwork.state.parameters import like, plain_name
from lightwork.state.scaling import LossScale, Scale
from lightwork.state.shards import Shards
from lightwork.state.weights import Weights


class OfModel(NamedTuple):
    """The items of a model."""

    items: list[Item]  #: of its state dict, each once
    aliases: dict[str, str]  #: further names that some of them have
    rest: list[Item]  #: buffers that are not in its state dict (persistent=False)


class Meet(Protocol):
    """The call in which all workers meet."""

    def __call__(self, what: str, payload: bytes = b"", /) -> list[bytes]:
        """Return every worker's payload."""


class ByLeader(Protocol):
    """A call in which all workers meet after one of them has done something for all."""

    def __call__(self, what: str, work: Callable[[], bytes], /) -> bytes:
        """Call `work` on the leader of each host; anew on the next one, where the one that was at it has died."""


class Source(Protocol):
    """Tensors by name, of which parts can be read: a checkpoint's."""

    def read(self, name: str, start: int, end: int) -> torch.Tensor:
        """Return some elements of a tensor, flat."""


class Upkeep(NamedTuple):
    """What is done so that values are where they are kept, and are those of the run."""

    check: Callable[[str], None]  #: raises when the script has written the model outside an edit
    check_form: Callable[[str], None]  #: raises when parts of the model were added, removed or replaced
    settle: Callable[[], None]  #: returns when nothing is on its way, and forgets what comes and goes
    drop: Callable[[], None]  #: lets go of the pages of what lies on disk
    forget_steps: Callable[[], None]  #: forgets what is known of single steps, which may come again; by the leaders
    spread: Callable[[], None]  #: makes the first host's memory that of all; called by the leaders


class TrainedState:
    """What a team trains, by name."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        weights: Weights,
        updates: BlockOptimizer,
        buffers: Buffers,
        loss_scale: LossScale,
        upkeep: Upkeep,
        shards: Shards,
    ) -> None:
        self._model = model
        self.optimizers = optimizers
        self._weights = weights
        self._updates = updates
        self._moments = updates.moments
        self._buffers = buffers
        self._loss_scale = loss_scale
        self._upkeep = upkeep
        self._shards = shards
        self.extra = ExtraState(model)
        self.optimizer_state = OptimizerState(
            weights, updates.moments, is_shared_out=shards.are_there, settle=upkeep.settle
        )

    # --- the items --------------------------------------------------------------------------------------------------

    def of_model(self) -> OfModel:
        """Return the items of the model, under the names of the model that is not compiled."""
        self._buffers.restore()
        index_of = {id(p): index for index, p in enumerate(self._weights.parameters)}
        items: list[Item] = []
        aliases: dict[str, str] = {}
        first: dict[int, str] = {}
        for full_name, value in self._model.state_dict(keep_vars=True).items():
            name = plain_name(full_name)
            if not isinstance(value, torch.Tensor) or is_extra(name):
                continue
            if id(value) in first:
                aliases[name] = first[id(value)]
                continue
            first[id(value)] = name
            index = index_of.get(id(value))
            items.append(Plain(name, value) if index is None else self._weight(name, index))
        buffers = self._model.named_buffers()
        rest: list[Item] = [Plain(plain_name(name), value) for name, value in buffers if id(value) not in first]
        return OfModel(items, aliases, rest)

    def of_optimizer(self, *, possible: bool = False) -> list[Moment]:
        """Return the items of the state of every parameter: what was made or, with `possible`, may be."""
        return [
            Moment(parameter.name, self._weights, self._moments, index, entry)
            for index, parameter in enumerate(self._weights.layout.parameters)
            for entry in self._moments.entries_of(index, possible=possible).values()
        ]

    def groups(self) -> list[dict[str, Any]]:
        """Return the hyper-parameters of each parameter group."""
        return [{k: v for k, v in group.items() if k != "params"} for group in self.optimizers.groups]

    def loss_scale(self, step: int) -> tuple[float, ...]:
        """Return the state of loss scaling as `step` begins; empty where losses are not scaled."""
        return tuple(self._loss_scale.state(step)) if self._loss_scale.enabled else ()

    def _weight(self, name: str, index: int) -> Item:
        return Weight(name, self._weights, self._moments, index)

    def _everything(self) -> dict[str, Item]:
        """Return all that a digest is of; with the buffers that a state dict leaves out."""
        parameters = [parameter.name for parameter in self._weights.layout.parameters]
        items = {f"weight {name}": self._weight(name, index) for index, name in enumerate(parameters)}
        items |= {"state " + " ".join(item.name.rsplit(SEPARATOR, 1)): item for item in self.of_optimizer()}
        return items | {f"buffer {name}": Plain(name, value) for name, value in self._buffers.values().items()}

    def check_untouched(self, when: str) -> None:
        """Raise UsageError when the script has written or replaced anything of the model since the last step or edit.

        `when` says where the script is.
        """
        self._upkeep.check(when)

    # --- reading ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reading(self, what: str, meet: Meet, *, is_leader: bool) -> Iterator[Walk]:
        """Be where the state can be read: a context, in which every worker goes through the same items."""
        self.check_untouched("between two steps")
        if is_leader:
            self._upkeep.settle()
            self._shards.tell_what_is_made()
        meet(f"{what} (gathered)")
        yield Walk(what, meet, self._upkeep.drop, self._shards, is_leader=is_leader)
        self._upkeep.drop()
        meet(f"{what} (end)")

    def state_dict(self, meet: Meet, *, is_leader: bool) -> dict[str, torch.Tensor]:
        """Return the model's state dict: tensors of its own, on the host."""
        with self.reading("state_dict", meet, is_leader=is_leader) as walk:
            items, aliases, _ = self.of_model()
            found = {item.name: value for item, value in walk.copies(items)}
        values: dict[str, Any] = found | {alias: found[name].clone() for alias, name in aliases.items()}
        values |= self.extra.read()
        return {name: values[plain_name(name)] for name in self._model.state_dict(keep_vars=True)}

    def digest(self, meet: Meet, share: Callable[[Sequence[str]], Sequence[str]], *, is_leader: bool) -> str:
        """Return the SHA-256 of everything, in hexadecimal digits.

        Each worker hashes its `share` of the items: of all, then of what those that died have left.
        """
        hashes: dict[str, str] = {}
        with self.reading("digest", meet, is_leader=is_leader) as walk:
            items = self._everything()
            while left := [name for name in items if name not in hashes]:
                own = {id(items[name]): name for name in share(left)}
                hashers = {}
                for piece in walk.through(items.values()):
                    name = own.get(id(piece.item))
                    if name is None:
                        continue
                    if name not in hashers:
                        hashers[name] = hashlib.sha256(f"{piece.item.dtype} {piece.item.shape} ".encode())
                    hashers[name].update(piece.read().view(torch.uint8).numpy().data)
                mine = {name: hasher.hexdigest() for name, hasher in hashers.items()}
                for part in meet("digest (hashes)", json.dumps(mine).encode()):
                    hashes.update(json.loads(part))
        return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()

    # --- writing ----------------------------------------------------------------------------------------------------

    def load(
        self, model: Source, buffers: Source, optimizer: Source, state: Container[str], *, is_leader: bool
    ) -> None:
        """Write everything, from tensors by the names of the items: the leaders what is shared, each what is its own.

        `state` are the names of the items that are in `optimizer`; another one begins anew.
        """
        with torch.no_grad():
            items, _, rest = self.of_model()
            if not is_leader:
                self._fill([item for item in items if isinstance(item, Plain) and not item.is_shared], model)
                return
            self._upkeep.settle()
            self._fill(items, model)
            self._fill(rest, buffers)
            for index, parameter in enumerate(self._weights.layout.parameters):
                possible = self._moments.entries_of(index, possible=True)
                self._moments.mark(index, {name for name in possible if f"{parameter.name}{SEPARATOR}{name}" in state})
            self._fill(self.of_optimizer(), optimizer)
            self._buffers.publish()
            self._upkeep.forget_steps()

    def set_loss_scale(self, step: int, state: Sequence[float]) -> None:
        """Let `step` begin with a state of loss scaling, if there is one. The leaders do."""
        if state:
            scale, good_steps, skipped = state
            self._loss_scale.set_state(step, Scale(scale, int(good_steps), int(skipped)))

    def set_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take these hyper-parameters. Every worker does."""
        for group, saved in zip(self.optimizers.groups, groups, strict=True):
            group.update(saved)

    def accept(self) -> None:
        """Take what the leaders have written for legitimate. Every worker does."""
        self._updates.forget()
        self._weights.writes.accept()
        self._buffers.restore()

    def release(self) -> None:
        """Give back the memory of what other hosts own. The leaders do."""
        self._shards.release_all()

    def _fill(self, items: Iterable[Item], source: Source) -> None:
        for window in windows(items):
            for piece in window:
                piece.item.write(piece.start, piece.end, source.read(piece.item.name, piece.start, piece.end))
            self._upkeep.drop()
            self._shards.release_window(_buckets(window))

    # --- editing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def edit(self, meet: Meet, by_leader: ByLeader, *, is_leader: bool) -> Iterator[None]:
        """Let the body write into fp32 weights and buffers of this worker's own; the leaders' become all workers'."""
        with self.reading("edit (begun)", meet, is_leader=is_leader) as walk:
            items = [self._weight(str(index), index) for index in range(len(self._weights.parameters))]
            for item, value in walk.copies(items):
                index = int(item.name)
                parameter = self._weights.parameters[index]
                is_on_host = self._weights.home_on_host(index) is not None
                flat = torch.empty(item.numel, dtype=torch.float32, device="cpu" if is_on_host else parameter.device)
                with torch._C.DisableTorchFunctionSubclass():
                    parameter.data = like(flat, parameter).copy_(value)
            self._buffers.restore()
        is_attached = False

        def attach(*, write: bool) -> None:
            nonlocal is_attached
            self._weights.attach(write=write, done=lambda index: self._upkeep.drop())
            is_attached = True

        def write() -> bytes:
            self._buffers.publish()
            attach(write=True)
            self._upkeep.spread()
            self.release()
            return b""

        try:
            with torch.no_grad():
                yield
            self._upkeep.check_form("in run.edit()")
            by_leader("edit (end)", write)
        finally:
            if not is_attached:
                attach(write=False)
        self._weights.writes.accept()
        self._buffers.restore()


class Walk:
    """Goes through items, while every other worker goes through the same."""

    def __init__(self, what: str, meet: Meet, drop: Callable[[], None], shards: Shards, *, is_leader: bool) -> None:
        self._what = what
        self._meet = meet
        self._drop = drop
        self._shards = shards
        does = (shards.bring_window, shards.release_window) if is_leader else (_nothing, _nothing)
        self._bring: Callable[[Iterable[Piece]], None] = does[0]
        self._give_back: Callable[[Iterable[int]], None] = does[1]

    def through(self, items: Iterable[Item]) -> Iterator[Piece]:
        """Yield every piece of these items; it may be read until the next one is asked for."""
        for window in windows(items):
            if self._shards.are_there:
                self._bring(window)
                self._meet(f"{self._what} (brought)")
            yield from window
            self._drop()
            if self._shards.are_there:
                self._meet(f"{self._what} (read)")
                self._give_back(_buckets(window))

    def copies(self, items: Iterable[Item]) -> Iterator[tuple[Item, torch.Tensor]]:
        """Yield each item with a copy of its value, on the host."""
        whole = torch.empty(0, dtype=torch.float32)
        for piece in self.through(items):
            if piece.start == 0:
                whole = torch.empty(piece.item.shape, dtype=piece.item.dtype)
            whole.view(-1)[piece.start : piece.end].copy_(piece.read())
            if piece.end == piece.item.numel:
                yield piece.item, whole


def _nothing(_: object) -> None:
    """What a worker does that does not speak for its host."""


def _buckets(window: Sequence[Piece]) -> list[int]:
    return sorted({bucket for piece in window for bucket in piece.item.buckets(piece.start, piece.end)})
