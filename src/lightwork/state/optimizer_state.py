"""The optimizers' state as a script knows it: `optimizer.state`, `state_dict()`, `load_state_dict()`.

During a run the state lies in the team's memory, and `optimizer.state` is a mapping that copies from there what is
asked for. After it, the mapping is an ordinary one, filled from there when it is first looked into: plain PyTorch goes
on with it, and a script that only ends pays nothing.
"""

from __future__ import annotations

import copy
import weakref
from collections import UserDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import optim

from lightwork.errors import SpecError, UsageError
from lightwork.state.items import SEPARATOR, Item, Moment
from lightwork.state.moments import Moments
from lightwork.state.shadow import whole_copy
from lightwork.state.weights import Weights

State = dict[str, Any]


class OptimizerState:
    """What the optimizers keep, by parameter, as a plain script would have it."""

    def __init__(
        self, weights: Weights, moments: Moments, *, is_shared_out: bool, settle: Callable[[], None] = lambda: None
    ) -> None:
        self._weights = weights
        self._index_of: dict[torch.Tensor, int] = {
            parameter: index for index, parameter in enumerate(weights.parameters)
        }
        self._moments = moments
        self._is_shared_out = is_shared_out
        self._settle = settle

    def after_the_run(self) -> OptimizerState:
        """Return the same for when everything is at home, without a tie to the engine."""
        return OptimizerState(self._weights, self._moments, is_shared_out=self._is_shared_out)

    def read(self, parameter: torch.Tensor) -> State:
        """Return a copy of a parameter's state; empty before its first update.

        Raises: UsageError where it lies with other workers.
        """
        self._refuse_where_shared_out()
        index = self._index_of.get(parameter)
        if index is None:
            return {}
        with torch.no_grad():
            self._settle()
            name, found = self._weights.layout.parameters[index].name, self._moments.entries_of(index)
            state: State = {}
            for entry in found.values():
                item = Moment(name, self._weights, self._moments, index, entry)
                value = _copy_of(item)
                state[entry.name] = item.in_python(value if entry.on_host else value.to(parameter.device))
        return state

    def has(self, parameter: torch.Tensor) -> bool:
        """Return whether a parameter has state. Raises: as `read`."""
        self._refuse_where_shared_out()
        index = self._index_of.get(parameter)
        return index is not None and bool(self._moments.entries_of(index))

    def _refuse_where_shared_out(self) -> None:
        if self._is_shared_out:
            raise UsageError(
                "the optimizer's state is shared out among workers (placement), and this one has a part of it. "
                "run.save() writes all of it, in the loop or after it; lightwork.distribute(resume=) reads it."
            )

    def take(self, member: optim.Optimizer, state_of: Callable[[torch.Tensor], Mapping[str, Any]]) -> None:
        """Make what `state_of` returns the state of the parameters of one optimizer. The leaders do.

        Raises: SpecError when an entry is missing, is not known, or has another shape; nothing is written then.
        """
        items: list[tuple[int, Mapping[str, Any]]] = []
        own = {parameter for group in member.param_groups for parameter in group["params"]}
        for index, parameter in enumerate(self._weights.parameters):
            if parameter in own and self._moments.entries_of(index, possible=True):
                given = {name: value for name, value in state_of(parameter).items() if value is not None}
                self._check(index, given)
                items.append((index, given))
        with torch.no_grad():
            self._settle()
            for index, state in items:
                self._moments.mark(index, state)
                for item, value in self._paired(index, state):
                    flat = value.reshape(-1)
                    for start, end in item.ranges():
                        item.write(start, end, flat[start:end])

    def loaded(self, member: optim.Optimizer, state_dict: Mapping[str, Any]) -> optim.Optimizer:
        """Return a copy of an optimizer that has loaded a state dict; its parameters are stand-ins, in order.

        Raises: as the class's own `load_state_dict`; SpecError for state that does not belong here.
        """
        parameters = _parameters_of(member)
        stand_ins = {
            parameter: torch.nn.Parameter(torch.empty(0, dtype=torch.float32, device=parameter.device))
            for parameter in parameters
        }
        whole = whole_copy(member, stand_ins)
        whole.load_state_dict(dict(state_dict))
        for stand_in, parameter in zip(_parameters_of(whole), parameters, strict=True):
            index = self._index_of.get(parameter)
            state = {k: v for k, v in whole.state.get(stand_in, {}).items() if v is not None}
            if index is not None and self._moments.entries_of(index, possible=True):
                self._check(index, state)
        return whole

    def take_loaded(self, member: optim.Optimizer, whole: optim.Optimizer) -> None:
        """Make the state that a copy has `loaded` that of the team. The leaders do."""
        stand_ins = dict(zip(_parameters_of(member), _parameters_of(whole), strict=True))
        self.take(member, lambda parameter: whole.state.get(stand_ins[parameter], {}))

    def _check(self, index: int, state: Mapping[str, Any]) -> None:
        spec, possible = self._weights.layout.parameters[index], self._moments.entries_of(index, possible=True)
        needed = {entry.name for entry in possible.values() if not entry.comes_later} if state else set()
        for name in sorted((state.keys() - possible.keys()) | (needed - state.keys())):
            raise SpecError(
                f"the optimizer's state for {spec.name} has {'also' if name in state else 'no'} {name!r}; its class "
                f"keeps {', '.join(possible)} with the settings that it has. Make the optimizer anew, or load state "
                "that belongs to it."
            )
        for item, value in self._paired(index, state):
            if value.numel() != item.numel:
                entry = item.name.rpartition(SEPARATOR)[2]
                raise SpecError(
                    f"the optimizer's state {entry!r} for {spec.name} has {value.numel()} elements, where {item.numel} "
                    "are expected. Make the optimizer anew, or load state that belongs to it."
                )

    def _paired(self, index: int, state: Mapping[str, Any]) -> Iterator[tuple[Item, torch.Tensor]]:
        name, possible = self._weights.layout.parameters[index].name, self._moments.entries_of(index, possible=True)
        for entry, value in state.items():
            yield Moment(name, self._weights, self._moments, index, possible[entry]), torch.as_tensor(value)


