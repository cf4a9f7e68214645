"""A model and its optimizer, laid out: what lies where in shared memory, and how much of it there will be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from lightwork.device.base import Device
from lightwork.device.cpu import Cpu
from lightwork.engine.backward import early
from lightwork.engine.backward.gradients import Slots
from lightwork.engine.backward.outbox import MAX_BACKLOG
from lightwork.engine.exchange.exchange import TURNS_AT_ONCE
from lightwork.engine.forward.fetching import AHEAD, KEPT
from lightwork.errors import SpecError
from lightwork.spec.assignment import share
from lightwork.spec.hosts import Hosts
from lightwork.spec.layout import Layout, cut_for, lay_out, spans_of
from lightwork.spec.plan import Part, Place, Placement
from lightwork.spec.spec import Spec
from lightwork.spec.tree import Node, fold
from lightwork.state.buffers import Buffers
from lightwork.state.materialise import check_can_reset, give_buffers_memory
from lightwork.state.optimizer import StateLayout, is_elementwise, probe_state
from lightwork.state.scaling import LossScale
from lightwork.state.staging import LEAVING
from lightwork.state.weights import DTYPES, describe_parameters, refuse_sparse_gradients
from lightwork.store.elements import Units
from lightwork.store.regions import MemoryMap
from lightwork.team.board import Board, BoardSize

_PARTS: tuple[str, ...] = get_args(Part)
_PLACES: tuple[Place, ...] = get_args(Place)

DTYPES_OF_WIRE = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Blueprint:
    """A model and its optimizer, laid out: what shared memory they need. Made before there is any."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        spec: Spec,
        hosts: Hosts,
        host: int = 0,
        placement: Placement = "replicate",
        weights: Path | None = None,
        device: Device | None = None,
        offload: Mapping[str, Place] | None = None,
    ) -> None:
        """`weights` is a safetensors file that takes the place of the model's own values."""
        self.device = device or Cpu()
        self.offload: Mapping[str, Place] = dict(offload or {})
        refuse_sparse_gradients(model.named_modules())
        if weights is None:
            check_can_reset(model)
        self.weights_file = weights
        self.has_meta_buffers = give_buffers_memory(model, self.device.place)
        self.model = model
        self.optimizer = optimizer
        self.spec = spec
        self.placement: Placement = placement if len(hosts) > 1 else "replicate"
        self.sharded = self.placement != "replicate"
        if self.placement == "zero3" and max(hosts.sizes) > 1:
            raise SpecError(
                f"placement='zero3' shares weights out among workers with memories of their own, and here up to "
                f"{max(hosts.sizes)} workers of a machine share one. Choose transport='group', or placement='zero2'."
            )
        self.hosts = hosts
        self.host = host
        self.world_size = hosts.sizes[host]
        self.parameters, described = describe_parameters(model, optimizer, spec, whole=not is_elementwise(optimizer))
        self.layout: Layout = lay_out(described, cut_for(spec.device))
        self.units = Units(self.layout) if self.device.has_own_memory else None
        if spec.optimizer_state != "fp32" and not is_elementwise(optimizer):
            raise SpecError(
                f"optimizer_state={spec.optimizer_state!r} is for optimizers that treat every element by itself, and "
                f"{type(optimizer).__name__} reads whole parameters. Leave it out, or use AdamW."
            )
        self.state_layout = StateLayout(
            self.layout, probe_state(optimizer, described, self.device.place), spec.optimizer_state
        )
        self.board_size = BoardSize(
            world_size=self.world_size,
            num_micro_batches=spec.num_micro_batches,
            num_parameters=len(described),
            num_buckets=len(self.layout.buckets),
            num_hosts=len(hosts),
        )

    @property
    def _is_narrow(self) -> bool:
        """Whether any parameter has a working weight of its own."""
        return any(p.dtype != "float32" for p in self.layout.parameters)

    @property
    def streams_weights(self) -> bool:
        """Whether weights come to a device just before they are used."""
        return self.device.has_own_memory and "weights" in self.offload

    @property
    def updates_in_backward(self) -> bool:
        """Whether a bucket is updated as soon as its gradient is there (`early`)."""
        needs_norm = self.spec.clip_grad_norm is not None or self.spec.precision == "fp16"
        is_alone = self.hosts.world_size == 1 and self.spec.num_micro_batches == 1
        return is_alone and not needs_norm and self.layout.numel >= early.WORTH_IT

    def regions_of(self, part: str) -> list[str]:
        """Return the regions of a part that can be offloaded."""
        narrow = self._is_narrow
        parts: dict[str, list[str]] = {
            # Under fp32 the masters are the working weights.
            "optimizer": [*(["masters"] if narrow else []), *(f"state {name}" for name in self.state_layout.flat)],
            "weights": ["working"] if narrow else ["masters"],
            "gradients": ["partial sums"],
        }
        return parts[part]

    def memory_map(self) -> MemoryMap:
        """Return a map in which the regions that `offload` names lie where it says, as yet without regions."""
        placed: dict[Place, set[str]] = {place: set() for place in _PLACES}
        for part, place in self.offload.items():
            placed[place].update(self.regions_of(part))
        if not self.device.has_own_memory:
            return MemoryMap(on_disk=frozenset(placed["disk"]))
        all_parts = {region for part in _PARTS for region in self.regions_of(part)} | {"masters", "working"}
        scales = {f"scales {name}" for name in self.state_layout.in_8_bits}
        flat = {"state odd", "buffers", "buffers of micro-batches"} | scales
        return MemoryMap(
            on_disk=frozenset(placed["disk"]),
            beside_device=frozenset(placed["host"]),
            on_device=frozenset((all_parts | flat) - placed["disk"] - placed["host"]),
        )

    def reserve(self, memory_map: MemoryMap) -> None:
        """Reserve the regions of the engine."""
        numel = self.layout.numel
        memory_map.reserve("board", Board.num_bytes(self.board_size))
        memory_map.reserve("masters", numel * 4)
        memory_map.reserve("working", numel * 2 if self._is_narrow else 0)
        for name, dtype in self.state_layout.flat.items():
            memory_map.reserve(f"state {name}", numel * dtype.itemsize)
        for name in self.state_layout.in_8_bits:
            memory_map.reserve(f"scales {name}", self.state_layout.num_scales * 4)
        LossScale.reserve(memory_map)
        memory_map.reserve("state odd", self.state_layout.odd_bytes)
        memory_map.reserve("state numbers", self.state_layout.number_bytes)
        memory_map.reserve("state initialised", len(self.layout.blocks))
        for name, size in Buffers.reservations(self.model, self.spec.num_micro_batches).items():
            memory_map.reserve(name, size)
        slots = Slots.num_bytes(self.world_size, self.board_size.num_places, numel, DTYPES_OF_WIRE[self.spec.wire])
        memory_map.reserve("partial sums", slots)

    def working_set_bytes(self, offload: Mapping[str, Place] | None = None) -> int:
        """Return what a worker needs beside the parts, at most; with other parts offloaded if `offload` is given.

        Scratch of an update; the largest parameter in backward (its weight, its gradient as autograd makes it, and its
        partial sum); with several hosts, the gradients that are on their way, and with zero3 the weights. On a device
        also the buckets of what is offloaded that come, are updated and leave. (What is read ahead from disk is not
        mapped.)
        """
        sizes = [sum(s.numel for s in spans_of(self.layout, bucket)) for bucket in self.layout.buckets]
        of_bucket = max(sizes, default=0)
        largest = max((p.numel * (2 * DTYPES[p.dtype].itemsize + 4) for p in self.layout.parameters), default=0)
        wire = DTYPES_OF_WIRE[self.spec.wire].itemsize
        between_hosts = 0
        if len(self.hosts) > 1:
            on_their_way = TURNS_AT_ONCE * len(self.hosts)
            between_hosts = of_bucket * wire * (MAX_BACKLOG + 2 * on_their_way)
        coming = KEPT + AHEAD + 1 if self.placement == "zero3" else 0
        if not self.device.has_own_memory:
            entries = len(self.state_layout.flat) + 2  # beside the state: master and gradient
            weights = of_bucket * (2 if self._is_narrow else 4) * coming
            return of_bucket * 4 * (entries + 2) + largest + between_hosts + weights
        staged, offload = 0, self.offload if offload is None else offload
        if "optimizer" in offload:
            staged = sum(dtype.itemsize for dtype in self.state_layout.flat.values()) + (4 if self._is_narrow else 0)
        if "weights" in offload:
            coming = 2 * KEPT + AHEAD + 1  # of these, as many wait for computation to be done with them
        weights = of_bucket * (2 if self._is_narrow else 4) * coming
        return of_bucket * (4 + wire + staged * (LEAVING + 2)) + largest + between_hosts + weights

    def expected_bytes(self) -> dict[str, int]:
        """Return the bytes of shared memory that training on this host takes, by the parts that can be offloaded.

        For P trained parameters on H hosts, of each host, as in "ZeRO: Memory Optimizations Toward Training Trillion
        Parameter Models" (Rajbhandari et al., 2020), sections 3 and 5, with what this design keeps besides:

            weights     2 P under bf16, 4 P under fp32; P / H of them with zero3 (frozen ones stay everywhere)
            optimizer   the state (8 P for Adam), and 4 P for masters under bf16; 1 / H of them from zero1 on
            gradients   with several hosts the sum over all, in the wire format: 4 P or 2 P; 1 / H of it from zero1 on.
                        The workers' partial sums: up to log2(m) + 1 for m micro-batches each. On a host of one worker
                        the last gradient is not kept, nor where the update is in backward.
        """
        parameters = self.layout.parameters
        trained, low = self._elements(range(len(self.layout.buckets)))
        shard = range(self.host, len(self.layout.buckets), len(self.hosts)) if self.sharded else None
        own, own_low = (trained, low) if shard is None else self._elements(shard)
        frozen = sum(p.numel * DTYPES[p.dtype].itemsize for p in parameters if p.group is None)
        state = sum(own * dtype.itemsize for dtype in self.state_layout.flat.values())
        wire = DTYPES_OF_WIRE[self.spec.wire].itemsize
        leaf = trained * wire if self.spec.wire == "bf16" else trained * 4 - low * 2
        micro_batches = len(self.hosts.micro_batches(self.host, self.spec.num_micro_batches))
        gradients = own * wire if len(self.hosts) > 1 else 0
        for rank in range(self.world_size):
            slots = self._slots_of(share(rank, self.world_size, micro_batches))
            gradients += sum(leaf if of_leaves else trained * wire for of_leaves in slots)
        weights = own * 4 - own_low * 2 if self.placement == "zero3" else trained * 4 - low * 2
        return {"weights": weights + frozen, "optimizer": own_low * 4 + state, "gradients": gradients}

    def _elements(self, buckets: Iterable[int]) -> tuple[int, int]:
        """Return the elements of these buckets, and those of them whose working weights are narrow."""
        every = low = 0
        for bucket in buckets:
            spec = self.layout.buckets[bucket]
            for block in self.layout.blocks[spec.first_block : spec.end_block]:
                size = block.end - block.start
                every += size
                low += size if self.layout.parameters[block.parameter].dtype != "float32" else 0
        return every, low

    def _slots_of(self, micro_batches: range) -> list[bool]:
        """Return for each slot that a worker fills with these micro-batches whether it holds single ones alone."""
        held: dict[Node, int] = {}
        slots: dict[int, bool] = {}
        for index in micro_batches:
            chain, node = fold(index - micro_batches.start, len(micro_batches), held)
            leaves = len(self.hosts) > 1 and self.world_size == 1 and index == micro_batches[-1]
            leaves = leaves or self.updates_in_backward
            if not (leaves and (not chain or self.placement in ("zero2", "zero3"))):
                slot = next(s for s in range(len(held) + 1) if s not in held.values())
                slots[slot] = slots.get(slot, True) and not chain
                for old in chain:
                    del held[old]
                held[node] = slot
        return list(slots.values())
