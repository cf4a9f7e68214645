"""The engine of one worker: the phases of a step, and everything in shared memory that they touch.

The order of a step, and who carries it out:

    enter          the board opens the step; buffers and random state are set       (here, `random`, `buffers`)
    micro-batch    user code computes a loss; `backward` folds its gradients         (`precision`, `gradients`)
    exchange       with several hosts: partial sums become one on every host         (`exchange`)
    measure        with clipping or loss scaling: the norm of each bucket's gradient (`update`, `scaling`)
    update         partial sums to gradients to weights, bucket by bucket            (`update`, `optimizer`)
    leave          the results of the step are read from the board                   (here)

Moves: nothing but what the buckets' owners read: each partial sum once an update (twice with clipping).
"""

from __future__ import annotations

import itertools
import math
import operator
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lightwork.engine.backward.early import UpdateInBackward
from lightwork.engine.backward.gradients import Fold, Gradients, Slots
from lightwork.engine.backward.outbox import make_outbox
from lightwork.engine.blueprint import DTYPES_OF_WIRE, Blueprint
from lightwork.engine.exchange.exchange import Exchange, Total, Touched
from lightwork.engine.forward.activations import Activations
from lightwork.engine.forward.fetching import Home, Owners, ShardedWeights, Source, serve
from lightwork.engine.forward.precision import Compute
from lightwork.engine.update import StepMap, Updater
from lightwork.errors import SpecError
from lightwork.random import derive, seed_all
from lightwork.spec.layout import Block, span_of
from lightwork.spec.tree import Node, combine
from lightwork.state.buffers import Buffers
from lightwork.state.materialise import load, reset
from lightwork.state.optimizer import (
    BlockOptimizer,
    hyper_parameters,
)
from lightwork.state.residency import Residency
from lightwork.state.scaling import LossScale
from lightwork.state.staging import Staging
from lightwork.state.weights import Weights
from lightwork.store.regions import SharedMemory
from lightwork.team.board import Action, Activity, Board, Kind, Phase
from lightwork.trace import Trace
from lightwork.transport.base import Carrier

#: Seconds between two looks at the other workers' health while waiting.
WATCH_SECONDS = 0.2

#: The slope of torch.nn.utils.clip_grad_norm_: max_norm / (norm + this).
CLIP_EPSILON = 1e-6


class Waiter(Protocol):
    """What the engine needs of a transport's signal."""

    def wait(self, seen: int, seconds: float) -> bool:
        """Return True as soon as the signal is not `seen` any more, False after `seconds`."""


@dataclass(frozen=True)
class StepResult:
    """What a step came to; the same on every worker."""

    loss: float  #: weighted mean over the global batch
    grad_norm: float  #: L2, before clipping
    weight: float
    skipped: bool  #: the gradient was not finite, and the weights are as they were (loss scaling)
    metrics: Mapping[str, float]


