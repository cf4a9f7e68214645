"""Frozen values as JSON objects, and back."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from lightwork.errors import SpecError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def written(value: DataclassInstance) -> str:
    """Return a value as a JSON object, keys sorted."""
    return json.dumps(asdict(value), indent=2, sort_keys=True)


def fields_in(text: str, kind: type[DataclassInstance], name: str) -> dict[str, Any]:
    """Return the fields that `written` wrote of a value of this kind, which messages call `name`.

    Raises: SpecError when one is unknown.
    """
    values: dict[str, Any] = json.loads(text)
    unknown = set(values) - {f.name for f in fields(kind)}
    if unknown:
        raise SpecError(f"the {name} has fields that this version does not know: {', '.join(sorted(unknown))}.")
    return values
