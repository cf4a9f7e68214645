"""Translation by a transformer: sequences of several lengths, padded, and a mean over tokens rather than samples."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import lightwork

WORDS, WIDTH, PAD, START = 20, 32, 0, 1


def sentences(num):
    """Return pairs: numbers, and the same in reverse order, each one higher."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(2, 8, (num,), generator=generator)
    sources = [torch.randint(2, WORDS - 1, (int(n),), generator=generator) for n in lengths]
    return [(source, source.flip(0) + 1) for source in sources]


def pad(pairs):
    sources, targets = zip(*pairs, strict=True)
    return pad_sequence(list(sources), batch_first=True), pad_sequence(list(targets), batch_first=True)


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(16, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 2 * WIDTH, dropout=0.1, batch_first=True)
        self.transformer.encoder.use_nested_tensor = False  # in evaluation: PyTorch warns of it as unfinished
        self.head = nn.Linear(WIDTH, WORDS)

    def embed(self, tokens):
        return self.words(tokens) + self.places.weight[: tokens.shape[1]]

    def forward(self, source, target):
        shifted = F.pad(target[:, :-1], (1, 0), value=START)
        mask = self.transformer.generate_square_subsequent_mask(shifted.shape[1])
        out = self.transformer(
            self.embed(source),
            self.embed(shifted),
            tgt_mask=mask,
            tgt_is_causal=True,
            src_key_padding_mask=torch.zeros(source.shape).masked_fill(source == PAD, -torch.inf),
            memory_key_padding_mask=torch.zeros(source.shape).masked_fill(source == PAD, -torch.inf),
        )
        return self.head(out)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", help="a folder for this run; if it holds a checkpoint, the run goes on from there")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    loader = DataLoader(sentences(320), batch_size=32, shuffle=True, collate_fn=pad)
    held_out = DataLoader(sentences(400)[320:], collate_fn=pad)
    model = Translator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    run = lightwork.distribute(model, optimizer, global_batch=32, micro_batch=8, run_dir=args.out)
    run.keep(warm_up=warm_up)

    for epoch in run.epochs(args.epochs):
        for step in run.steps(loader):
            for source, target in step:
                logits = model(source, target)
                num_tokens = int((target != PAD).sum())
                loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, label_smoothing=0.1)
                step.backward(loss, weight=num_tokens)
            warm_up.step()
            if step.index % 4 == 3:
                run.save()
        with run.evaluate(held_out) as evaluation:
            for source, target in evaluation:
                guess = model(source, target).argmax(-1)
                evaluation.gather("sentences", [row[row != PAD].tolist() for row in guess])
                evaluation.gather("references", [row[row != PAD].tolist() for row in target])
        pairs = zip(evaluation["sentences"], evaluation["references"], strict=True)
        exact = sum(guess == reference for guess, reference in pairs) / len(evaluation["references"])
        print(f"epoch {epoch}   sentences that are right {exact:.3f}")


if __name__ == "__main__":
    main()
