"""What the table of holdings predicts is what is reserved and used, byte for byte, wherever a bucket's parts lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightwork.device.base import Device
from lightwork.device.cpu import Cpu, Rehearsal
from lightwork.engine.assembly import attach, make_parts
from lightwork.engine.parts import Parts, Workplace
from lightwork.errors import SpecError
from lightwork.spec.footprint import regions_of
from lightwork.spec.holdings import MASTERS, SUMS, WORKING, Depths, Dials, Holdings, Home, Tuning, state_region
from lightwork.spec.layout import ALIGNMENT, span_of
from lightwork.spec.roster import Roster
from lightwork.spec.spec import Spec
from lightwork.spec.tree import Node
from lightwork.state.description import Description, describe
from lightwork.state.optimizers import Optimizers
from lightwork.store.elements import Elements, UnitElements, Units
from lightwork.store.mapped import create_disk_store
from lightwork.store.private import PrivateStore
from lightwork.store.regions import PAGE_BYTES, Regions, map_regions
from lightwork.team.board import Board
from lightwork.team.hosts import Hosts
from lightwork.trace import Trace
from lightwork.transport.null import NullCarrier

PLACEMENTS = ("replicate", "zero1", "zero2", "zero3")
OFFLOADS: dict[str, dict[str, str]] = {
    "nothing": {},
    "state": {"optimizer": "disk"},
    "all to disk": {"optimizer": "disk", "weights": "disk", "gradients": "disk"},
    "all to the host": {"optimizer": "host", "weights": "host", "gradients": "host"},
}
HOSTS = ((1,), (3,), (1, 1), (1, 1, 1), (2, 1))


class Net(nn.Module):
    """Norms keep fp32 weights, one layer is frozen, and there are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 40), nn.BatchNorm1d(40), nn.Linear(40, 40), nn.LayerNorm(40))
        self.frozen = nn.Linear(40, 8).requires_grad_(False)


def holdings_of(
    device: Device, *, precision: str, hosts: tuple[int, ...], host: int, dials: Dials, **more: Any
) -> tuple[Description, Holdings]:
    kind = "rehearsal" if device.has_own_memory else "cpu"
    spec = Spec(global_batch=8, micro_batch=2, precision=precision, device=kind, **more.pop("spec", {}))  # type: ignore[arg-type]
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    tuning = Tuning(block=96, bucket=256, depths=Depths())
    description = describe(model, Optimizers([optimizer]), spec, device, tuning.cut_for(kind))
    holdings = Holdings(
        layout=description.layout,
        spec=spec,
        roster=Roster.of_sizes(hosts),
        host=host,
        state=description.state_shape,
        dials=dials,
        **more,
    )
    return description, holdings


def parts_of(description: Description, holdings: Holdings, device: Device, folder: Path) -> tuple[Parts, Regions]:
    fixed = {"board": 4096, **description.flag_bytes(holdings)}
    memory_map = map_regions(regions_of(holdings, fixed, description.buffer_bytes))
    store = PrivateStore(memory_map.num_bytes)
    disk = create_disk_store(folder, memory_map.disk_bytes) if memory_map.disk_bytes else None
    units = Units(holdings.layout) if device.has_own_memory else None
    memory = Regions(store.buffer, memory_map, device, disk=disk.fileno() if disk else None, units=units)
    board: Board = object()  # type: ignore[assignment]  # nothing is asked of it here
    workplace = Workplace(
        local_rank=0,
        memory=memory,
        board=board,
        signal=object(),  # type: ignore[arg-type]
        trace=Trace(None, print),
        hosts=Hosts(NullCarrier(0), board),
        weights_carrier=NullCarrier(0),
    )
    parts = make_parts(description, holdings, workplace)
    attach(description, parts, write=True)
    return parts, memory


