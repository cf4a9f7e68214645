"""The optimizers of a script as one: their parameter groups, numbered through, and what is known of their classes.

Element-wise classes (a list of known ones) give the same bits on a block as on the whole parameter; any other gets
whole parameters. What the class keeps and does beside that is not known but observed: `observation`, `probe`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import optim

from lightwork.errors import SpecError

_ELEMENTWISE: tuple[type[optim.Optimizer], ...] = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.Adagrad,
    optim.RMSprop,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.Adadelta,
    optim.ASGD,
    optim.Rprop,
)
_FUSED: tuple[type[optim.Optimizer], ...] = (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad)
_FUSED_ON_GPUS = _FUSED[:3]
_REFUSED: dict[type[optim.Optimizer], str] = {
    optim.LBFGS: "it calls the loss several times an update",
    optim.SparseAdam: "it wants sparse gradients",
}


#: Of each setting of a group, by name, whether it is on.
Switches = tuple[tuple[str, object], ...]


@final
class Optimizers:
    """One optimizer, or several over disjoint parameters. What is asked for by group has the group's number."""

    def __init__(self, members: Sequence[optim.Optimizer]) -> None:
        """Raise SpecError when two of them have the same parameter, or one can not be shared by a team."""
        self.members = tuple(members)
        self._places = [(member, at) for member in self.members for at in range(len(member.param_groups))]
        for member in self.members:
            reason = next((why for cls, why in _REFUSED.items() if isinstance(member, cls)), None)
            if reason is not None:
                raise SpecError(
                    f"{type(member).__name__} can not train data-parallel: {reason}. Use AdamW, SGD or another."
                )
        owner: dict[torch.Tensor, optim.Optimizer] = {}
        for number, (member, _) in enumerate(self._places):
            for parameter in self.group(number)["params"]:
                if owner.setdefault(parameter, member) is not member:
                    raise SpecError(
                        f"{type(owner[parameter]).__name__} and {type(member).__name__} both have a parameter of shape "
                        f"{tuple(parameter.shape)}. Give each parameter to one optimizer."
                    )

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all of them, in order."""
        return [group for member in self.members for group in member.param_groups]

    def group(self, number: int) -> dict[str, Any]:
        """Return a parameter group."""
        member, at = self._places[number]
        group: dict[str, Any] = member.param_groups[at]
        return group

    def owner(self, number: int) -> optim.Optimizer:
        """Return the optimizer to which a group belongs."""
        return self._places[number][0]

    def numbers(self) -> range:
        """Return the numbers of the groups."""
        return range(len(self._places))

    def of_member(self, member: optim.Optimizer) -> Iterator[int]:
        """Yield the numbers of the groups of one of them."""
        return (number for number in self.numbers() if self.owner(number) is member)

    def state_of(self, parameter: torch.Tensor) -> Mapping[str, Any]:
        """Return the state that the script's optimizers have for a parameter, before the run or after; may be empty."""
        found = (member.state[parameter] for member in self.members if parameter in member.state)
        return next(found, {})

    def describe(self, *, on_gpu: bool = False) -> str:
        """Return the classes and the implementations that will be used, for the spec."""
        parts = []
        for member in self.members:
            kinds = sorted({implementation(member, group, on_gpu=on_gpu) for group in member.param_groups})
            parts.append(f"{type(member).__module__}.{type(member).__qualname__} ({', '.join(kinds)})")
        return " + ".join(parts)

    def hyper_parameters(self) -> tuple[object, ...]:
        """Return all settings of the groups, in order: what must be the same on every worker."""
        values: list[object] = []
        for group in self.groups:
            for name, value in group.items():
                if value is None or name == "params":  # else each None is asked whether it is a tensor, which is slow
                    continue
                if isinstance(value, (int, float, str, tuple, list)):
                    values.append(tuple(value) if isinstance(value, list) else value)
                elif isinstance(value, torch.Tensor):
                    values.append(value.item())
        return tuple(values)

    def switches(self) -> tuple[Switches, ...]:
        """Return of each setting whether it is on (not zero, False or None): what decides which state is kept."""
        return tuple(
            tuple((name, _is_on(value)) for name, value in group.items() if name != "params") for group in self.groups
        )


def is_elementwise(optimizer: optim.Optimizer) -> bool:
    """Return whether the optimizer's class is known to treat every element by itself."""
    return type(optimizer) in _ELEMENTWISE


def implementation(optimizer: optim.Optimizer, group: Mapping[str, Any], *, on_gpu: bool) -> str:
    """Return which of torch's implementations is used."""
    if group.get("fused") or should_fuse(optimizer, group, on_gpu=on_gpu):
        return "fused"
    by_itself = on_gpu and group.get("foreach") is None  # torch's choice there
    return "foreach" if group.get("foreach") or by_itself else "single"


def should_fuse(optimizer: optim.Optimizer, group: Mapping[str, Any], *, on_gpu: bool) -> bool:
    """Return whether a fused implementation is used that the user has not asked for."""
    return (
        type(optimizer) in (_FUSED_ON_GPUS if on_gpu else _FUSED)
        and group.get("fused") is None
        and not any(group.get(option) for option in ("foreach", "differentiable", "capturable"))
    )


def has_plain_adam_kernel(optimizer: optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether an update is nothing but torch's fused kernel of Adam or AdamW, with numbers as settings."""
    plain = isinstance(group.get("lr"), float) and all(isinstance(beta, float) for beta in group.get("betas", (None,)))
    return (
        plain
        and type(optimizer) in (optim.Adam, optim.AdamW)
        and implementation(optimizer, group, on_gpu=True) == "fused"
    )


def _is_on(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return tuple(map(_is_on, value))
    if isinstance(value, torch.Tensor):
        return bool(value.any())
    return value if isinstance(value, str) else bool(value)
