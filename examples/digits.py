"""Train a small convolutional net, with BatchNorm and dropout, to read scikit-learn's handwritten digits.

lightwork run -n auto examples/digits.py                # a team of workers
python examples/digits.py                               # one worker, the same weights to the bit
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset, random_split

import lightwork


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # 1797 of 1 x 8 x 8
    data = TensorDataset(images, torch.from_numpy(digits.target))
    training, held_out = random_split(data, [1500, 297], generator=torch.Generator().manual_seed(0))

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    run = lightwork.distribute(model, optimizer, global_batch=64, micro_batch=16, seed=0)

    for step in run.steps(training, epochs=args.epochs):
        for inputs, targets in step:
            step.backward(F.cross_entropy(run.model(inputs), targets))
        if step.index % 50 == 0:
            print(f"epoch {step.epoch:2d}   step {step.index:4d}   loss {step.loss:.4f}")

    with run.evaluate(held_out) as evaluation:
        for inputs, targets in evaluation:
            right = (run.model(inputs).argmax(1) == targets).float().mean()
            evaluation.add("accuracy", right, len(targets))
    digest = run.digest()
    if run.is_main:
        print(f"\naccuracy {evaluation['accuracy']:.4f} on 297 digits that it has not seen\ndigest {digest}")


if __name__ == "__main__":
    main()
