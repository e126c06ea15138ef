"""Small models for streams of tables and of sequences, trained where they are used, the same each time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TableNet(nn.Module):
    """A perceptron with BatchNorm for rows ``(N, features)``, which it centres and scales itself.

    Args:
        rows: Training rows; a feature that hardly varies in them is scaled as if it varied by 0.05.
        classes: Of the answers.
        width: Of its two hidden layers.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, rows: Tensor, classes: int, width: int = 32) -> None:
        super().__init__()
        self.register_buffer("mean", rows.mean(0))
        self.register_buffer("scale", rows.std(0).clamp(min=0.05))
        self.body = nn.Sequential(
            nn.Linear(rows.shape[1], width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body((x - self.mean) / self.scale))
        return logits


class _Block(nn.Module):
    """Self-attention and a perceptron, each after LayerNorm and added to what it was given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mixed(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        added: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return added


class SequenceNet(nn.Module):
    """A transformer of two blocks with LayerNorm for sequences ``(N, steps, channels)``."""

    def __init__(self, steps: int, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.lift = nn.Linear(channels, width)
        self.place = nn.Parameter(0.1 * torch.randn(steps, width))
        self.blocks = nn.Sequential(_Block(width, 4), _Block(width, 4))
        self.norm = nn.LayerNorm(width)
        self.head: nn.Module = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.lift(x) + self.place)).mean(1))
        return logits


class ManyHeads(nn.Module):
    """What several sources share, with a linear head for each; answers with the mean of their logits.

    Args:
        body: Gives the features ``(N, width)``.
        width: Of the features.
        sources: How many heads.
        classes: Of the answers.
    """

    def __init__(self, body: nn.Module, width: int, sources: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(sources))

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        return torch.stack([head(features) for head in self.heads]).mean(0)


def trained(model: nn.Module, rows: Tensor, labels: Tensor, epochs: int, seed: int, batch_size: int = 128) -> nn.Module:
    """``model`` after ``epochs`` of Adam with a falling learning rate; in eval mode."""
    shuffle = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = epochs * (len(rows) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=shuffle)
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            optimizer.zero_grad()
            F.cross_entropy(model(rows[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
