"""Where a run is in its data: over the loops of its script, and over the processes that go on with it.

Each call of run.steps begins a new pass over its data set, the data set's next epoch. What a resumed run's first calls
are depends on how its script is written:

    for epoch in run.epochs(E)      begins at the epoch that was interrupted; its calls that had ended yield nothing
    range(run.epoch, E), while      the first call goes on with the pass that was interrupted. That the script uses the
    run.step_index < N              place is seen, when it counts or compares with it (`Place`)
    one loop, run.steps(epochs=E)   goes on in its middle
    range(E), a second loop         is right in the first pass alone; refused behind it, with the line to write
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Any, cast, final

from lightwork.checkpoint.settings import Bookmark
from lightwork.data.feed import Feed, Schedule
from lightwork.data.identity import DataSets
from lightwork.errors import CheckpointError, UsageError

_ADVICE = (
    "Write `for epoch in run.epochs(E):` with `run.steps(data)` in it, which goes on where the run was interrupted and "
    "runs the code after each epoch once."
)


def check_count(name: str, count: object) -> None:
    """Raise UsageError unless a number of epochs or steps is one."""
    if not isinstance(count, int) or count < 0:
        raise UsageError(f"{name}={count!r} is not a whole number from 0 upwards.")


@final
class Place:
    """A whole number that notes when a script counts or compares with it, rather than prints it.

    (Not an int: `range` takes an int for what it is, and asks it nothing.)
    """

    def __init__(self, value: int, used: Callable[[], None]) -> None:
        self._value = value
        self._used = used

    def __index__(self) -> int:
        self._used()
        return self._value

    __int__ = __index__

    def __bool__(self) -> bool:
        return bool(self.__index__())

    def __lt__(self, other: int) -> bool:
        return self.__index__() < other

    def __le__(self, other: int) -> bool:
        return self.__index__() <= other

    def __gt__(self, other: int) -> bool:
        return self.__index__() > other

    def __ge__(self, other: int) -> bool:
        return self.__index__() >= other

    def __eq__(self, other: object) -> bool:
        return self.__index__() == other

    def __hash__(self) -> int:
        return hash(self._value)

    def __add__(self, other: int) -> int:
        return self.__index__() + other

    __radd__ = __add__

    def __sub__(self, other: int) -> int:
        return self.__index__() - other

    def __rsub__(self, other: int) -> int:
        return other - self.__index__()

    def __mul__(self, other: int) -> int:
        return self.__index__() * other

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> int:
        return self.__index__() // other

    def __mod__(self, other: int) -> int:
        return self.__index__() % other

    def __truediv__(self, other: float) -> float:
        return self.__index__() / other

    def __format__(self, form: str) -> str:
        return format(self._value, form)

    def __repr__(self) -> str:
        return repr(self._value)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (self._value,)


class Following(Enum):
    """What a call of run.steps is, in a run that goes on."""

    FINISHED = auto()  #: it had ended
    INTERRUPTED = auto()  #: it goes on
    NEW = auto()  #: it begins a pass


@final
class Course:
    """The way of one run through its data."""

    def __init__(self) -> None:
        self.at = Bookmark()
        self.data = DataSets()
        self.is_resuming = False  #: and has not come to where the run was
        self.num_evaluations = 0  #: so far
        self.has_begun = False  #: whether the script has come to a loop
        self._is_used = False  # the place, by the script
        self._may_replay = False  # its first loop had ended, and the code after it runs again
        self._resumed_at = -1  # the step
        self._num_known = 0  # data sets, then
        self._loops = 0  # over run.epochs, in this process
        self._plain = 0  # calls outside of them, in this process
        self._epoch: int | None = None  # of the loop over run.epochs that the script is in
        self._num_epochs = 0
        self._call = 0  # in this body

    def resume(self, position: Bookmark, data_sets: list[dict[str, Any]]) -> None:
        """Go on where a checkpoint was saved."""
        self.at = position
        self.data.take(data_sets)
        self.is_resuming = True
        self.has_begun = self._is_used = self._may_replay = False
        self._resumed_at = position.step
        self._num_known = len(self.data.known)
        self._loops = self._plain = self._call = 0

    # --- what a script sees -----------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Updates done."""
        return self._place(self.at.step)

    @property
    def epoch(self) -> int:
        """The epoch that the run is in: of `run.epochs` or, outside of such a loop, the last data set's."""
        return self._place(self._epoch_now)

    @property
    def _epoch_now(self) -> int:
        at = self.at
        if self._epoch is not None:
            return self._epoch
        if at.outer is not None:
            return at.outer
        if at.is_open or at.is_after:
            return at.last_epoch if at.steps_in_call else at.epoch
        return self.data.known[at.data].num_passes if self.data.known else 0

    def _place(self, value: int) -> int:
        return cast(int, Place(value, self._use)) if self.is_resuming else value

    def _use(self) -> None:
        self._is_used = True

    # --- loops ------------------------------------------------------------------------------------------------------

    def epochs(self, num: int, body_ended: Callable[[], None]) -> Iterator[int]:
        """Yield the epochs that are left of `num`; `body_ended` is called after each."""
        if self._epoch is not None:
            raise UsageError("run.epochs was called inside a loop over run.epochs. One such loop at a time.")
        index, self._loops = self._loops, self._loops + 1
        first = 0
        if self.is_resuming:
            at = self.at
            if at.loop > index:  # it had ended
                return
            if at.outer is not None:
                first = at.outer
            elif at.loop == 0:  # saved outside of such a loop
                first = self._epoch_now
            else:
                self.is_resuming = False
        try:
            for epoch in range(first, num):
                if not self.is_resuming:
                    self.at = self.at._replace(outer=epoch, call=0, is_open=False, is_after=False)
                self.has_begun = True
                self._epoch, self._num_epochs, self._call = epoch, num, 0
                yield epoch
                body_ended()
                self.at = self.completed
                self.is_resuming = False
            self.at = self.at._replace(loop=index + 1, outer=None, call=0)
            self.is_resuming = False
        finally:
            self._epoch = None

    def enter(self, feed: Feed, check_unchanged: Callable[[], None]) -> Following:
        """Begin a call of run.steps and return what it is.

        Raises: UsageError, CheckpointError where it can not be told to be what the run was interrupted in.
        """
        number = self.data.find(feed.data, feed.fingerprint)
        if self._epoch is None:
            place, self._plain = self._plain, self._plain + 1
        else:
            place, self._call = self._call, self._call + 1
        following = self._following(place, number, feed.order) if self.is_resuming else Following.NEW
        self.has_begun = True
        if following is Following.FINISHED:
            return following
        if following is Following.NEW and place == 1 and self._may_replay and self.at.step == self._resumed_at:
            check_unchanged()  # the code between the first loop and this one has run again
        if following is Following.NEW:
            epoch = self.data.known[number].num_passes
            before = self.completed if self._epoch is None else self.at
            self.at = before._replace(
                data=number,
                first_epoch=epoch,
                epoch=epoch,
                step_in_epoch=0,
                steps_in_call=0,
                last_epoch=epoch,
            )
        elif self._epoch is None and not self.at.is_open:  # it is not counted twice
            self.at = self.at._replace(plain=self.at.plain - 1)
        self.at = self.at._replace(is_open=True, is_after=False, outer=self._epoch)
        self.is_resuming = False
        return following

    def first_epoch_of(self, feed: Feed) -> int:
        """Return the epoch at which a new call over this data set begins; 0 where its object is not known."""
        for known in self.data.known:
            if known.object is not None and known.object() is feed.data:
                return known.num_passes
        return 0

    def begin_step(self, order: Schedule, epoch: int) -> None:
        """Take note of the epoch of the step that follows."""
        known = self.data.known[self.at.data]
        known.num_passes = max(known.num_passes, epoch + 1)
        if self.at.order.get("epoch") != epoch or not self.at.steps_in_call:
            self.at = self.at._replace(order={"epoch": epoch, **order.describe(epoch)})

    def advance(self, epoch: int, following: tuple[int, int]) -> None:
        """Take note of an update, in `epoch`, which `following` comes after."""
        at = self.at
        self.at = at._replace(
            step=at.step + 1,
            steps_in_call=at.steps_in_call + 1,
            last_epoch=epoch,
            epoch=following[0],
            step_in_epoch=following[1],
        )

    def leave(self, *, broken: bool) -> None:
        """End a call of run.steps, `broken` where the script left it: a run that is resumed there goes on with it."""
        at = self.at
        within = self._epoch is not None
        self.at = at._replace(
            is_open=broken,
            is_after=True,
            call=at.call + (within and not broken),
            plain=at.plain + (not within and not broken),
        )

    @property
    def is_in_epochs(self) -> bool:
        """Whether the script is in a loop over run.epochs."""
        return self._epoch is not None

    @property
    def completed(self) -> Bookmark:
        """Where the run is when the code after the call has ended."""
        if self._epoch is None:
            return self.at._replace(plain=self.at.plain + self.at.is_open, is_open=False, is_after=False)
        return self.at._replace(outer=self._epoch + 1, call=0, is_open=False, is_after=False)

    def end_of(self, total: int | None) -> int | None:
        """Return the step at which the run ends, for all that is known, where the present call makes `total` steps."""
        if total is None:
            return None
        left = self._num_epochs - self._epoch if self._epoch is not None and self._call == 1 else 1
        return self.at.step - self.at.steps_in_call + total * left

    # --- going on ---------------------------------------------------------------------------------------------------

    def _following(self, place: int, number: int, order: Schedule) -> Following:
        at = self.at
        if self._epoch is None and not self._is_used:
            return self._following_unused(place, number, order)
        if at.outer is not None and self._epoch is None and at.call and at.is_open:
            raise UsageError(
                f"the run was interrupted in a loop over several data sets, after {at.step} steps, and run.epoch does "
                f"not say in which. {_ADVICE}"
            )
        ended = at.call if at.outer is not None else int(at.is_after and not at.is_open)
        if self._epoch is not None and place < ended:
            return Following.FINISHED
        if at.is_open or (self._epoch is None and ended):  # it may be longer now
            self._check_same(number, order)
            return Following.INTERRUPTED
        if at.step and (self._epoch is None or self._epoch > 0):
            self._check_same(number, order, among_others=True)
        return Following.NEW

    def _following_unused(self, place: int, number: int, order: Schedule) -> Following:
        at = self.at
        if at.outer is None and at.loop == 0 and place == 0 and at.plain + at.is_open <= 1:
            if not at.step:
                return Following.NEW
            self._check_same(number, order)
            self._may_replay = not at.is_open and not at.is_after
            return Following.INTERRUPTED
        raise UsageError(
            f"the run goes on after {at.step} steps, in epoch {self._epoch_now}, and its script calls "
            "run.steps as if it began: loops that had ended, and the code between them, would run again, or steps be "
            f"left out. {_ADVICE} Or use the place: `for epoch in range(run.epoch, E):`, `while run.step_index < N:`."
        )

    def _check_same(self, number: int, order: Schedule, *, among_others: bool = False) -> None:
        """Raise CheckpointError where the data are not those with which the run was interrupted."""
        at, known = self.at, self.data.known
        if number != at.data and not (among_others and number < self._num_known):
            ours, theirs = known[number].fingerprint, known[at.data].fingerprint
            names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            listed = "; ".join(f"{name}: {ours.get(name)}, was {theirs.get(name)}" for name in names)
            raise CheckpointError(
                f"the run was interrupted in a loop over other data ({listed}). Go on with the same data set; for "
                "weights alone, model.load_state_dict(lightwork.load(path)) before distribute."
            )
        if number != at.data or not at.order:
            return
        epoch = at.order["epoch"]
        ours = {"epoch": epoch, **order.describe(epoch)} if isinstance(epoch, int) else {}
        if ours != at.order:
            listed = "; ".join(f"{name}: {ours.get(name)}, was {at.order[name]}" for name in at.order)
            raise CheckpointError(
                f"the samples of epoch {epoch} do not come as they did when the run was interrupted ({listed}). Pass "
                "the same shuffle=, order= or sampler. A sampler that draws from a generator of its own can not be "
                "resumed: leave it to shuffle=True, or give the ids by order=, a function of the epoch."
            )
