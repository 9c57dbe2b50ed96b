"""With Accelerate, in any number of processes: accelerate launch examples/accelerate_recipe.py"""

import torch
from accelerate import Accelerator  # pyright: ignore[reportMissingImports]
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = (x[:, :5].sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))
    bn.synchronize(model) if accelerator.num_processes > 1 else bn.convert(model)  # before prepare wraps it
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(5):
        for batch, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(wrapped(batch), labels))
            optimizer.step()

    model = accelerator.unwrap_model(wrapped)
    bn.recalibrate(model, loader, method="layerwise")  # each process brings its shard
    x, y = x.to(accelerator.device), y.to(accelerator.device)
    accuracy = (model.eval()(x).argmax(1) == y).float().mean()
    exact = torch.allclose(model[1].running_var, model[0](x).var(0))
    accelerator.print(f"accuracy {accuracy:.2f}, running variance that of all data: {exact}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
