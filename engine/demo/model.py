"""The digit classifier of the demonstration."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.optimizers import AdamW


class DigitNet(nn.Module):
    """Three convolutions with BatchNorm over 8x8 digits.

    Input ``(B, 1, 8, 8)`` in [0, 1]; output ``(B, 10)`` logits.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, 10)

    def features(self, x: Tensor) -> Tensor:
        """``(B, 64)`` pooled features."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return F.relu(self.bn3(self.conv3(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.fc(self.features(x))
        return logits


def build() -> DigitNet:
    """The factory that the demonstration's policy names."""
    return DigitNet()


def train(x: Tensor, y: Tensor, *, epochs: int = 25, seed: int = 0) -> DigitNet:
    """Train on clean digits ``x (N, 1, 8, 8)`` in [0, 1] with labels ``y (N,)``, shifted by up to a pixel."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = DigitNet().train()
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator)[: len(x) // 64 * 64].split(64):
            dx, dy = torch.randint(-1, 2, (2,), generator=generator).tolist()
            shifted = torch.roll(F.pad(x[rows], (1, 1, 1, 1)), (dy, dx), (2, 3))[:, :, 1:-1, 1:-1]
            optimizer.zero_grad()
            F.cross_entropy(model(shifted), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