def combinations() -> Iterator[Any]:
    kinds: tuple[type[Device], ...] = (Cpu, Rehearsal)
    for kind, precision, hosts, placement, offload in itertools.product(
        kinds, ("fp32", "bf16"), HOSTS, PLACEMENTS, OFFLOADS
    ):
        if placement == "zero3" and max(hosts) > 1 and len(hosts) > 1:
            continue  # refused
        if (len(hosts) == 1 and placement != "replicate") or (kind is Rehearsal and max(hosts) > 1):
            continue  # the same as another one; a device is a host
        yield pytest.param(
            kind, precision, hosts, placement, offload, id=f"{kind.__name__}-{precision}-{hosts}-{placement}-{offload}"
        )


def places_of(parts: Parts, region: str) -> tuple[Elements, Elements]:
    """Return where masters or state have their home, and where computation sees them."""
    places = {name: (home, here) for name, home, here in parts.state.optimizer.moments.places}
    weights = parts.state.weights
    return (weights.masters, weights.masters_here) if region == MASTERS else places[region]


@pytest.mark.parametrize(("kind", "precision", "hosts", "placement", "offload"), list(combinations()))
def test_every_byte_that_is_predicted_is_reserved_and_no_other(
    kind: type[Device], precision: str, hosts: tuple[int, ...], placement: str, offload: str, tmp_path: Path
) -> None:
    device = kind()
    for host in range(len(hosts)):
        dials = Dials(placement=placement, offload=OFFLOADS[offload])  # type: ignore[arg-type]
        description, holdings = holdings_of(device, precision=precision, hosts=hosts, host=host, dials=dials)
        parts, memory = parts_of(description, holdings, device, tmp_path)
        layout, map_ = holdings.layout, memory._map
        # The mapping and the file hold the regions, page by page, and nothing else.
        mapped = {name: region for name, region in map_.regions.items() if region.is_mapped}
        assert map_.num_bytes == sum(-(-max(1, r.num_bytes) // PAGE_BYTES) * PAGE_BYTES for r in mapped.values())
        on_disk = [b - a for region in mapped.values() for a, b in region.on_disk]
        assert (
            0
            <= sum(-(-b // PAGE_BYTES) * PAGE_BYTES for b in on_disk) - map_.disk_bytes
            < PAGE_BYTES * (len(on_disk) + 1)
        )
        # Each part of each bucket is as large as its row says, and lies where it says.
        for row in holdings.rows:
            spans = [span_of(layout, block) for block in layout.blocks_of(row.bucket)]
            for region in [state_region(entry) for entry in holdings.state.itemsizes] + [MASTERS]:
                elements, here = places_of(parts, region)
                views = [elements.view(span.start, span.end) for span in spans]
                assert sum(view.nbytes for view in views) == row.parts[region].num_bytes
                home = row.parts[region].home
                if home is not Home.OWNER:
                    assert all(on_file(memory, view) == (home is Home.DISK) for view in views)
                    assert (elements is here) == (home is Home.HERE or not device.has_own_memory)
            working = [s for s in parts.state.weights.stretches(row.bucket) if s.dtype != torch.float32]
            exact = sum(s.numel for s in spans if layout.parameters[s.blocks[0].parameter].dtype != "float32")
            assert row.num_narrow == exact
            assert 0 <= sum(2 * (s.end - s.start) for s in working) - 2 * exact <= 2 * ALIGNMENT * len(spans)
        # Slots: the last element of the last slot of the last worker is the last of the region.
        slots, last = parts.moving.slots, holdings.num_places - 1
        for node in (Node(0, 1), Node(0, 2)):
            slots.take_room(last, node)
        sums = [
            slots.range_view(rank, slot, Node(0, 2), 0, layout.numel) if memory.is_mapped(SUMS) else None
            for rank in range(holdings.num_workers)
            for slot in range(holdings.num_places)
        ]
        if all(view is not None for view in sums):
            assert sum(view.nbytes for view in sums if view is not None) == map_.regions[SUMS].num_bytes
            addresses = {view.data_ptr() for view in sums if view is not None}
            assert len(addresses) == len(sums)
        parts.exchange.close()


def on_file(memory: Regions, view: torch.Tensor) -> bool:
    """Return whether a tensor's bytes lie in the file; one whose pages it shares may be either."""
    first = view.data_ptr() - memory._bytes.data_ptr()
    end = first + view.nbytes
    inside = [a <= first and end <= b for a, b, _ in memory._map.files]
    return any(inside)


def test_each_bucket_may_have_a_placement_and_an_offload_of_its_own(tmp_path: Path) -> None:
    hosts, overridden = (
        (1, 1),
        {1: Dials(placement="replicate"), 2: Dials(placement="zero3", offload={"weights": "disk"})},
    )
    rows = {}
    for host in range(2):
        _, holdings = holdings_of(
            Cpu(), precision="bf16", hosts=hosts, host=host, dials=Dials(placement="zero1"), dials_of=overridden
        )
        rows[host] = holdings.rows
        assert holdings.own_buckets == tuple(b for b in range(len(holdings.rows)) if b == 1 or b % 2 == host)
        assert [row.is_shared_out for row in holdings.rows[:3]] == [True, False, True]
        assert [row.weights_are_fetched for row in holdings.rows[:3]] == [False, False, host == 1]
    assert rows[0][0].parts[MASTERS].home is Home.HERE
    assert rows[1][0].parts[MASTERS].home is Home.OWNER
    assert rows[0][2].parts[WORKING].home is (Home.DISK if rows[0][2].num_narrow else Home.HERE)
    assert rows[1][2].parts[WORKING].home is Home.OWNER


def test_what_is_in_no_bucket_follows_the_plan_of_the_whole(tmp_path: Path) -> None:
    description, holdings = holdings_of(
        Cpu(), precision="fp32", hosts=(1,), host=0, dials=Dials(offload={"weights": "disk"}), dials_of={0: Dials()}
    )
    _, memory = parts_of(description, holdings, Cpu(), tmp_path)
    ((_, end),) = memory._map.regions[MASTERS].on_disk[-1:]
    assert end == memory._map.regions[MASTERS].num_bytes, "frozen parameters lie on disk"
    start, stop = (span_of(holdings.layout, holdings.layout.blocks_of(0)[i]) for i in (0, -1))
    assert not any(a < stop.end * 4 and start.start * 4 < b for a, b in memory._map.regions[MASTERS].on_disk)


def test_zero3_is_refused_where_workers_share_a_memory() -> None:
    with pytest.raises(SpecError, match="shares weights out among workers with memories of their own"):
        holdings_of(Cpu(), precision="fp32", hosts=(2, 1), host=0, dials=Dials(placement="zero3"))


def test_units_take_the_room_of_their_bucket_alone(tmp_path: Path) -> None:
    description, holdings = holdings_of(
        Rehearsal(), precision="fp32", hosts=(1,), host=0, dials=Dials(offload={"optimizer": "host"})
    )
    parts, _ = parts_of(description, holdings, Rehearsal(), tmp_path)
    for _, home, here in parts.state.optimizer.moments.places:
        assert isinstance(home, UnitElements)
        assert isinstance(here, UnitElements)
        for row in holdings.rows:
            before = home.num_bytes
            (start, _), (_, end) = (
                holdings.layout.range_of(b.parameter)
                for b in (holdings.layout.blocks_of(row.bucket)[0], holdings.layout.blocks_of(row.bucket)[-1])
            )
            home.take_room(start, end)
            aligned = sum(
                -(-holdings.layout.parameters[p].numel // ALIGNMENT) * ALIGNMENT
                for p in {b.parameter for b in holdings.layout.blocks_of(row.bucket)}
            )
            assert home.num_bytes - before == aligned * 4 + 2 * PAGE_BYTES
        assert here.num_bytes == 0
