"""Runs the layer of panel "broken" of `batchnorm learn`, as the page shows it, and records what its defects do.

    python -m scripts.broken_layer        # writes benchmarks/results/learn/broken_layer.json: two minutes; needs Linux and node

A trial gets what the listing defines (BatchNorm, model, predict) and returns plain values. Its outcome depends on the defects that
`TRIALS` of src/batchnorm/learn/defects.mjs names.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from batchnorm.env import versions
from batchnorm.files import to_json, write

ROOT = Path(__file__).parent.parent
DEFECTS = ROOT / "src" / "batchnorm" / "learn" / "defects.mjs"
RESULT = ROOT / "benchmarks" / "results" / "learn" / "broken_layer.json"
STEPS, EVERY, BATCH = 300, 10, 64

Values = dict[str, Any]
Listing = dict[str, Any]
SHOWN = 80  # characters of an error


def node(expression: str) -> Any:
    """The value of a JavaScript expression, in which `it` is the module of the defects."""
    program = f"import({json.dumps(DEFECTS.as_uri())}).then((it) => console.log(JSON.stringify({expression})))"
    return json.loads(subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True).stdout)


def source(mended: Iterable[str]) -> str:
    """The Python of the listing."""
    return node(f"it.source(new Set({json.dumps(sorted(mended))}))")


def run(text: str) -> Listing:
    """What the listing defines, always with the same weights."""
    torch.manual_seed(0)
    defined = Listing()
    exec(text, defined)
    return defined


def outcomes(trial: str) -> list[list[str]]:
    """The sets of mended defects for which a trial comes out differently."""
    defects = node(f"it.TRIALS[{json.dumps(trial)}]")
    return [list(chosen) for count in range(len(defects) + 1) for chosen in combinations(defects, count)]


def state_dict(listing: Listing) -> Values:
    return {"keys": list(listing["BatchNorm"](3).state_dict())}


def double(listing: Listing) -> Values:
    layer = listing["BatchNorm"](3).double()
    return {"gamma": _name(layer.gamma.dtype), "running_mean": _name(layer.running_mean.dtype)}


def deepcopy(listing: Listing) -> Values:
    model = listing["model"]
    _step(model)
    return _tried(lambda: copy.deepcopy(model))


def second_backward(listing: Listing) -> Values:
    """A gradient in inference, such as fine-tuning with fixed statistics or a saliency map takes it, after a step of training."""
    model = listing["model"]
    _step(model)
    x = torch.randn(BATCH, 784, requires_grad=True)
    return _tried(lambda: model.eval()(x).sum().backward())


def single(listing: Listing) -> Values:
    layer = listing["BatchNorm"](3)
    with torch.no_grad():
        layer.beta.copy_(torch.tensor([1.0, 2.0, 3.0]))
    found = _tried(lambda: layer(torch.tensor([[5.0, -7.0, 90.0]])).tolist()[0])
    return {**found, "running_var": [_rounded(value) for value in layer.running_var.tolist()]}


def variance(listing: Listing) -> Values:
    layer = listing["BatchNorm"](1, momentum=1.0)
    layer(torch.tensor([[0.8], [1.2], [0.9], [1.1]]))
    return {"running_var": _rounded(layer.running_var.item())}


def images(listing: Listing) -> Values:
    layer = listing["BatchNorm"](3)
    return _tried(lambda: _largest_mean(layer(torch.randn(8, 3, 5, 5) * 2 + 7)))


def square_images(listing: Listing) -> Values:
    """As wide as there are channels: then shapes fit by chance."""
    layer = listing["BatchNorm"](4)
    with torch.no_grad():
        layer.beta.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    y = layer(torch.randn(8, 4, 4, 4))
    means = [_rounded(value) for value in y.detach().mean((0, 2, 3)).tolist()]
    return {"channel_means": means, "running_mean": list(layer.running_mean.shape)}


def momentum(listing: Listing) -> Values:
    """The running mean after one batch of mean 10."""

    def moved(weight: float) -> float:
        layer = listing["BatchNorm"](1, momentum=weight)
        layer(torch.tensor([[9.0], [11.0]]))
        return _rounded(layer.running_mean.item())

    return {"small": moved(0.1), "large": moved(0.9)}


def neighbors(listing: Listing) -> Values:
    """How much the prediction for one sample changes with the others, and whether predicting changes the model."""
    model, predict = listing["model"], listing["predict"]
    torch.manual_seed(0)
    with torch.no_grad():  # the same weights with and without biases
        for layer in model:
            if isinstance(layer, torch.nn.Linear):
                layer.weight.copy_(torch.randn_like(layer.weight) / layer.in_features**0.5)
                if layer.bias is not None:
                    layer.bias.zero_()
    for _ in range(50):
        _step(model)
    before = model[1].running_mean.clone()
    sample = torch.randn(1, 784)
    alone = predict(torch.cat([sample, torch.randn(7, 784)]))[0]
    beside = predict(torch.cat([sample, torch.randn(7, 784) + 1.0]))[0]
    moved = not torch.equal(before, model[1].running_mean)
    return {"change": _rounded((alone - beside).abs().max().item()), "statistics_moved": moved}


def dead_bias(listing: Listing) -> Values:
    model = listing["model"]
    _step(model)
    first = model[0]
    bias = None if first.bias is None else float(f"{first.bias.grad.abs().max().item():.1e}")
    return {"bias": bias, "weight": float(f"{first.weight.grad.abs().max().item():.1e}")}


def memory(listing: Listing) -> Values:
    """Resident megabytes above those at the first of the steps."""
    model = listing["model"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps, used = list[int](), list[float]()
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            steps.append(step)
            used.append(_resident())
        optimizer.zero_grad()
        _loss(model).backward()
        optimizer.step()
    return {"steps": steps[1:], "megabytes": [round(value - used[1], 1) for value in used[1:]]}


TRIALS: dict[str, Callable[[Listing], Values]] = {
    trial.__name__: trial
    for trial in (
        state_dict,
        double,
        memory,
        deepcopy,
        second_backward,
        single,
        variance,
        images,
        square_images,
        momentum,
        neighbors,
        dead_bias,
    )
}


def tried(trial: str, mended: Iterable[str]) -> Values:
    return TRIALS[trial](run(source(mended)))


def _loss(model: torch.nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(torch.randn(BATCH, 784)), torch.randint(0, 10, (BATCH,)))


def _step(model: torch.nn.Module) -> None:
    _loss(model).backward()


def _tried(function: Callable[[], object]) -> Values:
    """The error that a call raises, or what it returns if that is plain."""
    try:
        result = function()
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0]
        return {
            "error": type(error).__name__,
            "text": text if len(text) <= SHOWN else f"{text[:SHOWN].rsplit(' ', 1)[0]} …",
        }
    return {"error": None, **({"output": result} if isinstance(result, list | float) else {})}


def _largest_mean(y: torch.Tensor) -> float:
    return _rounded(y.detach().mean((0, 2, 3)).abs().max().item())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rounded(value: float) -> Any:
    return "NaN" if value != value else float(f"{value:.3g}") if abs(value) > 1e-6 else 0.0


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    def fresh(trial: str, mended: list[str]) -> Values:
        """In a process of its own, whose memory is no other's."""
        program = (
            f"import json; from scripts.broken_layer import tried; print(json.dumps(tried({trial!r}, {mended!r})))"
        )
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
        return json.loads(found.stdout)

    rows = {trial: {"-".join(mended): fresh(trial, mended) for mended in outcomes(trial)} for trial in TRIALS}
    made = {"command": "python -m scripts.broken_layer", "date": datetime.now(UTC).date().isoformat(), **versions()}
    RESULT.parent.mkdir(exist_ok=True)
    write(RESULT, to_json({"environment": made, "trials": rows}))


if __name__ == "__main__":
    main()
