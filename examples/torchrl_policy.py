"""Batch norm in a policy of torchrl: rollouts in inference, updates with a joint forward of states and next states in training."""

import torch
from tensordict import TensorDictBase  # pyright: ignore[reportMissingImports]
from torch import nn
from torch.nn.functional import smooth_l1_loss
from torchrl.data import LazyTensorStorage, ReplayBuffer  # pyright: ignore[reportMissingImports]
from torchrl.envs import GymEnv  # pyright: ignore[reportMissingImports]
from torchrl.modules import QValueActor  # pyright: ignore[reportMissingImports]

import batchnorm as bn


class QNetwork(nn.Module):
    """(..., 4) -> (..., 2): the values of both actions. Environments give one observation without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        hidden = (nn.Linear(4, 64), nn.BatchNorm1d(64, momentum=0.01), nn.ReLU())
        self.net = bn.convert(nn.Sequential(nn.BatchNorm1d(4, momentum=0.01), *hidden, nn.Linear(64, 2)))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.net(observation.reshape(-1, 4)).reshape(*observation.shape[:-1], 2)


def loss_of(network: nn.Module, batch: TensorDictBase) -> torch.Tensor:
    """Q-learning without a target network; both states are normalized together."""
    values, next_values = bn.joint_values(network, batch["observation"], batch["next", "observation"])
    alive = ~batch["next", "terminated"]
    wanted = batch["next", "reward"] + 0.99 * alive * next_values.amax(1, keepdim=True)
    return smooth_l1_loss((values * batch["action"]).sum(1, keepdim=True), wanted)


def main() -> None:
    torch.manual_seed(0)
    env, network = GymEnv("CartPole-v1", categorical_action_encoding=False), QNetwork()
    policy = QValueActor(network, spec=env.action_spec)
    memory = ReplayBuffer(storage=LazyTensorStorage(2000), batch_size=64)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for episode in range(20):
        with bn.training_mode(network, False), torch.no_grad():  # one observation at a time: running statistics
            memory.extend(env.rollout(100, policy if episode % 2 else None))
        for _ in range(10):
            loss = loss_of(network, memory.sample())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    tracked = network.state_dict()["net.0.num_batches_tracked"]
    print(f"{len(memory)} steps; running statistics of {tracked} updates, none of them of a rollout")


if __name__ == "__main__":
    main()
