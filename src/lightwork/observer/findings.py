"""What differs between two starts of a script, and what is legal but probably not meant: told by notes.

Pure: notes in, findings out. Notes of two starts are compared in the order in which things are computed, and the first
difference is told: what comes after it is its consequence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

#: In place of the number of a late worker: the script runs in plain PyTorch.
PLAIN = -2

#: Losses are equal to rounding below this part of them.
_ROUNDING = 2e-4

#: What may be off plain PyTorch, as a part: of a loss, and of the norm of a weight.
_PLAIN_LOSS, _PLAIN_WEIGHT = 5e-3, 2e-2

#: Half a loss, as near as rounding, or random numbers, let it be.
_HALF, _HALF_OF_NOISY = 1e-3, 0.05


@dataclass(frozen=True)
class Finding:
    """One thing to look at."""

    kind: str  #: a word for programs
    text: str  #: a sentence
    where: str = ""  #: FILE:LINE of the user's, where it is known
    is_wrong: bool = True  #: else it is legal, and probably not meant

    def to_json(self) -> dict[str, object]:
        """Return it for programs."""
        return asdict(self)


@dataclass
class Micro:
    """What is known of a micro-batch."""

    batch: Record
    outputs: list[Record] = field(default_factory=list)
    gradients: dict[str, str] = field(default_factory=dict)
    loss: Record | None = None
    buffers: Record | None = None
    random: Record | None = None


@dataclass
class Notes:
    """What is known of one start of a script."""

    run: dict[str, Record] = field(default_factory=dict)  #: by the run's folder
    micros: dict[tuple[str, int, int], Micro] = field(default_factory=dict)  #: by run, step, index
    weights: dict[tuple[str, int], Record] = field(default_factory=dict)  #: by run and step, as the first worker has it
    steps: dict[tuple[str, int], Record] = field(default_factory=dict)
    sizes: dict[tuple[str, int], Record] = field(default_factory=dict)  #: losses, and sizes of weights, to rounding
    num_workers: int = 0

    @classmethod
    def read(cls, folder: Path) -> Notes:
        """Return those of a folder; empty where no worker came to an end."""
        notes = cls()
        for path in sorted(folder.glob("rank*.jsonl")):
            notes.num_workers += 1
            for line in filter(None, path.read_text(encoding="utf-8").splitlines()):
                notes._take(json.loads(line))
        return notes

    def _take(self, record: Record) -> None:
        run = str(record["run"])
        match record["kind"]:
            case "run":
                self.run.setdefault(run, record)
            case "weights":
                self.weights.setdefault((run, record["step"]), record)
            case "step":
                self.steps.setdefault((run, record["step"]), record)
            case "sizes":
                self.sizes.setdefault((run, record["step"]), record)
            case "batch":
                self.micros[run, record["step"], record["index"]] = Micro(record)
            case kind:
                micro = self.micros.get((run, record["step"], record["index"]))
                if micro is not None:
                    self._add(micro, kind, record)

    @staticmethod
    def _add(micro: Micro, kind: str, record: Record) -> None:
        match kind:
            case "output":
                micro.outputs.append(record)
            case "gradient":
                micro.gradients[f"{record['of']} {record['parameter']}"] = record["value"]
            case "loss":
                micro.loss = record
            case "buffers":
                micro.buffers = record
            case "random":
                micro.random = record


# --- two starts -------------------------------------------------------------------------------------------------------


def first_difference(one: Notes, other: Notes, how: str) -> Finding | None:
    """Return the first thing that differs; `how` says what is different of the other start, after "with"."""
    for run, record in one.run.items():
        if run not in other.run:
            return Finding("runs", f"the script makes the run {run} only without {how}.", record["where"])
    for run, step in sorted(one.weights, key=lambda key: (key[1], key[0])):
        theirs = other.weights.get((run, step))
        if step < 0:
            if theirs is not None and (name := _other_key(one.weights[run, step], theirs)):
                return Finding(
                    "start",
                    f"parameter {name} begins with other values {how}: they are drawn from no fixed seed. Call "
                    "torch.manual_seed(...) before the model is made.",
                    one.run[run]["where"],
                )
            continue
        for key in sorted(key for key in one.micros if key[0] == run and key[1] == step):
            if key in other.micros and (found := _of_micro(one.micros[key], other.micros[key], key, how)):
                return found
        if theirs is not None and (name := _other_key(one.weights[run, step], theirs)):
            return _of_update(one, other, (run, step), name, how)
    return None


def _of_micro(one: Micro, other: Micro, key: tuple[str, int, int], how: str) -> Finding | None:
    place = f"micro-batch {key[2]} of step {key[1]}"
    for found in (
        _of_data(one, other, place, how),
        _of_outputs(one, other, place, how),
        _of_loss(one, other, place, how),
        _of_random(one, other, place, how),
        _of_gradients(one, other, place, how),
    ):
        if found is not None:
            return found
    name = _other_key(one.buffers, other.buffers)
    if name:
        return Finding(
            "buffer",
            f"{place}: buffer {name} is left with another value {how}, though all outputs are "
            "the same: it is written outside of a forward, or by something that no output "
            "shows.",
        )
    return None


def _of_data(one: Micro, other: Micro, place: str, how: str) -> Finding | None:
    if one.batch["ids"] != other.batch["ids"]:
        return Finding(
            "order",
            f"{place} has other samples {how}: {one.batch['ids'][:4]} and "
            f"{other.batch['ids'][:4]}. The order comes from something that is not the same in "
            "each process: a sampler with a generator of its own, order= with one, a set.",
        )
    for number, rows in one.batch["fields"].items():
        theirs = other.batch["fields"].get(number, [])
        if rows != theirs:
            ids = one.batch["ids"]
            at = next((i for i, pair in enumerate(zip(rows, theirs, strict=False)) if pair[0] != pair[1]), 0)
            sample = f"sample {ids[at]}" if len(rows) == len(ids) else "the batch"
            return Finding(
                "data",
                f"{place}: tensor {number} of {sample} is another one {how}. What the data set or "
                "the collate function returns depends on more than the sample's number: a "
                "generator or a count of its own, the process, the time. (torch, numpy and "
                "random are seeded before.)",
            )
    return None


def _of_outputs(one: Micro, other: Micro, place: str, how: str) -> Finding | None:
    for mine, theirs in zip(one.outputs, other.outputs, strict=False):
        name = mine["module"] or "the model itself"
        if mine["module"] != theirs["module"]:
            return Finding(
                "branch",
                f"{place}: {name} is called {how} where another module was: what the loop or a "
                "forward does depends on the worker, or on what it did before.",
                mine["where"],
            )
        if mine["value"] != theirs["value"]:
            return Finding(
                "module",
                f"{place}: module {name} ({mine['type']}) is the first whose output is another "
                f"one {how}. It keeps state in Python or draws from a generator of its own, or "
                "its input was made so. State belongs into a buffer; random numbers come from "
                "torch's, numpy's or Python's own generator.",
                mine["where"],
            )
    if len(one.outputs) != len(other.outputs):
        return Finding(
            "branch",
            f"{place}: {abs(len(one.outputs) - len(other.outputs))} modules more are called "
            f"with or without {how}: a branch that depends on the worker.",
        )
    return None


def _of_loss(one: Micro, other: Micro, place: str, how: str) -> Finding | None:
    if one.loss is None or other.loss is None:
        return None
    if one.loss["weight"] != other.loss["weight"]:
        return Finding("weight", f"{place} has another weight= {how}.", one.loss["where"])
    if repr(one.loss["value"]) != repr(other.loss["value"]):
        return Finding(
            "loss",
            f"{place}: the loss is another one {how}, though every module's output is the same. "
            "The code of the loop between them depends on the worker, or on what it did "
            "before: a branch by rank, a count, a generator of its own.",
            one.loss["where"],
        )
    return None


def _of_random(one: Micro, other: Micro, place: str, how: str) -> Finding | None:
    name = _other_key(one.random, other.random)
    if name:
        return Finding(
            "random",
            f"{place}: the loop draws another number of random values from {name} {how}.",
            "" if one.loss is None else one.loss["where"],
        )
    return None


def _of_gradients(one: Micro, other: Micro, place: str, how: str) -> Finding | None:
    for name, value in one.gradients.items():
        if other.gradients.get(name) != value:
            return Finding(
                "gradient",
                f"{place}: the gradient of {name.partition(' ')[2]} is another one {how}, though "
                "outputs and loss are the same: a hook, or a backward that keeps state in Python.",
            )
    return None


def _of_update(one: Notes, other: Notes, key: tuple[str, int], name: str, how: str) -> Finding:
    mine, theirs = one.steps.get(key), other.steps.get(key)
    if mine is not None and theirs is not None and mine["settings"] != theirs["settings"]:
        return Finding(
            "settings",
            f"step {key[1]}: the optimizer's settings are others {how}: a scheduler, or code "
            "between steps, that depends on the worker or on the time.",
        )
    return Finding(
        "update",
        f"step {key[1]}: parameter {name} has another value {how} after the update, though "
        "all gradients are the same: it is written between steps, or the optimizer keeps "
        "state that is not the team's.",
    )


def _other_key(one: Record | None, other: Record | None) -> str:
    """Return the first name whose value differs."""
    if one is None or other is None:
        return ""
    mine, theirs = one["values"], other["values"]
    return next((str(name) for name in mine if theirs.get(name) != mine[name]), "")


# --- one start --------------------------------------------------------------------------------------------------------


def not_meant(notes: Notes) -> Iterator[Finding]:
    """Yield what one start shows that is legal and probably not meant."""
    for run, record in notes.run.items():
        micros = {key: micro for key, micro in notes.micros.items() if key[0] == run}
        size, batch = record["spec"]["micro_batch"], record["spec"]["global_batch"]
        if record["norms"] and record["num_micro_batches"] > 1:
            yield Finding(
                "batch norm",
                f"batch normalisation ({', '.join(record['norms'][:3])}) takes its statistics of "
                f"the {size} samples of a micro-batch, not of the {batch} of an update. With "
                f"micro_batch={batch} they are those of a plain script; or use GroupNorm or "
                "LayerNorm.",
                record["where"],
                is_wrong=False,
            )
        touched = {name.partition(" ")[2] for micro in micros.values() for name in micro.gradients}
        never = [name for name in record["trained"] if name not in touched]
        if micros and never:
            more = f" and {len(never) - 3} more" if len(never) > 3 else ""
            yield Finding(
                "no gradient",
                f"{', '.join(never[:3])}{more} never got a gradient: not used in the loss, or "
                "behind detach(). If that is meant, requires_grad_(False).",
                record["where"],
                is_wrong=False,
            )
        yield from _repeated(micros)


def _repeated(micros: Mapping[tuple[str, int, int], Micro]) -> Iterator[Finding]:
    seen: dict[int, tuple[str, int, int]] = {}
    content: dict[str, int] = {}
    for key, micro in sorted(micros.items()):
        ids = micro.batch["ids"]
        fields = [rows for rows in micro.batch["fields"].values() if len(rows) == len(ids)]
        for at, sample in enumerate(ids):
            if sample in seen and not micro.batch["stream"]:  # of a stream, they are places
                yield Finding(
                    "repeated",
                    f"sample {sample} comes in step {seen[sample][1]} and again in step {key[1]}: "
                    "the order or the sampler repeats samples.",
                    is_wrong=False,
                )
                return
            seen[sample] = key
            print_of = "".join(rows[at] for rows in fields)
            if print_of and content.setdefault(print_of, sample) != sample:
                yield Finding(
                    "repeated",
                    f"samples {content[print_of]} and {sample} are the same, in every tensor.",
                    is_wrong=False,
                )
                return


def of_plain(notes: Notes, plain: Notes) -> Finding | None:
    """Return the first loss or weight that is another one in plain PyTorch, beyond rounding."""
    for (run, step), record in sorted(notes.sizes.items(), key=lambda item: (item[0][1], item[0][0])):
        theirs = plain.sizes.get((run, step))
        if theirs is None:
            continue
        where = notes.run[run]["where"]
        if abs(record["loss"] - theirs["loss"]) > _PLAIN_LOSS * max(abs(theirs["loss"]), 1e-3):
            return Finding(
                "plain",
                f"step {step}: the loss is {record['loss']:.6g}, and {theirs['loss']:.6g} when the same is written in "
                "plain PyTorch.",
                where,
            )
        for name, norm in record["values"].items():
            other = theirs["values"].get(name, norm)
            if abs(norm - other) > _PLAIN_WEIGHT * max(other, 1e-2):
                return Finding(
                    "plain",
                    f"step {step}: parameter {name} has the norm {norm:.6g}, and {other:.6g} when the same is "
                    "written in plain PyTorch.",
                    where,
                )
    return None


def of_another_cut(notes: Notes, cut: Notes) -> Iterator[Finding]:
    """Yield what shows when the same global batch is cut into micro-batches of half the size."""
    for (run, step), record in notes.steps.items():
        theirs = cut.steps.get((run, step))
        if step != 0 or theirs is None or not record["loss"]:
            continue
        micros = [micro for key, micro in notes.micros.items() if key[:2] == (run, 0)]
        where = next((micro.loss["where"] for micro in micros if micro.loss is not None), "")
        if any(micro.batch["stream"] for micro in micros):  # which may be read otherwise then
            continue
        draws = any(micro.random is not None and micro.random["drawn"] for micro in micros)
        ratio = theirs["loss"] / record["loss"]
        if abs(ratio - 0.5) < (_HALF_OF_NOISY if draws else _HALF):
            yield Finding(
                "sum",
                "the loss of a micro-batch of half the size is half as large: it is a sum over "
                "the samples, and the gradient grows with the micro-batch. Take the mean "
                "(reduction='mean').",
                where,
                is_wrong=False,
            )
        elif abs(ratio - 1) > _ROUNDING and not draws and not notes.run[run]["norms"]:
            weighted = any(micro.loss is not None and micro.loss["weight"] >= 0 for micro in micros)
            why = "the samples of a micro-batch act on each other (an in-batch loss, mixup)"
            if not weighted:
                why += (
                    ", or it is a mean over something else than samples, such as unmasked tokens: then "
                    "step.backward(loss, weight=their number)"
                )
            yield Finding(
                "mean of means",
                f"the loss of the same global batch is {theirs['loss']:.6g} instead of "
                f"{record['loss']:.6g} with micro-batches of half the size: {why}.",
                where,
                is_wrong=False,
            )
