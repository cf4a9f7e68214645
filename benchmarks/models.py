"""The models and the data of the benchmarks: the same weights and samples for every competitor, from fixed seeds.

Every model takes a batch and returns its mean loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEQUENCE = 128
#: Batches are repeated, so that the loss falls by rote and a competitor that trains wrongly shows.
DISTINCT_BATCHES = 4
LEARNING_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Size:
    vocabulary: int
    width: int
    layers: int
    heads: int
    sequence: int = SEQUENCE


SIZES = {
    "mid": Size(vocabulary=8192, width=512, layers=6, heads=8),  # 27.4 M parameters
    "gpt2": Size(vocabulary=50257, width=768, layers=12, heads=12),  # 162 M, the head is not tied to the embedding
}


class Layer(nn.Module):
    """Causal self-attention and a perceptron, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        expanded: Tensor = F.gelu(self.mlp_in(self.mlp_norm(x)))
        return x + self.mlp_out(expanded)


class GPT(nn.Module):
    """A decoder; `forward` takes (batch, sequence + 1) token ids."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.sequence, size.width)
        self.layers = nn.ModuleList(Layer(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        inputs, targets = ids[:, :-1], ids[:, 1:]
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Perceptron(nn.Module):
    """Two layers, 50,410 parameters: a step that is nearly all overhead."""

    FEATURES, HIDDEN, CLASSES = 64, 672, 10

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(self.FEATURES, self.HIDDEN), nn.Linear(self.HIDDEN, self.CLASSES)])

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        hidden = F.relu(self.layers[0](features))
        return F.cross_entropy(self.layers[1](hidden), labels)


def make_model(name: str) -> GPT | Perceptron:
    """Return the model, with the same weights in every process."""
    torch.manual_seed(0)
    return Perceptron() if name == "tiny" else GPT(SIZES[name])


def make_data(name: str, batch: int, steps: int) -> tuple[Tensor, ...]:
    """Return the samples of `steps` global batches in order, as the tensors that the model takes."""
    generator = torch.Generator().manual_seed(1)
    distinct = batch * DISTINCT_BATCHES
    order = torch.arange(batch * steps) % distinct
    if name == "tiny":
        features = torch.randn(distinct, Perceptron.FEATURES, generator=generator)
        labels = torch.randint(Perceptron.CLASSES, (distinct,), generator=generator)
        return features[order], labels[order]
    ids = torch.randint(SIZES[name].vocabulary, (distinct, SEQUENCE + 1), generator=generator)
    return (ids[order],)


def to_bf16(model: nn.Module) -> nn.Module:
    """Convert the weights to bf16 in place, but for the norms, whose kernels are faster with fp32 ones."""
    for module in model.modules():
        if not isinstance(module, nn.LayerNorm):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()
    return model
