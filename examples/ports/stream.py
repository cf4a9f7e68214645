"""A stream: samples that are only read, one after the other, of shards that are shared out among the workers."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import IterableDataset

import lightwork


class Log(IterableDataset):
    """Lines of made-up log files, by number. By `num_shards` and `shard` a run shares the files out."""

    def __init__(self, files):
        super().__init__()
        self.files = list(files)

    @property
    def num_shards(self):
        return len(self.files)

    def shard(self, num_shards, index):
        return Log(self.files[index::num_shards])

    def __iter__(self):
        for number in self.files:
            generator = torch.Generator().manual_seed(number)
            for _ in range(20 + number % 3):
                x = torch.randn(6, generator=generator)
                yield {"x": x, "seconds": x[:3].abs().sum()}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", help="a folder for this run; if it holds a checkpoint, the run goes on from there")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=args.steps + 1)
    run = lightwork.distribute(model, optimizer, global_batch=32, micro_batch=8, run_dir=args.out)
    run.keep(scheduler=scheduler)

    for step in run.steps(Log(range(24)), max_steps=args.steps):
        for batch in step:
            step.backward(F.mse_loss(model(batch["x"])[:, 0], batch["seconds"]))
        scheduler.step()
        if step.index % 5 == 4:
            print(f"step {step.index}   epoch {step.epoch}   loss {step.loss:.3f}")
            run.save()


if __name__ == "__main__":
    main()
