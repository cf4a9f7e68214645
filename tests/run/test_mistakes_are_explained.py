"""What a newcomer may get wrong raises at once and says what replaces it; nothing hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightwork
from lightwork.launcher.team import fork_team
from lightwork.spec.plan import Plan
from lightwork.team.words import METRICS_BYTES
from tests.cases import CASES, vectors
from tests.training import distributed, new_folder, run_team, train


def setting(**settings: Any) -> Any:
    model = nn.Sequential(nn.Linear(20, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return lightwork.distribute(model, optimizer, **{"global_batch": 16, "run_dir": new_folder(), **settings})


def raised(job: Callable[[], Any], num_workers: int = 1) -> str:
    """Return the last lines of the tracebacks of a team that failed. (The first failure ends the others.)"""
    results = fork_team(num_workers, job, timeout=60.0)
    assert all(result.status != 0 for result in results), results
    return "\n".join(result.error.strip().splitlines()[-1] for result in results if result.error)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"global_batch": 500, "micro_batch": 16},
            "global_batch=500 is not a multiple of micro_batch=16. Nearest: 496 or 512",
        ),
        ({"global_batch": 0}, "global_batch=0 is not a positive whole number"),
        ({"micro_batch": 32}, "micro_batch=32 is larger than global_batch=16"),
        ({"precision": "fp8"}, "precision='fp8' is not known. Choose one of fp32, bf16"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm=-1.0 is not a positive number"),
        ({"seed": -1}, "seed=-1 is not a whole number"),
        ({"threads": 0}, "threads=0 is not a positive whole number"),
        ({"buffers": {"x": "median"}}, "buffers['x']='median' is not a rule"),
        ({"buffers": {"x": "mean"}}, "buffers names x, which the model does not have"),
        ({"fp32_modules": ("nope",), "precision": "bf16"}, "fp32_modules names 'nope'"),
        ({"fp32_modules": ("nope",)}, "fp32_modules names 'nope'"),
        ({"fp32_modules": "0"}, "fp32_modules='0' is not a list of names of modules"),
        ({"fp32_modules": 3}, "fp32_modules=3 is not a list of names of modules"),
        ({"buffers": "mean"}, "buffers='mean' is not a choice by name"),
        ({"threads": 100_000}, "threads=100000 a worker is more than 1024"),
        ({"plan": lambda: Plan(activations="recompute")}, "activations='recompute' is not a choice by module"),
        ({"plan": lambda: Plan(activations={"0": "int8"})}, "activations has 'int8' in a plan, which takes keep"),
        ({"plan": lambda: Plan(offload_dir=3)}, "offload_dir=3 is not the path of a folder"),
    ],
)
def test_an_impossible_spec_is_refused(settings: dict[str, Any], words: str) -> None:
    assert words in raised(lambda: setting(**{k: v() if callable(v) else v for k, v in settings.items()}))


def test_left_out_the_micro_batch_is_an_eighth_rounded_up() -> None:
    assert run_team(1, lambda: setting(global_batch=100).spec.micro_batch) == [13]
    assert run_team(1, lambda: setting(global_batch=1).spec.micro_batch) == [1]


def test_settings_of_the_command_line_take_the_place_of_those_in_the_script() -> None:
    def job() -> tuple[int, float | None]:
        spec = setting(micro_batch=4).spec
        return spec.micro_batch, spec.clip_grad_norm

    assert run_team(1, job, settings={"micro_batch": 8, "clip_grad_norm": 2.5}) == [(8, 2.5)]
    assert "--set colour=... names no field" in (fork_team(1, job, settings={"colour": "red"})[0].error or "")


def body(action: Callable[[Any, Any, torch.Tensor], None], **settings: Any) -> Callable[[], None]:
    """Return a job that calls `action(run, step, loss)` in the body of the first micro-batch."""

    def job() -> None:
        run = setting(micro_batch=4, **settings)
        for step in run.steps(vectors(), max_steps=2):
            for x, y in step:
                action(run, step, F.cross_entropy(run.model(x), y))

    return job


def write_weight(run: Any, step: Any, loss: torch.Tensor) -> None:
    step.backward(loss)
    with torch.no_grad():
        run.model[0].weight.mul_(0.5)


def twice(run: Any, step: Any, loss: torch.Tensor) -> None:
    step.backward(loss, weight=2)
    step.backward(loss, weight=2)


def too_many_metrics(run: Any, step: Any, loss: torch.Tensor) -> None:
    step.backward(loss)
    for index in range(METRICS_BYTES // 8):
        step.add(f"m{index}", 1.0)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (
            lambda run, step, loss: loss.backward(),
            "loss.backward() was called on a distributed model. Call step.backward(loss)",
        ),
        (
            lambda run, step, loss: run._engine.optimizers.members[0].step(),
            "optimizer.step() was called on a distributed run",
        ),
        (
            lambda run, step, loss: run._engine.optimizers.members[0].zero_grad(),
            "optimizer.zero_grad() was called on a distributed run",
        ),
        (lambda run, step, loss: None, "step.backward was not called for micro-batch 0 of step 0"),
        (twice, "step.backward was called twice for micro-batch 0 of step 0"),
        (write_weight, "parameter 0.weight was written in micro-batch 0 of step 0"),
        (too_many_metrics, "the metrics of micro-batch 0 of step 0 take"),
        (lambda run, step, loss: step.backward(loss.item()), "step.backward takes the loss as a tensor, not float"),
        (lambda run, step, loss: step.backward(loss.expand(3)), "the loss has shape (3,), not a scalar"),
        (lambda run, step, loss: step.backward(loss.detach()), "the loss does not depend on any trainable parameter"),
        (lambda run, step, loss: step.backward(loss, weight=-1), "weight=-1 in step.backward"),
        (lambda run, step, loss: step.loss, "loss of step 0 is not known yet"),
        (lambda run, step, loss: run.save(), "run.save was called inside the loop"),
        (lambda run, step, loss: run.digest(), "run.digest was called inside the loop"),
        (lambda run, step, loss: run.evaluate(vectors()), "run.evaluate was called inside the loop"),
        (lambda run, step, loss: step.add("x", torch.ones(3)), "metric 'x' is not a single number"),
        (lambda run, step, loss: list(run.steps(vectors())), "run.steps was called inside a loop over run.steps"),
        (lambda run, step, loss: list(step), "step 0 was iterated twice"),
    ],
)
def test_a_mistake_in_the_loop_body_is_explained(action: Callable[[Any, Any, torch.Tensor], None], words: str) -> None:
    assert words in raised(body(action))


def test_a_loss_that_is_not_finite_is_named_by_worker_step_micro_batch_and_samples() -> None:
    def job() -> None:
        run = setting(micro_batch=4)
        inputs, targets = vectors().tensors
        inputs[23] = float("nan")
        for step in run.steps(TensorDataset(inputs, targets), shuffle=False, epochs=1):
            for x, y in step:
                step.backward(F.cross_entropy(run.model(x), y))

    message = raised(job)
    assert "NonFiniteLoss" in message
    assert "the loss is nan on rank 0 in micro-batch 1 of step 1, samples 20, 21, 22, 23" in message


def test_leaving_the_inner_loop_early_is_named() -> None:
    def job() -> None:
        run = setting(micro_batch=4)
        for step in run.steps(vectors()):
            for x, y in step:
                step.backward(F.cross_entropy(run.model(x), y))
                break

    assert "the inner loop of step 0 was left early" in raised(job)


def test_not_entering_the_inner_loop_is_named() -> None:
    def job() -> None:
        for _ in setting().steps(vectors()):
            pass

    assert "the inner loop of step 0 was never entered" in raised(job)


def test_writing_weights_between_steps_is_named() -> None:
    def job() -> None:
        run = setting(micro_batch=4)
        for step in run.steps(vectors()):
            for x, y in step:
                step.backward(F.cross_entropy(run.model(x), y))
            with torch.no_grad():
                run.model[0].bias.zero_()

    assert "parameter 0.bias was written outside the loop or between two steps" in raised(job)


class Shrinking(TensorDataset):
    """Loses a sample as soon as its last one was read."""

    lost = 0

    def __len__(self) -> int:
        return super().__len__() - self.lost

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        self.lost = 1
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (lambda: TensorDataset(torch.zeros(0, 20)), "is empty"),
        (lambda: Shrinking(*vectors().tensors), "changed its length: 44 samples when the run began, 43"),
        (lambda: 17, "is not a data set"),
        (
            lambda: DataLoader(
                vectors(), sampler=torch.utils.data.DistributedSampler(vectors(), num_replicas=2, rank=0)
            ),
            "DistributedSampler",
        ),
    ],
)
def test_a_data_set_that_can_not_be_trained_on_is_refused(dataset: Callable[[], Any], words: str) -> None:
    def job() -> None:
        run = setting(micro_batch=4)
        for step in run.steps(dataset(), epochs=2):
            for x, y in step:
                step.backward(F.cross_entropy(run.model(x), y))

    assert words in raised(job)


def lazy() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.LazyLinear(5))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def lazy_norm() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.Linear(3, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def scripted(part: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 3)))
    model = nn.Sequential(model, nn.Linear(3, 3)) if part else model
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def traced() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = torch.jit.trace(nn.Linear(3, 3), torch.zeros(2, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def stranger() -> tuple[nn.Module, torch.optim.Optimizer]:
    return nn.Linear(3, 3), torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=0.1)


def sparse() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Embedding(5, 3, sparse=True)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def double() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 3).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def quasi_newton() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 3)
    return model, torch.optim.LBFGS(model.parameters())


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lazy, "module 0 is a lazy module (LazyLinear)"),
        (lazy_norm, "module 0 is a lazy module (LazyBatchNorm1d)"),
        (lambda: scripted(part=False), "the model is a module of TorchScript"),
        (lambda: scripted(part=True), "module 0 is a module of TorchScript"),
        (traced, "the model is a module of TorchScript"),
        (stranger, "parameters that are not in the model"),
        (sparse, "makes sparse gradients"),
        (double, "is torch.float64"),
        (quasi_newton, "LBFGS can not train data-parallel"),
        (lambda: (torch.optim.SGD([torch.zeros(1)]), nn.Linear(3, 3)), "distribute takes the model first"),
    ],
)
def test_a_model_or_optimizer_that_can_not_be_shared_is_refused_by_name(build: Callable[[], Any], words: str) -> None:
    assert words in raised(lambda: lightwork.distribute(*build(), global_batch=4, run_dir=new_folder()))


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_lazy_model_is_refused_by_name_in_every_precision(precision: Literal["fp32", "bf16", "fp16"]) -> None:
    def job() -> None:
        lightwork.distribute(*lazy(), global_batch=4, precision=precision, run_dir=new_folder())

    assert "is a lazy module" in raised(job)


def clip_by_value(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Stands for a user's hook."""


