"""LoRA by hand: a frozen model, of which small matrices beside the layers are trained, and saved alone."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import lightwork


class LoRA(nn.Module):
    """A frozen linear layer, plus the product of two thin matrices."""

    def __init__(self, base, rank=4, scale=2.0, dropout=0.1):
        super().__init__()
        self.base, self.scale, self.dropout = base.requires_grad_(False), scale, nn.Dropout(dropout)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + self.scale * self.dropout(x) @ self.down.T @ self.up.T


def add_adapters(module):
    """Put adapters around every linear layer."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, LoRA(child))
        else:
            add_adapters(child)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", help="a folder for this run; if it holds a checkpoint, the run goes on from there")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3)
    )
    model.requires_grad_(False)
    add_adapters(model)
    inputs = torch.randn(480, 16, generator=torch.Generator().manual_seed(6))
    data = TensorDataset(inputs, inputs[:, :3].argmax(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run = lightwork.distribute(model, optimizer, global_batch=48, micro_batch=12, run_dir=args.out)

    for epoch in run.epochs(args.epochs):
        for step in run.steps(data):
            for x, y in step:
                step.backward(F.cross_entropy(model(x), y))
            if step.last_of_epoch:
                print(f"epoch {epoch}   loss {step.loss:.3f}")
            if step.index % 4 == 3:
                run.save()
    state = run.state_dict()
    if run.is_main:
        adapters = {name: value for name, value in state.items() if name.endswith(("down", "up"))}
        torch.save(adapters, run.run_dir / "adapters.pt")
        print(f"saved {sum(a.numel() for a in adapters.values())} of {sum(v.numel() for v in state.values())} values")


if __name__ == "__main__":
    main()
