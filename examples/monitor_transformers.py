"""Watches batch norms in a training with the Trainer of Hugging Face's transformers."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn

try:
    from transformers import (  # pyright: ignore[reportMissingImports]
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
except ModuleNotFoundError:
    Trainer = TrainingArguments = None
    TrainerCallback = object


class BatchNormMonitor(TrainerCallback):  # pyright: ignore[reportGeneralTypeIssues]
    """A callback for `Trainer(..., callbacks=[BatchNormMonitor(every=100)])`. The steps are counted by a hook of the optimizer."""

    def __init__(self, every: int = 100, writer: Any = None) -> None:
        self.every, self.writer, self.monitor = every, writer, None

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.monitor = bn.diagnostics.Monitor(model, self.every, writer=self.writer).start()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.monitor is not None:
            self.monitor.close()


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


if __name__ == "__main__":
    x = torch.randn(640, 20)
    data = [{"x": each, "labels": (each[:5].sum() > 0).long()} for each in x]
    watching = BatchNormMonitor(every=10)
    with tempfile.TemporaryDirectory() as folder:
        options = {"num_train_epochs": 5, "per_device_train_batch_size": 64, "report_to": "none", "use_cpu": True}
        arguments = TrainingArguments(folder, save_strategy="no", disable_tqdm=True, **options)  # pyright: ignore
        Trainer(Classifier(), arguments, train_dataset=data, callbacks=[watching]).train()  # pyright: ignore
    print(f"{watching.monitor.looks} looks, findings: {list(watching.monitor.findings)}")  # pyright: ignore
