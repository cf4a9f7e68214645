"""What goes on with a run beside its trained state, as JSON values and tensors: in a checkpoint, or for a newcomer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from lightwork.checkpoint.settings import Bookmark, Settings, Unfinished
from lightwork.checkpoint.values import put_together, take_apart
from lightwork.spec.spec import Spec


class Description(NamedTuple):
    """What a checkpoint says beside the trained state."""

    spec: Spec
    settings: Settings
    data_sets: list[dict[str, Any]]  #: those that the run has seen
    name: str  #: of this save, which no other has
    unfinished: Unfinished | None  #: the code in which it was saved, unless that has ended
    beside: Mapping[str, int]  #: steps of the script's other runs, by the names of their folders
    extra: Mapping[str, Any]  #: what modules keep beside tensors, by its name


def to_values(description: Description, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return a description as JSON values; its tensors go into `tensors`.

    Raises: CheckpointError for what no JSON and no tensor holds.
    """
    unfinished = description.unfinished
    redo = None if unfinished is None else unfinished.redo
    return {
        "spec": json.loads(description.spec.to_json()),
        **_settings(description.settings, tensors, ""),
        "name": description.name,
        "data_sets": description.data_sets,
        "is_finished": unfinished is None,
        "redo": None if redo is None else _settings(redo, tensors, "redo."),
        "beside": dict(description.beside),
        "extra": take_apart(dict(description.extra), tensors, "extra"),
        "obstacle": "" if unfinished is None else unfinished.obstacle,
    }


def from_values(values: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Description:
    """Return what `to_values` was given."""
    redo = None if values["redo"] is None else _settings_of(values["redo"], tensors)
    return Description(
        spec=Spec.from_json(json.dumps(values["spec"])),
        settings=_settings_of(values, tensors),
        data_sets=values["data_sets"],
        name=values["name"],
        unfinished=None if values["is_finished"] else Unfinished(redo, values["obstacle"]),
        beside=values["beside"],
        extra=put_together(values["extra"], tensors),
    )


def _settings(settings: Settings, tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, Any]:
    return {
        "position": settings.position._asdict(),
        "groups": [take_apart(group, tensors, f"{prefix}group{i}") for i, group in enumerate(settings.groups)],
        "kept": {name: take_apart(value, tensors, f"{prefix}{name}") for name, value in settings.kept.items()},
    }


def _settings_of(values: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Settings:
    return Settings(
        Bookmark(**values["position"]),
        [put_together(group, tensors) for group in values["groups"]],
        {name: put_together(value, tensors) for name, value in values["kept"].items()},
    )
