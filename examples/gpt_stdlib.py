"""Train a small GPT on the source of Python's own standard library, and let it write a few lines of Python.

    lightwork run -n auto examples/gpt_stdlib.py            # a team of workers
    python examples/gpt_stdlib.py                           # one worker, the same weights to the bit

About two and a half minutes with two workers on two slow cores.
"""

import argparse
import json
import math
import os
import platform
import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import lightwork

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 4096, 256, 4, 4, 128
WORD = re.compile(r"\n *| ?[A-Za-z]+| +|.")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightwork"


def encode(text, ids):
    """Split text into known words and, where a word is not known, its characters."""
    return [i for word in WORD.findall(text) for i in ([ids[word]] if word in ids else map(ids.get, word))]


def stdlib():
    """Return (words, tokens): the vocabulary, and the whole standard library as one array of token ids."""
    cache = CACHE / f"stdlib-{platform.python_version()}-{VOCABULARY}.npz"
    if cache.exists():
        with np.load(cache) as stored:
            return stored["words"].tolist(), stored["tokens"]
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    files = [f for f in sorted(root.rglob("*.py")) if not left_out & set(f.relative_to(root).parts)]
    text = "\n\n\n".join(f.read_text("utf-8", errors="replace") for f in files).expandtabs()
    text = re.sub(r"[^\n -~]", "?", text)
    characters = ["\n", *map(chr, range(32, 127))]
    counts = Counter(word for word in WORD.findall(text) if 1 < len(word) < 24)
    words = characters + [word for word, _ in counts.most_common(VOCABULARY - len(characters))]
    tokens = np.array(encode(text, {word: i for i, word in enumerate(words)}), dtype=np.uint16)
    CACHE.mkdir(parents=True, exist_ok=True)
    part = cache.with_suffix(f".{os.getpid()}.npz")
    np.savez(part, words=np.array(words), tokens=tokens)
    part.replace(cache)
    return words, tokens


class Windows(Dataset):
    """Pieces of LENGTH tokens, and the same pieces one token later."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return (len(self.tokens) - 1) // LENGTH

    def __getitem__(self, index):
        piece = self.tokens[index * LENGTH : (index + 1) * LENGTH + 1].astype(np.int64)
        return piece[:-1], piece[1:]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1))
        heads = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if last else 0.02)

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.token.weight)


def loss_of(model, inputs, targets):
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def write(model, words, prompt, num_tokens=200, temperature=0.7):
    """Return the prompt and what the model writes after it."""
    tokens, generator = encode(prompt, {word: i for i, word in enumerate(words)}), torch.Generator().manual_seed(0)
    for _ in range(num_tokens):
        logits = model(torch.tensor([tokens[-LENGTH:]]))[0, -1].float()
        best = logits.topk(40)
        choice = torch.multinomial((best.values / temperature).softmax(0), 1, generator=generator)
        tokens.append(best.indices[choice].item())
    return "".join(words[i] for i in tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--digests", type=Path, help="write the digests of the first 3 steps to this file")
    parser.add_argument("--compare", type=Path, help="train 3 steps and compare their digests with this file's")
    args = parser.parse_args()

    words, tokens = stdlib()
    cut = len(tokens) - len(tokens) // 50  # the last files are held out
    training, validation = Windows(tokens[:cut]), Windows(tokens[cut:])

    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warm_up = 30
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * min(i / args.steps, 1))),
    )
    run = lightwork.distribute(
        model, optimizer, global_batch=16, micro_batch=2, seed=0, precision=args.precision, clip_grad_norm=1.0
    )
    run.keep(scheduler=schedule)

    digests = []
    for step in run.steps(training, max_steps=3 if args.compare else args.steps):
        for inputs, targets in step:
            step.backward(loss_of(run.model, inputs, targets), weight=targets.numel())
        schedule.step()
        if len(digests) < 3 and (args.digests or args.compare):
            digests.append(run.digest())
        if step.index % 50 == 0:
            print(f"step {step.index:4d}   loss {step.loss:.3f}")

    report = {"steps": args.steps, "precision": args.precision, "digests": digests}
    if args.compare:
        compare(report, json.loads(args.compare.read_text()))
        return
    if args.digests and run.is_main:
        args.digests.write_text(json.dumps(report))

    with run.evaluate(validation) as evaluation:
        for inputs, targets in evaluation:
            evaluation.add("loss", loss_of(run.model, inputs, targets), targets.numel())
    digest = run.digest()
    if run.is_main:
        print(write(run.model, words, "class Reader:\n    def __init__(self, "))
        print(f"\nvalidation loss {evaluation['loss']:.4f}\ndigest {digest}")


def compare(ours, theirs):
    """Say whether the first steps gave the same weights, and exit with 1 where they did not."""
    for name in ("steps", "precision"):
        if ours[name] != theirs[name]:
            raise SystemExit(
                f"{name} is {ours[name]} here and {theirs[name]} in the file: pass --{name} {theirs[name]}"
            )
    for i, (our, their) in enumerate(zip(ours["digests"], theirs["digests"], strict=True)):
        if our != their:
            print(f"the first 3 steps have the digests of the team's run: no\nstep {i}: {our} here, {their} there")
            raise SystemExit(1)
    print("the first 3 steps have the digests of the team's run: yes")


if __name__ == "__main__":
    main()
