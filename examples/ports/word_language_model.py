"""A word language model whose hidden state is carried from one window of the text to the next.

The loop body may depend on weights, buffers and the batch alone. So the carried state is a buffer, with a row for each
lane of text; each sample says its lane, and a micro-batch writes the rows of its own lanes. The rule "sum" adds up what
the micro-batches have changed.
"""

import argparse
import inspect
import math
import re
import textwrap

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import lightwork

LANES, WINDOW, WIDTH = 8, 12, 32


class Lanes(Dataset):
    """Sample t * LANES + lane is window t of a lane: LANES samples in order are a window of each."""

    def __init__(self, tokens):
        self.lanes = tokens[: len(tokens) // LANES * LANES].view(LANES, -1)

    def __len__(self):
        return (self.lanes.shape[1] - 1) // WINDOW * LANES

    def __getitem__(self, index):
        window, lane = divmod(index, LANES)
        piece = self.lanes[lane, window * WINDOW : (window + 1) * WINDOW + 1]
        return lane, piece[:-1], piece[1:]


class Model(nn.Module):
    def __init__(self, num_words):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(num_words, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, num_words)
        self.register_buffer("carried", torch.zeros(LANES, WIDTH))

    def forward(self, lanes, words, is_first):
        before = torch.zeros(len(lanes), WIDTH) if is_first else self.carried[lanes]
        out, after = self.rnn(self.embedding(words), before[None])
        self.carried[lanes] = after[0].detach()
        return self.head(out)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", help="a folder for this run; if it holds a checkpoint, the run goes on from there")
    args = parser.parse_args(arguments)

    words = re.findall(r"\w+|[^\w\s]", inspect.getsource(textwrap))[:1300]
    vocabulary = sorted(set(words))
    tokens = torch.tensor([vocabulary.index(word) for word in words])

    torch.manual_seed(0)
    model = Model(len(vocabulary))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    run = lightwork.distribute(
        model,
        optimizer,
        global_batch=LANES,
        micro_batch=2,
        clip_grad_norm=0.25,
        buffers={"carried": "sum"},
        run_dir=args.out,
    )
    for epoch in run.epochs(args.epochs):
        for step in run.steps(Lanes(tokens), shuffle=False):
            for lanes, inputs, targets in step:
                output = model(lanes, inputs, is_first=step.step_in_epoch == 0)
                step.backward(F.cross_entropy(output.flatten(0, 1), targets.flatten()))
            if step.last_of_epoch:
                print(f"epoch {epoch}   perplexity {math.exp(step.loss):.1f}")
            if step.index % 5 == 4:
                run.save()
        for group in optimizer.param_groups:
            group["lr"] *= 0.8


if __name__ == "__main__":
    main()
