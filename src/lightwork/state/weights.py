"""The model's weights in shared memory: one copy a host, into which every worker's parameters are views.

Under bf16 (and fp16 likewise) a trained parameter exists twice: the fp32 master that the optimizer updates, and the
bf16 working weight that the model computes with. Modules whose own parameters are all vectors (norms, scales) keep
fp32 working weights, because kernels of norms want them so, and they are small; so do modules named in
`fp32_modules`. A frozen parameter has no master.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lightwork.device.base import Mark
from lightwork.errors import SpecError, UsageError
from lightwork.spec.layout import ALIGNMENT, Block, Layout, ParameterSpec, span_of
from lightwork.spec.spec import Spec
from lightwork.store.elements import Elements
from lightwork.store.regions import Advice, SharedMemory

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
    if parameter.device.type not in ("cpu", "meta", "cuda"):
        raise SpecError(
            f"parameter {name} is on {parameter.device}. This version trains on CPUs and CUDA devices: keep the model "
            "on one of these."
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


class _Stretch(NamedTuple):
    """Working weights that lie beside each other: where, their type, and their elements."""

    name: str  #: of the region, where home and here are one
    home: Elements
    here: Elements
    dtype: torch.dtype
    start: int
    end: int

    @property
    def num_bytes(self) -> tuple[int, int]:
        """The first byte in the region, and the end."""
        return self.start * self.dtype.itemsize, self.end * self.dtype.itemsize

    def fits(self, home: Elements, here: Elements, dtype: torch.dtype) -> bool:
        """Return whether weights of these regions and type can follow."""
        return self.home is home and self.here is here and self.dtype is dtype


class Weights:
    """The parameters of one worker's model, attached to the memory of the team.

    A value has a *home*, where it is kept from step to step, and a place *here*, where computation sees it. They are
    one, except for a device that offloads: then what is here comes and goes (`sharding`, `staging`).

    Owns: the `.data` of every parameter in `parameters`.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], layout: Layout, memory: SharedMemory, *, streamed: bool = False
    ) -> None:
        """`streamed` says that trained weights are brought here just before they are used."""
        self.parameters = list(parameters)
        self.layout = layout
        self.streamed = streamed
        self._memory = memory
        narrow = next((DTYPES[p.dtype] for p in layout.parameters if p.dtype != "float32"), None)
        self.masters = memory.home("masters", torch.float32)
        self.masters_here = memory.here("masters", torch.float32)
        self._working = memory.home("working", narrow) if narrow else None
        self._working_here = self._working
        self._all_working = False
        if memory.device.has_own_memory and narrow:
            # All working weights lie in one region there, so that masters need not be here for the fp32 ones. These
            # are few and small, and always here.
            self._all_working = True
            self._working_here = memory.new_units([DTYPES[p.dtype] for p in layout.parameters])
            if not streamed:
                self._working = self._working_here
        self._versions: list[int] = []
        self.accepted: Mark = None  #: when every weight had its value
        self._stretches_of: dict[int, list[_Stretch]] = {}  # of each bucket, made once
        self._tensors: dict[int, list[torch.Tensor]] = {}

    def attach(self, *, write: bool, done: Callable[[int], None] = lambda index: None) -> list[int]:
        """Point every parameter at the memory of the team; with `write`, after putting its present value there.

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
                self.write(index, parameter.data)
            parameter.data = view
            self.written(index)
            done(index)
        self.accept_versions()
        return were_meta

    def write(self, index: int, value: torch.Tensor) -> None:
        """Give a parameter a value, in every place where it has one."""
        if self.layout.parameters[index].group is not None or not self._is_low(index):
            master = self._strided(index, self.masters)
            if master.data_ptr() != value.data_ptr():
                master.copy_(value)
        for region in self._other_places(index):
            self._strided(index, region).copy_(value)

    def written(self, index: int) -> None:
        """Say that a value was written whose place here was asked for: a streamed one leaves it again."""
        if self._is_streamed(index):
            self._region_here(index).release(*self._range(index))

    def home_on_host(self, index: int) -> torch.Tensor | None:
        """Return where the fp32 value of a parameter lies, if that is the host's memory."""
        if self._is_low(index) and self.layout.parameters[index].group is None:
            return None
        master = self._strided(index, self.masters)
        return master if master.device.type == "cpu" else None

    def working_view(self, index: int) -> torch.Tensor:
        """Return the working weight of a parameter, as computation sees it, in the parameter's shape and strides."""
        return self._strided(index, self._region_here(index))

    def master_view(self, index: int) -> torch.Tensor:
        """Return the fp32 value of a parameter, in its shape; of a frozen narrow one, a converted copy."""
        if self._is_low(index) and self.layout.parameters[index].group is None:
            return self.working_view(index).float()
        return self._strided(index, self.masters)

    def master_here(self, index: int) -> torch.Tensor:
        """Return the fp32 value of a trained parameter where an update sees it."""
        return self._strided(index, self.masters_here)

    def updated(self, blocks: Sequence[Block]) -> None:
        """Write the working weights of these blocks from their masters here, after an update."""
        if self._working_here is None:
            return
        targets, sources = [], []
        for block in blocks:
            region = self._region_here(block.parameter)
            if region is not self.masters_here:
                start = self.layout.offsets[block.parameter] + block.start
                end = start + block.end - block.start
                targets.append(region.view(start, end))
                sources.append(self.masters_here.view(start, end))
        self._memory.device.foreach_copy(targets, sources)

    def publish_all(self) -> None:
        """Write every working weight from its master's home."""
        for index in range(len(self.parameters)):
            if self.layout.parameters[index].group is not None:
                for region in self._other_places(index):
                    self._strided(index, region).copy_(self._strided(index, self.masters))

    def of_bucket(self, bucket: int) -> list[torch.Tensor]:
        """Return the working weights of a bucket, at home, as flat tensors, neighbours of one type together."""
        tensors = self._tensors.get(bucket)
        if tensors is None:
            with torch.no_grad():
                tensors = [stretch.home.view(stretch.start, stretch.end) for stretch in self._stretches(bucket)]
            if not self._memory.device.has_own_memory:
                self._tensors[bucket] = tensors
        return tensors

    def here_of_bucket(self, bucket: int) -> list[torch.Tensor]:
        """Return the same as computation sees them."""
        return [stretch.here.view(stretch.start, stretch.end) for stretch in self._stretches(bucket)]

    def comes_and_goes(self, bucket: int) -> bool:
        """Return whether a bucket's working weights are here only while they are used."""
        return self._is_streamed(self.layout.blocks[self.layout.buckets[bucket].first_block].parameter)

    def take(self, bucket: int) -> None:
        """Take room here for the working weights of a bucket."""
        for stretch in self._stretches(bucket):
            if self._memory.device.has_own_memory:
                stretch.here.take(stretch.start, stretch.end)
            else:
                self._memory.advise(stretch.name, *stretch.num_bytes, Advice.MAP_TO_WRITE)

    def give_back(self, bucket: int) -> None:
        """Give back the room here of the working weights of a bucket."""
        for stretch in self._stretches(bucket):
            if self._memory.device.has_own_memory:
                stretch.here.release(stretch.start, stretch.end)
            else:
                self._memory.release(stretch.name, *stretch.num_bytes)

    def parameter_of(self, tensor: torch.Tensor) -> int | None:
        """Return the parameter in whose working weight a tensor lies, or None."""
        if tensor.layout is not torch.strided or tensor.numel() == 0:
            return None
        if tensor.device.type != self._memory.device.place.type:
            return None
        for region in (self._working_here, self.masters_here):
            element = region.element_of(tensor) if region is not None else None
            if element is not None:
                return bisect.bisect_right(self.layout.offsets, element) - 1
        return None

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies in the memory of the weights."""
        return self.parameter_of(tensor) is not None

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a saved tensor as it is: weights are always here."""
        return tensor

    def accept_versions(self) -> None:
        """Take every parameter's value as it is now for legitimate."""
        self._versions = [p._version for p in self.parameters]
        self.accepted = self._memory.device.mark()

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

    @property
    def working_is_apart(self) -> bool:
        """Whether computation reads other tensors than the masters, for some parameters."""
        return self._working_here is not None

    def has_master_apart(self, index: int) -> bool:
        """Return whether computation reads another tensor than a parameter's master."""
        return self._region(index) is not self.masters

    def release_home(self, block: Block) -> None:
        """Give back the room of a block's working weight at its home."""
        span, region = span_of(self.layout, block), self._region(block.parameter)
        region.release(span.start, span.end)
        if not self._memory.device.has_own_memory:
            size = DTYPES[self.layout.parameters[block.parameter].dtype].itemsize
            self._memory.release("working", span.start * size, span.end * size)

    def regions(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in which a value has its home, or its only place."""
        if not self._memory.device.has_own_memory:
            yield self._memory.tensor("masters")
            if self._working is not None:
                yield self._memory.tensor("working")
            return
        for index, parameter in enumerate(self.layout.parameters):
            if parameter.group is not None or not self._is_low(index):
                yield self.masters.view(*self._range(index))
            for region in self._other_places(index):
                yield region.view(*self._range(index))

    # --- where they lie ---------------------------------------------------------------------------------------------

    def _is_low(self, index: int) -> bool:
        return self.layout.parameters[index].dtype != "float32"

    def _is_streamed(self, index: int) -> bool:
        is_narrow = self._working is None or self._is_low(index)
        return self.streamed and is_narrow and self.layout.parameters[index].group is not None

    def _region(self, index: int) -> Elements:
        """Return the region in which a parameter's working weight has its home."""
        if self._is_streamed(index) or not self._all_working:
            return self._working if self._is_low(index) and self._working is not None else self.masters
        return self._region_here(index)

    def _region_here(self, index: int) -> Elements:
        """Return the region in which computation sees a parameter's working weight."""
        low = self._working_here is not None and (self._is_low(index) or self._all_working)
        return self._working_here if low and self._working_here is not None else self.masters_here

    def _other_places(self, index: int) -> list[Elements]:
        """Return the regions in which a parameter has a value, beside its master."""
        here = [] if self._is_streamed(index) else [self._region_here(index)]
        regions: list[Elements] = []
        for region in (self._region(index), *here):
            if region is not self.masters and region not in regions:
                regions.append(region)
        return regions

    def _stretches(self, bucket: int) -> list[_Stretch]:
        found = self._stretches_of.get(bucket)
        if found is None:
            found = self._stretches_of[bucket] = []
            spec = self.layout.buckets[bucket]
            for block in self.layout.blocks[spec.first_block : spec.end_block]:
                home, here = self._region(block.parameter), self._region_here(block.parameter)
                span, dtype = span_of(self.layout, block), DTYPES[self.layout.parameters[block.parameter].dtype]
                last = found[-1] if found else None
                if last and last.fits(home, here, dtype) and 0 <= span.start - last.end < ALIGNMENT:
                    found[-1] = last._replace(end=span.end)
                else:
                    name = "masters" if here is self.masters_here else "working"
                    found.append(_Stretch(name, home, here, dtype, span.start, span.end))
        return found

    def _range(self, index: int) -> tuple[int, int]:
        start = self.layout.offsets[index]
        return start, start + self.layout.parameters[index].numel

    def _strided(self, index: int, region: Elements) -> torch.Tensor:
        return like(region.view(*self._range(index)), self.parameters[index])


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
