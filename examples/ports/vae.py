"""A variational autoencoder: noise within forward, and a loss that is a sum, divided by the samples."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import lightwork


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 48), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(48, 8), nn.Linear(48, 8)
        self.decoder = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 64))

    def forward(self, x):
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        noise = torch.randn_like(mean)  # the run seeds it for each micro-batch
        return self.decoder(mean + noise * (log_variance / 2).exp()), mean, log_variance


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", help="a folder for this run; if it holds a checkpoint, the run goes on from there")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().images).float().flatten(1) / 16
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, eps=1e-4)
    run = lightwork.distribute(model, optimizer, global_batch=128, micro_batch=32, seed=2, run_dir=args.out)

    for epoch in run.epochs(args.epochs):
        for step in run.steps(images[:640]):
            for x in step:
                decoded, mean, log_variance = model(x)
                reconstruction = F.binary_cross_entropy_with_logits(decoded, x, reduction="sum") / len(x)
                divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum() / len(x)
                step.backward(reconstruction + divergence)
                step.add("divergence", divergence)
            if step.last_of_epoch:
                print(f"epoch {epoch}   loss {step.loss:.2f}   of it divergence {step['divergence']:.2f}")
            if step.index % 3 == 2:
                run.save()


if __name__ == "__main__":
    main()
