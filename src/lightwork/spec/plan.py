"""The plan: everything that can not change a bit of the result. It may be chosen freely, and changed at any step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from lightwork.errors import SpecError
from lightwork.spec.spec import Activation, Spec, check_choice
from lightwork.spec.written import fields_in, written
from lightwork.units import parse_bytes, parse_interval

Carriage = Literal["host", "group"]
Placement = Literal["replicate", "zero1", "zero2", "zero3"]
Part = Literal["optimizer", "weights", "gradients"]
Place = Literal["host", "disk"]
Memory = Literal["anonymous", "file"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a spec is carried out. JSON both ways, diffable."""

    world_size: int = 1  #: workers; the launcher's business alone
    transport: Carriage = "host"  #: host: workers of a machine share memory; group: each has its own, joined by sockets
    shared_memory: Memory = "anonymous"  #: an anonymous memory file, or an unlinked temporary one where there are none
    placement: Placement = "replicate"  #: what is shared out: nothing, optimizer state, gradients too, weights too
    offload: Mapping[str, Place] = field(default_factory=dict)  #: what lies where, if not on the worker's device
    memory: str | None = None  #: resident bytes of a worker, such as "1GiB": what does not fit is offloaded to disk
    offload_dir: str = ""  #: of the disk; the system's temporary folder unless given
    activations: Mapping[str, Activation] = field(default_factory=dict)  #: of modules by name; the others are kept
    steal: bool = True  #: a worker that is done takes micro-batches that a late one has not started
    elastic: bool = True  #: go on without a worker or host that is lost, where others have what it had
    lease: float = 2.0  #: seconds after which an elastic team ends a worker that is stopped (SIGSTOP); 0 for never.
    #: Five of it: those after which a host is lost whose machine does not answer any more.
    audit_every: int = 0  #: steps after which two workers compute one micro-batch and compare; 0: newcomers alone do
    save_every: str | int | None = None  #: a checkpoint each "10min", "90s", "2h", or so many steps; none by itself
    keep_checkpoints: int = 2  #: in the run directory: the last one, and those before it
    noise: bool = False  #: estimate the noise scale of the gradients: how large a batch pays (`spec/noise`)
    trace: bool = True  #: spans and counters of each worker in the run directory

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise SpecError(f"world_size={self.world_size} is not a positive whole number.")
        for name, switch in (
            ("steal", self.steal),
            ("elastic", self.elastic),
            ("trace", self.trace),
            ("noise", self.noise),
        ):
            if not isinstance(switch, bool):
                raise SpecError(f"{name}={switch!r} is neither true nor false.")
        if not isinstance(self.lease, int | float) or not 0 <= self.lease < float("inf"):
            raise SpecError(f"lease={self.lease!r} is not a number of seconds from 0 upwards.")
        if not isinstance(self.audit_every, int) or self.audit_every < 0:
            raise SpecError(f"audit_every={self.audit_every!r} is not a whole number of steps from 0 upwards.")
        if not isinstance(self.keep_checkpoints, int) or self.keep_checkpoints < 1:
            raise SpecError(f"keep_checkpoints={self.keep_checkpoints!r} is not a whole number from 1 upwards.")
        if self.save_every is not None:
            parse_interval(self.save_every)
        check_choice("transport", self.transport, get_args(Carriage))
        check_choice("placement", self.placement, get_args(Placement))
        if not isinstance(self.offload, Mapping):
            raise SpecError(f'offload={self.offload!r} is not a choice by part. Write {{"optimizer": "disk"}}.')
        for part, place in self.offload.items():
            if part not in get_args(Part) or place not in get_args(Place):
                raise SpecError(
                    f"offload={{{part!r}: {place!r}}} is not known. The parts are {', '.join(get_args(Part))}, the "
                    f"places {', '.join(get_args(Place))}."
                )
        if self.memory is not None:
            parse_bytes(str(self.memory))
        if not isinstance(self.activations, Mapping):
            raise SpecError(
                f'activations={self.activations!r} is not a choice by module. Write {{"layers.0": "recompute"}} in a '
                "plan; distribute(activations=...) takes one value for all layers."
            )
        odd = {value for value in self.activations.values() if value not in ("keep", "recompute", "offload")}
        if odd:
            raise SpecError(
                f"activations has {odd.pop()!r} in a plan, which takes keep, recompute and offload. What changes bits "
                "(int8) is said to distribute(activations=...), for the spec."
            )
        if not isinstance(self.offload_dir, str):
            raise SpecError(f"offload_dir={self.offload_dir!r} is not the path of a folder.")
        check_choice("shared_memory", self.shared_memory, get_args(Memory))

    def to_json(self) -> str:
        """Return the plan as a JSON object, keys sorted."""
        return written(self)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that `to_json` wrote.

        Raises: SpecError when a field is unknown or impossible.
        """
        return cls(**fields_in(text, cls, "plan"))


#: What `--set` may name: the fields of spec and plan, but for what the launcher, the script or the engine decides.
SETTABLE = sorted({f.name for f in (*fields(Spec), *fields(Plan))} - {"optimizer", "world_size", "int8_activations"})
