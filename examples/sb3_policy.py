"""Batch norm in a policy of stable-baselines3: it acts in inference and learns in training, also after bn.convert."""

import gymnasium
import torch
from stable_baselines3 import DQN  # pyright: ignore[reportMissingImports]
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor  # pyright: ignore[reportMissingImports]
from torch import nn

import batchnorm as bn


class Normalized(BaseFeaturesExtractor):
    """The observation's four quantities, in meters, radians and so on, normalized before the first layer."""

    def __init__(self, observation_space: gymnasium.spaces.Box) -> None:
        super().__init__(observation_space, features_dim=64)
        self.net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 64), nn.BatchNorm1d(64, momentum=0.01), nn.ReLU())

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.net(observations)


def main() -> None:
    options = {"features_extractor_class": Normalized, "net_arch": [64]}
    model = DQN("MlpPolicy", "CartPole-v1", policy_kwargs=options, learning_starts=100, seed=0, device="cpu")
    bn.convert(model.policy)  # buffers stay the same objects, so the copies to the target network go on
    seen = set[tuple[bool, bool]]()
    layer = next(each for each in model.q_net.modules() if isinstance(each, bn.BatchNorm))
    layer.register_forward_hook(lambda layer, inputs, _: seen.add((len(inputs[0]) == 1, layer.training)))
    model.learn(total_timesteps=600)
    print(
        f"acts in inference: {(True, False) in seen and (True, True) not in seen}, learns in training: {(False, True) in seen}"
    )
    variance = layer.state_dict()["running_var"]
    print(f"the observations' deviations: {variance.sqrt().numpy().round(2)}")


if __name__ == "__main__":
    main()
