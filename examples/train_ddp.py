"""Handwritten digits in several processes, with batch statistics of all: torchrun --nproc-per-node=2 examples/train_ddp.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import batchnorm as bn
from batchnorm.lab.data import load


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, 128), nn.BatchNorm1d(128), nn.ReLU()),
        *(nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU()),
        nn.Linear(64, 10),
    )


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    digits = load()
    data = TensorDataset(digits.train.images, digits.train.labels)
    loader = DataLoader(data, batch_size=32, sampler=DistributedSampler(data))

    model = bn.synchronize(network().to(device))  # after init_process_group, before DDP
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(5):
        assert isinstance(loader.sampler, DistributedSampler)
        loader.sampler.set_epoch(epoch)
        for x, y in loader:
            loss = nn.functional.cross_entropy(parallel(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    bn.recalibrate(model, loader, method="layerwise")  # every rank brings its part of the data
    agreement = bn.replicas_agree(model)
    found = model.eval()(digits.test.images.to(device)).argmax(1).cpu()
    if rank == 0:
        accuracy = (found == digits.test.labels).float().mean()
        print(f"{dist.get_world_size()} processes: accuracy {accuracy:.3f}; {agreement}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
