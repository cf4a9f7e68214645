"""The engine of one worker: the phases of a step. `assembly` makes its parts.

The order of a step, and who carries it out:

    enter          the board opens the step; buffers and random state are set       (here, `random`, `state/buffers`)
    micro-batch    user code computes a loss; `backward` folds its gradients         (`forward`, `backward`)
    exchange       with several hosts: partial sums become one on every host         (`exchange`)
    measure        with clipping or loss scaling: the norm of each bucket's gradient (`update`, `state/scaling`)
    update         partial sums to gradients to weights, bucket by bucket            (`update`, `state/optimizer`)
    leave          the results of the step are read from the board                   (here)

Moves: nothing but what the buckets' owners read: each partial sum once an update (twice with clipping).
"""

from __future__ import annotations

import operator
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import final

import torch

from lightwork.engine.audits import Audits
from lightwork.engine.beside import Beside
from lightwork.engine.exchange.turns import Held, Touched
from lightwork.engine.forward.activations import Activations
from lightwork.engine.forward.precision import Compute
from lightwork.engine.looks import BETWEEN_STEPS, Looks
from lightwork.engine.noise import Unasked
from lightwork.engine.norms import Norms
from lightwork.engine.parts import Parts, settle, trained_state
from lightwork.engine.result import StepResult
from lightwork.engine.update import StepMap
from lightwork.random import derive, seed_all
from lightwork.spec.means import weighted_mean
from lightwork.spec.tree import Node, combine
from lightwork.team.ledger import Outcome
from lightwork.team.presence import Activity
from lightwork.team.rules import Action
from lightwork.team.words import Kind
from lightwork.transport.base import Watch

#: Seconds between two looks at the other workers' health while waiting.
WATCH_SECONDS = 0.05


