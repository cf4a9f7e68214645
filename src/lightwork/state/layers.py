"""Which modules of a model are its layers, and what is done with the activations of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from torch import nn

from lightwork.errors import SpecError
from lightwork.spec.spec import Activation

#: The forward of a module.
Forward = Callable[..., Any]


def layers_of(model: nn.Module) -> list[str]:
    """Return the names of a model's layers: the items of the ModuleList or Sequential with the most parameters in them.

    Of lists within each other the outermost counts. Without any, the model's children.
    """
    best: tuple[int, list[str]] = (0, [])
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > best[0]:
                best = (size, [f"{name}.{child}" if name else child for child, _ in module.named_children()])
    if best[1]:
        return best[1]
    return [name for name, child in model.named_children() if any(True for _ in child.parameters())]


def resolve(model: nn.Module, activations: str | Mapping[str, str], *, has_device: bool = False) -> dict[str, str]:
    """Return what is done with the activations of which module; `keep` is left out.

    Args:
        activations: one value for all layers (`layers_of`), or a value for each module by name.
        has_device: whether the model is trained on a device with a memory of its own.

    Raises: SpecError for an unknown value or module, modules within each other, and a value that can not be carried
    out here.
    """
    if not isinstance(activations, (str, Mapping)) or activations == "":
        raise SpecError(
            f"activations={activations!r} is neither a value nor a choice by module. The values are "
            f"{', '.join(get_args(Activation))}."
        )
    chosen = activations if isinstance(activations, Mapping) else dict.fromkeys(layers_of(model) or [""], activations)
    modules = dict(model.named_modules())
    for name, value in chosen.items():
        if value not in get_args(Activation):
            raise SpecError(f"activations={value!r} is not known. Choose one of {', '.join(get_args(Activation))}.")
        if name not in modules:
            near = ", ".join(list(modules)[1:6])
            raise SpecError(f"activations names {name!r}, which the model does not have. It has {near}, ...")
        if value == "offload" and not has_device:
            raise SpecError(
                f"activations='offload' moves what {name} saves from a device to host memory, and it is on a CPU "
                "already. Choose recompute, or int8."
            )
    for outer, value in chosen.items():
        inner = next((name for name in chosen if name != outer and (not outer or name.startswith(f"{outer}."))), None)
        if value != "keep" and inner is not None:
            raise SpecError(
                f"activations names {outer or 'the model'!r} and {inner!r}, which is inside it. Name one of them, or "
                f"the modules beside {inner!r} one by one."
            )
    return {name: value for name, value in chosen.items() if value != "keep"}
