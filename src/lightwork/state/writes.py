"""What the script has written of the weights, which the update alone writes.

PyTorch counts writes in place, but not those through `.data`, nor when a tensor is given other memory: so addresses are
compared, too, and a few elements of each weight.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import nn

from lightwork.device.base import Mark
from lightwork.errors import UsageError
from lightwork.spec.holdings import WORKING, Holdings
from lightwork.spec.layout import Layout
from lightwork.store.regions import Regions

#: How often a tensor was written in place.
_VERSION = operator.attrgetter("_version")


@final
class Writes:
    """The weights as they were when they were last legitimate."""

    def __init__(self, parameters: Sequence[nn.Parameter], holdings: Holdings, memory: Regions) -> None:
        """Begin with nothing: `accept` comes first."""
        self._parameters = parameters
        self._layout = holdings.layout
        self._device = memory.device
        self._stay_put = memory.units is None
        self._versions: list[int] = []
        self._addresses: list[int] = []
        self._samples = _Samples(holdings.layout, holdings, memory)
        self.accepted: Mark = None  #: when every weight had its value

    def accept(self, *, moved: bool = False) -> None:
        """Take every weight as it is now for legitimate, whoever wrote it; with `moved`, also where it lies."""
        self._versions = list(map(_VERSION, self._parameters))
        if moved:
            self._addresses = list(map(torch.Tensor.data_ptr, self._parameters)) if self._stay_put else []
        self.accept_values()

    def accept_values(self) -> None:
        """Take the values that an update has made for legitimate."""
        self._samples.take()
        self.accepted = self._device.mark()

    def check(self, when: str) -> None:
        """Raise UsageError when the script has written a weight in place since `accept`, or moved it."""
        if self._versions != list(map(_VERSION, self._parameters)):
            self._refuse(self._counted(), when)
        if self._stay_put and self._addresses != list(map(torch.Tensor.data_ptr, self._parameters)):
            places = zip(self._layout.parameters, self._parameters, self._addresses, strict=True)
            name = next(spec.name for spec, parameter, address in places if parameter.data_ptr() != address)
            raise UsageError(
                f"parameter {name} was given other memory {when} (by `.data = ...`, model.to(...), .half(), "
                "load_state_dict(assign=True) or the like), so that it would not be trained. Convert and move the "
                "model before lightwork.distribute; write values in `with run.edit(): parameter.copy_(...)`."
            )

    def check_values(self, when: str) -> None:
        """Raise UsageError when the script has written a weight through `.data` since `accept_values`."""
        if self._samples.differ():
            self._refuse(self._samples.changed(), when)

    def found(self) -> list[bool]:
        """Return of each weight whether the script has written it, in any way."""
        return [one or other for one, other in zip(self._counted(), self._samples.changed(), strict=True)]

    def _counted(self) -> list[bool]:
        return [p._version != version for p, version in zip(self._parameters, self._versions, strict=True)]

    def _refuse(self, written: Sequence[bool], when: str) -> None:
        raise UsageError(
            f"parameter {self._layout.parameters[written.index(True)].name} was written {when}. Weights are shared by "
            "all workers and written by the update alone: put other writes into `with run.edit():`."
        )


class _Samples:
    """A few elements of each working weight that stays in the host's memory."""

    def __init__(self, layout: Layout, holdings: Holdings, memory: Regions) -> None:
        self._regions: list[tuple[list[int], memoryview, Callable[[memoryview], tuple[int, ...]]]] = []
        self._then: list[tuple[int, ...]] = []
        self._num_parameters = len(layout.parameters)
        places: dict[str, list[tuple[int, int]]] = {}
        if memory.units is not None or holdings.weights_are_paged or holdings.shares_weights:
            return
        for index, (region, is_fetched, _) in enumerate(holdings.working_weights):
            first, end = layout.range_of(index)
            if not is_fetched:
                found = {first, (2 * first + end) // 3, (first + 2 * end) // 3, end - 1} if end > first else set()
                places.setdefault(region, []).extend((index, element) for element in sorted(found))
        for region, elements in places.items():
            size = 2 if region == WORKING else 4
            values = memory.region(region)
            bits = values[: len(values) // size * size].cast("H" if size == 2 else "I")
            if elements:
                at = [element for _, element in elements]
                # Of one place alone it would return no tuple.
                self._regions.append(([index for index, _ in elements], bits, operator.itemgetter(*at, at[0])))

    def take(self) -> None:
        """Remember them as they are."""
        self._then = [read(values) for _, values, read in self._regions]

    def differ(self) -> bool:
        """Return whether any is another one now."""
        return self._then != [read(values) for _, values, read in self._regions]

    def changed(self) -> list[bool]:
        """Return of each parameter whether one of its elements is another one now."""
        changed = [False] * self._num_parameters
        for then, (indices, values, read) in zip(self._then, self._regions, strict=True):
            for index, one, other in zip(indices, read(values), then, strict=False):
                changed[index] |= one != other
        return changed
