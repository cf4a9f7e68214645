"""A loop in the manner of nanoGPT: a number of steps, the learning rate set by hand, evaluation now and then."""

import argparse
import inspect
import math
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import lightwork

WIDTH, LENGTH = 32, 24


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.head.weight = self.tokens.weight  # tied

    def forward(self, idx):
        return self.head(self.norm(self.blocks(self.tokens(idx) + self.places.weight)))


class RandomWindows(Dataset):
    """As nanoGPT's get_batch: a window at a random place. The run seeds numpy for each sample."""

    def __init__(self, text, num):
        self.text, self.num = text, num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        start = np.random.randint(len(self.text) - LENGTH - 1)
        piece = self.text[start : start + LENGTH + 1].astype(np.int64)
        return piece[:-1], piece[1:]


def learning_rate(step, warm_up, total, highest=3e-3, lowest=3e-4):
    if step < warm_up:
        return highest * (step + 1) / (warm_up + 1)
    done = (step - warm_up) / max(1, total - warm_up)
    return lowest + 0.5 * (1 + math.cos(math.pi * done)) * (highest - lowest)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", help="a folder for this run; if it holds a checkpoint, the run goes on from there")
    args = parser.parse_args(arguments)

    torch.manual_seed(1337)
    text = np.frombuffer(inspect.getsource(textwrap).encode(), dtype=np.uint8) % 128
    training, validation = RandomWindows(text[:-2000], 4096), RandomWindows(text[-2000:], 32)
    model = GPT(128)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.99)
    )
    run = lightwork.distribute(
        model, optimizer, global_batch=32, micro_batch=8, clip_grad_norm=1.0, seed=1337, run_dir=args.out
    )

    for step in run.steps(training, max_steps=args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step.index, 4, args.steps)
        for x, y in step:  # nanoGPT's gradient accumulation
            step.backward(F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
        if (step.index + 1) % 8 == 0:
            with run.evaluate(validation) as evaluation:
                for x, y in evaluation:
                    evaluation.add("loss", F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
            print(f"step {step.index}   loss {step.loss:.3f}   validation {evaluation['loss']:.3f}")
        if (step.index + 1) % 5 == 0:
            run.save()


if __name__ == "__main__":
    main()
