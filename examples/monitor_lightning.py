"""Watches batch norms in a Lightning training, and logs how far running statistics are from the batches."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn

try:
    import lightning as L  # pyright: ignore[reportMissingImports]

    Callback, Module = L.Callback, L.LightningModule
except ModuleNotFoundError:
    L, Callback, Module = None, object, nn.Module


class BatchNormMonitor(Callback):  # pyright: ignore[reportGeneralTypeIssues]
    """A callback for `L.Trainer(callbacks=[BatchNormMonitor(every=100)])`. The steps are counted by a hook of the optimizer."""

    def __init__(self, every: int = 100) -> None:
        super().__init__()
        self.every, self.monitor = every, None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        writer = getattr(trainer.logger, "experiment", None)
        writer = writer if hasattr(writer, "add_scalar") else None
        self.monitor = bn.diagnostics.Monitor(pl_module, self.every, writer=writer).start()

    def on_train_end(self, *_: Any) -> None:
        if self.monitor is not None:
            self.monitor.close()

    on_exception = on_train_end


class Classifier(Module):  # pyright: ignore[reportGeneralTypeIssues]
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    x = torch.randn(640, 20)
    data = DataLoader(TensorDataset(x, (x[:, :5].sum(1) > 0).long()), batch_size=64)
    watching = BatchNormMonitor(every=10)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(max_epochs=5, accelerator="cpu", callbacks=[watching], **quiet).fit(Classifier(), data)  # pyright: ignore
    print(f"{watching.monitor.looks} looks, findings: {list(watching.monitor.findings)}")  # pyright: ignore
