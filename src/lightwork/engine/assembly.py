"""An engine from its parts: what reads the spec, the plan and the table of holdings once, so that the phases need not.

In three steps, because the leaders of the hosts put the values into memory before the others look at them:

    make_parts    everything that lies in memory, or works on it
    attach        the model moves into the memory of the team
    make_engine   the surroundings of forward, which look at the attached model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lightwork.engine.backward.early import Early, UpdateInBackward
from lightwork.engine.backward.gradients import Gradients
from lightwork.engine.backward.leaves import LeafNorms
from lightwork.engine.backward.outbox import Consumed, messages_of_leaves, pool_for
from lightwork.engine.backward.slots import Slots
from lightwork.engine.clipping import clipping_of
from lightwork.engine.engine import Engine
from lightwork.engine.exchange.exchange import BetweenHosts, Exchange
from lightwork.engine.forward.activations import Activations
from lightwork.engine.forward.fetching import Fetching, WeightsOnTheirWay
from lightwork.engine.forward.paging import WeightsOnDisk
from lightwork.engine.forward.precision import Compute
from lightwork.engine.forward.sources import FetchedWeights, answer_requests
from lightwork.engine.noise import Noise
from lightwork.engine.parts import Backward, Moving, Parts, State, Workplace
from lightwork.engine.update import Updater
from lightwork.spec.holdings import MASTERS, WORKING, Holdings
from lightwork.state.buffers import Buffers
from lightwork.state.description import Description
from lightwork.state.hashes import BucketHashes, StateHashes
from lightwork.state.journal import Journal, UndoJournal
from lightwork.state.materialise import load, reset
from lightwork.state.moments import Moments
from lightwork.state.optimizer import BlockOptimizer
from lightwork.state.optimizer_state import OptimizerState
from lightwork.state.parameters import DTYPES
from lightwork.state.places import UpdateParts, Visits, WeightPages
from lightwork.state.scaling import LossScale
from lightwork.state.structure import Structure
from lightwork.state.weights import Weights
from lightwork.store.elements import Elements
from lightwork.store.regions import Regions


def make_parts(description: Description, holdings: Holdings, workplace: Workplace) -> Parts:
    """Return the parts of a worker's engine."""
    memory, device = workplace.memory, workplace.memory.device
    weights = Weights(description.parameters, holdings, memory)
    state = State(
        structure=Structure(description.model),
        weights=weights,
        buffers=Buffers(description.model, description.spec.buffers, memory),
        optimizer=BlockOptimizer(description.optimizers, weights, Moments(weights, description.state_layout, memory)),
        loss_scale=LossScale(memory, enabled=description.spec.precision == "fp16"),
    )
    slots = Slots(holdings, memory)
    fetching = _fetching(weights, holdings, workplace)
    home_and_here = _UpdateRegions(holdings, memory, state.optimizer)
    come_and_go = [row.bucket for row in holdings.rows if row.is_own and home_and_here.of_bucket(row.bucket)]
    update_parts = Visits(
        UpdateParts(holdings.layout, device, home_and_here.of_bucket),
        come_and_go,
        device,
        limit=holdings.depths.leaving,
    )
    are_one = holdings.widths.narrow is None
    clipping = clipping_of(holdings.spec, weights)
    updater = Updater(
        weights,
        slots,
        state.optimizer,
        update_parts,
        fetching,
        clipping=clipping,
        journal=_journal(description, holdings, workplace),
        masters_are_weights=are_one,
    )
    hashes = updater.hashes = _hashes(description, holdings, memory, state.optimizer)
    exchange = Exchange()
    if workplace.hosts.carrier.others:
        exchange = BetweenHosts(holdings, workplace.hosts, workplace.board, slots, state.buffers, hashes)
    return Parts(
        description=description,
        holdings=holdings,
        workplace=workplace,
        state=state,
        backward=Backward(
            gradients=Gradients(workplace.local_rank, weights, slots, holdings.num_slots, fetching),
            early=_early(weights, holdings, slots, updater, fetching),
        ),
        moving=Moving(fetching=fetching, update_parts=update_parts, slots=slots, on_disk=home_and_here.mapped),
        exchange=exchange,
        updater=updater,
    )


def attach(description: Description, parts: Parts, *, write: bool) -> None:
    """Move the model into the memory of the team; with `write`, as its contents."""
    state, done = parts.state, parts.moving.fetching.leave_written
    were_meta = state.weights.attach(write=write, done=done)
    if write:
        if description.weights_file is not None:
            load(description.model, state.weights, description.weights_file, done)
        elif were_meta or description.has_meta_buffers:
            reset(description.model, state.weights, were_meta, done)
        state.weights.writes.accept()
        state.buffers.publish()
        taken = OptimizerState(state.weights, state.optimizer.moments, is_shared_out=False)
        for member in description.optimizers.members:
            taken.take(member, description.optimizers.state_of)
    state.structure.accept()


