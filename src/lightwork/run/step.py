"""One step: the inner loop of the user's script. The only place where data and engine meet.

The loop is a generator that belongs to the engine. A worker that has no micro-batch left helps with the update or
waits there, and a worker that could take over a late one's micro-batches is simply given them: user code sees more
turns of its loop, and nothing else.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from lightwork.data.batch import count_tokens, map_tensors
from lightwork.data.feed import Batches
from lightwork.data.order import Ids, some_of
from lightwork.engine.beside import Beside
from lightwork.engine.engine import Engine
from lightwork.engine.result import StepResult
from lightwork.errors import NonFiniteLoss, UsageError
from lightwork.run.audit import Audit
from lightwork.run.collected import Part, combined
from lightwork.run.gathered import packed, parts_of_all
from lightwork.run.interrupt import INTERRUPTS
from lightwork.run.micro_batch import MicroBatch, StepPlace
from lightwork.team.ledger import STOP, Outcome
from lightwork.team.proofs import Proof
from lightwork.team.rules import Action
from lightwork.team.team import Team
from lightwork.team.words import Kind
from lightwork.trace import Trace
from lightwork.transport.base import Watch


class Step:
    """One update of the weights. Iterate over it once: it gives the micro-batches that fall to this worker.

    After the loop, `loss`, `grad_norm` and the metrics given to `add` are those of the whole global batch, the same on
    every worker.
    """

    def __init__(
        self,
        place: StepPlace,
        team: Team,
        engine: Engine,
        loader: Batches,
        trace: Trace,
        updated: Callable[[bool | None], None],
        others: Sequence[Beside] = (),
    ) -> None:
        """Be the step at `place`.

        Args:
            updated: called when the update is done, with whether samples follow, where that is told.
            others: models of other runs, in which a micro-batch leaves nothing.
        """
        self.index = place.index  #: 0 for the first update of the run
        self.epoch = place.epoch  #: 0 for the first pass over the data
        self.step_in_epoch = place.step_in_epoch
        self._num_micro_batches = place.num_micro_batches
        self._is_last = place.is_last
        self._wish = place.wish
        self._team = team
        self._engine = engine
        self._loader = loader
        self._trace = trace
        self._updated = updated
        self._others = others
        self._audit = Audit(team, engine, trace, place.index)
        self._current: MicroBatch | None = None
        self._result: StepResult | None = None
        self._parts: dict[int, dict[str, Part]] = {}  # of this worker's micro-batches
        self._metrics: Mapping[str, Any] = {}
        self._begun = False
        self._own: list[int] = []
        self._num_samples = 0
        self._num_tokens = 0

    # --- what the user's loop body calls --------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor, weight: float | None = None) -> None:
        """Compute the gradients of one micro-batch. Call it once for each.

        Args:
            loss: a scalar, the mean over the micro-batch.
            weight: what the mean was taken over, if not the number of samples: the unmasked tokens, say. The loss and
                gradient of the global batch are the means of the micro-batches' weighted by it. 0 is legal.

        Raises: UsageError when called twice or with something else than a scalar; NonFiniteLoss.
        """
        now = time.perf_counter()
        micro = self._in_hand("step.backward")
        if self._engine.is_folded:
            raise UsageError(
                f"step.backward was called twice for micro-batch {micro.index} of step {self.index}. "
                "Add the losses up and "
                "call it once."
            )
        try:
            micro.weight = float(len(micro.ids) if weight is None else weight)
        except (TypeError, ValueError):
            micro.weight = math.nan
        if not (math.isfinite(micro.weight) and micro.weight >= 0):
            raise UsageError(
                f"weight={weight!r} in step.backward is not a number from 0 upwards. Pass the tokens or samples."
            )
        self._check_loss(loss, micro.weight)
        late = loss.detach().clone() if self._engine.reads_late else None
        if late is None:
            self._take_loss(micro, loss.detach())
        self._trace.span("forward", self.index, micro.index, micro.start, now)
        self._engine.backward(self.index, micro.index, loss, micro.weight)
        if late is not None:
            self._take_loss(micro, late)
        self._trace.span("backward", self.index, micro.index, now, time.perf_counter())

    def add(self, name: str, value: float | torch.Tensor, weight: float | None = None) -> None:
        """Add a metric of the micro-batch in hand: after the loop, `step[name]` is the weighted mean of all.

        `weight` is the number of samples unless given.
        """
        self._in_hand("step.add").collected.add(name, value, weight)

    def sum(self, name: str, value: float | torch.Tensor) -> None:
        """Add a number or tensor of the micro-batch in hand: after the loop, `step[name]` is the sum over all."""
        self._in_hand("step.sum").collected.sum(name, value)

    def gather(self, name: str, value: Any) -> None:
        """Keep values of the micro-batch in hand: after the loop, `step[name]` has those of all, in their order.

        Args:
            value: a tensor or array, of which the rows of all micro-batches are put together, on the host; or a list
                with something for each sample, which gives one list.

        Moves: at the end of the step, every worker's values to all, who meet for it.
        """
        self._in_hand("step.gather").collected.gather(name, value)

    @property
    def batch_index(self) -> int:
        """The number of the micro-batch in hand, from 0 in each step, whoever computes it."""
        return self._in_hand("step.batch_index").index

    @property
    def sample_ids(self) -> Ids:
        """The ids of the samples of the micro-batch in hand, int64; of a stream their positions."""
        return self._in_hand("step.sample_ids").ids

    # --- what is known after the loop -----------------------------------------------------------------------------

    @property
    def loss(self) -> float:
        """The mean loss over the global batch."""
        return self._finished("loss").loss

    @property
    def grad_norm(self) -> float:
        """The L2 norm of the whole gradient, before clipping."""
        return self._finished("grad_norm").grad_norm

    @property
    def skipped(self) -> bool:
        """Whether the gradient was not finite, so that the weights stayed as they were (precision "fp16" alone)."""
        return self._finished("skipped").skipped

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What was added, summed and gathered, by name."""
        self._finished("metrics")
        return self._metrics

    def __getitem__(self, name: str) -> Any:
        self._finished(f"step[{name!r}]")
        if name not in self._metrics:
            known = ", ".join(self._metrics) or "nothing"
            raise UsageError(f"no micro-batch of step {self.index} gave {name!r}; they gave {known}.")
        return self._metrics[name]

    @property
    def last_of_epoch(self) -> bool:
        """Whether the data have no further step in this epoch; of a stream, known after the loop."""
        return self._is_last if self._is_last is not None else not self._finished("last_of_epoch").goes_on

    @property
    def finished(self) -> bool:
        """Whether the update is done."""
        return self._result is not None

    def check_finished(self) -> int:
        """Return what workers wish for the end of the step.

        Raises: UsageError when the update is not done, though the script goes on to the next step.
        """
        if not self.finished:
            what = "was left early" if self.begun else "was never entered"
            raise UsageError(
                f"the inner loop of step {self.index} {what}. Go through all of `for ... in step:`; to stop training, "
                "break out of the outer loop after it."
            )
        return self._result.wishes if self._result is not None else 0

    def refuse_within(self, call: str, *, is_left: bool) -> None:
        """Raise UsageError for a call in the middle of the step; `is_left` says whether its loop was left."""
        if self.finished or not self.begun:
            return
        message = (
            f"inside the loop over the micro-batches of step {self.index}. Call it after that loop, when the update is "
            "done."
        )
        if is_left:
            message = (
                f"after step {self.index} was left in its middle (an error, an interruption), which can not be taken "
                "up again. Call lightwork.distribute anew, with resume= to go on from a checkpoint."
            )
        raise UsageError(f"{call} was called {message}")

    @property
    def begun(self) -> bool:
        """Whether the inner loop was entered."""
        return self._begun

    # --- the loop -------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        if self._begun:
            raise UsageError(f"step {self.index} was iterated twice. Its micro-batches are given once.")
        self._begun = True
        engine = self._engine
        watch: Watch | None = None
        action = self._enter()
        while action.kind is not Kind.COMMITTED:
            if action.kind is Kind.WAIT:
                watch = watch or self._team.watch_step(self.index)
                action = engine.wait_for_team(self.index, action.item, self._loader.idle, watch)
                continue
            watch = None  # the next wait is another one
            if action.kind is Kind.AGAIN:
                self._parts.clear()
                self._own.clear()
                self._num_samples = self._num_tokens = 0
                action = self._enter()
            elif action.kind is Kind.COMPUTE and self._team.hosts.one_is_missed:
                action = engine.exchange_phase(self.index, Kind.EXCHANGE)
            elif action.kind is Kind.COMPUTE:
                yield from self._repeat(self._audit.owed())
                micro, batch = self._load(action.item)
                if len(micro.ids):
                    yield from self._body(micro, batch)
                    del batch
                else:
                    engine.skip(self.index, micro.index)
                outcome = Outcome(
                    loss=micro.loss,
                    weight=micro.weight,
                    metrics=json.dumps(micro.collected.numbers).encode() if micro.collected.numbers else b"",
                    goes_on=self._loader.goes_on(self.epoch, self.step_in_epoch, micro.index),
                    wishes=self._wish | STOP * INTERRUPTS.is_pending,
                )
                self._parts[micro.index] = micro.collected.parts
                self._audit.prove(micro)
                action = engine.finish_micro_batch(self.index, micro.index, outcome)
            elif action.kind is Kind.AUDIT:
                yield from self._repeat(self._audit.audited())
                action = self._team.board.finished_phase(self.index, Kind.AUDIT)
            elif action.kind in (Kind.MEASURE, Kind.UPDATE):
                action = engine.process_bucket(self.index, action)
            else:
                action = engine.exchange_phase(self.index, action.kind, packed(self._parts))
        self._result = engine.leave_step(self.index)
        self._check_gradient(self._result)
        self._metrics = combined(self._result.metrics, self._parts_of_all)
        self._updated(self._result.goes_on)
        self._trace.event(
            "step",
            step=self.index,
            loss=self._result.loss,
            grad_norm=self._result.grad_norm,
            **({"skipped": True} if self._result.skipped else {}),
            **({} if self._result.state_before is None else {"state": f"{self._result.state_before:016x}"}),
            **({} if self._result.noise is None else {"noise": asdict(self._result.noise)}),
            samples=self._num_samples,
            tokens=self._num_tokens,
            micro_batches=self._own,
        )

    def _enter(self) -> Action:
        """Enter the step; a newcomer does when another one has, with whose settings its own are compared."""
        newcomer = self._team.newcomer
        if newcomer is not None:
            newcomer.wait_for_another(self.index)
        action = self._engine.enter_step(self.index, self._num_micro_batches)
        if newcomer is not None:
            self._team.begin(elastic=True)
        return action

    def _repeat(self, proof: Proof | None) -> Iterator[Any]:
        """Let the body compute once more what another worker has computed, and compare; of none nothing."""
        if proof is None:
            return
        micro, batch = self._load(proof.micro_batch, is_own=False)
        with self._engine.audits.repeating():
            yield from self._body(micro, batch)
        self._audit.judge(proof, micro)

    def _body(self, micro: MicroBatch, batch: Any) -> Iterator[Any]:
        """Let the body of the user's loop have a micro-batch in hand, and check that it has called backward."""
        self._current = micro
        with self._engine.computing():
            yield batch
        self._current = None
        for other in self._others:
            other.leave_out()
        if not self._engine.is_folded:
            raise UsageError(
                f"step.backward was not called for micro-batch {micro.index} of step {self.index} (rank "
                f"{self._team.rank}). Call it once in the loop body; for nothing to learn from, with weight=0."
            )

    def _parts_of_all(self) -> Iterable[Mapping[int, Mapping[str, Part]]]:
        here = self._engine.parts_of_hosts
        return parts_of_all(self._parts, here, self._team, self.index, self._num_micro_batches)

    def _load(self, index: int, *, is_own: bool = True) -> tuple[MicroBatch, Any]:
        start = time.perf_counter()
        ids = self._loader.ids(self.epoch, self.step_in_epoch, index)
        self._audit.refuse_deadly(index, ids)
        batch = self._loader.get(self.epoch, self.step_in_epoch, index) if len(ids) else None
        if is_own:
            self._own.append(index)
            self._num_samples += len(ids)
            self._num_tokens += count_tokens(batch)
        batch = self._engine.device.bring_batch(batch, map_tensors)
        self._engine.begin_micro_batch(self.index, index)
        now = time.perf_counter()
        self._trace.span("load", self.index, index, start, now)
        return MicroBatch(index=index, ids=ids, start=now), batch

    def _in_hand(self, call: str) -> MicroBatch:
        if self._current is None:
            raise UsageError(
                f"{call} was called outside the loop over step {self.index}. Call it in the body of `for ... in step:`."
            )
        return self._current

    def _check_loss(self, loss: torch.Tensor, weight: float) -> None:
        if not isinstance(loss, torch.Tensor):
            raise UsageError(
                f"step.backward takes the loss as a tensor, not {type(loss).__name__}: leave out .item() or float()."
            )
        if loss.numel() != 1:
            raise UsageError(
                f"the loss has shape {tuple(loss.shape)}, not a scalar. Take its mean over the "
                "micro-batch: loss.mean()."
            )
        if weight and not loss.requires_grad:
            raise UsageError(
                "the loss does not depend on any trainable parameter (no .grad_fn). Compute it from "
                "run.model's output, "
                "without torch.no_grad() or .detach()."
            )

    def _take_loss(self, micro: MicroBatch, loss: torch.Tensor) -> None:
        micro.loss = float(loss)
        if micro.weight and not math.isfinite(micro.loss):
            raise NonFiniteLoss(
                f"the loss is {micro.loss} on rank {self._team.rank} in micro-batch {micro.index} of step "
                f"{self.index}, samples "
                f"{some_of(micro.ids)}. No weight was changed by this step. Look at these samples, "
                "lower the learning rate, or "
                "set clip_grad_norm."
            )

    def _check_gradient(self, result: StepResult) -> None:
        if not (math.isfinite(result.grad_norm) or result.skipped):
            raise NonFiniteLoss(
                f"the gradient of step {self.index} is not finite (its norm is {result.grad_norm}), though its loss is "
                f"{result.loss:.6g}. The update was made with it, so that weights are lost: go on from a checkpoint. "
                "torch.autograd.set_detect_anomaly(True) names the operation, often sqrt, log or a division at 0."
            )

    def _finished(self, what: str) -> StepResult:
        if self._result is None:
            raise UsageError(
                f"{what} of step {self.index} is not known yet: it belongs to the whole global batch. "
                "Read it after the loop "
                "`for ... in step:`."
            )
        return self._result
