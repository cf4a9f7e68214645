"""Two optimizers over one model: Muon for the matrices within, AdamW for embedding, head and the rest."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import lightwork

WORDS, WIDTH = 16, 24


class Mixer(nn.Module):
    """Predicts the next of a few words."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.hidden = nn.Sequential(nn.Linear(4 * WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH, bias=False))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words):
        return self.head(self.hidden(self.embedding(words).flatten(1)))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", help="a folder for this run; if it holds a checkpoint, the run goes on from there")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    words = torch.randint(0, WORDS, (512, 4), generator=torch.Generator().manual_seed(5))
    data = TensorDataset(words, (words[:, 0] + words[:, 3]) % WORDS)
    model = Mixer()
    matrices = [p for p in model.hidden.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0)
    adamw = torch.optim.AdamW(rest, lr=3e-3, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=16) for o in (muon, adamw)]
    run = lightwork.distribute(model, [muon, adamw], global_batch=64, micro_batch=16, run_dir=args.out)
    run.keep(muon=schedulers[0], adamw=schedulers[1])

    for epoch in run.epochs(args.epochs):
        for step in run.steps(data):
            for inputs, targets in step:
                step.backward(F.cross_entropy(model(inputs), targets))
            for scheduler in schedulers:
                scheduler.step()
            if step.last_of_epoch:
                print(f"epoch {epoch}   loss {step.loss:.3f}   Muon's learning rate {muon.param_groups[0]['lr']:.4f}")
            if step.index % 3 == 2:
                run.save()


if __name__ == "__main__":
    main()
