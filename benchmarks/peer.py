"""One worker of one peer, under torchrun: the same model and samples as lightwork, at the peer's fastest settings.

Settings that were tried and dropped, or made no difference, are noted at each peer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from measure import Recorder, parse_arguments
from models import LEARNING_RATE, make_data, make_model, to_bf16
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

#: Takes this worker's part of a global batch, trains on it, and returns its loss.
TrainStep = Callable[..., Tensor]


def _autocast(bf16: bool) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


def _plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, *, autocast: bool) -> TrainStep:
    def train_step(*batch: Tensor) -> Tensor:
        with _autocast(autocast):
            loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return train_step


def _compress(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    # DDP refuses bf16_compress_hook itself, by name, unless the gradients travel by NCCL; over Gloo it works as well.
    return bf16_compress_hook(group, bucket)


def _data_parallel(model: nn.Module, *, compress: bool) -> DistributedDataParallel:
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    if compress:
        parallel.register_comm_hook(None, _compress)
    return parallel


def make_ddp(model: nn.Module, bf16: bool, batch: int) -> tuple[TrainStep, str]:
    """DDP; under bf16, autocast over fp32 weights and gradients sent as bf16."""
    parallel = _data_parallel(model, compress=bf16)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=LEARNING_RATE, fused=True)
    setting = "gradient_as_bucket_view, static_graph, fused AdamW"
    if bf16:
        setting += ", autocast, bf16_compress_hook"
    return _plain_step(parallel, optimizer, autocast=bf16), setting


def make_ddp_master(model: nn.Module, bf16: bool, batch: int) -> tuple[TrainStep, str]:
    """DDP over bf16 weights, whose fp32 masters are kept by hand."""
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    parallel = _data_parallel(to_bf16(model), compress=False)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, fused=True)
    for master in masters:
        master.grad = torch.empty_like(master)

    def train_step(*batch: Tensor) -> Tensor:
        with _autocast(True):
            loss = parallel(*batch)
        loss.backward()
        with torch.no_grad():
            torch._foreach_copy_([m.grad for m in masters], [w.grad for w in weights])
            optimizer.step()
            torch._foreach_copy_(weights, masters)
        parallel.zero_grad(set_to_none=True)
        return loss

    return train_step, "bf16 weights, norms fp32, fp32 masters by hand, bf16 all-reduce, fused AdamW"


def make_zero1(model: nn.Module, bf16: bool, batch: int) -> tuple[TrainStep, str]:
    """DDP with ZeroRedundancyOptimizer: the optimizer's state is sharded."""
    parallel = _data_parallel(model, compress=bf16)
    optimizer = ZeroRedundancyOptimizer(
        parallel.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, lr=LEARNING_RATE, fused=True
    )
    setting = "as DDP, parameters_as_bucket_view"
    return _plain_step(parallel, optimizer, autocast=bf16), setting


def make_fsdp2(model: nn.Module, bf16: bool, batch: int) -> tuple[TrainStep, str]:
    """FSDP2, sharded by layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    low = torch.bfloat16 if bf16 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low)
    layers = list(model.layers)
    for layer in layers if len(layers) > 2 else []:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    setting = "fully_shard by layer, reshard_after_forward=False, fused AdamW"
    return _plain_step(model, optimizer, autocast=False), setting + (", bf16 policy" if bf16 else "")


def make_deepspeed(model: nn.Module, bf16: bool, batch: int) -> tuple[TrainStep, str]:
    """DeepSpeed ZeRO-2 with its CPUAdam, which it compiles on first use."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # the other peers must run where it is not installed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    config = {
        "train_micro_batch_size_per_gpu": batch,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": bf16},
    }
    optimizer = DeepSpeedCPUAdam(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2, adamw_mode=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def train_step(*batch: Tensor) -> Tensor:
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        return loss

    return train_step, f"{deepspeed.__version__}, ZeRO-2, CPUAdam" + (", bf16" if bf16 else "")


PEERS: dict[str, Callable[[nn.Module, bool, int], tuple[TrainStep, str]]] = {
    "ddp": make_ddp,
    "ddp-master": make_ddp_master,
    "zero1": make_zero1,
    "fsdp2": make_fsdp2,
    "deepspeed": make_deepspeed,
}


def main() -> None:
    parser = parse_arguments(__doc__)
    parser.add_argument("--peer", choices=PEERS, required=True)
    arguments = parser.parse_args()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    share = arguments.batch // world_size
    torch.set_num_threads(1)
    dist.init_process_group("gloo")

    model = make_model(arguments.model)
    train_step, setting = PEERS[arguments.peer](model, arguments.precision == "bf16", share)
    data = make_data(arguments.model, arguments.batch, arguments.steps)
    recorder = Recorder(arguments.out, rank=rank, world_size=world_size)
    for step in range(arguments.steps):
        start = step * arguments.batch + rank * share
        loss = train_step(*(tensor[start : start + share] for tensor in data))
        recorder.end_step(loss.item())
    recorder.finish(setting)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
