"""Train a small GPT on the source of Python's own standard library, and let it write a few lines of Python.

    lightwork run -n auto examples/gpt_stdlib.py            # a team of workers
    python examples/gpt_stdlib.py                           # one worker, the same weights to the bit

Two to three minutes with two workers on two slow cores.
"""

import argparse
import json
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

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 2048, 192, 4, 4, 128
WORD = re.compile(r"\n+ *| ?[A-Za-z]+|_+| +|[^\w\s]+|.")  # indents, identifiers, spaces, punctuation, digits
PROMPT = "class Reader:\n    def __init__(self, "


def spell(word, ids):
    """Return the ids of a word: its own, or those of the longest known pieces that it is made of."""
    spelled = []
    while word:
        known = next(n for n in range(len(word), 0, -1) if word[:n] in ids)
        spelled.append(ids[word[:known]])
        word = word[known:]
    return spelled


def choose_vocabulary(counts):
    """Return the characters, the most frequent words, and the most frequent pieces of the other words."""
    characters = ["\n", *map(chr, range(32, 127))]
    words = [word for word, _ in counts.most_common() if 1 < len(word) < 24]
    frequent, rare = words[: VOCABULARY * 3 // 4], words[VOCABULARY * 3 // 4 :]
    pieces = Counter()
    for word in rare:
        for length in (2, 3, 4):
            for start in range(len(word) - length + 1):
                pieces[word[start : start + length]] += counts[word] * (length - 1)
    return list(dict.fromkeys(characters + frequent + [p for p, _ in pieces.most_common()]))[:VOCABULARY]


def load_stdlib():
    """Return (vocabulary, tokens): the words, and the whole library as their ids; from a cache the next time."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightwork"
    cache = folder / f"stdlib-{platform.python_version()}-{VOCABULARY}.npz"
    if cache.exists():
        with np.load(cache) as stored:
            return stored["vocabulary"].tolist(), stored["tokens"]
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    files = [f for f in sorted(root.rglob("*.py")) if not left_out & set(f.relative_to(root).parts)]
    text = "\n\n\n".join(f.read_text("utf-8", errors="replace") for f in files).expandtabs()
    text = WORD.findall(re.sub(r"[^\n -~]", "?", text))
    counts = Counter(text)
    vocabulary = choose_vocabulary(counts)
    ids = {word: i for i, word in enumerate(vocabulary)}
    spelling = {word: spell(word, ids) for word in counts}
    tokens = np.array([i for word in text for i in spelling[word]], dtype=np.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    own = cache.with_suffix(f".{os.getpid()}.npz")  # several workers may come by here at once
    np.savez(own, vocabulary=np.array(vocabulary), tokens=tokens)
    own.replace(cache)
    return vocabulary, tokens


class Windows(Dataset):
    """Pieces of LENGTH tokens, each with the same piece one token later."""

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
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.token.weight)  # the head is the embedding's weight


def loss_of(model, inputs, targets):
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def write(model, vocabulary, num_tokens=160, temperature=0.7):
    """Return the prompt and what the model writes after it."""
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokens = [i for word in WORD.findall(PROMPT) for i in spell(word, ids)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_tokens):
        best = model(torch.tensor([tokens[-LENGTH:]]))[0, -1].float().topk(40)
        choice = torch.multinomial((best.values / temperature).softmax(0), 1, generator=generator)
        tokens.append(best.indices[choice].item())
    return "".join(vocabulary[i] for i in tokens)


def compare(ours, theirs):
    """Exit with 1, naming the step, unless the digests of the first steps are equal."""
    if (ours["steps"], ours["precision"]) != (theirs["steps"], theirs["precision"]):
        raise SystemExit(f"the file is of --steps {theirs['steps']} --precision {theirs['precision']}: pass these.")
    same = [our == their for our, their in zip(ours["digests"], theirs["digests"], strict=True)]
    print(f"the first {len(same)} steps have the digests of the team's run: {'yes' if all(same) else 'no'}")
    if not all(same):
        raise SystemExit(f"step {same.index(False)} is the first that differs")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--digests", type=Path, metavar="FILE", help="write the first 3 steps' digests")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="train 3 steps, compare their digests")
    args = parser.parse_args()

    vocabulary, tokens = load_stdlib()
    held_out = len(tokens) // 50
    training, validation = Windows(tokens[:-held_out]), Windows(tokens[-held_out:])

    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=30)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(args.steps - 30, 1), eta_min=1e-4)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[30])

    run = lightwork.distribute(
        model, optimizer, global_batch=16, micro_batch=2, seed=0, precision=args.precision, clip_grad_norm=1.0
    )
    run.keep(scheduler=scheduler)
    report = {"steps": args.steps, "precision": args.precision, "digests": []}

    for step in run.steps(training, max_steps=3 if args.compare else args.steps):
        for inputs, targets in step:
            step.backward(loss_of(run.model, inputs, targets), weight=targets.numel())
        scheduler.step()
        if step.index % 50 == 0:
            print(f"step {step.index:4d}   loss {step.loss:.3f}")
        if step.index < 3 and (args.digests or args.compare):
            report["digests"].append(run.digest())

    if args.compare:
        return compare(report, json.loads(args.compare.read_text()))
    if args.digests and run.is_main:
        args.digests.parent.mkdir(parents=True, exist_ok=True)
        args.digests.write_text(json.dumps(report, indent=2))

    with run.evaluate(validation) as evaluation:
        for inputs, targets in evaluation:
            evaluation.add("loss", loss_of(run.model, inputs, targets), targets.numel())
    digest = run.digest()
    if run.is_main:
        print(f"\n{write(run.model, vocabulary)}\n")
        print(f"loss {step.loss:.4f}   validation loss {evaluation['loss']:.4f}\ndigest {digest}")
    return None


if __name__ == "__main__":
    main()
