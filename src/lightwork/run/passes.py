"""The loops over run.steps: which may begin, what a step is, where the run is when one ends or is left."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import final

from lightwork.checkpoint.settings import Bookmark
from lightwork.data.feed import Batches, Feed, Schedule, total_steps, upcoming, walk
from lightwork.engine.engine import Engine
from lightwork.engine.looks import BETWEEN_STEPS
from lightwork.errors import UsageError
from lightwork.run.automatic import Automatic
from lightwork.run.course import Course, Following
from lightwork.run.exit import EXITS, Closable
from lightwork.run.guard import Guard
from lightwork.run.handover import HandOver
from lightwork.run.interrupt import INTERRUPTS
from lightwork.run.leaving import Leaving
from lightwork.run.micro_batch import StepPlace
from lightwork.run.saves import Saves
from lightwork.run.step import Step
from lightwork.team.ledger import STOP
from lightwork.team.presence import Activity
from lightwork.team.rendezvous import Progress
from lightwork.team.team import Team
from lightwork.trace import Trace


@final
class Passes:
    """The loops of one run."""

    step_class: type[Step] = Step  #: that of `lightwork check` takes notes

    def __init__(
        self,
        team: Team,
        engine: Engine,
        course: Course,
        saves: Saves,
        automatic: Automatic,
        guard: Guard,
        handover: HandOver,
        trace: Trace,
    ) -> None:
        self._team = team
        self._engine = engine
        self._course = course
        self._saves = saves
        self._automatic = automatic
        self._guard = guard
        self._handover = handover
        self._trace = trace
        self._loop: weakref.ref[Loop] | None = None  # while in it
        self._step: Step | None = None
        self._is_stopped = False  # by an interruption
        self.is_closed = False  #: the run is
        self.leaving = Leaving(team)
        self.owner: Closable | None = None  #: the run

    @property
    def is_within(self) -> bool:
        """Whether the script is in a loop."""
        return self._loop is not None

    def begin(self, feed: Feed, epochs: int | None, max_steps: int | None) -> Loop:
        """Return a loop, which begins when its first step is asked for."""
        total = partial(total_steps, feed.order, self._course.first_epoch_of(feed), epochs, max_steps)
        return Loop(partial(self._go, feed, epochs, max_steps), total)

    def _go(
        self, feed: Feed, epochs: int | None, max_steps: int | None, loop: weakref.ref[Loop]
    ) -> Generator[Step, None, None]:
        order, course = feed.order, self._course
        self.end_former()
        if not self._begin_loop(feed):
            return
        self._loop = loop
        loader: Batches | None = None
        broken = True
        INTERRUPTS.begin_loop()
        try:
            start = course.at
            total = total_steps(order, start.first_epoch, epochs, max_steps)
            self._trace.event("steps", first=start.step, total=course.end_of(total))
            left = None if total is None else max(0, total - start.steps_in_call)
            if left == 0 and start.steps_in_call:
                self._team.say(
                    f"the checkpoint was saved after step {start.step - 1}, the last of its loop over run.steps, which "
                    "has none left: what the loop sets for the code after it (`step`, say) is not set. run.keep(...) "
                    "holds values, and run.save() after that code leaves nothing of it to be done."
                )
            loader = feed.load(upcoming(order, start.epoch, start.step_in_epoch, left, self._share))
            while total is None or course.at.steps_in_call < total:
                epoch, step_in_epoch = next(walk(order, course.at.epoch, course.at.step_in_epoch))
                if epochs is not None and epoch >= start.first_epoch + epochs:
                    break
                if self._team.presence.anyone_left():
                    break
                if self.leaving.is_wanted and self.owner is not None:
                    self.leaving.leave(has_other_runs=EXITS.has_others(self.owner))
                if self._engine.looks.are_due:
                    self._guard.check()
                course.begin_step(order, epoch)
                self._team.welcome.let_in(course.at.step, self._handover.write)
                step = self._make_step(order, loader, epoch, step_in_epoch)
                self._step = step
                yield step
                wishes = step.check_finished()
                self._saves.body_ended()
                if self._automatic.is_due(course.at.step, wishes):
                    self._save_all(step.index)
                if wishes & STOP:
                    self._is_stopped = True
                    raise KeyboardInterrupt(f"after step {step.index}")
            self._guard.check()
            self._engine.trained.check_untouched(BETWEEN_STEPS)
            broken = False
        finally:
            INTERRUPTS.end_loop()
            self._end_loop(broken=broken)
            if loader is not None:
                loader.close()

    def _share(self, num_micro_batches: int) -> range:
        """Return the micro-batches of a step that fall to this worker, for all that is known of who is there."""
        return self._team.board.roster.share(self._team.rank, num_micro_batches)

    def _save_all(self, step: int) -> None:
        """Save, unless a worker has left the loop after this step: it does not come here."""
        if self._team.wait_for_arrivals(step) and self.owner is not None:
            farthest = self.meet_where("save")
            self._automatic.save(EXITS.steps_beside(self.owner), farthest)

    def _begin_loop(self, feed: Feed) -> bool:
        """Meet the others before a loop; return False for one that a resumed run had finished."""
        course = self._course
        if self._is_stopped:
            self._is_stopped = False
            self._leave_call(broken=True)
        joins = self._team.newcomer is not None  # the others are in the loop
        if not joins:
            self.meet_where("steps")
        was_resuming = course.is_resuming
        if was_resuming:
            self._saves.check_settings()
        elif not course.is_in_epochs:
            self._saves.body_ended()
        following = course.enter(feed, self._saves.check_unchanged)
        if was_resuming and course.is_in_epochs and following is not Following.NEW:
            self._saves.put_all_back()
        if following is Following.FINISHED:
            return False
        if joins:
            self._handover.calls.check_all_were_made()
            return True
        self._team.presence.set_left(left=False)
        fingerprint = course.data.known[course.at.data].fingerprint
        self._team.meet_equal("run.steps", {**fingerprint, **feed.order.describe(course.at.epoch)})
        self._team.report(Progress.TRAINING)
        return True

    def end_former(self) -> None:
        """End a loop that was left without its iterator being let go of.

        Raises: UsageError in a step, after one that was left in its middle, and after `close`.
        """
        if self.is_closed:
            raise UsageError("run.steps was called after run.close(). Call lightwork.distribute for another run.")
        if self._loop is None:
            self.refuse_within("run.steps")
            return
        loop = self._loop()
        if loop is None or (self._step is not None and self._step.begun and not self._step.finished):
            raise UsageError(
                "run.steps was called inside a loop over run.steps. End the one before beginning the next."
            )
        loop.close()

    def _end_loop(self, *, broken: bool) -> None:
        self._loop = None
        if self.is_closed:
            return
        step = self._step
        if not self._is_stopped:  # else the run is still in the call, for who saves it now
            self._leave_call(broken=broken)
        # A step that was left in its middle (an error) is not left as a loop is: the others may still need this worker.
        if self._team.is_in and (step is None or step.finished or not step.begun):
            self._team.presence.set_left(left=True)
            self._team.presence.show(Activity.OUTSIDE)
            self._team.report(Progress.BETWEEN)

    def _leave_call(self, *, broken: bool) -> None:
        self._course.leave(broken=broken)
        if self._team.is_main:
            self._saves.pass_ended()

    def _make_step(self, order: Schedule, loader: Batches, epoch: int, step_in_epoch: int) -> Step:
        place = StepPlace(
            index=self._course.at.step,
            epoch=epoch,
            step_in_epoch=step_in_epoch,
            num_micro_batches=order.micro_batches(epoch, step_in_epoch),
            is_last=order.is_last(epoch, step_in_epoch),
            wish=self._automatic.wish,
        )
        self._engine.noise.num_all = order.num_different
        updated = partial(self._advance, order, epoch, step_in_epoch)
        others = EXITS.beside(self._engine.beside)
        return self.step_class(place, self._team, self._engine, loader, self._trace, updated, others)

    def meet_where(self, what: str) -> int | None:
        """Meet, take over the place of the worker that is farthest, and return its rank if any is behind.

        One that left its loop early is: the others finished the step that they were in without it.
        """
        self._guard.check()
        places = [json.loads(place) for place in self._team.meet(what, json.dumps(self._course.at._asdict()).encode())]
        farthest = max(places, key=lambda place: (place["step"], place["plain"], place["call"]))
        if farthest["step"] > self._course.at.step:
            self._engine.trained.accept()  # what the others have done since
        self._course.at = Bookmark(**farthest)
        is_behind = any(place["step"] < farthest["step"] for place in places)
        return self._team.roster.living[places.index(farthest)] if is_behind else None

    def _advance(self, order: Schedule, epoch: int, step_in_epoch: int, goes_on: bool | None) -> None:
        """Take note of an update that is done: what is saved from here on is the state after it."""
        self._guard.updated()
        self._course.advance(epoch, order.after(epoch, step_in_epoch, goes_on))

    def refuse_within(self, call: str) -> None:
        """Raise UsageError for a call in the middle of a step."""
        if self._step is not None:
            self._step.refuse_within(call, is_left=self._loop is None)

    def updated(self) -> None:
        """Let schedulers know that there have been updates: one may step at once."""
        self._guard.updated()


@final
class Loop(Iterator[Step]):
    """A loop over steps, as the user's script holds it.

    It ends when it is let go of, or when the script begins another; going on with it then is a mistake.
    """

    def __init__(
        self, steps: Callable[[weakref.ref[Loop]], Generator[Step, None, None]], total: Callable[[], int | None]
    ) -> None:
        """`total` returns the steps of the whole loop, None where only reading shows them."""
        self._steps = steps(weakref.ref(self))
        self._total = total
        self._was_closed = False

    def __len__(self) -> int:
        """Return the steps of the whole loop, those before a resume included."""
        total = self._total()
        if total is None:
            raise TypeError("the steps of a stream's epoch are not known before it is read: give max_steps=")
        return total

    def __next__(self) -> Step:
        if self._was_closed:
            raise UsageError(
                "a loop over run.steps goes on after another call of run.steps has ended it. One loop at a time: "
                "end it, or break out of it, before the next."
            )
        return next(self._steps)

    def close(self) -> None:
        """End the loop, as leaving it does."""
        self._was_closed = True
        self._steps.close()
