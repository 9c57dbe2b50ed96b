"""Times whole training steps of a network: with torch's layers, and converted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.bench import device
from batchnorm.bench.networks import NETWORKS, Network
from batchnorm.bench.row import Row, circumstances
from batchnorm.bench.run import settled
from batchnorm.errors import InputError
from batchnorm.measure import Effort, digits, percentile, saved_bytes
from batchnorm.surgery import convert, freeze, fuse

VARIANTS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "eager": lambda model: model,
    "eager again": lambda model: model,  # as "compile again", tells how much a ratio can tell
    "ours": lambda model: convert(model),
    "fused": lambda model: fuse(convert(model)),
    "save memory": lambda model: fuse(convert(model, save_memory=True)),
    "eval": lambda model: model.eval(),
    "frozen": lambda model: freeze(model),
    "frozen statistics": lambda model: freeze(model, affine=False, save_memory=True),
    "compile": lambda model: torch.compile(model, dynamic=False),
    "compile again": lambda model: torch.compile(model, dynamic=False),
    "compile ours": lambda model: torch.compile(convert(model), dynamic=False),
    "compile fused": lambda model: torch.compile(fuse(convert(model)), dynamic=False),
}


class Setting(NamedTuple):
    """How a network is run: as in `case.Case`. On a GPU under autocast to bfloat16."""

    layout: str
    outputs: str
    threads: int
    device: str

    @property
    def dtype(self) -> str:
        return "float32" if self.device == "cpu" else "bfloat16"

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.device == "cpu" else torch.autocast(self.device, torch.bfloat16)


def run(
    name: str, variants: Sequence[str], settings: Sequence[Setting], batch: int, rounds: int
) -> Iterator[list[Row]]:
    """Time steps of forward, backward and SGD; rows for each setting.

    Raises:
        InputError: on an unknown model or variant.
    """
    network = find(name)
    for variant in variants:
        if variant not in VARIANTS:
            raise InputError(f"for a model, provider must be one of {', '.join(VARIANTS)}, but got {variant!r}")
    for setting in settings:
        with settled(setting.threads), device.controlled(setting.outputs, setting.device):
            yield _measure(name, network, ("eager", *variants), setting, batch, rounds)


def find(name: str) -> Network:
    """The network of this name.

    Raises:
        InputError: there is none.
    """
    if name not in NETWORKS:
        raise InputError(f"model must be one of {', '.join(NETWORKS)}, but got {name!r}")
    return NETWORKS[name]


def layouts_of(network: Network, layouts: Sequence[str]) -> list[str]:
    """The layouts that the network's input can have: images both, all else one, as in `case.Case`."""
    ranks = {1: "channels_last", 2: "planar"}
    return list(layouts) if len(network.sample) == 3 else [ranks[len(network.sample)]]


def _measure(
    name: str,
    network: Network,
    variants: Sequence[str],
    setting: Setting,
    batch: int,
    rounds: int,
) -> list[Row]:
    layout, outputs, threads, where = setting
    torch.manual_seed(0)
    if any(variant.startswith("compile") for variant in variants):
        torch.compiler.reset()  # after 8 models a function would no longer be compiled
    original = network.build().to(where)
    x = torch.randn(batch, *network.sample).to(where)
    with torch.no_grad():
        classes, *positions = copy.deepcopy(original)(x).shape[1:]
    labels = torch.randint(classes, (batch, *positions)).to(where)
    if x.dim() == 4 and layout == "channels_last":
        original = original.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (missing in torch's stubs)
        x = x.contiguous(memory_format=torch.channels_last)
    steps, saved, peaks = {}, {}, {}
    for variant in dict.fromkeys(variants):
        model = copy.deepcopy(original)
        forward = VARIANTS[variant](model)

        def loss(forward: Callable[[Tensor], Tensor] = forward) -> Tensor:
            with setting.autocast():
                return F.cross_entropy(forward(x), labels)

        saved[variant] = saved_bytes(loss) if where == "cpu" else None
        steps[variant] = _step(model, loss)
        steps[variant]()  # create the optimizer's buffers and compiled code before the peak is measured
        peaks[variant] = device.peak_bytes(steps[variant], where)
    samples = device.samples(steps, Effort(0.0, least=rounds), where, outputs, threads)
    median = {variant: percentile(values, 50) for variant, values in samples.items()}

    def row(variant: str, values: list[float]) -> Row:
        p20, p50, p80 = (digits(percentile(values, percent) * 1e3) for percent in (20, 50, 80))
        return Row(
            suite=name,
            case="model step",
            shape="x".join(map(str, x.shape)),
            count=1,
            epilogue="-",
            layout=layout,
            dtype=setting.dtype,
            direction="step",
            outputs=outputs,
            threads=threads,
            provider=variant,
            metric=f"{device.metric_of(where, threads)} per training step",
            unit="ms",
            p20=p20,
            p50=p50,
            p80=p80,
            rounds=len(values),
            tensor_bytes=x.numel() * x.itemsize,
            limit=None,
            ratio_to_limit=None,
            ratio_to_eager=digits(median["eager"] / median[variant]),
            max_error=None,
            peak_bytes=peaks[variant],
            saved_bytes=saved[variant],
            device=device.name_of(where),
            **circumstances(),
        )

    return [row(variant, values) for variant, values in samples.items()]


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()  # last, so that a step starts and ends with the same memory, which peak_bytes needs

    return step
