"""The model's weights in shared memory: one copy a host, into which every worker's parameters are views.

Under bf16 (and fp16 likewise) a trained parameter exists twice: the fp32 master that the optimizer updates, and the
bf16 working weight that the model computes with. Modules whose own parameters are all vectors (norms, scales) keep
fp32 working weights, because kernels of norms want them so, and they are small; so do modules named in
`fp32_modules`. A frozen parameter has no master.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from lightwork.engine.memory import SharedMemory
from lightwork.errors import SpecError, UsageError
from lightwork.spec.job import Spec
from lightwork.spec.layout import ALIGNMENT, Block, Layout, ParameterSpec

#: Of working weights and gradients, by their name in the layout.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: The type of most working weights, by precision.
NARROW = {"bf16": "bfloat16", "fp16": "float16"}

_HALVES = (torch.float16, torch.bfloat16)


def describe_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer, spec: Spec, *, whole: bool
) -> tuple[list[nn.Parameter], list[ParameterSpec]]:
    """Return the model's floating-point parameters, each once, and what the layout needs to know of them.

    Parameters of other types (quantised and frozen ones) stay with each worker, as they are.

    Raises: SpecError for lazy parameters, parameters of a type that is not supported, trained parameters whose
    memory overlaps itself, and an optimizer with parameters of another model.
    """
    group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    narrow = NARROW.get(spec.precision)
    fp32 = _fp32_parameters(model, spec.fp32_modules) if narrow or spec.fp32_modules else None
    parameters, specs = [], []
    for name, parameter in model.named_parameters():
        _check_supported(name, parameter)
        if not parameter.is_floating_point():
            continue
        low = narrow is not None and fp32 is not None and parameter not in fp32
        parameters.append(parameter)
        specs.append(
            ParameterSpec(
                name=name,
                shape=tuple(parameter.shape),
                dtype=narrow if narrow and low else "float32",
                group=group_of.pop(parameter, None),
                whole=whole,
            )
        )
    if group_of:
        shapes = ", ".join(str(tuple(p.shape)) for p in list(group_of)[:3])
        raise SpecError(
            f"the optimizer has {len(group_of)} parameters that are not in the model (shapes {shapes}). "
            "Make the optimizer from model.parameters(), after the model has its final modules."
        )
    if not any(s.group is not None for s in specs):
        raise SpecError("the optimizer has no parameter of the model. Make it from model.parameters().")
    return parameters, specs


def _check_supported(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise SpecError(
            f"parameter {name} is of a lazy module and has no shape yet. Run one batch through the "
            "model before distribute."
        )
    if parameter.device.type not in ("cpu", "meta"):
        raise SpecError(
            f"parameter {name} is on {parameter.device}. This version trains on CPUs: keep the model there."
        )
    if parameter.is_floating_point() and parameter.dtype not in (torch.float32, *_HALVES):
        raise SpecError(f"parameter {name} is {parameter.dtype}. Convert the model with model.float().")
    if parameter.is_complex() and parameter.requires_grad:
        raise SpecError(f"parameter {name} is {parameter.dtype}. Keep real and imaginary parts as two parameters.")
    if parameter.layout is not torch.strided:
        raise SpecError(f"parameter {name} is sparse. Use a dense parameter.")


def _fp32_parameters(model: nn.Module, names: Sequence[str]) -> set[nn.Parameter]:
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            near = ", ".join(sorted(modules)[1:6])
            raise SpecError(f"fp32_modules names {name!r}, which the model does not have. It has {near}, ...")
    keep: set[nn.Parameter] = {p for name in names for p in modules[name].parameters()}
    for module in modules.values():
        own = list(module.parameters(recurse=False))
        if all(p.dim() <= 1 for p in own) or isinstance(module, nn.Bilinear):
            keep.update(own)
    return keep


class Weights:
    """The parameters of one worker's model, attached to the shared memory.

    Owns: the `.data` of every parameter in `parameters`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], layout: Layout, memory: SharedMemory) -> None:
        self.parameters = list(parameters)
        self.layout = layout
        self.masters = memory.tensor("masters", torch.float32, numel=layout.numel)
        narrow = next((p.dtype for p in layout.parameters if p.dtype != "float32"), None)
        self._working = memory.tensor("working", DTYPES[narrow], numel=layout.numel) if narrow else None
        self._storages = {flat.untyped_storage().data_ptr() for flat in self.flats.values()}
        self._versions: list[int] = []
        self._stretches: dict[int, list[torch.Tensor]] = {}  # of each bucket, made once

    def attach(self, *, write: bool, done: Callable[[int], None] = lambda index: None) -> list[int]:
        """Point every parameter at the shared memory; with `write`, after putting its present value there.

        `done` is called after each. Returns the parameters that were on the meta device, which have no value yet.
        """
        were_meta = []
        for index, parameter in enumerate(self.parameters):
            view = self.working_view(index)
            if parameter.is_meta:
                were_meta.append(index)
                # Its `.data` can not change its device; swapped, it stays the object that modules and optimizer hold.
                empty = nn.Parameter(torch.empty(0), requires_grad=parameter.requires_grad)
                torch.utils.swap_tensors(parameter, empty)  # type: ignore[no-untyped-call]
            elif write:
                view.copy_(parameter.data)
                if view.dtype != torch.float32 and self.layout.parameters[index].group is not None:
                    self._strided(index, self.masters).copy_(parameter.data)
            parameter.data = view
            done(index)
        self.accept_versions()
        return were_meta

    def master_or_working(self, index: int) -> torch.Tensor:
        """Return where a parameter's value is written: its master, or its working weight if it has none."""
        narrow = self.layout.parameters[index].dtype != "float32"
        return (
            self.working_view(index)
            if narrow and self.layout.parameters[index].group is None
            else (self._strided(index, self.masters))
        )

    def working_view(self, index: int) -> torch.Tensor:
        """Return the working weight of a parameter, in the parameter's shape and strides."""
        return self._strided(index, self._flat(index))

    def master_view(self, index: int) -> torch.Tensor:
        """Return the fp32 value of a parameter, in its shape; of a frozen narrow one, a converted copy."""
        if self.layout.parameters[index].dtype != "float32" and self.layout.parameters[index].group is None:
            return self.working_view(index).float()
        return self._strided(index, self.masters)

    def publish(self, index: int, start: int, end: int) -> None:
        """Write elements `start` to `end` of a parameter's working weight from its master, after an update."""
        flat = self._flat(index)
        if flat is not self.masters and self.layout.parameters[index].group is not None:
            offset = self.layout.offsets[index]
            flat[offset + start : offset + end].copy_(self.masters[offset + start : offset + end])

    def publish_all(self) -> None:
        """Write every working weight from its master."""
        for index, parameter in enumerate(self.parameters):
            if self.layout.parameters[index].group is not None:
                self.publish(index, 0, parameter.numel())

    @property
    def flats(self) -> dict[str, torch.Tensor]:
        """The flat tensors in which working weights lie, by region."""
        return {"masters": self.masters} | ({"working": self._working} if self._working is not None else {})

    def of_bucket(self, bucket: int) -> list[torch.Tensor]:
        """Return the working weights of a bucket as flat tensors, neighbours of one type together."""
        stretches = self._stretches.get(bucket)
        if stretches is None:
            spec = self.layout.buckets[bucket]
            with torch.no_grad():
                stretches = self._stretches_of(self.layout.blocks[spec.first_block : spec.end_block])
            self._stretches[bucket] = stretches
        return stretches

    def _stretches_of(self, blocks: Sequence[Block]) -> list[torch.Tensor]:
        found: list[tuple[torch.Tensor, int, int]] = []
        for block in blocks:
            flat, offset = self._flat(block.parameter), self.layout.offsets[block.parameter]
            start, end = offset + block.start, offset + block.end
            if found and found[-1][0] is flat and 0 <= start - found[-1][2] < ALIGNMENT:
                found[-1] = (flat, found[-1][1], end)
            else:
                found.append((flat, start, end))
        return [flat[start:end] for flat, start, end in found]

    def parameter_of(self, tensor: torch.Tensor) -> int | None:
        """Return the parameter in whose working weight a tensor lies, or None."""
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.numel() == 0:
            return None
        if tensor.untyped_storage().data_ptr() not in self._storages:
            return None
        address = tensor.data_ptr()
        for flat in self.flats.values():
            start = flat.data_ptr()
            if start <= address < start + flat.numel() * flat.itemsize:
                return bisect.bisect_right(self.layout.offsets, (address - start) // flat.itemsize) - 1
        return None

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies in the memory of the weights."""
        return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in self._storages

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a saved tensor as it is: weights are always here."""
        return tensor

    def accept_versions(self) -> None:
        """Take every parameter's value as it is now for legitimate."""
        self._versions = [p._version for p in self.parameters]

    def check_unwritten(self, when: str) -> None:
        """Raise UsageError when user code has written a parameter in place since `accept_versions`.

        Not seen: writes through `.data`, which PyTorch does not count.
        """
        if self._versions != [p._version for p in self.parameters]:
            index = next(i for i, p in enumerate(self.parameters) if p._version != self._versions[i])
            raise UsageError(
                f"parameter {self.layout.parameters[index].name} was written {when}. Weights are "
                "shared by all workers and "
                "written by the update alone: put other writes into `with run.edit():`."
            )

    def _flat(self, index: int) -> torch.Tensor:
        low = self._working is not None and self.layout.parameters[index].dtype != "float32"
        return self._working if low and self._working is not None else self.masters

    def _strided(self, index: int, flat: torch.Tensor) -> torch.Tensor:
        parameter = self.parameters[index]
        offset = self.layout.offsets[index]
        return like(flat[offset : offset + parameter.numel()], parameter)


def like(flat: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return `flat` in the shape of `parameter` and, where these are dense (such as channels-last), its strides."""
    if parameter.is_contiguous() or not _is_dense(parameter):
        return flat.view(parameter.shape)
    return flat.as_strided(parameter.shape, parameter.stride())


def _is_dense(tensor: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def refuse_sparse_gradients(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise SpecError for an embedding that makes sparse gradients."""
    for name, module in modules:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise SpecError(f"module {name} makes sparse gradients (sparse=True). Leave sparse out.")
