"""Optimizer state, weights and gradients in a file on disk: the same digests, and little resident memory."""

from __future__ import annotations

import filecmp
import os
import re
import threading
from pathlib import Path

import pytest
import torch

import lightwork
from lightwork.errors import MemoryFull, SpecError
from lightwork.store.mapped import create_disk_store
from tests.training import new_folder, run_team

EVERYTHING = {"optimizer": "disk", "weights": "disk", "gradients": "disk"}


def on_disk() -> tuple[int, int]:
    """Return size and resident bytes of this process's mapping of a file on disk."""
    text = Path("/proc/self/smaps").read_text()
    mappings = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)
    own = [m for m in mappings if re.match(r"[^\n]* /(?!memfd)[^\n]*lightwork-\w+ \(deleted\)\n", m)]
    size, resident = (
        sum(int(found) * 1024 for m in own for found in re.findall(rf"(?m)^{field}:\s+(\d+) kB", m))
        for field in ("Size", "Rss")
    )
    return size, resident


def resident_of_a_large_model() -> tuple[int, int]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters())
    run = lightwork.distribute(
        model, optimizer, global_batch=2, micro_batch=1, offload=EVERYTHING, run_dir=str(new_folder())
    )
    highest = 0
    data = torch.utils.data.TensorDataset(torch.randn(8, 1024))
    for step in run.steps(data, epochs=1):
        for (x,) in step:
            loss = model(x).square().mean()
            highest = max(highest, on_disk()[1])
            step.backward(loss)
            highest = max(highest, on_disk()[1])
        highest = max(highest, on_disk()[1])
    return on_disk()[0], highest


def test_little_of_what_lies_on_disk_is_resident() -> None:
    for size, highest in run_team(2, resident_of_a_large_model):
        assert size >= 8 * 1024 * 1025 * 4 * 5  # weights, two moments, two workers' gradients
        assert highest < size / 8


def test_a_disk_without_room_or_that_is_memory_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(MemoryFull, match=r"offload to disk needs 1 PiB|offload to disk needs \d+"):
        create_disk_store(tmp_path, 2**50)
    with pytest.raises(SpecError, match="nothing, which does not exist"):
        create_disk_store(tmp_path / "nothing", 4096)
    if os.path.ismount("/dev/shm"):
        with pytest.raises(SpecError, match="which is memory itself"):
            create_disk_store(Path("/dev/shm"), 4096)
    assert list(tmp_path.iterdir()) == []


def proportional() -> int:
    """Return this process's proportional set size."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"(?m)^Pss:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]


def train_within(memory: str | None) -> tuple[str, int, dict[str, str]]:
    """Train 34 M parameters; return the digest, the highest proportional set size above the start, and the offload."""
    before = proportional()
    torch.manual_seed(0)
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(32)))
    optimizer = torch.optim.AdamW(model.parameters())
    run = lightwork.distribute(
        model, optimizer, global_batch=4, micro_batch=2, memory=memory, run_dir=str(new_folder())
    )
    highest = proportional()
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(8, 1024, generator=generator))
    for step in run.steps(data, epochs=1):
        for (x,) in step:
            loss = model(x).square().mean()
            highest = max(highest, proportional())
            step.backward(loss)
            highest = max(highest, proportional())
        highest = max(highest, proportional())
    return run.digest(), highest - before, dict(run.plan.offload)


def test_a_model_whose_training_state_is_four_times_the_limit_trains_within_it_to_the_same_digest() -> None:
    state = 32 * 1024 * 1025 * 16  # weights, gradients and two moments, fp32: 537 MB
    limit = state // 4
    ((expected, free, nothing),) = run_team(1, lambda: train_within(None))
    ((digest, highest, offload),) = run_team(1, lambda: train_within(str(limit)))
    assert (nothing, set(offload)) == ({}, {"optimizer", "gradients", "weights"})
    assert free > state * 0.9
    assert highest <= limit
    assert digest == expected


def test_a_limit_that_nothing_fits_is_refused_with_what_is_missing() -> None:
    model = torch.nn.Linear(1024, 4096)
    with pytest.raises(
        MemoryFull, match=r"memory='64MiB' .* is .* too little: .* nearest plan that fits is memory='\d+MiB'"
    ):
        lightwork.distribute(
            model,
            torch.optim.AdamW(model.parameters()),
            global_batch=2,
            memory="64MiB",
            run_dir=str(new_folder()),
        )


def save_and_resume_within(memory: str | None, folder: Path) -> tuple[str, int]:
    """Train a step and save or, where that was done, go on from there; return digest and the highest memory."""
    before = proportional()
    highest = [before]
    resume = folder / "saved" if (folder / "saved").exists() else None
    torch.manual_seed(0)
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(32)))
    optimizer = torch.optim.AdamW(model.parameters())
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            highest.append(proportional())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run = lightwork.distribute(
            model, optimizer, global_batch=4, micro_batch=2, memory=memory, run_dir=new_folder(), resume=resume
        )
        data = torch.utils.data.TensorDataset(torch.randn(8, 1024, generator=torch.Generator().manual_seed(1)))
        for step in run.steps(data, epochs=1):
            for (x,) in step:
                step.backward(model(x).square().mean())
            if resume is None:
                run.save(folder / "saved")
                break
        digest = run.digest()
    finally:
        ended.set()
        watcher.join()
    return digest, max(highest) - before


def test_a_run_held_to_a_quarter_of_its_training_state_saves_and_resumes_within_it_to_the_same_digest() -> None:
    limit = 32 * 1024 * 1025 * 16 // 4
    free, held = new_folder(), new_folder()
    ((expected, _),) = run_team(1, lambda: save_and_resume_within(None, free))
    ((digest, highest),) = run_team(1, lambda: save_and_resume_within(str(limit), held))
    assert (digest, highest <= limit) == (expected, True)
    for file in ("model", "optimizer"):
        name = f"saved/{file}.safetensors"
        assert filecmp.cmp(free / name, held / name, shallow=False)
    ((expected, _),) = run_team(1, lambda: save_and_resume_within(None, held))
    ((digest, highest),) = run_team(1, lambda: save_and_resume_within(str(limit), held))
    assert (digest, highest <= limit) == (expected, True)
