"""Images of roads from a camera behind the windshield, with steering angles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 32
HORIZON = 10  # the first row with ground


@dataclass(frozen=True)
class Roads:
    """Images (N, 1, 32, 32) in 0..1, and steering angles (N,) in degrees, positive to the right."""

    images: Tensor
    angles: Tensor


def render(count: int, seed: int) -> Roads:
    """
    Render `count` random roads: curved, seen from next to their middle, in different light, with noise.

    The angle steers to the middle and along the curve: 6 degrees for each half width of offset, 12 for each unit of curvature.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1).uniform_(low, high, generator=generator)

    beside, curvature = uniform(-1, 1), uniform(-1, 1)
    near = (torch.arange(HORIZON, SIZE) - HORIZON + 1.0).view(1, -1, 1) / (
        SIZE - HORIZON
    )  # 1 at the bottom, toward 0 at the horizon
    x = (torch.arange(SIZE) - (SIZE - 1) / 2).view(1, 1, -1) / (SIZE / 2)  # -1..1 across
    half = 0.05 + 0.6 * near
    across = (x + beside * 0.6 * near - 0.5 * curvature * (1 - near) ** 2) / half  # the road is between -1 and 1
    road, grass, line, sky = uniform(0.2, 0.5), uniform(0.3, 0.8), uniform(0.7, 1), uniform(0.4, 1)
    on_line = (across.abs() - 0.9).abs() < 0.1
    ground = torch.where(on_line, line, torch.where(across.abs() < 1, road, grass))
    images = torch.cat([sky.expand(count, HORIZON, SIZE), ground], 1) * uniform(0.15, 1)  # the light
    images = images + 0.03 * torch.randn(images.shape, generator=generator)
    return Roads(images.clamp(0, 1).unsqueeze(1), (12 * curvature - 6 * beside).flatten())