def make_engine(parts: Parts, memory: Regions, activations: Mapping[str, str], *, noise: bool = False) -> Engine:
    """Return the engine, once the model is attached.

    Args:
        activations: what the plan says of modules by name; those in 8 bits are the spec's.
        noise: estimate the noise scale of the gradients.
    """
    holdings, weights = parts.holdings, parts.state.weights
    _take_room_at_home(holdings, memory, parts.state.optimizer)
    parts.state.buffers.restore()
    parts.moving.fetching.watch_modules(parts.description.model)
    chosen = dict(activations) | dict.fromkeys(holdings.spec.int8_activations, "int8")
    saved = parts.backward.early if isinstance(parts.backward.early, UpdateInBackward) else parts.moving.fetching
    compute = Compute(
        holdings.spec.precision,
        weights,
        parts.description.model,
        has_masters=holdings.masters_are_here,
        device=parts.workplace.memory.device,
        fetching=parts.moving.fetching,
        early=parts.backward.early,
    )
    device, board = parts.workplace.memory.device, parts.workplace.board
    engine = Engine(parts, compute, Activations(parts.description.model, chosen, saved, device))
    if noise:
        leaves = parts.backward.gradients.leaves = LeafNorms(holdings.layout, device)
        engine.noise = Noise(leaves, board.ledger, holdings.spec.micro_batch)
    return engine


class _UpdateRegions:
    """Where the masters and state of each bucket have their home, and where an update sees them."""

    def __init__(self, holdings: Holdings, memory: Regions, optimizer: BlockOptimizer) -> None:
        self._holdings = holdings
        self._places = {name: (home, here) for name, home, here in optimizer.moments.places}
        self._places[MASTERS] = memory.home(MASTERS, torch.float32), memory.here(MASTERS, torch.float32)
        if any(WORKING in row.comes_for_update for row in holdings.rows):
            working = memory.home(WORKING, DTYPES[holdings.rows[0].parts[WORKING].dtype])
            self._places[WORKING] = working, working

    @property
    def mapped(self) -> list[Elements]:
        """The homes of these regions."""
        return [home for home, _ in self._places.values()]

    def of_bucket(self, bucket: int) -> Sequence[tuple[Elements, Elements]]:
        """Return the home and the place here of each part of a bucket that comes for its update."""
        return [self._places[name] for name in self._holdings.rows[bucket].comes_for_update]


def _take_room_at_home(holdings: Holdings, memory: Regions, optimizer: BlockOptimizer) -> None:
    """Take the host memory that offloaded buckets will need: what is missing must show before the first step."""
    regions = _UpdateRegions(holdings, memory, optimizer)
    for bucket in holdings.own_buckets:
        for home, here in regions.of_bucket(bucket):
            if home is not here:
                for block in holdings.layout.blocks_of(bucket):
                    start = holdings.layout.offsets[block.parameter] + block.start
                    home.take_room(start, start + block.end - block.start)


def _fetching(weights: Weights, holdings: Holdings, workplace: Workplace) -> Fetching:
    """Return who brings weights that are not always here."""
    device, depths = workplace.memory.device, holdings.depths
    fetching = Fetching(weights)
    way = FetchedWeights(weights, holdings, device, workplace.weights_carrier)
    if way.is_used:
        visits = Visits(way, way.buckets, device, limit=depths.kept)
        fetching = WeightsOnTheirWay(weights, visits, depths, way.close)
    answer_requests(weights, workplace.weights_carrier, device, way.closed)
    if holdings.weights_are_paged:
        pages = Visits(WeightPages(holdings.layout, weights.homes), range(len(weights.parameters)), device, limit=1)
        fetching = WeightsOnDisk(weights, pages, fetching)
    return fetching


def _journal(description: Description, holdings: Holdings, workplace: Workplace) -> Journal:
    layout, memory = holdings.layout, workplace.memory
    if not holdings.dials.elastic:
        return Journal(layout)
    return UndoJournal(layout, description.state_layout, memory, workplace.local_rank, holdings.capacity)


def _hashes(description: Description, holdings: Holdings, memory: Regions, optimizer: BlockOptimizer) -> StateHashes:
    if holdings.roster.world_size == 1:
        return StateHashes()
    copied = [row.bucket for row in holdings.rows if not row.is_shared_out]
    return BucketHashes(holdings.layout, description.state_layout, memory, optimizer, copied)


def _early(weights: Weights, holdings: Holdings, slots: Slots, updater: Updater, fetching: Fetching) -> Early:
    if not holdings.updates_in_backward:
        return Early()
    messages = messages_of_leaves(slots)
    gradients = Consumed(weights.layout, slots.leaf_dtypes, messages, pool_for(slots.device, messages))
    return UpdateInBackward(weights, gradients, updater, fetching)
