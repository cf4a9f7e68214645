"""A checkpoint: a folder with a manifest and four tensor files.

    manifest.json           format, spec, position in the data, hyper-parameters, kept objects, aliases of tied tensors;
                            the SHA-256 of each of the other files, and of itself
    model.safetensors       the model's state dict: fp32 weights, buffers
    buffers.safetensors     buffers that are not in it
    optimizer.safetensors   "PARAMETER|ENTRY": the optimizer's state of each parameter
    kept.safetensors        tensors of the objects given to `run.keep`

It does not depend on how many workers wrote it. It is written while the team goes through its state, piece by piece,
and takes the place of an older one as a whole (`folder`). It is read piece by piece, too: `load` reads the manifest
and the objects, and leaves the tensors where they are until they are asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightwork.checkpoint import folder as folders
from lightwork.checkpoint import foreign
from lightwork.checkpoint.description import Description, from_values
from lightwork.checkpoint.folder import MANIFEST, TENSOR_FILES, file_of
from lightwork.checkpoint.manifest import FORMAT, HASHES, OWN_HASH, hash_of
from lightwork.checkpoint.settings import Settings
from lightwork.checkpoint.tensors import TensorFile, sha256_of
from lightwork.errors import CheckpointError, DamagedCheckpoint
from lightwork.spec.spec import Spec, differences
from lightwork.state.items import SEPARATOR
from lightwork.state.state import TrainedState

_OLDER = "Use an older one."


@dataclass(kw_only=True)
class Checkpoint(Mapping[str, Any]):
    """What `lightwork.load` returns: a mapping of the model's tensors by name, ready for `model.load_state_dict`.

    A tensor is read from the file when it is asked for. Everything else that a run needs to go on is in its attributes.
    """

    model: TensorFile
    buffers: TensorFile  #: those that are not in the model's state dict
    optimizer_file: TensorFile
    description: Description
    loss_scale: tuple[float, ...] = ()  #: of fp16: scale, steps since it changed, steps skipped
    folder: Path = Path()  #: where it lies
    hashes: Mapping[str, str] = field(default_factory=dict)  #: SHA-256 of its files, by their names

    def damage(self, first: int = 0, every: int = 1) -> str:
        """Read one in `every` of its files, from the `first` on; return what is damaged, or nothing."""
        for name, expected in list(self.hashes.items())[first::every]:
            try:
                found = sha256_of(self.folder / name)
            except OSError as error:
                return f"{name} of the checkpoint in {self.folder} can not be read ({error}). {_OLDER}"
            if found != expected:
                return (
                    f"the checkpoint in {self.folder} is damaged: {name} (its SHA-256 is {found[:12]}..., and was "
                    f"{expected[:12]}... when it was written). {_OLDER}"
                )
        return ""

    def __getitem__(self, name: str) -> Any:
        extra = self.description.extra
        return extra[name] if name in extra else self.model[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.model, *self.description.extra])

    def __len__(self) -> int:
        return len(self.model) + len(self.description.extra)

    @property
    def spec(self) -> Spec:
        """What the run was to do."""
        return self.description.spec

    @property
    def settings(self) -> Settings:
        """Where it was, and what code outside of its steps may have changed."""
        return self.description.settings

    @property
    def step(self) -> int:
        """Updates done when it was saved."""
        return self.settings.position.step

    @property
    def kept(self) -> Mapping[str, Any]:
        """What `run.keep` was given: plain values, and state dicts of objects."""
        return self.settings.kept

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The hyper-parameters of each parameter group."""
        return self.settings.groups

    @property
    def optimizer(self) -> dict[str, dict[str, torch.Tensor]]:
        """The state entries of each parameter that has any; all are read."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in self.optimizer_file.items():
            name, _, entry = key.rpartition(SEPARATOR)
            found.setdefault(name, {})[entry] = value
        return found


def load(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return the checkpoint in the folder `path`, or in the `checkpoint` folder of a run directory: a `Checkpoint`.

    Of what others have written (a file of torch.save, safetensors, a folder of torch.distributed.checkpoint or Hugging
    Face), the model's state dict.

    Raises: CheckpointError when there is none, or it is damaged.
    """
    _wait_until_written(path)
    if not (folders.exists(Path(path)) or folders.exists(Path(path) / "checkpoint")):
        weights = foreign.load_weights(Path(path))
        if weights is not None:
            return weights
    checkpoint = load_whole(path)
    damage = checkpoint.damage()
    if damage:
        raise DamagedCheckpoint(damage)
    return checkpoint


