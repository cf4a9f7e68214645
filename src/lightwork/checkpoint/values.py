"""State dicts of any object, as JSON with the tensors taken out: what `run.keep` saves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lightwork.errors import CheckpointError

#: A key that no state dict uses for itself.
_KIND = "__lightwork__"

_ADVICE = "Keep objects whose state_dict() holds tensors, numbers, strings and containers of them."


def take_apart(value: Any, tensors: dict[str, torch.Tensor], path: str) -> Any:
    """Return `value` as JSON; its tensors go into `tensors`, each under a number, and where it was found.

    Raises: CheckpointError for a value that is neither a container, a number, a string, None, an array nor a tensor.
    """
    if isinstance(value, torch.Tensor):
        return {_KIND: "tensor", "name": _put(_plain(value, path), tensors, path)}
    if isinstance(value, np.ndarray):
        return {_KIND: "array", "name": _put(_tensor_of(value, path), tensors, path)}
    if isinstance(value, np.generic):
        return take_apart(value.item(), tensors, path)
    if isinstance(value, dict):
        items = [
            [take_apart(k, tensors, f"{path}.key{i}"), take_apart(v, tensors, f"{path}.{k}")]
            for i, (k, v) in enumerate(value.items())
        ]
        return {_KIND: "dict", "items": items}
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = next(t.__name__ for t in (list, tuple, set, frozenset) if isinstance(value, t))
        return {_KIND: kind, "items": [take_apart(v, tensors, f"{path}.{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"{path} is a {type(value).__name__}, which can not be saved without pickle. {_ADVICE}")


def put_together(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return what `take_apart` was given."""
    if not isinstance(value, dict):
        return value
    kind = value[_KIND]
    if kind == "tensor":
        return tensors[value["name"]]
    if kind == "array":
        return tensors[value["name"]].numpy()
    if kind == "dict":
        return {put_together(k, tensors): put_together(v, tensors) for k, v in value["items"]}
    containers: dict[str, type[list[Any]] | type[tuple[Any, ...]] | type[set[Any]] | type[frozenset[Any]]] = {
        "list": list,
        "tuple": tuple,
        "set": set,
        "frozenset": frozenset,
    }
    return containers[kind](put_together(v, tensors) for v in value["items"])


def _put(tensor: torch.Tensor, tensors: dict[str, torch.Tensor], path: str) -> str:
    """Add a tensor under a name that no other has: paths alone may be equal, as of the keys 1 and "1"."""
    name = f"{len(tensors)} {path}"
    tensors[name] = tensor
    return name


def _plain(value: torch.Tensor, path: str) -> torch.Tensor:
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        raise CheckpointError(f"{path} is a sparse or quantised tensor, or one without values. {_ADVICE}")
    return value.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _tensor_of(value: np.ndarray, path: str) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(value, order="C"))
    except TypeError as error:
        raise CheckpointError(f"{path} is an array of {value.dtype}, which no tensor can hold. {_ADVICE}") from error
