"""The spec: everything that can change a bit of the result. The plan (`plan.py`) is everything that can not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from lightwork.errors import SpecError
from lightwork.spec.written import fields_in, written

Precision = Literal["fp32", "bf16", "fp16"]
Wire = Literal["fp32", "bf16"]
StateFormat = Literal["fp32", "int8"]
Activation = Literal["keep", "recompute", "offload", "int8"]
DeviceKind = Literal["cpu", "cuda", "rehearsal"]
BufferRule = Literal["mean", "sum", "first", "last", "maximum", "minimum"]


#: Threads of a worker, at most.
MAX_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is trained, to the bit. JSON both ways, diffable.

    A field left out of `distribute` follows a fixed rule that reads neither the number of workers nor a timing, so
    that the spec of a script is the same wherever it runs.
    """

    global_batch: int  #: samples an update
    micro_batch: int  #: samples a forward and backward; the last of an update may hold fewer
    seed: int = 0
    device: DeviceKind = "cpu"  #: cuda: a GPU for each worker; rehearsal: what a GPU's worker does, on a CPU
    precision: Precision = "fp32"  #: bf16, fp16: of working weights, under autocast; masters, sums and state are fp32
    wire: Wire = "fp32"  #: of partial sums, kept and sent: bf16 rounds every node of the tree
    optimizer_state: StateFormat = "fp32"  #: int8: the moments of element-wise optimizers in 8 bits
    int8_activations: tuple[str, ...] = ()  #: modules whose activations are kept in 8 bits, by name
    clip_grad_norm: float | None = None  #: the largest L2 norm of the whole gradient
    clip_grad_value: float | None = None  #: the largest absolute value of an element of the gradient
    clip_grad_adaptive: float | None = None  #: the largest length of a unit's gradient, as a part of its weights'
    threads: int = 1  #: of torch, a worker; a different number gives different bits
    fp32_modules: tuple[
        str, ...
    ] = ()  #: modules that keep fp32 weights under bf16 and fp16, by name (with all below them)
    buffers: Mapping[str, BufferRule] = field(default_factory=dict)  #: how micro-batches' values become one, by name
    optimizer: str = ""  #: class and implementation, filled in by `distribute`

    def __post_init__(self) -> None:
        _check_count("global_batch", self.global_batch)
        _check_count("micro_batch", self.micro_batch)
        _check_count("threads", self.threads)
        if self.threads > MAX_THREADS:
            raise SpecError(f"threads={self.threads} a worker is more than {MAX_THREADS}. threads=1 is the default.")
        if not _is_count(self.seed) or not 0 <= self.seed < 2**63:
            raise SpecError(f"seed={self.seed!r} is not a whole number from 0 to 2**63 - 1. seed=0 is the default.")
        if self.micro_batch > self.global_batch:
            raise SpecError(
                f"micro_batch={self.micro_batch} is larger than global_batch={self.global_batch}. "
                f"Choose micro_batch={self.global_batch} or less."
            )
        check_choice("device", self.device, get_args(DeviceKind))
        check_choice("precision", self.precision, get_args(Precision))
        check_choice("optimizer_state", self.optimizer_state, get_args(StateFormat))
        check_choice("wire", self.wire, get_args(Wire))
        self._check_clipping()
        if not isinstance(self.fp32_modules, tuple) or not all(isinstance(name, str) for name in self.fp32_modules):
            raise SpecError(
                f'fp32_modules={self.fp32_modules!r} is not a list of names of modules. Write ("head", "layers.0").'
            )
        if not isinstance(self.buffers, Mapping):
            raise SpecError(f'buffers={self.buffers!r} is not a choice by name. Write {{"largest": "maximum"}}.')
        for name, rule in self.buffers.items():
            if rule not in get_args(BufferRule):
                raise SpecError(
                    f"buffers[{name!r}]={rule!r} is not a rule. Choose one of {', '.join(get_args(BufferRule))}."
                )

    def _check_clipping(self) -> None:
        names = ("clip_grad_norm", "clip_grad_value", "clip_grad_adaptive")
        limits = {name: value for name, value in zip(names, self._clipping, strict=True) if value is not None}
        for name, value in limits.items():
            if not _is_positive(value):
                raise SpecError(f"{name}={value!r} is not a positive number. None does not clip.")
        if len(limits) > 1:
            raise SpecError(
                f"{' and '.join(f'{name}={value!r}' for name, value in limits.items())} were given together. Choose "
                "one way to clip."
            )
        if self.clip_grad_adaptive is not None and self.optimizer_state != "fp32":
            raise SpecError(
                f"clip_grad_adaptive={self.clip_grad_adaptive!r} needs whole parameters, and "
                f"optimizer_state={self.optimizer_state!r} pieces of them. Leave one of the two out."
            )

    @property
    def _clipping(self) -> tuple[float | None, float | None, float | None]:
        return self.clip_grad_norm, self.clip_grad_value, self.clip_grad_adaptive

    @property
    def num_micro_batches(self) -> int:
        """The micro-batches of a full global batch: M."""
        return -(-self.global_batch // self.micro_batch)

    def to_json(self) -> str:
        """Return the spec as a JSON object, keys sorted."""
        return written(self)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Return the spec that `to_json` wrote.

        Raises: SpecError when a field is unknown or impossible.
        """
        values = fields_in(text, cls, "spec")
        names = {name: tuple(values.get(name, ())) for name in ("fp32_modules", "int8_activations")}
        return cls(**{**values, **names})


def choose_micro_batch(global_batch: int, micro_batch: int | None) -> int:
    """Return the micro-batch: as asked, or an eighth of the global batch, rounded up.

    Raises: SpecError when one was asked for that does not divide the global batch.
    """
    _check_count("global_batch", global_batch)
    if micro_batch is None:
        return -(-global_batch // 8)
    _check_count("micro_batch", micro_batch)
    if micro_batch <= global_batch and global_batch % micro_batch:
        below = global_batch - global_batch % micro_batch
        raise SpecError(
            f"global_batch={global_batch} is not a multiple of micro_batch={micro_batch}. "
            f"Nearest: {below} or {below + micro_batch}."
        )
    return micro_batch


def differences(ours: Spec, theirs: Spec) -> dict[str, tuple[object, object]]:
    """Return the fields in which two specs differ, with both values."""
    a, b = asdict(ours), asdict(theirs)
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise SpecError unless a field has one of the values that it may have."""
    if value not in choices:
        raise SpecError(f"{name}={value!r} is not known. Choose one of {', '.join(choices)}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _check_count(name: str, value: object) -> None:
    if not _is_count(value) or not _is_positive(value):
        raise SpecError(f"{name}={value!r} is not a positive whole number.")