@pytest.mark.parametrize(("kind", "instead"), [("pre", "pass clip_grad_norm="), ("post", "weights are written in")])
def test_a_hook_on_the_optimizer_s_step_is_refused_by_name(kind: str, instead: str) -> None:
    def before() -> None:
        model = nn.Linear(20, 5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        vars(torch.optim.Optimizer)[f"register_step_{kind}_hook"](optimizer, clip_by_value)
        lightwork.distribute(model, optimizer, global_batch=4, run_dir=new_folder())

    def after() -> None:
        optimizer = setting()._engine.optimizers.members[0]
        (optimizer.register_step_pre_hook if kind == "pre" else optimizer.register_step_post_hook)(clip_by_value)

    message = raised(before)
    assert f"optimizer.register_step_{kind}_hook was called with clip_by_value" in message
    assert instead in message
    assert f"optimizer.register_step_{kind}_hook was called. The team" in raised(after)


def test_hooks_that_were_removed_and_those_of_a_closed_run_are_the_script_s_business() -> None:
    def job() -> int:
        model = nn.Linear(20, 5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(clip_by_value).remove()
        lightwork.distribute(model, optimizer, global_batch=4, run_dir=new_folder()).close()
        optimizer.register_step_post_hook(clip_by_value)
        return len(optimizer._optimizer_step_post_hooks)

    assert run_team(1, job) == [1]


def test_parameters_added_to_the_optimizer_later_are_refused() -> None:
    def job() -> None:
        run = setting(micro_batch=4)
        run._engine.optimizers.members[0].add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        for step in run.steps(vectors()):
            list(step)

    assert "+1 since distribute" in raised(job)


# --- between workers ---------------------------------------------------------------------------------------------


def test_models_that_differ_between_workers_are_named() -> None:
    def job() -> None:
        width = 5 + int(os.environ["LIGHTWORK_RANK"])
        model = nn.Linear(20, width)
        lightwork.distribute(model, torch.optim.SGD(model.parameters()), global_batch=4, run_dir=new_folder())

    results = fork_team(2, job, timeout=60.0)
    assert "rank 1 differs from rank 0 at lightwork.distribute in its parameters" in (results[1].error or "")
    assert all(result.status != 0 for result in results)


def test_data_sets_that_differ_between_workers_are_named() -> None:
    def job() -> None:
        run = setting(micro_batch=4)
        for step in run.steps(vectors(40 + run.rank)):
            list(step)

    assert "rank 1 differs from rank 0 at run.steps in its samples in the data set: 41 against 40" in raised(job, 2)


def test_learning_rates_that_differ_between_workers_are_named() -> None:
    def job() -> None:
        run = setting(micro_batch=4)
        for step in run.steps(vectors()):
            run._engine.optimizers.members[0].param_groups[0]["lr"] = 1e-3 * (1 + run.rank)
            for x, y in step:
                step.backward(F.cross_entropy(run.model(x), y))

    assert "at step 0 rank 1 has other learning rates" in raised(job, 2)


def test_a_collective_call_of_one_worker_alone_is_named_on_all() -> None:
    def job() -> None:
        run = setting(micro_batch=4)
        for step in run.steps(vectors()):
            for x, y in step:
                step.backward(F.cross_entropy(run.model(x), y))
            if run.is_main:
                run.save()

    start = time.monotonic()
    message = raised(job, 2)
    assert "if run.is_main" in message
    assert time.monotonic() - start < 20


def test_different_collective_calls_are_named() -> None:
    def job() -> None:
        run = setting(micro_batch=4)
        if run.is_main:
            run.digest()
        else:
            run.state_dict()

    assert "calls digest while rank" in raised(job, 2) or "calls state_dict while rank" in raised(job, 2)


def test_a_worker_that_raises_ends_the_others() -> None:
    def job() -> None:
        run = setting(micro_batch=4)
        for step in run.steps(vectors(), epochs=50):
            for x, y in step:
                if run.rank == 1 and step.index >= 3:
                    raise ValueError("mine alone")
                step.backward(F.cross_entropy(run.model(x), y))

    start = time.monotonic()
    results = fork_team(3, job, timeout=60.0)
    assert time.monotonic() - start < 20
    assert "ValueError: mine alone" in (results[1].error or "")
    assert all(result.status != 0 for result in results)


def test_a_worker_that_exits_with_0_in_the_middle_ends_the_others() -> None:
    def job() -> None:
        run = setting(micro_batch=4)
        for step in run.steps(vectors(), epochs=50):
            if run.rank == 1 and step.index >= 3:
                os._exit(0)
            for x, y in step:
                step.backward(F.cross_entropy(run.model(x), y))

    start = time.monotonic()
    results = fork_team(2, job, timeout=60.0)
    assert time.monotonic() - start < 20
    assert [result.status for result in results] == [-signal.SIGTERM, 0]


def test_too_little_memory_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightwork.team.join.available_memory", lambda: 1000)
    message = raised(setting)
    assert "MemoryFull: training needs" in message
    assert "1000 B are left" in message


def test_a_second_run_in_one_process_takes_the_model_over() -> None:
    def job() -> tuple[bool, bool]:
        case = CASES["experts, SGD"]
        first = train(case, max_steps=2)
        run, _ = distributed(case)
        again, _ = distributed(case)
        del run
        return first == train(case, max_steps=2), again.world_size == 1

    assert run_team(1, job) == [(True, True)]
