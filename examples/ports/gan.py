"""A generative adversarial network: two models, each with an optimizer and a run of its own, that take turns."""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import lightwork


def on_a_circle(num):
    """Return points near a circle."""
    generator = torch.Generator().manual_seed(3)
    angle = torch.rand(num, generator=generator) * 2 * math.pi
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(num, 2, generator=generator)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", help="a folder for both runs; if it holds checkpoints, they go on from there")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    points = on_a_circle(512)
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    settings = {"global_batch": 64, "micro_batch": 16, "run_dir": args.out and Path(args.out)}
    run_g = lightwork.distribute(
        generator, torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.9)), name="generator", **settings
    )
    run_d = lightwork.distribute(
        critic, torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.9)), name="critic", **settings
    )

    steps = run_d.steps(points, epochs=args.epochs), run_g.steps(points, epochs=args.epochs)
    for step_d, step_g in zip(*steps, strict=True):
        for real in step_d:
            with torch.no_grad():
                fake = generator(torch.randn(len(real), 4))
            step_d.backward(F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean())
        for points_ in step_g:
            # The gradient goes through the critic, whose weights belong to the other run and are left alone.
            step_g.backward(F.softplus(-critic(generator(torch.randn(len(points_), 4)))).mean())
        if step_d.last_of_epoch:
            print(f"epoch {step_d.epoch}   critic {step_d.loss:.3f}   generator {step_g.loss:.3f}")
        if step_d.index % 5 == 4:
            run_d.save()
            run_g.save()


if __name__ == "__main__":
    main()
