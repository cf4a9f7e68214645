"""Which data set is which: the same one, over all loops of a run and in every process that goes on with it.

The same object is the same data set. Another object is, if it has the same type and length and a few samples with the
same content: scripts make their data sets anew, in each epoch or when they are resumed.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from lightwork.data.batches import Row
from lightwork.data.fetch import Fetcher, as_in_a_loading_worker
from lightwork.data.stream import Stream
from lightwork.notice import notice
from lightwork.random import RandomState, derive, seed_all

#: What is compared of a data set, by a name for messages.
Fingerprint = Mapping[str, object]


@dataclass
class Known:
    """A data set that a run has seen."""

    fingerprint: dict[str, object]
    num_passes: int = 0  #: begun
    object: weakref.ref[Any] | None = field(default=None, compare=False, repr=False)


class DataSets:
    """Those of a run, in the order in which it came to them."""

    def __init__(self) -> None:
        self.known: list[Known] = []

    def find(self, data: object, fingerprint: Callable[[], Fingerprint]) -> int:
        """Return the number of a data set, a new one for one that is not known."""
        for number, known in enumerate(self.known):
            if known.object is not None and known.object() is data:
                return number
        found = dict(fingerprint())
        prints = [known.fingerprint for known in self.known]
        number = prints.index(found) if found in prints else len(prints)
        if number == len(prints):
            self.known.append(Known(found))
        try:
            self.known[number].object = weakref.ref(data)
        except TypeError:  # a list, a range
            pass
        return number

    def to_json(self) -> list[dict[str, object]]:
        """Return what a checkpoint keeps."""
        return [{"fingerprint": known.fingerprint, "num_passes": known.num_passes} for known in self.known]

    def take(self, saved: list[dict[str, Any]]) -> None:
        """Take what `to_json` returned in place of what is known."""
        self.known = [Known(of_one["fingerprint"], of_one["num_passes"]) for of_one in saved]


def fingerprint_of(fetcher: Fetcher) -> Fingerprint:
    """Return the fingerprint of a map-style data set: its type, its length, and the content of three samples.

    They are fetched twice. Where the two differ, their content is left out, and that is said.
    """
    data = fetcher.dataset
    found: dict[str, object] = {"kind of data set": type(data).__qualname__, "samples in the data set": len(data)}
    if isinstance(data, Subset):
        found["ids of the subset"] = zlib.crc32(np.asarray(data.indices).tobytes())
    last = len(data) - 1
    before = RandomState.capture()
    probes: list[object] = []
    try:
        for sample_id in sorted({0, last // 2, last}):
            once, again = _content(fetcher.sample(0, sample_id)), _content(fetcher.sample(0, sample_id))
            if once != again:
                notice(
                    f"sample {sample_id} of {fetcher.name} is not the same when it is fetched twice, though torch, "
                    "numpy and random are seeded before: it depends on a generator of its own, the time, or what was "
                    "fetched before. A resumed run, or another team, will see other samples."
                )
                probes = []
                break
            probes.append(once)
    except Exception:  # the sample is named when it is used
        probes = []
    finally:
        before.restore()
    found["content of some samples"] = zlib.crc32(repr(probes).encode()) if probes else None
    return found


def fingerprint_of_stream(stream: Stream) -> Fingerprint:
    """Return the fingerprint of a stream: its type, its shards, and the content of the first sample of one without.

    A stream that each worker reads whole, and that gives each another part (by its rank), shows itself so.
    """
    found: dict[str, object] = {
        "kind of data set": type(stream.known_as).__qualname__,
        "shards of it": stream.num_shards,
    }
    if stream.num_shards is not None:  # a worker reads its own shards alone
        return found
    before = RandomState.capture()
    content: object = None
    try:
        with as_in_a_loading_worker():
            samples = stream.lane(0, 0, 1)
            seed_all(derive(stream.seed, "stream", 0, 0, 0))
            content = zlib.crc32(repr(_content(next(samples))).encode())
    except Exception:  # it is named when it is read
        pass
    finally:
        before.restore()
    found["content of its first sample"] = content
    return found


def _content(value: Any) -> object:
    """Return what tells the content of a sample, as far as its kind is known."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            return str(value.shape)
        flat = value.detach().contiguous().reshape(-1)
        return str(value.dtype), tuple(value.shape), zlib.crc32(flat.view(torch.uint8).numpy().data)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return str(value.dtype), value.shape, zlib.crc32(np.ascontiguousarray(value).tobytes())
    if isinstance(value, Mapping):
        return [(str(key), _content(one)) for key, one in value.items()]
    if isinstance(value, list | tuple):
        return [_content(one) for one in value]
    if isinstance(value, str | bytes | bool | int | float | None):
        return repr(value)
    if isinstance(value, Row):
        return value.index, _content(value.whole.batch)
    if is_dataclass(value) and not isinstance(value, type):
        return [(one.name, _content(vars(value).get(one.name))) for one in fields(value)]
    return type(value).__qualname__
