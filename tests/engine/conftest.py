"""All tests here run in one process: what one of them sets is put back."""

from __future__ import annotations

import pytest

from lightwork.run import distribute
from lightwork.store.elements import UnitElements
from lightwork.store.regions import Pages
from tests.training import in_small_pieces, poison_what_is_given_back


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((distribute, "TUNING"), (Pages, "release_room"), (UnitElements, "release_room")):
        monkeypatch.setattr(owner, name, vars(owner)[name])


@pytest.fixture
def small_pieces(_put_back: None) -> None:
    """Let there be many small buckets, of which few are kept, and NaN in memory that was given back."""
    in_small_pieces(kept=1, ahead=2)
    poison_what_is_given_back()
