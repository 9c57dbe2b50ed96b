"""Layers that stay in inference mode: those that `freeze` cannot convert to ours."""

from __future__ import annotations

from typing import Self

from torch import nn

BEFORE_FREEZING = "_before_freezing"


class HeldInInference(nn.Module):
    """A frozen layer of another class: it ignores `train()` and stays in inference mode, where statistics do not change."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the submodules only."""
        super().train(mode)
        self.__dict__[BEFORE_FREEZING] = (mode, self.__dict__[BEFORE_FREEZING][1])
        self.training = False
        return self
