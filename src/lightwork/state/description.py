"""A model and its optimizer as a run needs them, before there is any memory: parameters, layout, what state is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lightwork.device.base import Device
from lightwork.errors import SpecError
from lightwork.spec.holdings import Holdings, StateShape
from lightwork.spec.layout import Cut, Layout, lay_out
from lightwork.spec.spec import Spec
from lightwork.state.buffers import Buffers, refuse_odd_buffers
from lightwork.state.hashes import hashes_bytes
from lightwork.state.journal import journal_bytes
from lightwork.state.materialise import check_can_reset, give_buffers_memory
from lightwork.state.observation import observe
from lightwork.state.optimizers import Optimizers, is_elementwise
from lightwork.state.parameters import describe_parameters, refuse_sparse_gradients, refuse_unfinished
from lightwork.state.probe import probe_state
from lightwork.state.rules import refuse_synchronised
from lightwork.state.scaling import LossScale
from lightwork.state.state_layout import StateLayout


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is trained; made by `describe`."""

    model: nn.Module
    optimizers: Optimizers
    spec: Spec
    parameters: list[nn.Parameter]
    layout: Layout
    state_layout: StateLayout
    has_meta_buffers: bool
    weights_file: Path | None  #: a safetensors file that takes the place of the model's own values

    @property
    def state_shape(self) -> StateShape:
        """What the optimizer keeps, in numbers."""
        layout = self.state_layout
        return StateShape(
            itemsizes={name: dtype.itemsize for name, dtype in layout.flat.items()},
            of_group=layout.of_group,
            num_flags=layout.first_flag[-1],
            in_8_bits=frozenset(layout.in_8_bits),
            num_scales=layout.num_scales,
            odd_bytes=layout.odd_bytes,
            number_bytes=layout.number_bytes,
        )

    @property
    def buffer_bytes(self) -> Mapping[str, int]:
        """The bytes of the regions of the model's buffers, which lie where computation sees them."""
        return Buffers.values_bytes(self.model, self.spec.num_micro_batches)

    def flag_bytes(self, holdings: Holdings) -> Mapping[str, int]:
        """Return the bytes of the regions of flags and numbers, which lie with the host, and of its journal."""
        journal = journal_bytes(self.layout, self.state_layout, holdings.capacity) if holdings.dials.elastic else {}
        hashes = hashes_bytes(len(self.layout.buckets))
        buffers = Buffers.flag_bytes(self.model, self.spec.num_micro_batches)
        return {**buffers, **LossScale.region_bytes(), **hashes, **journal}


def describe(
    model: nn.Module,
    optimizers: Optimizers,
    spec: Spec,
    device: Device,
    cut: Cut,
    weights: Path | None = None,
) -> Description:
    """Describe a model and its optimizer. Moves the model's buffers to the device.

    Args:
        cut: how parameters are cut into blocks and buckets.
        weights: a safetensors file that takes the place of the model's own values.

    Raises: SpecError for what can not be trained.
    """
    refuse_unfinished(model)
    refuse_sparse_gradients(model.named_modules())
    refuse_synchronised(model)
    refuse_odd_buffers(model)
    if weights is None:
        check_can_reset(model)
    has_meta_buffers = give_buffers_memory(model, device.place)
    parameters, described = describe_parameters(model, optimizers, spec)
    layout = lay_out(described, cut)
    return Description(
        model=model,
        optimizers=optimizers,
        spec=spec,
        parameters=parameters,
        layout=layout,
        state_layout=_state_layout(optimizers, spec, layout, device),
        has_meta_buffers=has_meta_buffers,
        weights_file=weights,
    )


def _state_layout(optimizers: Optimizers, spec: Spec, layout: Layout, device: Device) -> StateLayout:
    whole = next((member for member in optimizers.members if not is_elementwise(member)), None)
    if spec.optimizer_state != "fp32" and whole is not None:
        raise SpecError(
            f"optimizer_state={spec.optimizer_state!r} is for optimizers that treat every element by itself, and "
            f"{type(whole).__name__} reads whole parameters. Leave it out, or use AdamW."
        )
    observed = observe(optimizers, device.place)
    entries = probe_state(
        optimizers, layout.parameters, observed, device.place, has_spare_room=not device.has_own_memory
    )
    counted = frozenset(number for number, seen in observed.items() if seen.counts)
    restless = frozenset(number for number, seen in observed.items() if seen.is_restless)
    return StateLayout(layout, entries, spec.optimizer_state, counted, restless)