class Engine:
    """One worker's engine."""

    def __init__(
        self,
        rank: int,
        blueprint: Blueprint,
        memory: SharedMemory,
        board: Board,
        signal: Waiter,
        trace: Trace,
        *,
        activations: Mapping[str, str] | None = None,
        carrier: Carrier | None = None,
        weights_carrier: Carrier | None = None,
    ) -> None:
        """`carrier` is the leader's, where there are several hosts; `weights_carrier` too, with sharded weights."""
        size = blueprint.board_size
        self._blueprint = blueprint
        self.spec = blueprint.spec
        self.board = board
        self.model = blueprint.model
        self.optimizer = blueprint.optimizer
        self.device = memory.device
        self.weights = Weights(blueprint.parameters, blueprint.layout, memory, streamed=blueprint.streams_weights)
        self.buffers = Buffers(blueprint.model, blueprint.spec.buffers, memory)
        self.state = BlockOptimizer(blueprint.optimizer, self.weights, blueprint.state_layout, memory)
        self._memory = memory
        self._sharded = blueprint.sharded
        self._hosts, self._host = blueprint.hosts, blueprint.host
        self._rank = rank
        self._world_size = blueprint.world_size
        self._signal = signal
        self._trace = trace
        slots = Slots(memory, self.weights, size.num_places, DTYPES_OF_WIRE[self.spec.wire])
        self._activations = dict(activations or {}) | dict.fromkeys(self.spec.int8_activations, "int8")
        self._wrapped: Activations | None = None
        wire = DTYPES_OF_WIRE[self.spec.wire].itemsize
        regions = {"masters": 4, "working": 2, "partial sums": wire, **dict(self.state.regions)}
        num_slots = size.world_size * size.num_places
        sources: list[Source] = [Owners(blueprint.hosts, weights_carrier)] if weights_carrier is not None else []
        staging: Staging | None = None
        if self.device.has_own_memory:
            staging = Staging(memory, self.weights, regions, num_slots, self.state.places)
            if blueprint.streams_weights:
                sources.append(Home(self.weights, self.device, staging.left))
        self.residency = staging or Residency(memory, self.weights, regions, num_slots)
        self._exchange: Exchange | None = None  # the leader's
        if carrier is not None:
            self._exchange = Exchange(
                blueprint.hosts,
                carrier,
                board,
                self.weights.layout,
                slots,
                self.buffers,
                into=size.num_places - 1,
                sharded=blueprint.sharded,
                release_sent=blueprint.placement in ("zero2", "zero3"),
                device=self.device,
            )
        self._serves_weights = weights_carrier is not None
        self._sharded_weights: ShardedWeights | None = None
        if sources:
            self._sharded_weights = ShardedWeights(self.weights, self.device, sources)
            if staging is not None and blueprint.streams_weights:
                staging.follow(self._sharded_weights)
        if weights_carrier is not None:
            answering = (self.weights, weights_carrier, self.device)
            threading.Thread(target=serve, args=answering, name="lightwork weights", daemon=True).start()
        folded = self._sharded_weights.folded if self._sharded_weights else None
        self._gradients = Gradients(rank, self.weights, slots, size.num_slots, self.residency, folded)
        self.loss_scale = LossScale(memory, enabled=self.spec.precision == "fp16")
        self._measures = self.loss_scale.enabled or self.spec.clip_grad_norm is not None
        self._updater = Updater(self.weights, slots, self.state, self.device)
        self._squares: dict[int, list[torch.Tensor]] = {}  # by bucket, of each block's gradient: not read yet
        self._own = [
            bucket
            for bucket in range(len(blueprint.layout.buckets))
            if not self._sharded or blueprint.hosts.owner(bucket) == blueprint.host
        ]
        self._early: UpdateInBackward | None = None
        if blueprint.updates_in_backward:
            outbox = make_outbox(self.weights.layout, slots.leaf_dtypes, slots.wire, device=self.device)
            bring = (self._sharded_weights or self.weights).bring
            self._early = UpdateInBackward(self.weights, outbox, self._updater, self.residency, bring)
        self._num_optimized = sum(len(group["params"]) for group in blueprint.optimizer.param_groups)
        self._num_micro_batches = 0
        self._num_computed = 0  # by this worker, in this step
        self._map: StepMap | None = None
        self._settings: tuple[object, int] = (None, 0)
        between_hosts = ("exchange", "exchange behind backward") if carrier is not None else ()
        phases = ("wait", *between_hosts, "reduce", "update")
        self._seconds = dict.fromkeys(phases, 0.0)
        self._step_start = 0.0
        self.compute: Compute

    def attach(self, *, write: bool) -> None:
        """Move the model into the shared memory; with `write`, as its contents."""
        were_meta = self.weights.attach(write=write, done=self.residency.folded)
        if write:
            if self._blueprint.weights_file is not None:
                load(self.model, self.weights, self._blueprint.weights_file, self.residency.folded)
            elif were_meta or self._blueprint.has_meta_buffers:
                reset(self.model, self.weights, were_meta, self.residency.folded)
            self.weights.accept_versions()
            self.buffers.publish()
            for index, parameter in enumerate(self.weights.parameters):
                state = self.optimizer.state.get(parameter)
                if state and self.weights.layout.parameters[index].group is not None:
                    self.state.load_state(index, dict(state))
        self.residency.reserve(self._own)
        self.residency.watch(self.model)
        if self._sharded_weights is not None:
            self._sharded_weights.watch(self.model)
        saved = self._early or self._sharded_weights or self.weights
        self._wrapped = Activations(self.model, self._activations, saved, self.device)
        self.compute = Compute(
            self.spec.precision,
            self.weights,
            self.model,
            complete=not self._sharded and self.weights.masters is self.weights.masters_here,
            device=self.device,
            sharded=self._sharded_weights,
            early=self._early,
        )

    def take_from_first_host(self) -> None:
        """Make the shared memory of the first host that of all: weights, buffers and state. Called by the leaders."""
        if self._exchange is not None:
            self._exchange.broadcast(self.weights.regions())
            self._exchange.broadcast([self._memory.tensor("buffers")])
            self.weights.accept_versions()
            self.release()

    def gather(self) -> None:
        """Bring the masters and state that are sharded to every host, until `release`. Called by the leaders."""
        self.forget()
        if not self._sharded:
            return
        exchange = self._between_hosts()
        own = bytes(self.state.initialised)
        for host, theirs in enumerate(exchange.exchange_bytes("state", own)):
            for bucket, spec in enumerate(self.weights.layout.buckets):
                if self._hosts.owner(bucket) == host:
                    self.state.initialised[spec.first_block : spec.end_block] = theirs[
                        spec.first_block : spec.end_block
                    ]

        def tensors_of(bucket: int) -> Iterator[torch.Tensor]:
            spec = self.weights.layout.buckets[bucket]
            for index in range(spec.first_block, spec.end_block):
                span = span_of(self.weights.layout, self.weights.layout.blocks[index])
                yield self.weights.masters.view(span.start, span.end)
                if self.state.initialised[index]:
                    yield from self.state.flat_views(index)

        exchange.share(tensors_of)

    def release(self) -> None:
        """Give back the memory of what other hosts own. Called by the leaders."""
        if not self._sharded:
            return
        for bucket in range(len(self.weights.layout.buckets)):
            if self._hosts.owner(bucket) == self._host:
                continue
            for block in self._blocks(bucket):
                span = span_of(self.weights.layout, block)
                if self._serves_weights or self.weights.has_master_apart(block.parameter):
                    self._memory.release_elements("masters", span.start, span.end, 4)
                if self._serves_weights and self.weights.has_master_apart(block.parameter):
                    self.weights.release_home(block)
                for region, size in self.state.regions:
                    self._memory.release_elements(region, span.start, span.end, size)

    def forget(self) -> None:
        """Be where all values are at home: nothing is on its way, and what comes and goes is gone."""
        self.residency.settle()
        if self._sharded_weights is not None:
            self._sharded_weights.forget()

    def _blocks(self, bucket: int) -> Sequence[Block]:
        spec = self.weights.layout.buckets[bucket]
        return self.weights.layout.blocks[spec.first_block : spec.end_block]

    def _between_hosts(self) -> Exchange:
        if self._exchange is None:
            raise ValueError("this worker does not speak to other hosts")
        return self._exchange

    @property
    def serves_weights(self) -> bool:
        """Whether other hosts read weights that this one has."""
        return self._serves_weights

    def detach(self) -> None:
        """Give the model back to plain PyTorch: no hooks; its weights stay where they are, as this run left them."""
        self._gradients.close()
        if self._exchange is not None:
            self._exchange.close()
        if self._sharded_weights is not None:
            self._sharded_weights.close()
        self.residency.close()
        if self._wrapped is not None:
            self._wrapped.close()

    # --- the phases of a step -----------------------------------------------------------------------------------

    def enter(self, step: int, num_micro_batches: int) -> Action:
        """Begin `step` and return the first thing to do."""
        self.weights.check_unwritten("outside the loop or between two steps")
        self._gradients.begin_step()
        self._num_micro_batches = num_micro_batches
        self._num_computed = 0
        self._map = None
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._step_start = time.perf_counter()
        return self.board.enter(step, num_micro_batches, self._settings_hash(), measure=self._measures)

    def begin_micro_batch(self, step: int, index: int) -> None:
        """Set the random state and the buffers from which micro-batch `index` is computed, whoever does."""
        self.buffers.restore()
        self.seed("micro-batch", step, index)

    def seed(self, *what: str | int) -> None:
        """Set the random state that belongs to `what`."""
        value = derive(self.spec.seed, *what)
        seed_all(value)
        self.device.seed(value)

    @property
    def reads_late(self) -> bool:
        """Whether a loss is to be read after backward was begun: before, a device would wait for the host.

        (Not where backward updates weights: a loss that is not finite must be seen before.)
        """
        return self.device.is_late and self._early is None

    def backward(self, step: int, index: int, loss: torch.Tensor, weight: float) -> Fold:
        """Run backward of a micro-batch's mean loss and fold its gradients; a weight of 0 makes none.

        The loss is scaled by weight / micro_batch, and the sum divided by the same of the whole batch: exact for a
        single full micro-batch. (And both by the loss scale, a power of two.)
        """
        fold = self._begin_fold(step, index, weight)
        if weight == 0:
            self._gradients.run(None)
            return fold
        share = weight / self.spec.micro_batch * self.loss_scale.of(step)
        scaled = loss if share == 1.0 else loss * share
        self._gradients.run(lambda: self.compute.backward(scaled))
        self.buffers.restore()
        return fold

    def skip(self, step: int, index: int) -> Fold:
        """Fold a micro-batch without samples: one without gradients."""
        fold = self._begin_fold(step, index, 0.0)
        self._gradients.run(None)
        return fold

    def _begin_fold(self, step: int, index: int, weight: float) -> Fold:
        """Begin to fold a micro-batch's gradients and, with the last one, to exchange what is complete."""
        self.buffers.capture(index)
        if self._early is not None and self._early.begin(weight / self.spec.micro_batch * self.loss_scale.of(step)):
            fold = self._gradients.begin(index, self._num_micro_batches, self._early.outbox)
            self._early.follow(self._gradients.touched)
            return fold
        exchange = self._exchange if self._is_last_of_host() else None
        fold = self._gradients.begin(index, self._num_micro_batches, exchange.outbox if exchange else None)
        if exchange is not None:
            places = {node: (0, slot) for node, slot in self._gradients.places(fold).items()}
            touched = {**self._touched_here(), index: self._gradients.touched}
            exchange.begin(self._num_micro_batches, places, touched, None if fold.freed else fold.node)
        return fold

    def finish_micro_batch(
        self,
        step: int,
        index: int,
        fold: Fold,
        *,
        loss: float,
        weight: float,
        metrics: bytes,
    ) -> Action:
        """Report a computed micro-batch and return what to do next."""
        self.weights.check_unwritten(f"in micro-batch {index} of step {step}")
        self._gradients.commit(fold, self.board.touched(index))
        self._num_computed += 1
        return self.board.finished_micro_batch(
            step, index, loss=loss, weight=weight, metrics=metrics, freed=fold.freed, slot=fold.slot, node=fold.node
        )

    def _is_last_of_host(self) -> bool:
        """Return whether the micro-batch in hand is its host's last one. Known where the host has one worker."""
        own = self._hosts.micro_batches(self._host, self._num_micro_batches)
        return self._world_size == 1 and self._num_computed == len(own) - 1

    def _touched_here(self) -> dict[int, Touched]:
        """Return which parameters this host's micro-batches have touched, by micro-batch."""
        own = self._hosts.micro_batches(self._host, self._num_micro_batches)
        return {index: self.board.touched(index) for index in own}

    def wait(self, step: int, seen: int, idle: Callable[[], bool], watch: Callable[[], None]) -> Action:
        """Wait for the others; `idle` may do something useful and says whether it did."""
        start = time.perf_counter()
        if not idle() and not self._signal.wait(seen, WATCH_SECONDS):
            watch()
        self._seconds["wait"] += time.perf_counter() - start
        return self.board.visit(step)

    def exchange(self, step: int, phase: Phase) -> Action:
        """Exchange with the other hosts what `phase` is for, and return what to do next. The leader's work.

        Raises: Disagreement when another host is elsewhere; RankLost when it is gone.
        """
        start = time.perf_counter()
        exchange = self._between_hosts()
        total: Total | None = None
        with torch.no_grad():
            match phase:
                case Phase.EXCHANGE:
                    if not exchange.is_going:
                        exchange.outbox.begin(())
                        exchange.begin(self._num_micro_batches, self._places(), self._touched_here())
                    exchange.records(step, self._num_micro_batches)
                    total = exchange.partial_sums()
                    behind = exchange.busy_seconds - (time.perf_counter() - start)
                    self._seconds["exchange behind backward"] = max(0.0, behind)
                case Phase.AGREE:
                    exchange.norms()
                case Phase.GATHER:
                    self.forget()
                    if not self._serves_weights:
                        exchange.share(self.weights.of_bucket)
                    if not self._measures or self._serves_weights:
                        exchange.norms()  # and with it nobody asks for weights before they are updated
        self._seconds["exchange"] += time.perf_counter() - start
        return self.board.finished_exchange(step, total)

    def process(self, step: int, action: Action) -> Action:
        """Measure or update the claimed bucket, or combine the buffers, and return what to do next."""
        start = time.perf_counter()
        step_map = self._step_map(step)
        squares = self._early.take_norms(action.item) if self._early is not None else None
        if squares is not None:
            return self._finish_bucket(step, action, squares)
        with torch.no_grad():
            if action.kind is Kind.UPDATE and action.item == len(self.weights.layout.buckets):
                self.buffers.combine(self._weights_of(step), self.spec.micro_batch)
                if self.loss_scale.enabled:
                    self.loss_scale.advance(step, finite=self._is_finite())
            elif action.kind is Kind.MEASURE or self._is_finite():
                self._updater.begin(self._clipped(step_map, action.kind))
                if action.kind is Kind.UPDATE:
                    # What this worker will probably claim next.
                    self.residency.fetch(action.item + self._world_size * (len(self._hosts) if self._sharded else 1))
                    self.residency.map(action.item)
                gradients = self._updater.gradients(action.item)
                reduced = time.perf_counter()
                self._seconds["reduce"] += reduced - start
                start = reduced
                if action.kind is Kind.MEASURE:
                    squares = self._updater.norms_squared(gradients)
                    self.residency.measured(action.item)
                else:
                    applied = self._updater.apply(action.item, gradients)
                    self.residency.updated(action.item)
                    squares = None if self._measures else applied
        self._seconds["update"] += time.perf_counter() - start
        return self._finish_bucket(step, action, squares)

    def _finish_bucket(self, step: int, action: Action, squares: list[torch.Tensor] | None) -> Action:
        """Report a bucket, with the norm of its gradient; from a device, those of all together."""
        if squares is None:
            return self.board.finished_bucket(step, action, None)
        if not self.device.is_late:
            return self.board.finished_bucket(step, action, math.fsum(map(float, squares)))
        self._squares[action.item] = squares
        if len(self._squares) == len(self._own):
            of_all = [square for of_bucket in self._squares.values() for square in of_bucket]
            values = iter(torch.stack(of_all).tolist() if of_all else [])
            for bucket, of_blocks in self._squares.items():
                self.board.take_norm(bucket, math.fsum(itertools.islice(values, len(of_blocks))))
            self._squares.clear()
        return self.board.finished_bucket(step, action, None)

    def leave(self, step: int) -> StepResult:
        """Return what `step` came to, once it is committed, and set the random state for the code between steps."""
        self.weights.accept_versions()
        records = self.board.records(step, self._num_micro_batches)
        metrics = [self.board.metrics(step, index) for index in range(self._num_micro_batches)]
        for name, seconds in self._seconds.items():
            self._trace.span(name, step, -1, self._step_start, self._step_start + seconds)
        self.seed("between", step)
        self.board.show(Activity.BETWEEN)
        return StepResult(
            loss=weighted_mean(records),
            grad_norm=self._grad_norm(),
            skipped=not self._is_finite(),
            weight=combine([weight for _, weight in records], operator.add) or 0.0,
            metrics=combine_metrics(metrics),
        )

    def check_parameters(self) -> None:
        """Raise SpecError when the optimizer got parameters after `distribute`."""
        count = sum(len(group["params"]) for group in self.optimizer.param_groups)
        if count != self._num_optimized:
            raise SpecError(
                f"the optimizer has {count} parameters, {count - self._num_optimized:+d} since "
                "distribute. Parameters can not be "
                "added or removed during a run: add them before distribute, and freeze with requires_grad_(False)."
            )

    def _settings_hash(self) -> int:
        """Return a hash of all that must be the same on every worker and may change between steps."""
        settings = (hyper_parameters(self.optimizer), [p.requires_grad for p in self.weights.parameters])
        if settings != self._settings[0]:  # mostly they are as they were, and this takes as long as a small product
            # Not `hash`, which differs between processes for strings.
            self._settings = settings, zlib.crc32(repr(settings).encode())
        return self._settings[1]

    def _step_map(self, step: int) -> StepMap:
        """Return the map of the step's partial sums; only while holding a claim, so that the step stays open."""
        if self._map is None:
            total = combine(self._weights_of(step), operator.add) or 0.0
            self._map = StepMap(
                num_micro_batches=self._num_micro_batches,
                places=self._places(),
                touched=tuple(self.board.touched(index) for index in range(self._num_micro_batches)),
                divisor=total / self.spec.micro_batch * self.loss_scale.of(step),
                scale=1.0,
            )
        return self._map

    def _places(self) -> dict[Node, tuple[int, int]]:
        """Return where the partial sums of this host lie: worker and slot, by node."""
        return {node: (rank, slot) for rank in range(self._world_size) for slot, node in self.board.held(rank).items()}

    def _clipped(self, step_map: StepMap, kind: Kind) -> StepMap:
        limit = self.spec.clip_grad_norm
        if limit is None or kind is Kind.MEASURE or step_map.scale != 1.0:
            return step_map
        norm = self._grad_norm()
        scale = min(1.0, limit / (norm + CLIP_EPSILON))
        self._map = StepMap(step_map.num_micro_batches, step_map.places, step_map.touched, step_map.divisor, scale)
        return self._map

    def _grad_norm(self) -> float:
        squares = self.board.norms_squared()
        return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf

    def _is_finite(self) -> bool:
        """Return whether the step's measured gradient may be used: always, where losses are not scaled."""
        return not self.loss_scale.enabled or math.isfinite(self._grad_norm())

    def _weights_of(self, step: int) -> list[float]:
        return [weight for _, weight in self.board.records(step, self._num_micro_batches)]


def weighted_mean(records: list[tuple[float, float]]) -> float:
    """Return the mean of (value, weight) pairs, summed in the fixed tree; 0 when nothing has weight."""
    total = combine([weight for _, weight in records], operator.add)
    values = combine([value * weight if weight else None for value, weight in records], operator.add)
    return values / total if total and values is not None else 0.0


def combine_metrics(metrics: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Return the weighted mean of each named metric over the micro-batches that have it."""
    names = dict.fromkeys(name for of_one in metrics for name in of_one)
    return {name: weighted_mean([of_one.get(name, (0.0, 0.0)) for of_one in metrics]) for name in names}
