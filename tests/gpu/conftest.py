"""These tests need a GPU: `python -m pytest tests/gpu`. Elsewhere they are skipped, and rehearsed (tests/run, engine).

The number of GPUs is asked of the driver, without beginning to use one: teams are forked from this process.
"""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("default"))  # of cuDNN and attention kernels
            if torch.cuda.device_count() == 0:
                item.add_marker(pytest.mark.skip(reason="no GPU"))
