"""Times whole training steps of a network: with torch's layers, and converted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.bench import memory
from batchnorm.bench.networks import NETWORKS, Network
from batchnorm.bench.row import Row, circumstances
from batchnorm.bench.run import settled
from batchnorm.errors import InputError
from batchnorm.measure import Effort, clock_for, digits, interleaved, peak_bytes, percentile, saved_bytes
from batchnorm.surgery import convert, fuse

VARIANTS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "eager": lambda model: model,
    "ours": lambda model: convert(model),
    "fused": lambda model: fuse(convert(model)),
    "save memory": lambda model: fuse(convert(model, save_memory=True)),
    "compile": lambda model: torch.compile(model, dynamic=False),
    "compile ours": lambda model: torch.compile(convert(model), dynamic=False),
    "compile fused": lambda model: torch.compile(fuse(convert(model)), dynamic=False),
}


def run(
    name: str,
    variants: Sequence[str],
    layouts: Sequence[str],
    outputs: Sequence[str],
    threads: Sequence[int],
    batch: int,
    rounds: int,
) -> Iterator[list[Row]]:
    """Time steps of forward, backward and SGD; rows for each layout, outputs and number of threads.

    Raises:
        InputError: on an unknown model or variant.
    """
    network = find(name)
    for variant in variants:
        if variant not in VARIANTS:
            raise InputError(f"for a model, provider must be one of {', '.join(VARIANTS)}, but got {variant!r}")
    for layout, kind, number in product(layouts, outputs, threads):
        with settled(number), memory.outputs(kind):
            yield _measure(name, network, ("eager", *variants), layout, kind, number, batch, rounds)


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
    layout: str,
    outputs: str,
    threads: int,
    batch: int,
    rounds: int,
) -> list[Row]:
    torch.manual_seed(0)
    if any(variant.startswith("compile") for variant in variants):
        torch.compiler.reset()  # after 8 models a function would no longer be compiled
    original = network.build()
    x = torch.randn(batch, *network.sample)
    with torch.no_grad():
        classes, *positions = copy.deepcopy(original)(x).shape[1:]
    labels = torch.randint(classes, (batch, *positions))
    if x.dim() == 4 and layout == "channels_last":
        original = original.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (missing in torch's stubs)
        x = x.contiguous(memory_format=torch.channels_last)
    steps, saved, peaks = {}, {}, {}
    for variant in dict.fromkeys(variants):
        model = copy.deepcopy(original)
        forward = VARIANTS[variant](model)
        saved[variant] = saved_bytes(lambda forward=forward: F.cross_entropy(forward(x), labels))
        steps[variant] = _step(model, forward, x, labels)
        steps[variant]()  # create the optimizer's buffers and compiled code before the peak is measured
        peaks[variant] = peak_bytes(steps[variant])
    samples = interleaved(steps, Effort(0.0, least=rounds), clock_for(threads)[0])
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
            dtype="float32",
            direction="step",
            outputs=outputs,
            threads=threads,
            provider=variant,
            metric=f"{clock_for(threads)[1]} per training step",
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
            **circumstances(),
        )

    return [row(variant, values) for variant, values in samples.items()]


def _step(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        F.cross_entropy(forward(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()  # last, so that a step starts and ends with the same memory, which peak_bytes needs

    return step
