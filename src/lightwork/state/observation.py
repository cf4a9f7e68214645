"""What an optimizer does is observed: a few scratch steps, in two ways that must give the same bits.

    [Note: two ways to take a step]
    As the script would: a copy of the whole optimizer, with all its groups, steps.
    As a team does: for each parameter and step a new shadow, which another worker might have; nothing goes from step to
    step but the parameter, its state and the settings of its group.
    On small parameters of the same number of dimensions, with random gradients of several sizes. Where the bits, or the
    state, differ, the optimizer does something that a team can not: it wraps another one, reads several parameters at
    once, keeps something elsewhere. It is refused with what was seen. No name of a class decides.

A setting of a group that `step()` changes, such as a count of steps, is right if it changes in the same way whatever
the gradients are: every worker then lets it advance once a step.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import optim

from lightwork.errors import SpecError
from lightwork.random import RandomState
from lightwork.state.optimizers import Optimizers, is_elementwise, should_fuse
from lightwork.state.shadow import bare_step, shadow_of, whole_copy

#: Scratch steps. What an optimizer does every few steps only (Lookahead: 5 or 6) is to be among them.
_NUM_STEPS = 7
_NUM_STEPS_OF_KNOWN = 3

#: Parameters of a group that are tried: two of a shape, so that what is done with all of one shape is seen.
_MOST_OF_GROUP = 6
_MOST_OF_SHAPE = 2

#: The largest size of a dimension of a scratch parameter.
_LARGEST = 16

#: Factors of the gradients, in turn: what happens above or below a limit only is to happen.
_SIZES = (1.0, 1e-3, 1e3)

#: What torch notes on an optimizer, which is no state.
_NOTES = {
    *("_opt_called", "_step_count", "_zero_grad_profile_name"),
    *("_warned_capturable_if_run_uncaptured", "_need_device_dtype_check_for_fused"),
}

#: What a setting that is off is set to, to see what it does.
_SWITCHED_ON = 0.5

#: Settings that choose an implementation.
_IMPLEMENTATIONS = ("foreach", "fused", "capturable", "differentiable")

Settings = dict[str, Any]


@dataclass(frozen=True)
class Observed:
    """What was seen of a group."""

    entries: frozenset[str] = frozenset()  #: of the state of a parameter, after the last scratch step
    num_steps: int = 1  #: until all of them were there
    counts: bool = False  #: whether step() changes settings of the group
    is_restless: bool = False  #: whether step() changes a parameter that has no gradient
    switches: Mapping[str, object] = field(default_factory=dict)  #: values with which, set later, there is more state


@dataclass
class _Trial:
    """A parameter that is tried, in both ways."""

    group: int  #: its number
    whole: torch.Tensor
    alone: torch.Tensor
    state: dict[str, Any] = field(default_factory=dict)  #: of `alone`


def observe(optimizers: Optimizers, device: torch.device, *, anew: bool = False) -> dict[int, Observed]:
    """Return what is seen of each group; see [Note: two ways to take a step].

    With `anew`, whatever state there is already. Nothing of the script's is written, and no random number is drawn.

    Raises: SpecError, with what was seen, for an optimizer that a team can not share.
    """
    found: dict[int, Observed] = {}
    for member in optimizers.members:
        _refuse_without_groups(member)
        found |= _Observation(optimizers, member, device, anew=anew).look()
    return found


class _Observation:
    """The scratch steps of one optimizer."""

    def __init__(self, optimizers: Optimizers, member: optim.Optimizer, device: torch.device, *, anew: bool) -> None:
        self._member = member
        self._name = type(member).__name__
        self._groups = list(optimizers.of_member(member))
        stand_ins: dict[torch.Tensor, torch.Tensor] = {}
        self._trials: list[_Trial] = []
        chosen: dict[int, list[torch.Tensor]] = {number: [] for number in self._groups}
        generator = torch.Generator().manual_seed(0)
        for number in self._groups:
            for parameter in optimizers.group(number)["params"]:
                stand_ins[parameter] = torch.zeros(_small(parameter.shape), dtype=torch.float32, device=device)
            for parameter in _choose(optimizers.group(number)["params"]):
                value = torch.randn(_small(parameter.shape), generator=generator, dtype=torch.float32)
                whole = stand_ins[parameter].copy_(value)
                state = {} if anew else _small_state(member, parameter, device)
                self._trials.append(_Trial(number, whole, whole.clone(), state))
                chosen[number].append(whole)
        self._whole = whole_copy(member, stand_ins)
        self._pristine = whole_copy(member, stand_ins)  # what shadows are made of
        on_gpu = device.type == "cuda"
        for number, group in zip(self._groups, self._whole.param_groups, strict=True):
            group["params"][:] = chosen[number]
            if should_fuse(member, group, on_gpu=on_gpu):
                group["fused"] = True
        for trial in self._trials:
            if trial.state:
                self._whole.state[trial.whole] = copy.deepcopy(trial.state)
        # Groups as the team sees them: what is in the script's own.
        self._settings: dict[int, Settings] = {
            number: _settings_of(group) for number, group in zip(self._groups, self._pristine.param_groups, strict=True)
        }
        self._attributes = _noted(vars(self._whole))
        self._generator = generator

    def look(self) -> dict[int, Observed]:
        """Take the steps and return what was seen of each group."""
        if not self._trials:
            return {number: Observed() for number in self._groups}
        num_steps = _NUM_STEPS_OF_KNOWN if is_elementwise(self._member) else _NUM_STEPS
        first_seen: dict[int, dict[str, int]] = {number: {} for number in self._groups}
        before = dict(self._settings)
        for step in range(num_steps):
            for trial in self._trials:
                gradient = torch.randn(trial.whole.shape, generator=self._generator, dtype=torch.float32)
                trial.whole.grad = torch.empty_like(trial.whole).copy_(gradient * _SIZES[step % len(_SIZES)])
                trial.alone.grad = trial.whole.grad.clone()
            self._step_whole()
            self._step_alone()
            self._compare(step)
            for trial in self._trials:
                for name in (name for name, value in trial.state.items() if value is not None):
                    first_seen[trial.group].setdefault(name, step + 1)
        self._refuse_state_elsewhere()
        restless = self._restless()
        return {
            number: Observed(
                entries=frozenset(first_seen[number]),
                num_steps=max(first_seen[number].values(), default=1),
                counts=not _same(before[number], self._settings[number]),
                is_restless=number in restless,
                switches=self._switches(number),
            )
            for number in self._groups
        }

    def _restless(self) -> set[int]:
        """Return the groups in which a step changes a parameter that has no gradient: a decay of weights may."""
        trials = {trial.group: trial for trial in self._trials}.values()
        before = [trial.whole.clone() for trial in trials]
        for trial in trials:
            trial.whole.grad = None
        with contextlib.suppress(Exception), torch.no_grad():  # what needs a gradient changes nothing without
            bare_step(self._member)(self._whole)
        return {trial.group for trial, then in zip(trials, before, strict=True) if not _same(trial.whole, then)}

    def _switches(self, number: int) -> dict[str, object]:
        """Return the settings that are off, and with which a parameter gets more state when they are set later."""
        found: dict[str, object] = {}
        tried = [trial for trial in self._trials if trial.group == number]
        if not tried:
            return found
        trial, settings = tried[0], self._settings[number]
        for name in (n for n, value in settings.items() if value in (0, False) and n not in _IMPLEMENTATIONS):
            value: object = True if settings[name] is False else _SWITCHED_ON
            group = {**copy.deepcopy(settings), name: value, "params": []}
            tensor = trial.alone.clone()
            tensor.grad = torch.ones_like(tensor)
            shadow = shadow_of(self._pristine, group, [tensor])
            shadow.state[tensor] = copy.deepcopy(trial.state)
            with contextlib.suppress(Exception), torch.no_grad():  # what can not be set later is no business of ours
                bare_step(self._member)(shadow)
                if any(v is not None and trial.state.get(n) is None for n, v in shadow.state[tensor].items()):
                    found[name] = value
        return found

    # --- the two ways -----------------------------------------------------------------------------------------------

    def _step_whole(self) -> None:
        before = RandomState.capture()
        try:
            with torch.no_grad():
                bare_step(self._member)(self._whole)
        except Exception as error:
            shapes = ", ".join(dict.fromkeys(str(tuple(trial.whole.shape)) for trial in self._trials))
            raise SpecError(
                f"{self._name} failed on scratch parameters of shapes {shapes}: {error}. Check its settings, that "
                f"step() can be called without arguments, and that its parameters have shapes that it supports."
            ) from error
        is_drawn = not _same(_as_dict(before), _as_dict(RandomState.capture()))
        before.restore()
        if is_drawn:
            self._refuse("draws random numbers in step(), which would be others on every worker")

    def _step_alone(self) -> None:
        changed: dict[int, Settings] = {}
        for trial in self._trials:
            shadow = shadow_of(self._pristine, {**self._settings[trial.group], "params": []}, [trial.alone])
            if trial.state:
                shadow.state[trial.alone] = trial.state
            before = RandomState.capture()
            try:
                with torch.no_grad():
                    bare_step(self._member)(shadow)
            except Exception as error:
                self._refuse(f"can not take the step of one parameter alone ({type(error).__name__}: {error})")
            finally:
                before.restore()
            odd = [key for key in shadow.state if key is not trial.alone]
            if odd:
                self._refuse(f"keeps state that belongs to no parameter: optimizer.state[{odd[0]!r}]")
            trial.state = dict(shadow.state.get(trial.alone, {}))
            settings = _settings_of(shadow.param_groups[0])
            settings["fused"] = self._settings[trial.group].get("fused")
            if "fused" not in self._settings[trial.group]:
                del settings["fused"]
            if not _same(changed.setdefault(trial.group, settings), settings):
                self._refuse("changes its parameter groups in step() in a way that depends on the gradients")
        self._settings |= changed

    def _compare(self, step: int) -> None:
        """Raise SpecError when the two ways have come to different ends."""
        after = f"after {step + 1} scratch steps" if step else "after one scratch step"
        for trial in self._trials:
            if not _same(trial.whole, trial.alone):
                inner = _inner_optimizers(vars(self._member))
                if inner:
                    refuse_wrapper(self._member, inner)
                self._refuse_state_elsewhere()
                self._refuse(
                    f"gives a parameter of shape {tuple(trial.whole.shape)} other values {after} when it steps alone: "
                    "it reads several parameters at once (a norm over all of them, or a stack), or keeps something "
                    "outside of optimizer.state[parameter]"
                )
            of_whole = self._whole.state.get(trial.whole, {})
            for name in sorted(of_whole.keys() ^ trial.state.keys()):
                where = "with the others" if name in of_whole else "alone"
                self._refuse(
                    f"keeps {name!r} for a parameter of shape {tuple(trial.whole.shape)} only when it steps {where}"
                )
            for name, value in of_whole.items():
                if not _same(value, trial.state[name]):
                    self._refuse(
                        f"gives {name!r} of a parameter of shape {tuple(trial.whole.shape)} another value {after} when "
                        "it steps alone: it keeps the state of several parameters together"
                    )
        for number, group in zip(self._groups, self._whole.param_groups, strict=True):
            settings = self._settings[number]
            name = next((n for n in settings if n != "fused" and not _same(settings[n], group.get(n))), None)
            if name is not None:
                self._refuse(f"changes {name!r} of its parameter groups in step() otherwise when a parameter is alone")

    # --- refusals ---------------------------------------------------------------------------------------------------

    def _refuse_state_elsewhere(self) -> None:
        odd = [key for key in self._whole.state if not isinstance(key, torch.Tensor)]
        if odd:
            self._refuse(f"keeps state that belongs to no parameter: optimizer.state[{odd[0]!r}]")
        before, now = self._attributes, _noted(vars(self._whole))
        changed = sorted(name for name in before.keys() | now.keys() if not _same(before.get(name), now.get(name)))
        if changed:
            self._refuse(f"changes its attribute {changed[0]!r} in step(), which is state that no worker could share")

    def _refuse(self, what: str) -> NoReturn:
        raise SpecError(
            f"{self._name} can not be shared by a team: it {what}. A team takes the step parameter by parameter, each "
            "on any worker. Use an optimizer that keeps its state in optimizer.state[parameter] and treats each "
            "parameter by itself; to clip, pass clip_grad_norm= to distribute."
        )


def refuse_wrapper(optimizer: optim.Optimizer, inner: list[optim.Optimizer]) -> NoReturn:
    """Raise SpecError for an optimizer that has others inside."""
    names = ", ".join(type(one).__name__ for one in inner)
    given = "it" if len(inner) == 1 else "them in a list: distribute(model, [first, second])"
    raise SpecError(
        f"{type(optimizer).__name__} wraps {'another optimizer' if len(inner) == 1 else 'other optimizers'} ({names}), "
        f"whose steps a team takes parameter by parameter, so that nothing would call what is around. Pass {given}, "
        "without the wrapper."
    )


def _refuse_without_groups(optimizer: optim.Optimizer) -> None:
    """Raise SpecError for a wrapper without groups or state of its own: what is written there would be another's."""
    if "param_groups" in vars(optimizer) and "state" in vars(optimizer):
        return
    inner = _inner_optimizers(vars(optimizer))
    if inner:
        refuse_wrapper(optimizer, inner)
    raise SpecError(
        f"{type(optimizer).__name__} has no parameter groups or no state of its own. Pass the torch.optim.Optimizer "
        "that it is made of."
    )