def state_dict_of(member: optim.Optimizer, states: Mapping[torch.Tensor, State]) -> dict[str, Any]:
    """Return an optimizer's state dict, as its class makes it, of the state of each parameter that has any."""
    stand_ins: dict[torch.Tensor, torch.Tensor] = {
        parameter: torch.nn.Parameter(torch.empty(0, dtype=torch.float32)) for parameter in _parameters_of(member)
    }
    whole = whole_copy(member, stand_ins)
    whole.state.update((stand_ins[parameter], states[parameter]) for parameter in stand_ins if parameter in states)
    return whole.state_dict()


def take_settings(member: optim.Optimizer, whole: optim.Optimizer) -> None:
    """Make the settings that a copy has loaded those of an optimizer. Every worker does."""
    for group, loaded in zip(member.param_groups, whole.param_groups, strict=True):
        parameters = group["params"]
        group.clear()
        group.update(loaded, params=parameters)


def _parameters_of(optimizer: optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _copy_of(item: Item) -> torch.Tensor:
    whole = torch.empty(item.shape, dtype=item.dtype)
    for start, end in item.ranges():
        whole.view(-1)[start:end].copy_(item.read(start, end))
    return whole


class _ReadOnly(dict[str, Any]):
    """A parameter's state, which can not be changed here."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise UsageError(_WRITTEN)

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = _refuse


_WRITTEN = (
    "optimizer.state was written during a run, which would not reach the team's memory. Write it with "
    "optimizer.load_state_dict(), which every worker calls, between two steps; or after run.close()."
)


class _Handed:
    """A copy that was handed out. It is not kept; a tensor that shares its count of writes is, without any memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._ref = weakref.ref(tensor)
        self._witness = tensor.detach()
        self._witness.data = tensor.new_empty(0)
        self._version = tensor._version

    @property
    def is_alive(self) -> bool:
        return self._ref() is not None

    @property
    def is_written(self) -> bool:
        return self._witness._version != self._version


class LiveState(Mapping[torch.Tensor, State]):
    """`optimizer.state` during a run: copies of what the team's memory has."""

    def __init__(self, access: OptimizerState, member: optim.Optimizer) -> None:
        self._access = access
        self._parameters = _parameters_of(member)
        self._handed: list[_Handed] = []

    def __getitem__(self, parameter: torch.Tensor) -> State:
        state = _ReadOnly(self._access.read(parameter))
        if not state and not any(parameter is own for own in self._parameters):
            raise KeyError(parameter)
        self._handed += [_Handed(value) for value in state.values() if isinstance(value, torch.Tensor)]
        return state

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (parameter for parameter in self._parameters if self._access.has(parameter))

    def __len__(self) -> int:
        return sum(map(self._access.has, self._parameters))

    def __contains__(self, parameter: object) -> bool:
        return any(parameter is own for own in self._parameters) and self._access.has(parameter)  # type: ignore[arg-type]

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise UsageError(_WRITTEN)

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = _refuse

    def check_unwritten(self) -> None:
        """Raise UsageError when a tensor that was handed out has been written, also if it is no more."""
        if self._handed:
            if any(handed.is_written for handed in self._handed):
                raise UsageError(_WRITTEN)
            self._handed = [handed for handed in self._handed if handed.is_alive]

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[torch.Tensor, State]:
        """Return an ordinary one, of the parameters' copies."""
        plain: dict[torch.Tensor, State] = defaultdict(dict)
        for parameter, state in self.items():
            plain[copy.deepcopy(parameter, memo)] = dict(state)
        return plain

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain, ([(parameter, dict(state)) for parameter, state in self.items()],)


def _plain(items: list[tuple[torch.Tensor, State]]) -> dict[torch.Tensor, State]:
    plain: dict[torch.Tensor, State] = defaultdict(dict)
    plain.update(items)
    return plain


class GivenBack(UserDict[torch.Tensor, State]):
    """`optimizer.state` after a run: an ordinary one that is filled when it is first looked into."""

    def __init__(self, live: LiveState) -> None:
        self._live: LiveState | None = live
        self._data: dict[torch.Tensor, State] = {}

    @property
    def data(self) -> dict[torch.Tensor, State]:  # type: ignore[override]
        """What a UserDict is made of."""
        live, self._live = self._live, None
        if live is not None:
            try:
                self._data = {parameter: dict(state) for parameter, state in live.items()}
            except UsageError:
                self._live = live
                raise
        return self._data

    def __missing__(self, parameter: torch.Tensor) -> State:
        return self.data.setdefault(parameter, {})

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[torch.Tensor, State]:
        return _plain([(copy.deepcopy(p, memo), copy.deepcopy(state, memo)) for p, state in self.items()])

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain, (list(self.items()),)
