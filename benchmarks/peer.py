"""One worker of one peer, under torchrun: the same model and samples as lightwork, at the peer's fastest settings.

Other settings that were tried are in `VARIANTS`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from measure import Recorder, parse_arguments
from models import LEARNING_RATE, make_data, make_model, to_bf16

#: Takes this worker's part of a global batch, trains on it, and returns its loss.
TrainStep = Callable[..., Tensor]
#: How to train a step, and the settings in words.
Peer = tuple[TrainStep, str]


def _autocast(bf16: bool) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


def _plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, *, autocast: bool) -> TrainStep:
    def train_step(*batch: Tensor) -> Tensor:
        with _autocast(autocast):
            loss: Tensor = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return train_step


def _data_parallel(model: nn.Module, *, compress: bool, bucket_mb: int = 25) -> DistributedDataParallel:
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True, bucket_cap_mb=bucket_mb)
    if compress:
        # DDP refuses bf16_compress_hook, by its name, unless gradients travel by NCCL. Over Gloo it works as well.
        parallel.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return parallel


def make_ddp(model: nn.Module, bf16: bool, share: int, *, compress: bool = True, bucket_mb: int = 25) -> Peer:
    """DDP; under bf16, autocast over fp32 weights."""
    parallel = _data_parallel(model, compress=bf16 and compress, bucket_mb=bucket_mb)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=LEARNING_RATE, fused=True)
    setting = f"gradient_as_bucket_view, static_graph, {bucket_mb} MB buckets, fused AdamW"
    if bf16:
        setting += ", autocast, " + ("bf16_compress_hook" if compress else "fp32 all-reduce")
    return _plain_step(parallel, optimizer, autocast=bf16), setting


def make_ddp_master(model: nn.Module, bf16: bool, share: int, *, autocast: bool = True, bucket_mb: int = 25) -> Peer:
    """DDP over bf16 weights, whose fp32 masters are kept by hand; without autocast, norms and loss are bf16 too."""
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    model = to_bf16(model) if autocast else model.bfloat16()
    parallel = _data_parallel(model, compress=False, bucket_mb=bucket_mb)
    weights: list[Tensor] = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, fused=True)
    gradients = [torch.empty_like(master) for master in masters]
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient

    def train_step(*batch: Tensor) -> Tensor:
        with _autocast(autocast):
            loss: Tensor = parallel(*batch)
        loss.backward()
        with torch.no_grad():
            torch._foreach_copy_(gradients, [weight.grad for weight in weights if weight.grad is not None])
            optimizer.step()
            torch._foreach_copy_(weights, masters)
        parallel.zero_grad(set_to_none=True)
        return loss

    kind = "autocast, norms fp32" if autocast else "norms and loss bf16 too"
    setting = f"bf16 weights ({kind}) and all-reduce, fp32 masters by hand, {bucket_mb} MB buckets, fused AdamW"
    return train_step, setting


def make_zero1(model: nn.Module, bf16: bool, share: int, *, compress: bool = True) -> Peer:
    """DDP with ZeroRedundancyOptimizer: the optimizer's state is sharded."""
    parallel = _data_parallel(model, compress=bf16 and compress)
    optimizer = ZeroRedundancyOptimizer(
        parallel.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, lr=LEARNING_RATE, fused=True
    )
    setting = "as ddp, parameters_as_bucket_view" + ("" if compress or not bf16 else ", fp32 all-reduce")
    return _plain_step(parallel, optimizer, autocast=bf16), setting


def make_fsdp2(model: nn.Module, bf16: bool, share: int, *, reshard: bool = False, by_layer: bool = True) -> Peer:
    """FSDP2, sharded by layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    low = torch.bfloat16 if bf16 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low)
    layers = list(model.get_submodule("layers").children())
    by_layer = by_layer and len(layers) > 2  # the tiny model is faster in one piece
    for layer in layers if by_layer else ():
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    unit = "by layer" if by_layer else "the root alone"
    setting = f"fully_shard {unit}, reshard_after_forward={reshard}, fused AdamW" + (", bf16 policy" if bf16 else "")
    return _plain_step(model, optimizer, autocast=False), setting


def make_deepspeed(
    model: nn.Module, bf16: bool, share: int, *, optimizer: str = "cpuadam", **zero: bool | float
) -> Peer:
    """DeepSpeed ZeRO-2 with its CPUAdam, which it compiles on first use."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # the other peers must run where it is not installed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    config = {
        "train_micro_batch_size_per_gpu": share,
        "zero_optimization": {"stage": 2, "compute_grad_norm": False, "reduce_scatter": False, **zero},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # the default is 1.0: another training than the rest
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
    }
    if optimizer == "cpuadam":
        adam = DeepSpeedCPUAdam(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2, adamw_mode=True)
    else:
        adam = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)

    def train_step(*batch: Tensor) -> Tensor:
        loss: Tensor = engine(*batch)
        engine.backward(loss)
        engine.step()
        return loss

    setting = f"{deepspeed.__version__}, ZeRO-2, {optimizer}" + "".join(f", {k}={v}" for k, v in zero.items())
    return train_step, setting + (", bf16" if bf16 else "")


#: The peers, at their fastest settings.
PEERS: dict[str, Callable[[nn.Module, bool, int], Peer]] = {
    "ddp": make_ddp,
    "ddp-master": make_ddp_master,
    "ddp-master-pure": partial(make_ddp_master, autocast=False),
    "zero1": make_zero1,
    "fsdp2": make_fsdp2,
    "deepspeed": make_deepspeed,
}

#: Settings that were not faster. `bench.py --only peer-settings-2` times them beside the chosen ones.
VARIANTS: dict[str, Callable[[nn.Module, bool, int], Peer]] = {
    "ddp/fp32-all-reduce": partial(make_ddp, compress=False),
    "ddp/one-bucket": partial(make_ddp, bucket_mb=10_000),
    "ddp-master/one-bucket": partial(make_ddp_master, bucket_mb=10_000),
    "zero1/fp32-all-reduce": partial(make_zero1, compress=False),
    "fsdp2/reshard": partial(make_fsdp2, reshard=True),
    "fsdp2/root": partial(make_fsdp2, by_layer=False),
    "deepspeed/torch-adam": partial(make_deepspeed, optimizer="fused torch AdamW"),
    "deepspeed/small-buckets": partial(make_deepspeed, reduce_bucket_size=5e6, overlap_comm=True),
    "deepspeed/reduce-scatter": partial(make_deepspeed, reduce_scatter=True),
    "deepspeed/grad-norm": partial(make_deepspeed, compute_grad_norm=True),
}


def main() -> None:
    parser = parse_arguments(__doc__)
    parser.add_argument("--peer", choices=[*PEERS, *VARIANTS], required=True)
    arguments = parser.parse_args()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    share = arguments.batch // world_size
    torch.set_num_threads(1)
    dist.init_process_group("gloo")

    model = make_model(arguments.model)
    train_step, setting = (PEERS | VARIANTS)[arguments.peer](model, arguments.precision == "bf16", share)
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
