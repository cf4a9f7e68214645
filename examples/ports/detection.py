"""Detection: images with any number of boxes, as lists; a loss over what was matched; scores gathered for a metric."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightwork

SIZE, CELL = 16, 4


class Squares(Dataset):
    """Images of bright squares, up to three, one or none; the target is a dict of their centres and sizes."""

    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        count = int(torch.randint(0, 4, (), generator=generator))
        sides = torch.randint(2, 5, (count,), generator=generator)
        corners = torch.stack([torch.randint(0, SIZE - 4, (count,), generator=generator) for _ in "xy"], 1)
        image = torch.rand(1, SIZE, SIZE, generator=generator) * 0.2
        for (x, y), side in zip(corners.tolist(), sides.tolist(), strict=True):
            image[0, y : y + side, x : x + side] += 0.8
        return image, {"centres": corners + sides[:, None] / 2, "sides": sides.float()}


def as_lists(samples):
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


class Detector(nn.Module):
    """For each cell of the image: whether the centre of a square is in it, where in the cell, and how large."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.GELU()
        )
        self.head = nn.Conv2d(24, 4, 1)

    def forward(self, images):
        return self.head(self.body(torch.stack(images))).movedim(1, -1)  # [images, rows, columns, 4]


def loss_of(output, targets):
    """Return the loss, a mean over images: of one, the cells' mean and the sum over its boxes."""
    wanted = torch.zeros(output.shape[:3])
    distances = []
    for of_image, target, found in zip(wanted, targets, output, strict=True):
        for centre, side in zip(target["centres"], target["sides"], strict=True):
            column, row = (centre // CELL).int().clamp(max=SIZE // CELL - 1).tolist()
            of_image[row, column] = 1
            box = torch.cat([centre % CELL / CELL, side[None] / CELL])
            distances.append(F.smooth_l1_loss(found[row, column, 1:], box))
    loss = F.binary_cross_entropy_with_logits(output[..., 0], wanted)
    return loss + torch.stack(distances).sum() / len(targets) if distances else loss


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", help="a folder for this run; if it holds a checkpoint, the run goes on from there")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    loader = DataLoader(Squares(160), batch_size=16, shuffle=True, collate_fn=as_lists)
    held_out = DataLoader(Squares(200), sampler=range(160, 200), collate_fn=as_lists)
    model = Detector()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    run = lightwork.distribute(model, optimizer, global_batch=16, micro_batch=4, clip_grad_norm=5.0, run_dir=args.out)

    for epoch in run.epochs(args.epochs):
        for step in run.steps(loader):
            for images, targets in step:
                step.backward(loss_of(model(images), targets))
            if step.index % 4 == 3:
                run.save()
        with run.evaluate(held_out) as evaluation:
            for images, targets in evaluation:
                evaluation.gather("found", model(images)[..., 0].sigmoid().gt(0.5).sum((1, 2)))
                evaluation.gather("there", torch.tensor([len(target["sides"]) for target in targets]))
        error = (evaluation["found"] - evaluation["there"]).abs().float().mean()
        print(f"epoch {epoch}   squares miscounted, an image {error:.2f}")


if __name__ == "__main__":
    main()
