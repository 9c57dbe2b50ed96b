"""A Lightning callback: statistics over all processes in training, population statistics at its end."""

import lightning as L  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn


class BatchNormCallback(L.Callback):
    """Synchronizes batch norms before the model is wrapped, and recalibrates them after the last step."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            bn.synchronize(pl_module) if trainer.world_size > 1 else bn.convert(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert trainer.train_dataloader is not None
        bn.recalibrate(pl_module, trainer.train_dataloader, method="layerwise")


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = (x[:, :5].sum(1) > 0).long()
    model = Classifier()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=5, accelerator="cpu", callbacks=[BatchNormCallback()], **quiet)
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    accuracy = (model.eval()(x).argmax(1) == y).float().mean()
    exact = torch.allclose(model.layers[1].running_var, model.layers[0](x).var(0))  # pyright: ignore[reportArgumentType]
    print(f"accuracy {accuracy:.2f}, running variance that of all data: {exact}")


if __name__ == "__main__":
    main()