def _inner_optimizers(value: object, depth: int = 2) -> list[optim.Optimizer]:
    if isinstance(value, optim.Optimizer):
        return [value]
    parts = tuple(value.values()) if isinstance(value, dict) else value
    if not depth or not isinstance(parts, list | tuple):
        return []
    found = [inner for part in parts for inner in _inner_optimizers(part, depth - 1)]
    return list({id(one): one for one in found}.values())


# --- small parameters -------------------------------------------------------------------------------------------------


def _choose(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    taken: dict[tuple[int, ...], int] = {}
    chosen: list[torch.Tensor] = []
    for parameter in parameters:
        shape = _small(parameter.shape)
        if parameter.numel() and taken.get(shape, 0) < _MOST_OF_SHAPE and len(chosen) < _MOST_OF_GROUP:
            taken[shape] = taken.get(shape, 0) + 1
            chosen.append(parameter)
    return chosen


def _small(shape: torch.Size) -> tuple[int, ...]:
    return tuple(min(size, _LARGEST) for size in shape)


def _small_state(optimizer: optim.Optimizer, parameter: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """Return state like that which an optimizer has already; none where it has other shapes than the parameter's."""
    small: dict[str, Any] = {}
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            if value.shape != parameter.shape:
                return {}
            small[name] = torch.zeros(_small(value.shape), dtype=value.dtype, device=device)
        else:
            small[name] = copy.deepcopy(value)
    return small


def _settings_of(group: Mapping[str, Any]) -> Settings:
    return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}


# --- comparing --------------------------------------------------------------------------------------------------------


def _noted(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of the attributes that may be state: numbers, text, tensors, and what is made of them."""
    left_out = {"param_groups", "state", "defaults", *_NOTES}
    found = {}
    for name, value in attributes.items():
        if name not in left_out and not name.startswith("_optimizer_") and _is_plain(value):
            found[name] = copy.deepcopy(value)
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.Tensor, np.ndarray))


def _same(one: object, other: object) -> bool:
    """Return whether two values are the same, to the bit; what is not a number is the same as itself."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        one, other = one.detach().cpu().contiguous(), other.detach().cpu().contiguous()
        return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return True
    return type(one) is type(other) and bool(one == other)


def _as_dict(state: RandomState) -> dict[str, object]:
    return {"torch": state.torch_state, "numpy": state.numpy_state, "python": state.python_state}
