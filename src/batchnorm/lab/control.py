"""Gymnasium's CartPole-v1 (Barto, Sutton & Anderson 1983) for many poles at once, with tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from batchnorm.lab import extras
from batchnorm.lab.experiment import Curve

LONGEST = 500  # steps of an episode, each of reward 1
SOLVED = 475.0  # mean return at which gymnasium calls CartPole-v1 solved
RETURN = Curve(
    "Return while learning",
    "environment steps",
    "mean return of 20 episodes",
    "Higher is better, 500 the most. The band reaches from the worst to the best seed.",
)
TEST_SEED = 1_000_000  # seed of the test episodes, which are not used for training


class CartPoles:
    """`count` poles, balanced side by side by gymnasium's own vector environment.

    Attributes:
        states: (count, 4) float32: position, velocity, angle, angular velocity; SI units.
        over: (count,) bool: these episodes have ended, so the next step resets them and ignores its action.

    Raises:
        MissingExtraError: gymnasium is not installed.
    """

    def __init__(self, count: int, seed: int) -> None:
        extras.require()
        import gymnasium

        self._environment = gymnasium.make_vec(
            "CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point", max_episode_steps=LONGEST
        )
        states, _ = self._environment.reset(seed=seed)
        self.states = torch.from_numpy(states)
        self.over = torch.zeros(count, dtype=torch.bool)

    def step(self, actions: Tensor) -> Tensor:
        """Push left (0) or right (1), (count,) int64, and return which poles fell, (count,) bool."""
        states, _, fell, stood, _ = self._environment.step(actions.numpy())
        self.states, fallen = torch.from_numpy(states), torch.from_numpy(fell)
        self.over = fallen | torch.from_numpy(stood)
        return fallen


@torch.no_grad()
def mean_return(choose: Callable[[Tensor], Tensor], episodes: int = 20) -> float:
    """The mean number of steps, at most 500, until a pole falls, for the policy `choose` of (N, 4) states to (N,) actions."""
    poles, standing, total = CartPoles(episodes, TEST_SEED), torch.ones(episodes, dtype=torch.bool), 0
    while standing.any():
        poles.step(choose(poles.states))
        total += int(standing.sum())
        standing &= ~poles.over
    return total / episodes