def load_whole(path: str | os.PathLike[str]) -> Checkpoint:
    """Return a checkpoint that lightwork has written in its own form. Its tensors are not verified yet.

    Raises: CheckpointError when there is none, or it is damaged.
    """
    _wait_until_written(path)
    folder = folders.find(Path(path))
    if not (folder / MANIFEST).exists() and folders.exists(folder / "checkpoint"):
        folder = folders.find(folder / "checkpoint")
    for name in (MANIFEST, *map(file_of, TENSOR_FILES)):
        if not (folder / name).exists():
            if name != MANIFEST:
                raise DamagedCheckpoint(f"the checkpoint in {folder} is damaged: {name} is missing. {_OLDER}")
            if foreign.is_there(folder):
                raise CheckpointError(
                    f"{folder} has no place in the data, which only run.save() without format= keeps. Begin with it "
                    "instead of going on: model.load_state_dict(lightwork.load(path)) before distribute, and "
                    "optimizer.load_state_dict(...)."
                )
            raise CheckpointError(
                f"{folder} is not a checkpoint: {name} is missing. Pass the folder given to run.save, "
                "or a run directory."
            )
    with _named(folder, MANIFEST):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {manifest['format']}; this version reads format {FORMAT}.")
        if manifest.pop(OWN_HASH) != hash_of(manifest):
            raise ValueError("it is not as it was written")
    files = {}
    for name in TENSOR_FILES:
        with _named(folder, file_of(name)):
            files[name] = TensorFile(folder / file_of(name), manifest["aliases"] if name == "model" else None)
    with _named(folder, MANIFEST):
        kept = dict(files["kept"])
        description = from_values(manifest, kept)
        return Checkpoint(
            model=files["model"],
            buffers=files["buffers"],
            optimizer_file=files["optimizer"],
            description=description,
            loss_scale=tuple(manifest["loss_scale"]),
            folder=folder,
            hashes=manifest[HASHES],
        )


def _wait_until_written(path: str | os.PathLike[str]) -> None:
    """Wait for a checkpoint that is on its way from memory to the disk."""
    for folder in (Path(path), Path(path) / "checkpoint"):
        folders.wait_until_written(folder)


@contextlib.contextmanager
def _named(folder: Path, name: str) -> Iterator[None]:
    """Raise CheckpointError, with the name of the file, for whatever its reading raises."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DamagedCheckpoint(f"the checkpoint in {folder} is damaged: {name} ({error}). {_OLDER}") from error


def check_fits(checkpoint: Checkpoint, spec: Spec, state: TrainedState) -> None:
    """Raise CheckpointError for a checkpoint of another spec, model or optimizer."""
    other = differences(spec, checkpoint.spec)
    if other:
        listed = "; ".join(f"{name} is {ours!r}, was {theirs!r}" for name, (ours, theirs) in other.items())
        raise CheckpointError(
            f"the checkpoint is of another spec: {listed}. Resume with the same settings; for its weights alone, "
            "model.load_state_dict(lightwork.load(path)) before distribute."
        )
    items, aliases, rest = state.of_model()
    shapes = {item.name: item.shape for item in items}
    shapes |= {alias: shapes[name] for alias, name in aliases.items()}
    has = shapes.keys() | state.extra.read().keys()
    for name in sorted(has ^ checkpoint.keys()):
        where = "the model has" if name in has else "the checkpoint has"
        raise CheckpointError(
            f"the checkpoint is of another model: only {where} {name!r}. Build the model as it was saved."
        )
    _check_shapes("model", shapes, checkpoint.model)
    buffers = {item.name: item.shape for item in rest}
    for name in sorted(buffers.keys() ^ checkpoint.buffers.keys()):
        where = "the model has" if name in buffers else "the checkpoint has"
        raise CheckpointError(
            f"the checkpoint is of another model: only {where} the buffer {name!r}. Build the model as it was saved."
        )
    _check_shapes("model", buffers, checkpoint.buffers)
    possible = {item.name: item for item in state.of_optimizer(possible=True)}
    saved = {name.rpartition(SEPARATOR)[0] for name in checkpoint.optimizer_file}
    needed = {
        name for name, item in possible.items() if name.rpartition(SEPARATOR)[0] in saved and not item.entry.comes_later
    }
    there = checkpoint.optimizer_file.keys()
    for name in sorted((needed - there) | (there - possible.keys())):
        where = "the optimizer keeps" if name in needed else "the checkpoint has"
        raise CheckpointError(
            f"the checkpoint is of another optimizer: only {where} {name!r}. Build the optimizer as it was saved."
        )
    _check_shapes("optimizer", {name: possible[name].shape for name in there}, checkpoint.optimizer_file)
    if len(checkpoint.groups) != len(state.groups()):
        raise CheckpointError(
            f"the checkpoint has {len(checkpoint.groups)} parameter groups, the optimizer {len(state.groups())}. "
            "Build the optimizer as it was saved."
        )


def _check_shapes(what: str, shapes: Mapping[str, tuple[int, ...]], file: TensorFile) -> None:
    for name, shape in shapes.items():
        if file.shape(name) != shape:
            raise CheckpointError(
                f"the checkpoint is of another {what}: {name} is {shape}, was {file.shape(name)}. "
                f"Build the {what} as it was saved."
            )


def restore(checkpoint: Checkpoint, state: TrainedState, *, is_leader: bool) -> None:
    """Write a checkpoint into the team's memory: every worker what is its own, the leaders the rest. Not a meeting."""
    optimizer = checkpoint.optimizer_file
    state.load(checkpoint.model, checkpoint.buffers, optimizer, optimizer, is_leader=is_leader)
    state.extra.write(checkpoint.description.extra)
    if is_leader:
        state.set_loss_scale(checkpoint.step, checkpoint.loss_scale)
    state.set_groups(checkpoint.groups)
