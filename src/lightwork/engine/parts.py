"""What an engine is made of, and what is done with all of it between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol

from lightwork.engine.backward.early import Early
from lightwork.engine.backward.gradients import Gradients
from lightwork.engine.backward.slots import Slots
from lightwork.engine.exchange.exchange import Exchange
from lightwork.engine.forward.fetching import Fetching
from lightwork.engine.update import Updater
from lightwork.spec.holdings import Holdings
from lightwork.state.buffers import Buffers
from lightwork.state.description import Description
from lightwork.state.optimizer import BlockOptimizer
from lightwork.state.places import Visits
from lightwork.state.scaling import LossScale
from lightwork.state.shards import Shards
from lightwork.state.state import TrainedState, Upkeep
from lightwork.state.structure import Structure
from lightwork.state.weights import Weights
from lightwork.store.elements import Elements
from lightwork.store.regions import Regions
from lightwork.team.board import Board
from lightwork.team.hosts import Hosts
from lightwork.trace import Trace
from lightwork.transport.base import Carrier


class Waiter(Protocol):
    """What the engine needs of a transport's signal."""

    def wait_for_change(self, seen: int, seconds: float) -> bool:
        """Return True as soon as the signal is not `seen` any more, False after `seconds`."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What a run keeps from step to step."""

    structure: Structure
    weights: Weights
    buffers: Buffers
    optimizer: BlockOptimizer
    loss_scale: LossScale


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What a worker has of its team and its host."""

    local_rank: int
    memory: Regions
    board: Board
    signal: Waiter
    trace: Trace
    hosts: Hosts  #: for workers that do not speak to others, their own alone
    weights_carrier: Carrier  #: to the other hosts for weights, where they are shared out


@dataclass(frozen=True, kw_only=True)
class Backward:
    """What receives gradients."""

    gradients: Gradients
    early: Early


@dataclass(frozen=True, kw_only=True)
class Moving:
    """What comes before it is used and leaves after; see [Note: coming and leaving]."""

    fetching: Fetching  #: working weights
    update_parts: Visits  #: masters and state
    slots: Slots  #: partial sums
    on_disk: Sequence[Elements]  #: regions of masters, working weights and state of which a part may lie on disk


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an engine is made of."""

    description: Description
    holdings: Holdings
    workplace: Workplace
    state: State
    backward: Backward
    moving: Moving
    exchange: Exchange
    updater: Updater


def take_from_first_host(parts: Parts) -> None:
    """Make the memory of the first host that of all: weights, buffers and state. Called by the leaders."""
    state = parts.state
    # One after the other: what lies on disk is mapped as it is asked for.
    parts.exchange.broadcast(lambda: chain(state.weights.values_at_home(), [state.buffers.values_at_home()]))
    parts.state.weights.writes.accept()


def check_untouched(parts: Parts, when: str) -> None:
    """Raise UsageError when the script has written or replaced anything of the model since the last step or edit."""
    state = parts.state
    state.weights.writes.check(when)
    state.weights.writes.check_values(when)
    state.structure.check(when, whole=True)
    state.buffers.check_unwritten(when)


def forget_steps(parts: Parts) -> None:
    """Forget what is known of single steps, as some may come again. Nobody is in one; the leaders do."""
    parts.updater.journal.forget()
    parts.updater.hashes.forget()
    parts.state.buffers.forget()


def settle(parts: Parts) -> None:
    """Let everything that comes and goes leave, and return when every value is at home."""
    parts.moving.update_parts.settle()
    parts.moving.fetching.settle()


def drop_pages(parts: Parts) -> None:
    """Let go of the memory of what lies on disk, after all of it, or a part, was read."""
    parts.moving.slots.drop_all()
    for elements in parts.moving.on_disk:
        elements.unmap(0, parts.holdings.layout.numel)


def trained_state(parts: Parts) -> TrainedState:
    """Return the state by name: what a checkpoint, a digest or an edit is of."""
    state = parts.state
    return TrainedState(
        parts.description.model,
        parts.description.optimizers,
        state.weights,
        state.optimizer,
        state.buffers,
        state.loss_scale,
        Upkeep(
            check=partial(check_untouched, parts),
            check_form=state.structure.check_forward,
            settle=partial(settle, parts),
            drop=partial(drop_pages, parts),
            spread=partial(take_from_first_host, parts),
            forget_steps=partial(forget_steps, parts),
        ),
        Shards(parts.holdings, state.weights, state.optimizer.moments, parts.exchange),
    )
