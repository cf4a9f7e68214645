"""From the arguments of `distribute` and the command line to a spec and a plan. Pure: nothing is made or moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from types import FunctionType
from typing import Any

import torch
from torch import nn

from lightwork.errors import SpecError, UsageError
from lightwork.run.guard import name_of, refuse_global_hooks, refused_hook
from lightwork.spec.plan import SETTABLE, Plan
from lightwork.spec.spec import Spec, choose_micro_batch
from lightwork.state.layers import resolve
from lightwork.state.optimizers import Optimizers
from lightwork.team.environment import Environment


def check_arguments(model: object, optimizer: object) -> Optimizers:
    """Return the optimizers as one.

    Raises: UsageError when `model` and `optimizer` are not what `distribute` takes; SpecError for optimizers that can
    not be shared.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"distribute takes the model first, a torch.nn.Module, not {type(model).__name__}.")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UsageError(
            "the model is wrapped in DistributedDataParallel. Pass the plain module: lightwork takes DDP's place."
        )
    given: list[object] = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    members: list[torch.optim.Optimizer] = []
    for member in given:
        if not isinstance(member, torch.optim.Optimizer):
            raise UsageError(
                "distribute takes the optimizer second, a torch.optim.Optimizer or a list of them over disjoint "
                f"parameters, not {type(member).__name__}."
            )
        _check_methods(member)
        members.append(member)
    if not members:
        raise UsageError("distribute takes the optimizer second, and the list of optimizers is empty.")
    refuse_global_hooks()
    return Optimizers(members)


def _check_methods(optimizer: torch.optim.Optimizer) -> None:
    """Raise UsageError when something is to happen around the optimizer's step, which nobody calls."""
    for kind in ("pre", "post"):
        hooks = vars(optimizer).get(f"_optimizer_step_{kind}_hooks")
        if hooks:
            raise UsageError(refused_hook(kind, ", ".join(name_of(hook) for hook in hooks.values())))
    step = vars(optimizer).get("step")
    is_a_scheduler_s = isinstance(step, FunctionType) and "_wrapped_by_lr_sched" in vars(step)
    if step is not None and not is_a_scheduler_s:  # a scheduler's only notes that it was called
        raise UsageError(
            f"optimizer.step was replaced by {name_of(step)}. The team takes the step of the class piece by piece, so "
            "nothing would call it. Define step in a subclass of the optimizer; to clip, pass clip_grad_norm= to "
            "distribute."
        )


def settle(
    model: nn.Module,
    optimizers: Optimizers,
    arguments: Mapping[str, Any],
    plan: Plan,
    environment: Environment,
) -> tuple[Spec, Plan]:
    """Return the spec, and the plan as it is carried out: `plan` with what the call and the command line say.

    `arguments` are those of `distribute`, by name; the command line's settings take their place.

    Raises: SpecError when they are impossible.
    """
    asked = {**arguments, "device": arguments["device"] or _device_of(model), **_settings(environment)}
    modes = resolve(
        model,
        plan.activations if asked["activations"] is None else asked["activations"],
        has_device=asked["device"] != "cpu",
    )
    return _spec(asked, optimizers, modes), _plan(plan, environment, asked, modes)


def _settings(environment: Environment) -> Mapping[str, object]:
    for name in environment.settings:
        if name not in SETTABLE:
            raise SpecError(f"--set {name}=... names no field of the spec or the plan. They are {', '.join(SETTABLE)}.")
    return environment.settings


def _spec(asked: Mapping[str, Any], optimizers: Optimizers, modes: Mapping[str, str]) -> Spec:
    values = {f.name: asked[f.name] for f in fields(Spec) if f.name in asked}
    values["micro_batch"] = choose_micro_batch(values["global_batch"], values["micro_batch"])
    if isinstance(values["fp32_modules"], list):
        values["fp32_modules"] = tuple(values["fp32_modules"])
    values["int8_activations"] = tuple(name for name, mode in modes.items() if mode == "int8")
    return Spec(**values, optimizer=optimizers.describe(on_gpu=asked["device"] == "cuda"))


def _plan(plan: Plan, environment: Environment, asked: Mapping[str, Any], modes: Mapping[str, str]) -> Plan:
    values = {f.name: asked[f.name] for f in fields(Plan) if asked.get(f.name) is not None}
    values["activations"] = {name: mode for name, mode in modes.items() if mode != "int8"}
    return replace(plan, **{**values, "world_size": environment.world_size})


def _device_of(model: nn.Module) -> str:
    """Return the kind of device that a model is on."""
    kinds = {parameter.device.type for parameter in model.parameters()} - {"meta"}
    if len(kinds) > 1:
        raise SpecError(
            f"the model's parameters are on {' and '.join(sorted(kinds))}. Move the model to one device, or say "
            "device='cuda' for lightwork to do it."
        )
    return next(iter(kinds), "cpu")
