"""What a worker does, beside its part of a step, so that what the team computes can be believed.

A micro-batch that another worker has computed is computed once more and compared (`team/proofs`): by a newcomer before
anything of its own, and in every `audit_every`-th step. One over which workers die is named.
"""

from __future__ import annotations

from typing import final

from lightwork.data.order import Ids, some_of
from lightwork.engine.engine import Engine
from lightwork.errors import CanNotJoin, Disagreement, TeamError
from lightwork.run.micro_batch import MicroBatch
from lightwork.team.proofs import Proof
from lightwork.team.rendezvous import Progress
from lightwork.team.team import Team
from lightwork.trace import Trace

#: Workers that may die over one micro-batch before it is taken for the cause.
MAX_DEATHS = 3


@final
class Audit:
    """That of one step."""

    def __init__(self, team: Team, engine: Engine, trace: Trace, step: int) -> None:
        self._team = team
        self._engine = engine
        self._trace = trace
        self._step = step
        self._proofs = team.board.proofs

    def prove(self, micro: MicroBatch) -> None:
        """Tell the others what the micro-batch in hand came to, if it is to be compared."""
        if len(micro.ids) and self._proofs.is_wanted(self._step):
            proof = self._engine.audits.proof(micro.index, micro.loss, micro.weight)
            if proof is not None:
                self._proofs.give(self._step, proof)

    def audited(self) -> Proof | None:
        """Return what this worker is to compute once more, as it has claimed to; None where no other is there to."""
        return None if self._proofs.is_own() else self._proofs.of(self._step)

    def owed(self) -> Proof | None:
        """Return what a newcomer is to compute once more before anything of its own, of which it holds a claim.

        Blocks: until another worker has computed a micro-batch.
        """
        proofs = self._proofs
        if not proofs.is_owed:
            return None
        proof = proofs.wait(self._step, self._team.watch_step(self._step))
        if proof is None and proofs.is_owed:  # all else was done before: it shows in the next step
            proofs.want(self._step + 1)
        return proof

    def judge(self, theirs: Proof, micro: MicroBatch) -> None:
        """Compare what the micro-batch that was repeated came to.

        Raises: CanNotJoin for a newcomer that computes something else, else Disagreement.
        """
        proofs, where = self._proofs, f"micro-batch {micro.index} of step {self._step}"
        difference = self._engine.audits.difference(theirs, micro.loss, micro.weight)
        if difference is not None and proofs.is_owed:
            self._team.is_in = False
            self._team.report(Progress.TURNED_AWAY)
            raise CanNotJoin(
                f"rank {self._team.rank} can not take the place of a worker that has died: it computes {where} "
                f"otherwise than a worker that was there: {difference} differs. What the loop does must follow from "
                "run, step and what run.keep holds."
            )
        if difference is not None:
            raise Disagreement(
                f"{where} was computed by two workers, and {difference} differs. Either an operation is not "
                "deterministic (lightwork check finds it), or what the loop does depends on the worker, or a processor "
                "or its memory fails."
            )
        proofs.pay()
        self._trace.event("compared", step=self._step, micro_batch=micro.index)

    def refuse_deadly(self, index: int, ids: Ids) -> None:
        """Raise TeamError for a micro-batch over which workers have died again and again."""
        deaths = self._proofs.deaths(self._step, index)
        if deaths >= MAX_DEATHS:
            raise TeamError(
                f"{deaths} workers were killed while they computed micro-batch {index} of step {self._step}, samples "
                f"{some_of(ids)}: one more would be. Most often memory runs out over long samples (see dmesg): a "
                "smaller micro_batch, or fewer workers."
            )