@final
class Engine:
    """One worker's engine."""

    def __init__(self, parts: Parts, compute: Compute, activations: Activations) -> None:
        self.state = parts.state
        self.model = parts.description.model
        self.optimizers = parts.description.optimizers
        self.device = parts.workplace.memory.device
        self._parts = parts
        self._compute = compute
        self._activations = activations
        self._spec = parts.holdings.spec
        self._board = parts.workplace.board
        self._norms = Norms(
            parts.workplace.board.ledger,
            parts.workplace.memory.device,
            len(parts.holdings.own_buckets),
            self._spec.clip_grad_norm,
            may_overflow=parts.state.loss_scale.enabled,
        )
        self._num_micro_batches = 0
        self._num_computed = 0  # by this worker, in this step
        self.looks = Looks()
        self.audit_every = 0  #: steps; by the plan
        self.noise = Unasked()
        self.parts_of_hosts: list[bytes] | None = None  #: what each gave to the step, if that has travelled
        names = [parameter.name for parameter in parts.holdings.layout.parameters]
        self.audits = Audits(parts.backward.gradients, parts.state.buffers, names)
        self._map: StepMap | None = None
        self._scale: float | None = None  # of clipping, in this step
        self.beside = Beside(parts.backward.gradients, parts.state.buffers)
        parts.backward.gradients.listen()
        self._settings: tuple[object, int] = (None, 0)
        self._modules = list(parts.description.model.modules())
        self.trained = trained_state(parts)  #: the same by name
        self._seconds = dict.fromkeys(("wait", *parts.exchange.phases, "reduce", "update"), 0.0)
        self._step_start = 0.0

    # --- the phases of a step -----------------------------------------------------------------------------------

    def enter_step(self, step: int, num_micro_batches: int) -> Action:
        """Begin `step` and return the first thing to do."""
        when = self.looks.begin_step()
        if self.looks.at_all:
            self.state.weights.writes.check(when)
            self.state.structure.check(when, whole=self.looks.closely)
        self.state.weights.writes.check_values(BETWEEN_STEPS)
        self._parts.backward.gradients.begin_step()
        self.beside.is_in_step = True
        self._num_micro_batches = num_micro_batches
        self._num_computed = 0
        self._map, self._scale = None, None
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._parts.updater.begin_step(step)
        self._step_start = time.perf_counter()
        self.noise.begin_step(step)
        audit = self.audit_every > 0 and step % self.audit_every == 0
        measure = self._norms.come_first
        return self._board.enter(step, num_micro_batches, self._settings_hash(), measure=measure, audit=audit)

    def begin_micro_batch(self, step: int, index: int) -> None:
        """Set the random state and the buffers from which micro-batch `index` is computed, whoever does."""
        if not self._num_computed:  # else looked at when the one before was finished
            self.state.buffers.check_unwritten(BETWEEN_STEPS)
        if self.looks.closely:
            self.state.structure.before_forward()
        self.seed("micro-batch", step, index)

    def seed(self, *what: str | int) -> None:
        """Set the random state that belongs to `what`."""
        value = derive(self._spec.seed, *what)
        seed_all(value)
        self.device.seed(value)

    def computing(self) -> AbstractContextManager[None]:
        """Be in the precision of the spec: around the body of the inner loop, or an evaluation."""
        return self._compute.active()

    @property
    def reads_late(self) -> bool:
        """Whether a loss is to be read after backward was begun: before, a device would wait for the host.

        Not where backward updates weights: [Note: who reads a weight after its gradient] in `backward/early`.
        """
        return self.device.is_late and not self._parts.backward.early.updates_in_backward

    @property
    def is_folded(self) -> bool:
        """Whether the micro-batch in hand has been folded, with or without gradients."""
        return self._parts.backward.gradients.is_folded

    def backward(self, step: int, index: int, loss: torch.Tensor, weight: float) -> None:
        """Run backward of a micro-batch's mean loss and fold its gradients; a weight of 0 makes none.

        The loss is scaled by weight / micro_batch, and the sum divided by the same of the whole batch: exact for a
        single full micro-batch. (And both by the loss scale, a power of two.)
        """
        if weight == 0:
            self.skip(step, index)
            return
        share = self._begin_fold(step, index, weight)
        scaled = loss if share == 1.0 else loss * share
        self._parts.backward.gradients.run_fold(lambda: self._compute.run_backward(scaled))
        self.state.buffers.restore()

    def skip(self, step: int, index: int) -> None:
        """Fold a micro-batch without gradients."""
        self._begin_fold(step, index, 0.0)
        self._parts.backward.gradients.run_fold(None)
        self.state.buffers.restore()

    def _begin_fold(self, step: int, index: int, weight: float) -> float:
        """Begin to fold a micro-batch's gradients and, with the last one, to exchange what is complete.

        Returns: the factor of the micro-batch's loss.
        """
        parts = self._parts
        share = weight / self._spec.micro_batch * self.state.loss_scale.of(step)
        if self.audits.is_repeating:
            self.audits.begin(index)
            return share
        self.noise.begin_micro_batch(share)
        thorough = self.looks.closely
        self.state.buffers.capture(index, of_many=self._num_micro_batches > 1, check=thorough)
        if thorough:
            self._check_forward(step, index)
        consumed = parts.backward.early.begin_step(share)
        if consumed is not None:
            parts.backward.early.follow(parts.backward.gradients.begin_fold(index, self._num_micro_batches, consumed))
            return share
        sent = parts.holdings.sent_at_once(self._board.roster, self._num_micro_batches)
        outbox = parts.exchange.outbox if self._num_computed in sent else None
        fold = parts.backward.gradients.begin_fold(index, self._num_micro_batches, outbox)
        if outbox is not None:
            places = {node: (0, slot) for node, slot in parts.backward.gradients.places().items()}
            touched = {**self._touched_here(), index: fold.touched}
            in_outbox = fold.node if fold.leaves_at_once else None
            parts.exchange.begin_sums(Held(self._whole, places, touched, in_outbox))
        return share

    def _check_forward(self, step: int, index: int) -> None:
        """Raise UsageError when forward has written weights by `.data`, or added or replaced parts of the model."""
        when = f"in micro-batch {index} of step {step}"
        self.state.weights.writes.check(when)
        self.state.weights.writes.check_values(when)
        self.state.structure.check_forward(when)

    def finish_micro_batch(self, step: int, index: int, outcome: Outcome) -> Action:
        """Report a computed micro-batch and return what to do next."""
        when = f"in micro-batch {index} of step {step}, after step.backward,"
        if self.looks.at_all:
            self.state.weights.writes.check(when)
        is_plain = not self._parts.backward.early.updates_in_backward
        if self.looks.closely and is_plain:
            self.state.weights.writes.check_values(when)
        self.state.buffers.check_unwritten(when)
        fold = self._parts.backward.gradients.commit(self._board.ledger.touched(index))
        self._num_computed += 1
        outcome = replace(outcome, square=self.noise.of_micro_batch())
        return self._board.finished_micro_batch(step, index, outcome, freed=fold.freed, slot=fold.slot, node=fold.node)

    @property
    def _whole(self) -> Node:
        """All micro-batches of the step."""
        return Node(0, self._num_micro_batches)

    def _touched_here(self) -> dict[int, Touched]:
        """Return which parameters this host's micro-batches have touched, by micro-batch."""
        of_host = self._board.roster.micro_batches(self._parts.holdings.host, self._num_micro_batches)
        return {index: self._board.ledger.touched(index) for index in of_host}

    def wait_for_team(self, step: int, seen: int, idle: Callable[[], bool], watch: Watch) -> Action:
        """Wait for the others; `idle` may do something useful and says whether it did. Raises: what `watch` returns."""
        start = time.perf_counter()
        if not idle() and not self._parts.workplace.signal.wait_for_change(seen, WATCH_SECONDS):
            reason = watch()
            if reason is not None:
                raise reason
        self._seconds["wait"] += time.perf_counter() - start
        return self._board.visit(step)

    def exchange_phase(self, step: int, kind: Kind, parts: bytes = b"") -> Action:
        """Exchange with the other hosts what the phase `kind` is for, and return what to do next. The leader's work.

        `parts` go with a step's records, where each host has one worker.

        Raises: Disagreement when another host is elsewhere; RankLost when it is gone.
        """
        start = time.perf_counter()
        between_hosts = self._parts.exchange
        with torch.no_grad():
            match kind:
                case Kind.EXCHANGE:
                    if not between_hosts.sum_up(step, self._num_micro_batches, lambda: self._held(step), parts):
                        self._board.begin_again(step)
                        return self._board.visit(step)
                    behind = between_hosts.busy_seconds - (time.perf_counter() - start)
                    self._seconds["exchange behind backward"] = max(0.0, behind)
                case Kind.AGREE:
                    between_hosts.norms()
                case Kind.GATHER:
                    self._gather_weights()
        self._seconds["exchange"] += time.perf_counter() - start
        return self._board.finished_phase(step, kind)

    def _held(self, step: int) -> Held:
        return Held(self._whole, self._board.partial_sums(step), self._touched_here())

    def _gather_weights(self) -> None:
        """Send new weights from their owners to all, but those that stay with them."""
        parts, holdings = self._parts, self._parts.holdings
        settle(parts)
        sent = [row.bucket for row in holdings.rows if row.is_shared_out and not row.weights_stay_with_owner]
        parts.exchange.share(sent, self.state.weights.of_bucket)
        if not self._norms.come_first or holdings.shares_weights:
            parts.exchange.norms()  # a barrier, too: nobody asks for weights before they are updated

    def process_bucket(self, step: int, action: Action) -> Action:
        """Measure or update the claimed bucket, or combine the buffers, and return what to do next."""
        start = time.perf_counter()
        squares = self._parts.backward.early.take_norms(action.item)
        if squares is None:
            with torch.no_grad():
                squares = self._process(step, action)
            self._seconds["update"] += time.perf_counter() - start
        norm_squared = None if squares is None else self._norms.of_bucket(action.item, squares)
        return self._board.finished_bucket(step, action, norm_squared)

    def _process(self, step: int, action: Action) -> list[torch.Tensor] | None:
        """Measure, update or combine; return the squared norms of a bucket's gradients, unless they are known."""
        updater, holdings = self._parts.updater, self._parts.holdings
        if action.kind is Kind.UPDATE and action.item == len(holdings.layout.buckets):
            self._end_state(step)
            return None
        if action.kind is Kind.MEASURE:
            updater.begin(self._step_map(step))
            return updater.measure(action.item)
        if not self._norms.may_be_used():
            return None
        updater.begin(self._clipped(step))
        following = action.item + holdings.num_workers * (holdings.roster.num_hosts if holdings.shares_state else 1)
        squares = updater.update(action.item, following=following)
        return None if self._norms.come_first else squares

    def _end_state(self, step: int) -> None:
        """Make the step's buffers, and the next step's loss scale."""
        self.state.buffers.combine(step, self._weights_of(step), self._spec.micro_batch)
        if self.state.loss_scale.enabled:
            self.state.loss_scale.advance(step, finite=self._norms.may_be_used())

    def leave_step(self, step: int) -> StepResult:
        """Return what `step` came to, once it is committed, and set buffers and random state for the code between."""
        self.state.weights.writes.accept_values()
        self.state.buffers.restore()
        self.beside.is_in_step = False
        if self._norms.may_be_used():
            self.state.optimizer.count_step()
        self._parts.moving.update_parts.leave_all()  # what was asked for here, and updated by another worker
        records = self._board.ledger.records(step, self._num_micro_batches)
        metrics = [self._board.ledger.metrics(step, index) for index in range(self._num_micro_batches)]
        self._seconds["reduce"] = self._parts.updater.reduce_seconds
        self._seconds["update"] = max(0.0, self._seconds["update"] - self._seconds["reduce"])
        for name, seconds in self._seconds.items():
            self._parts.workplace.trace.span(name, step, -1, self._step_start, self._step_start + seconds)
        self.parts_of_hosts = self._parts.exchange.parts
        self.seed("between", step)
        self._board.presence.show(Activity.BETWEEN)
        return StepResult(
            loss=weighted_mean(records),
            grad_norm=self._norms.of_all(),
            skipped=not self._norms.may_be_used(),
            metrics=metrics,
            goes_on=self._board.ledger.goes_on(step, self._num_micro_batches),
            wishes=self._board.ledger.wishes(step, self._num_micro_batches),
            state_before=self._parts.updater.hashes.before(step),
            noise=self.noise.end_step(step, self._num_micro_batches),
        )

    def _settings_hash(self) -> int:
        """Return a hash of all that must be the same on every worker and may change between steps."""
        modes = [module.training for module in self._modules]
        trained = [p.requires_grad for p in self.state.weights.parameters]
        settings = (modes, self.optimizers.hyper_parameters(), trained)
        if settings != self._settings[0]:  # mostly they are as they were, and this takes as long as a small product
            self.state.optimizer.check_settings()
            # Not `hash`, which differs between processes for strings.
            self._settings = settings, zlib.crc32(repr(settings).encode())
        return self._settings[1]

    def _step_map(self, step: int) -> StepMap:
        """Return the map of the step's partial sums; only while holding a claim, so that the step stays open."""
        if self._map is None:
            total = combine(self._weights_of(step), operator.add) or 0.0
            self._map = StepMap(
                num_micro_batches=self._num_micro_batches,
                places=self._board.partial_sums(step),
                touched=tuple(self._board.ledger.touched(index) for index in range(self._num_micro_batches)),
                divisor=total / self._spec.micro_batch * self.state.loss_scale.of(step),
                scale=1.0,
            )
        return self._map

    def _clipped(self, step: int) -> StepMap:
        """Return the map of the step's partial sums, with the scale that clipping gives the step."""
        if self._scale is None:
            self._scale = self._norms.clip_scale()
            self._map = replace(self._step_map(step), scale=self._scale)
        return self._step_map(step)

    def _weights_of(self, step: int) -> list[float]:
        return [weight for _, weight in self._board.ledger.records(step, self._num_micro_batches)]

    # --- between steps ------------------------------------------------------------------------------------------

    @property
    def serves_weights(self) -> bool:
        """Whether other hosts read weights that this one has."""
        return self._parts.holdings.shares_weights

    def close(self, *, gives_back: bool) -> str | None:
        """Give the model back to plain PyTorch: no hooks; with `gives_back`, its weights in memory of their own.

        Returns the name of a parameter that the script has written since the last step, outside an edit.
        """
        if self.beside.is_in_step:  # it was left in its middle: the buffers are a micro-batch's
            self.state.buffers.restore()
        self._parts.backward.gradients.close()
        self._parts.exchange.close()
        with torch.no_grad():
            if gives_back:
                self._parts.moving.fetching.settle()
            written = self.state.weights.give_back(copies=gives_back)
        self._parts.moving.fetching.close()
        self._compute.close()
        self._activations.close()
        return None if self.beside.is_in_step else written
