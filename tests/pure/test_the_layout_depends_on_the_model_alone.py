"""Where parameters lie: aligned, cut at fixed multiples, each element in exactly one block and one bucket."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lightwork.spec.layout import ALIGNMENT, BLOCK, BUCKET, Layout, ParameterSpec, lay_out

sizes = st.one_of(
    st.integers(0, 100),
    st.integers(BLOCK - 2, BLOCK + 2),
    st.integers(1, 5).map(lambda n: n * BLOCK),
    st.just(BUCKET + 7),
)
parameters = st.lists(
    st.builds(
        lambda size, group, dtype, whole: ParameterSpec("p", (size,), dtype, group, whole),
        sizes,
        st.sampled_from([None, 0, 0, 1, 2]),
        st.sampled_from(["float32", "bfloat16"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@given(parameters)
@settings(max_examples=60)
def test_parameters_are_aligned_and_do_not_overlap(described: list[ParameterSpec]) -> None:
    layout = lay_out(described)
    end = 0
    for parameter, offset in zip(described, layout.offsets, strict=True):
        assert offset % ALIGNMENT == 0
        assert end <= offset < end + ALIGNMENT
        end = offset + parameter.numel
    assert end <= layout.numel < end + ALIGNMENT


@given(parameters)
@settings(max_examples=60)
def test_blocks_cover_what_is_trained_and_are_cut_at_multiples(described: list[ParameterSpec]) -> None:
    layout = lay_out(described)
    pieces: dict[int, list[tuple[int, int]]] = {}
    for block in layout.blocks:
        pieces.setdefault(block.parameter, []).append((block.start, block.end))
    for index, parameter in enumerate(described):
        if parameter.group is None or parameter.numel == 0:
            assert index not in pieces
            continue
        ranges = pieces[index]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == parameter.numel, "the true end, unpadded"
        assert all(a[1] == b[0] for a, b in pairwise(ranges))
        if parameter.whole:
            assert len(ranges) == 1
        else:
            assert all(start % BLOCK == 0 and end - start <= BLOCK for start, end in ranges)


@given(parameters)
@settings(max_examples=60)
def test_buckets_hold_every_block_once_and_one_group_each(described: list[ParameterSpec]) -> None:
    layout = lay_out(described)
    at = 0
    for bucket in layout.buckets:
        assert bucket.first_block == at
        assert bucket.end_block > at
        blocks = layout.blocks[bucket.first_block : bucket.end_block]
        assert {described[block.parameter].group for block in blocks} == {bucket.group}
        assert len(blocks) == 1 or sum(block.end - block.start for block in blocks) <= BUCKET
        at = bucket.end_block
    assert at == len(layout.blocks)


def test_a_model_without_trained_parameters_has_no_blocks() -> None:
    layout = lay_out([ParameterSpec("frozen", (3, 5), "float32", None)])
    assert (layout.blocks, layout.buckets, layout.numel) == ((), (), ALIGNMENT)


def test_the_fingerprint_tells_shapes_groups_and_types_apart() -> None:
    def layout(**changes: object) -> Layout:
        return lay_out([ParameterSpec(**{"name": "w", "shape": (4, 6), "dtype": "float32", "group": 0, **changes})])  # type: ignore[arg-type]

    prints = {
        layout(**changes).fingerprint()
        for changes in ({}, {"shape": (6, 4)}, {"group": None}, {"dtype": "bfloat16"}, {"whole": True}, {"name": "v"})
    }
    assert len(prints) == 6
    assert layout().fingerprint() == layout().fingerprint()
