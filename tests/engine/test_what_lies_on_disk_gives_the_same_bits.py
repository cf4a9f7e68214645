"""Optimizer state, weights and gradients in a file on disk: the same digests, and little resident memory."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases import CASES, Case
from tests.fake_ranks import run_ranks
from tests.training import alone, in_small_pieces, train

EVERYTHING = {"optimizer": "disk", "weights": "disk", "gradients": "disk"}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_step_has_the_digest_of_one_worker_in_memory(case: Case) -> None:
    in_memory = alone(case.name)
    in_small_pieces(block=None, bucket=None, piece=50)  # gradients are folded in several pieces
    for offload in ({"optimizer": "disk"}, EVERYTHING):
        for seen in run_ranks(2, lambda offload=offload: train(case, offload=offload)):
            assert seen == in_memory


@pytest.mark.parametrize("more", [{"transport": "group"}, {"transport": "group", "placement": "zero1"}])
def test_it_goes_together_with_the_other_dials(more: dict[str, Any]) -> None:
    case = CASES["gpt, tied, dropout, token weights"]
    settings = {**more, "offload": EVERYTHING, "activations": "recompute", "precision": "bf16"}
    for seen in run_ranks(3, lambda: train(case), settings=settings):
        assert seen == alone(case.name, precision="bf16")
