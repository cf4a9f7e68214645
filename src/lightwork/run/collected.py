"""What a loop body collects of each batch by name, and what it comes to: means, sums, values in the order of the data.

Numbers travel with the loss of a batch. Tensors and lists do not fit there: of a name that has them, everyone knows by
an empty record, and all meet to exchange them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, final

import numpy as np
import torch

from lightwork.checkpoint.values import take_apart
from lightwork.errors import CheckpointError, UsageError
from lightwork.spec.means import weighted_mean
from lightwork.spec.tree import combine

#: Of one batch by name: value and weight of what becomes a mean, the value alone of a sum, nothing for a `Part`.
Numbers = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Part:
    """One batch's part of what is no number."""

    is_sum: bool
    value: Any  #: a tensor on the host, or of what is gathered a list


@final
@dataclass
class Collected:
    """The values of one batch of `num_samples` samples; `call` is what collects them, for messages."""

    num_samples: int
    call: str
    numbers: dict[str, tuple[float, ...]] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)

    def add(self, name: str, value: float | torch.Tensor, weight: float | None) -> None:
        """Take a number that becomes a mean, weighted by the number of samples unless `weight` is given."""
        self._refuse_again(name, "add")
        self.numbers[name] = as_metric(name, value, self.num_samples if weight is None else weight)

    def sum(self, name: str, value: float | torch.Tensor) -> None:
        """Take a number or tensor that is summed."""
        self._refuse_again(name, "sum")
        if isinstance(value, torch.Tensor) and value.ndim:
            self.numbers[name] = ()
            self.parts[name] = Part(True, _taken(value))
            return
        number = value.detach().item() if isinstance(value, torch.Tensor) else value
        number = number.item() if isinstance(number, np.generic) else number
        if not isinstance(number, int | float):
            raise UsageError(
                f"{self.call}.sum({name!r}, ...) takes a number or a tensor, not {_named(value)}. To keep the values "
                f"of each sample, call {self.call}.gather."
            )
        self.numbers[name] = (number,)

    def gather(self, name: str, value: Any) -> None:
        """Take values that are put behind those of the batches before: rows of a tensor or array, or a list."""
        self._refuse_again(name, "gather")
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value if value.flags.writeable else value.copy())  # else torch warns
        if isinstance(value, list | tuple):
            kept: Any = [_taken(one) if isinstance(one, torch.Tensor) else one for one in value]
            self._check_can_travel(name, kept)
        elif isinstance(value, torch.Tensor) and value.ndim:
            kept = _taken(value)
        else:
            raise UsageError(
                f"{self.call}.gather({name!r}, ...) takes the values of a batch's samples, a tensor with rows or a "
                f"list, not {_named(value)}. For one number a batch call {self.call}.add, for one sample's [value]."
            )
        self.numbers[name] = ()
        self.parts[name] = Part(False, kept)

    def _check_can_travel(self, name: str, values: list[Any]) -> None:
        try:
            take_apart(values, {}, name)
        except CheckpointError as error:
            kinds = ", ".join(sorted({type(one).__name__ for one in values}))
            raise UsageError(
                f"{self.call}.gather({name!r}, ...) takes lists of numbers, texts, tensors and containers of them, "
                f"which travel to the other workers; here are {kinds}."
            ) from error

    def _refuse_again(self, name: str, method: str) -> None:
        if name in self.numbers:
            raise UsageError(
                f"{self.call}.{method}({name!r}, ...) was called twice for one batch, or after another call with "
                "this name. Choose another name, or put the values together first."
            )


def to_values(parts: Mapping[int, Mapping[str, Part]]) -> dict[int, dict[str, list[Any]]]:
    """Return the parts of some batches as containers and tensors, which can be packed."""
    return {index: {name: [part.is_sum, part.value] for name, part in of.items()} for index, of in parts.items()}


def from_values(values: Mapping[int, Mapping[str, Sequence[Any]]]) -> dict[int, dict[str, Part]]:
    """Return what `to_values` was given."""
    return {index: {name: Part(*part) for name, part in of.items()} for index, of in values.items()}


def as_metric(name: str, value: float | torch.Tensor, weight: float) -> tuple[float, float]:
    """Return a metric's value and weight as numbers.

    Raises: UsageError when they are not single numbers.
    """
    try:
        return _number(value), _number(weight)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"metric {name!r} is not a single number ({error}). Add one number a micro-batch, such as a mean."
        ) from error


def _number(value: float | torch.Tensor) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def combined(
    batches: Sequence[Numbers], exchange: Callable[[], Iterable[Mapping[int, Mapping[str, Part]]]]
) -> dict[str, Any]:
    """Return what all batches of a team come to, by name; the same on every worker.

    Args:
        batches: the numbers of every batch, in order.
        exchange: returns every worker's parts, by the batch's place in `batches`. Called where some batch has parts,
            on every worker.

    Raises: UsageError where batches do not go together.
    """
    parts: dict[int, Mapping[str, Part]] = {}
    if any(not record for numbers in batches for record in numbers.values()):
        for of_worker in exchange():
            parts.update(of_worker)
    names = dict.fromkeys(name for numbers in batches for name in numbers)
    found: dict[str, Any] = {}
    for name in names:
        records = [numbers.get(name) for numbers in batches]
        lengths = {len(record) for record in records if record is not None}
        present = [parts[index][name] for index, record in enumerate(records) if record is not None and not record]
        if len(lengths) > 1 or len({part.is_sum for part in present}) > 1:
            _refuse(name, "some batches gave it by another call (add, sum or gather), or as a number and as a tensor")
        if present:
            found[name] = _of_parts(name, present)
        elif lengths == {1}:
            found[name] = combine([None if r is None else r[0] for r in records], operator.add)
        else:
            found[name] = weighted_mean([(0.0, 0.0) if r is None else (r[0], r[1]) for r in records])
    return found


def _of_parts(name: str, parts: Sequence[Part]) -> Any:
    values = [part.value for part in parts]
    kinds = {type(value) for value in values}
    if kinds == {list}:
        return [one for value in values for one in value]
    if kinds != {torch.Tensor}:
        _refuse(name, "some batches gave a tensor and others a list")
    if len({value.dtype for value in values}) > 1:
        _refuse(name, f"its types differ: {', '.join(sorted({str(value.dtype) for value in values}))}")
    trailing = 0 if parts[0].is_sum else 1
    shapes = {tuple(value.shape[trailing:]) for value in values}
    if len(shapes) > 1:
        shown = ", ".join(map(str, sorted(shapes)[:4]))
        instead = "" if parts[0].is_sum else ". A list of one tensor a sample, list(value), may hold any shapes"
        _refuse(name, f"the batches' shapes differ{'' if parts[0].is_sum else ' behind the first'}: {shown}{instead}")
    return combine(values, operator.add) if parts[0].is_sum else torch.cat(values)


def _refuse(name: str, why: str) -> NoReturn:
    raise UsageError(f"the values of {name!r} can not become one: {why}. Give the same kind for every batch.")


def _taken(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of its own on the host, without a graph."""
    on_host = value.detach().cpu()
    # A view would keep all of what it is a view of.
    return on_host.clone() if on_host.untyped_storage().nbytes() > on_host.nbytes or on_host is value else on_host


def _named(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
