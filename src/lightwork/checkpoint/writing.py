"""Writing a checkpoint: while the team goes through its state, to the disk or first into memory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightwork.checkpoint import folder as folders
from lightwork.checkpoint.description import Description, to_values
from lightwork.checkpoint.draft import Draft
from lightwork.checkpoint.folder import MANIFEST, file_of
from lightwork.checkpoint.manifest import FORMAT, HASHES, write_manifest
from lightwork.checkpoint.tensors import TensorWriter, in_file_order
from lightwork.errors import CheckpointError
from lightwork.notice import notice
from lightwork.state.items import Item, Piece, Plain, windows
from lightwork.state.state import Meet, TrainedState


def save(
    path: Path,
    state: TrainedState,
    description: Description | None,
    meet: Meet,
    *,
    is_leader: bool,
    keep: int = 1,
    draft: Draft | None = None,
) -> str:
    """Write a checkpoint to the folder `path`, in place of one that is there; return what went wrong, if anything did.

    Every worker calls it and goes through the state; the one that has a `description` writes. The last `keep` stay.
    With a `draft` it is written there, and not put in its place.
    """
    problem = ""
    with state.reading("save", meet, is_leader=is_leader) as walk:
        model, aliases, rest = state.of_model()
        moments: list[Item] = [*state.of_optimizer()]
        files = {
            "model": in_file_order(model),
            "buffers": in_file_order(rest),
            "optimizer": in_file_order(moments),
        }
        pieces = walk.through(item for items in files.values() for item in items)
        if description is not None:

            def write(place: Callable[[str], Path]) -> dict[str, Any]:
                hashes = {
                    file_of(name): _write_file(place(file_of(name)), items, pieces, hashed=draft is None)
                    for name, items in files.items()
                }
                loss_scale = state.loss_scale(description.settings.position.step)
                return _with_rest(place, description, hashes, aliases, loss_scale)

            with _told(path) as problems:
                if draft is None:
                    with folders.replaced(path, keep=keep) as folder:
                        write_manifest(folder, write(folder.joinpath))
                else:
                    draft.begin(folders.replaced(path, keep=keep))
                    draft.manifest = write(draft.place)
            problem = "".join(problems)
        for _ in pieces:  # what the others still bring for one that reads
            pass
    return problem


def finish(draft: Draft, path: Path) -> str:
    """Write a draft to its folder, and put it in the place of `path`; return what went wrong, if anything did."""
    with _told(path) as problems, draft as folder:
        write_manifest(folder, {**draft.manifest, HASHES: draft.copy_to(folder)})
    return "".join(problems)


def size_of(state: TrainedState) -> int:
    """Return the bytes of the tensors of a checkpoint, but for those of kept objects."""
    model, _, rest = state.of_model()
    return sum(item.numel * item.dtype.itemsize for item in (*model, *rest, *state.of_optimizer()))


@contextlib.contextmanager
def _told(path: Path) -> Iterator[list[str]]:
    """Give the body a list, into which goes what went wrong in it."""
    problems: list[str] = []
    try:
        yield problems
    except CheckpointError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{path} could not be written ({error}). The checkpoint that was there is kept.")


def _write_file(path: Path, items: Sequence[Item], pieces: Iterator[Piece], *, hashed: bool = True) -> str:
    """Write a file of tensors, as they come, and return its SHA-256; unless `hashed`, that of nothing."""
    writer = TensorWriter(path, items, hashed=hashed)
    try:
        for item in items:
            for piece in pieces:
                writer.write(piece.read())
                if piece.end == item.numel:
                    break
        writer.close()
        return writer.sha256
    finally:
        writer.abandon()


def complete(path: Path, description: Description) -> None:
    """Write anew what a checkpoint says beside the trained state, if it is still the one that was saved."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("name") != description.name:
            return
        with folders.replaced(path) as folder:
            names = [file_of(name) for name in ("model", "buffers", "optimizer")]
            for name in names:
                _link(path / name, folder / name)
            hashes = {name: manifest[HASHES][name] for name in names}
            rest = manifest["aliases"], manifest["loss_scale"]
            write_manifest(folder, _with_rest(folder.joinpath, description, hashes, *rest))
    except (OSError, ValueError, CheckpointError) as error:
        notice(f"what changed after {path} was saved could not be added to it ({error}).")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _with_rest(
    place: Callable[[str], Path],
    description: Description,
    hashes: Mapping[str, str],
    aliases: Mapping[str, str],
    loss_scale: Sequence[float],
) -> dict[str, Any]:
    """Write the objects, and return the manifest; `hashes` are those of the files that are there."""
    tensors: dict[str, torch.Tensor] = {}
    manifest = {
        "format": FORMAT,
        **to_values(description, tensors),
        "loss_scale": list(loss_scale),
        "aliases": dict(aliases),
    }
    items = in_file_order(Plain(name, tensor) for name, tensor in tensors.items())
    kept = file_of("kept")
    hash_of_kept = _write_file(place(kept), items, (piece for window in windows(items) for piece in window))
    return {**manifest, HASHES: {**hashes, kept: hash_of_kept}}
