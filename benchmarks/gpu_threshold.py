"""From which size on the GPU programs are faster than torch's operators in eager mode: `python benchmarks/gpu_threshold.py`, on a GPU.

A training step of BN + ReLU alone, channels_last, bfloat16, from 1 MB to 128 MB. Of each implementation:

    host      time in which the host queues a step
    step      time of a step in a long row of steps: the host's or the device's, whichever is longer
    device    time of a step in a CUDA graph, which the host only starts

In a network the device also computes convolutions, so the programs pay off from the size on at which their `host` is below the time of a
layer with its convolution, some four times `device`. That size belongs into `plans.toml`, as `bytes_below` of the plan "small".
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("BATCHNORM_GPU_BYTES", "0")  # before the table is read: every size by the programs

import torch
from torch import nn

import batchnorm as bn
from batchnorm.files import to_json, write
from batchnorm.kernels.gpu import trust

SIZES = [1, 2, 4, 8, 16, 32, 64, 128]  # MB of x
CONVOLUTIONS = 4  # times of batch norm in those of a layer
STEPS = 100


def layers(C: int, device: str) -> dict[str, nn.Module]:
    ours = bn.BatchNorm2d(C, activation="relu", device=device)
    return {"ours": ours, "eager": nn.Sequential(nn.BatchNorm2d(C, device=device), nn.ReLU())}


def training_step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    """A forward and a backward; gradients are dropped."""
    given, parameters = x.detach().requires_grad_(), list(layer.parameters())

    def call() -> None:
        torch.autograd.grad(layer(given), [given, *parameters], dy)

    return call


def seconds(call: Callable[[], None], steps: int, wait: Callable[[], None]) -> tuple[float, float]:
    """Of a step on the host, and in a long row of steps."""
    for _ in range(3):
        call()
    wait()
    few = max(steps // 10, 1)  # which fit into the queue of the device
    start = time.perf_counter()
    for _ in range(few):
        call()
    host = (time.perf_counter() - start) / few
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        call()
    wait()
    return host, (time.perf_counter() - start) / steps


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """The same in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(megabytes: float, device: str, steps: int) -> list[dict[str, Any]]:
    """Rows of one size."""
    C, H = 256, 14
    N = max(round(megabytes * 2**20 / (2 * C * H * H)), 2)
    x, dy = (torch.randn(N, C, H, H, device=device).bfloat16().to(memory_format=torch.channels_last) for _ in "12")
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    rows = []
    for name, layer in layers(C, device).items():
        call = training_step(layer, x, dy)
        host, step = seconds(call, steps, wait)
        of_device = seconds(captured(call), steps, wait)[1] if device == "cuda" else None
        row = {"megabytes": megabytes, "provider": name, "host_us": 1e6 * host, "step_us": 1e6 * step}
        rows.append({**row, "device_us": None if of_device is None else 1e6 * of_device})
    return rows


def threshold(rows: list[dict[str, Any]]) -> float | None:
    """MB from which on the host stays ahead of the device with our layers, and the device is no slower than with torch's; or None."""
    found = None
    for megabytes in sorted({row["megabytes"] for row in rows}, reverse=True):
        ours, eager = (
            next(row for row in rows if (row["megabytes"], row["provider"]) == (megabytes, name))
            for name in ("ours", "eager")
        )
        if ours["host_us"] > CONVOLUTIONS * ours["device_us"] or ours["device_us"] > eager["device_us"] / 0.95:
            break
        found = megabytes
    return found


def verdict(rows: list[dict[str, Any]]) -> str:
    """What the rows say of the table's number."""
    found = threshold(rows)
    return "the programs pay off at no size" if found is None else f"the programs pay off from {found:g} MB on"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here")
    rows: list[dict[str, Any]] = []
    print(
        "|   MB | provider | host, us | step, us | device, us |\n|-----:|----------|---------:|---------:|-----------:|"
    )
    for megabytes in SIZES:
        for row in measure(megabytes, "cuda", STEPS):
            rows.append(row)
            numbers = " | ".join(f"{row[name]:.0f}" for name in ("host_us", "step_us", "device_us"))
            print(f"| {megabytes} | {row['provider']} | {numbers} |", flush=True)
        if arguments.json is not None:
            write(arguments.json, to_json({"device": torch.cuda.get_device_name(), "rows": rows}))
    print(verdict(rows))
    if trust.failures():
        raise SystemExit("\n".join(trust.failures()))


if __name__ == "__main__":
    main()
