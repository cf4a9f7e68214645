"""An image classifier: epochs, augmentation, evaluation, a schedule by epoch, the best checkpoint, resuming.

lightwork run -n 2 examples/ports/image_classifier.py --out runs/digits

The same command again goes on where the last checkpoint was saved, in the middle of an epoch too.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import lightwork


class Digits(Dataset):
    """Handwritten digits of 8 x 8 pixels; for training each is shifted by up to one pixel."""

    def __init__(self, augment):
        digits = load_digits()
        self.images = F.pad(torch.from_numpy(digits.images).float()[:, None] / 16, (1, 1, 1, 1))
        self.labels = torch.from_numpy(digits.target)
        self.augment = augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        x, y = torch.randint(0, 3, (2,)).tolist() if self.augment else (1, 1)
        return self.images[index, :, y : y + 8, x : x + 8], self.labels[index]


def build():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(144, 10),
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--out", help="a folder for this run; if it holds a checkpoint, the run goes on from there")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    training = DataLoader(Subset(Digits(augment=True), range(args.samples)), batch_size=64, shuffle=True)
    held_out = Subset(Digits(augment=False), range(1500, 1797))
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    run = lightwork.distribute(model, optimizer, global_batch=64, micro_batch=16, seed=1, run_dir=args.out)
    run.keep(scheduler=scheduler, best=0.0)

    for epoch in run.epochs(args.epochs):
        for step in run.steps(training):
            for images, labels in step:
                output = model(images)
                step.backward(F.cross_entropy(output, labels, label_smoothing=0.1))
                step.add("accuracy", (output.argmax(1) == labels).float().mean())
            if step.last_of_epoch:
                print(f"epoch {epoch}   loss {step.loss:.3f}   accuracy in training {step['accuracy']:.3f}")
            if step.index % 4 == 3:
                run.save()
        with run.evaluate(held_out) as evaluation:
            for images, labels in evaluation:
                evaluation.add("accuracy", (model(images).argmax(1) == labels).float().mean())
        print(f"epoch {epoch}   accuracy {evaluation['accuracy']:.3f}")
        scheduler.step()
        if evaluation["accuracy"] > run.kept["best"]:
            run.keep(best=evaluation["accuracy"])
            run.save(run.run_dir / "best")
        run.save()
    print("best accuracy", run.kept["best"])


if __name__ == "__main__":
    main()
