"""Every test forks its teams from this process; what it imports here, they need not import again."""

from pathlib import Path

import pytest
import torch
import torch._dynamo  # the first optimizer of a process imports it, 70 MB and two seconds

torch.set_num_threads(1)  # a forked process can not use the thread pool of its parent


@pytest.fixture(autouse=True)
def folders_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let temporary folders lie in the test's own, which pytest clears away."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
