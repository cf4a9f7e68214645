"""Which of a model's parameters are trained, of what type and in which group; and what can not be trained is refused.

Under bf16 (and fp16 likewise) a trained parameter exists twice: the fp32 master that the optimizer updates, and the
bf16 working weight that the model computes with. Modules whose own parameters are all vectors (norms, scales) keep
fp32 working weights, because kernels of norms want them so, and they are small; so do modules named in
`fp32_modules`. A frozen parameter has no master.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from lightwork.errors import SpecError
from lightwork.spec.layout import ParameterSpec
from lightwork.spec.spec import Spec
from lightwork.state.optimizers import Optimizers, is_elementwise
from lightwork.state.sharing import overlaps_itself, refuse_shared_memory

#: Of working weights and gradients, by their name in the layout.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: The type of most working weights, by precision.
NARROW = {"bf16": "bfloat16", "fp16": "float16"}

_HALVES = (torch.float16, torch.bfloat16)


P = ParamSpec("P")
T = TypeVar("T")


def plain_name(name: str) -> str:
    """Return a name as in the model that was compiled: torch.compile puts a part of its own into it."""
    return name.replace("_orig_mod.", "")


def plainly(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function use parameters as they are, also those of a class that sees what scripts do with them."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    return call


def describe_parameters(
    model: nn.Module, optimizers: Optimizers, spec: Spec
) -> tuple[list[nn.Parameter], list[ParameterSpec]]:
    """Return the model's floating-point parameters, each once, and what the layout needs to know of them.

    Parameters of other types (quantised and frozen ones) stay with each worker, as they are.

    Raises: SpecError for parameters of a type that is not supported, trained parameters whose memory overlaps itself,
    and an optimizer with parameters of another model.
    """
    group_of = {p: number for number, group in enumerate(optimizers.groups) for p in group["params"]}
    for name, parameter in model.named_parameters():
        _check_supported(name, parameter, is_trained=parameter in group_of)
    refuse_shared_memory(model, group_of)
    most, fp32 = NARROW.get(spec.precision, "float32"), _fp32_parameters(model, spec.fp32_modules)
    parameters, specs = [], []
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        parameters.append(parameter)
        group = group_of.pop(parameter, None)
        whole = spec.clip_grad_adaptive is not None or (
            group is not None and not is_elementwise(optimizers.owner(group))
        )
        specs.append(
            ParameterSpec(
                name=plain_name(name),
                shape=tuple(parameter.shape),
                dtype="float32" if parameter in fp32 else most,
                group=group,
                whole=whole,
            )
        )
    if group_of:
        shapes = ", ".join(str(tuple(p.shape)) for p in list(group_of)[:3])
        raise SpecError(
            f"the optimizer has {len(group_of)} parameters that are not in the model (shapes {shapes}). "
            "Make the optimizer from model.parameters(), after the model has its final modules."
        )
    if not any(s.group is not None for s in specs):
        raise SpecError("the optimizer has no parameter of the model. Make it from model.parameters().")
    return parameters, specs


def refuse_unfinished(model: nn.Module) -> None:
    """Raise SpecError for lazy modules that have seen no batch, and for modules of TorchScript."""
    for name, module in model.named_modules():
        what = f"module {name}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise SpecError(
                f"{what} is a module of TorchScript (torch.jit.script or trace), "
                "whose parameters no Python object holds. Distribute the module that it was made of, and script it "
                "when it is trained."
            )
        if any(map(nn.parameter.is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
            raise SpecError(
                f"{what} is a lazy module ({type(module).__name__}) and has no shape yet. Run one batch through the "
                "model before distribute."
            )


def _check_supported(name: str, parameter: nn.Parameter, *, is_trained: bool) -> None:
    if parameter.device.type not in ("cpu", "meta", "cuda"):
        raise SpecError(
            f"parameter {name} is on {parameter.device}. This version trains on CPUs and CUDA devices: keep the model "
            "on one of these."
        )
    if parameter.is_floating_point() and parameter.dtype not in (torch.float32, *_HALVES):
        raise SpecError(f"parameter {name} is {parameter.dtype}. Convert the model with model.float().")
    if parameter.is_complex() and parameter.requires_grad:
        raise SpecError(f"parameter {name} is {parameter.dtype}. Keep real and imaginary parts as two parameters.")
    if parameter.layout is not torch.strided:
        raise SpecError(f"parameter {name} is sparse. Use a dense parameter.")
    if parameter.is_inference():
        raise SpecError(f"parameter {name} was made in torch.inference_mode(). Build the model outside of it.")
    if is_trained and overlaps_itself(parameter):
        raise SpecError(
            f"parameter {name} has elements that share their memory (shape {tuple(parameter.shape)}, strides "
            f"{parameter.stride()}), as expand() makes them. Give each its own: nn.Parameter(tensor.clone())."
        )


def _fp32_parameters(model: nn.Module, names: Sequence[str]) -> set[nn.Parameter]:
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            near = ", ".join(sorted(modules)[1:6])
            raise SpecError(f"fp32_modules names {name!r}, which the model does not have. It has {near}, ...")
    keep: set[nn.Parameter] = {p for name in names for p in modules[name].parameters()}
    for module in modules.values():
        own = list(module.parameters(recurse=False))
        if all(p.dim() <= 1 for p in own) or isinstance(module, nn.Bilinear):
            keep.update(own)
    return keep


def flattened(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a gradient as one dimension, in the order in which the parameter's elements lie in memory."""
    if gradient.is_contiguous() and parameter.is_contiguous():
        return gradient.view(-1)
    flat = torch.empty(gradient.numel(), dtype=gradient.dtype, device=gradient.device)
    like(flat, parameter).copy_(gradient)
    return flat


def like(flat: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return `flat` in the shape of `parameter` and, where these are dense (such as channels-last), its strides."""
    if parameter.is_contiguous() or not _is_dense(parameter):
        return flat.view(parameter.shape)
    return flat.as_strided(parameter.shape, parameter.stride())


def _is_dense(tensor: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def refuse_sparse_gradients(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise SpecError for an embedding that makes sparse gradients."""
    for name, module in modules:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise SpecError(f"module {name} makes sparse gradients (sparse=True). Leave sparse out.")


def clear_gradients(model: nn.Module) -> list[str]:
    """Clear the gradients that parameters have, as `zero_grad` does, and return the names of these parameters."""
    found = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    for parameter in model.parameters():
        parameter.grad = None
    return found
