"""Parameters whose weights are elsewhere, used by the script outside the loop and outside a forward of the model.

Where a weight lives with its owner (zero3), or is offloaded from a device, its place here is empty between two uses: to
read it would give zeros, or end the process. So such a parameter is of a class that sees what is done with it:

    metadata        as ever
    read            its value is brought first; what would lie in its memory is a copy, because that is emptied again
    written         refused by name
    copied, saved   a plain parameter with its value

Inside the loop and inside a forward the same is brought by the mode of torch functions (`fetching`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from lightwork.errors import UsageError


class Bringer(Protocol):
    """Who brings weights."""

    @property
    def brings(self) -> bool:
        """Whether all that torch functions read is brought now."""

    def parameters_of(self, value: Any) -> Sequence[int]:
        """Return the parameters in whose memory a value lies: a tensor, or those of a list."""

    def refusal(self, parameter: int, why: str) -> str:
        """Say what is not possible with a parameter."""

    def check_open(self, parameter: int) -> None:
        """Raise UsageError when nothing is brought any more."""

    def bring_arguments(self, arguments: Iterable[Any]) -> None:
        """Return when the weights among the arguments of a torch function are here."""

    def active(self) -> AbstractContextManager[None]:
        """Bring what torch functions read."""


class AwayParameter(nn.Parameter):
    """A parameter whose weights come and go; the class of a run is a subclass with its `bringer`."""

    bringer: Bringer

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func` once what it reads is here."""
        kwargs = kwargs or {}
        bringer, name = cls.bringer, _name_of(func)
        with torch._C.DisableTorchFunctionSubclass():
            if bringer.brings or name in _METADATA:
                return func(*args, **kwargs)
            away = bringer.parameters_of([*args, *kwargs.values()])
            if not away:
                return func(*args, **kwargs)
            if name in _MEMORY:
                raise UsageError(bringer.refusal(away[0], f"has no memory that {name} could show"))
            written = bringer.parameters_of([*args[:1], kwargs.get("out")])
            if written and (_writes(name) or "out" in kwargs):
                raise UsageError(bringer.refusal(written[0], "was written outside the loop"))
            bringer.check_open(away[0])
        with bringer.active():
            with torch._C.DisableTorchFunctionSubclass():
                bringer.bring_arguments([*args, *kwargs.values()])  # for attributes that are views, too, such as .T
            result = func(*args, **kwargs)
            return _apart(result, bringer)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Return a plain parameter."""
        if id(self) not in memo:
            memo[id(self)] = self._plain()
        copied: nn.Parameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be saved as a plain parameter."""
        return self._plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def _plain(self) -> nn.Parameter:
        return nn.Parameter(self.detach().clone(), self.requires_grad)


def class_for(bringer: Bringer) -> type[AwayParameter]:
    """Return the class of a run's parameters that come and go."""
    return type("Parameter", (AwayParameter,), {"bringer": bringer})


def _name_of(func: Callable[..., Any]) -> str:
    """Return the name of a torch function; of an attribute's getter or setter, with which it is."""
    name = func.__name__
    if name in ("__get__", "__set__", "__delete__"):
        attribute = func.__self__.__name__  # type: ignore[attr-defined]
        return attribute if name == "__get__" else f"{attribute}="
    return name


def _writes(name: str) -> bool:
    """Return whether a torch function writes its first argument."""
    return (name.endswith("_") and not name.startswith("__")) or name in ("__setitem__", *_IN_PLACE)


def _apart(result: Any, bringer: Bringer) -> Any:
    """Return a result with what lies in the memory of weights copied."""
    if isinstance(result, torch.Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            lies_there = bool(bringer.parameters_of(result)) and not isinstance(result, AwayParameter)
        return result.clone() if lies_there else result
    if isinstance(result, (tuple, list)) and any(isinstance(item, torch.Tensor) for item in result):
        return type(result)(_apart(item, bringer) for item in result) if type(result) in (tuple, list) else result
    return result


_IN_PLACE = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__")

#: What shows the memory itself, which is empty or about to be.
_MEMORY = frozenset(
    {"data", "data=", "numpy", "__array__", "__dlpack__", "untyped_storage", "storage", "share_memory_", "set_"}
    | {"_typed_storage", "pin_memory", "cuda_array_interface"}
)

#: What does not read values.
_METADATA = frozenset(
    {"shape", "dtype", "device", "layout", "ndim", "requires_grad", "requires_grad=", "grad", "grad=", "grad_fn"}
    | {
        "is_leaf",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_sparse",
        "is_quantized",
        "is_mkldnn",
        "is_mps",
        "is_xla",
        "is_xpu",
    }
    | {"_version", "_backward_hooks", "_backward_hooks=", "_post_accumulate_grad_hooks", "_post_accumulate_grad_hooks="}
    | {"itemsize", "nbytes", "names", "name", "output_nr", "_base", "_grad", "_cdata", "grad_dtype", "retains_grad"}
    | {"is_nested", "is_vulkan", "is_ipu", "is_maia", "is_mtia", "is_hpu", "volatile", "_python_dispatch"}
    | {"size", "dim", "numel", "nelement", "ndimension", "stride", "storage_offset", "element_size", "data_ptr"}
    | {"is_floating_point", "is_complex", "is_contiguous", "is_shared", "is_pinned", "is_inference", "get_device"}
    | {"requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "__len__", "__hash__"}
    | {"is_set_to", "is_same_size", "type", "has_names", "_is_view", "is_tensor", "is_signed", "is_conj", "is_neg"}
)
