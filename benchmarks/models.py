"""Other people's architectures, each converted, fused, frozen, folded, reverted, copied and exported: `make models`.

    python benchmarks/models.py [NAMES...] [--json FILE] [--page FILE]

Everything is compared in float64 with the same model of torch's layers, from the same weights, inputs and random numbers. Exit status 1
when a cell is wrong. Each architecture has a process of its own; weights are random, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-9  # of the largest value of each output, gradient and buffer
FOLD_TOLERANCE = 1e-8  # folding multiplies weights, so that its rounding differs everywhere
SECONDS = 900  # for one architecture

Build = Callable[[], tuple[nn.Module, Any]]


@dataclass
class Architecture:
    """A model and an input for it.

    Attributes:
        library: whose it is.
        build: makes both, in float32.
    """

    library: str
    build: Build


@dataclass
class Row:
    """What was found of one architecture.

    Attributes:
        converted, fused, folded: batch norms that were, of `total`.
        cells: of each operation "right", or what is wrong, or why it could not be tried.
        left: reasons why batch norms were not converted, fused or folded, with how many.
    """

    name: str
    library: str
    total: int = 0
    converted: int = 0
    fused: int = 0
    folded: int = 0
    fold_total: int = 0
    cells: dict[str, str] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def image(size: int = 32, batch: int = 4, channels: int = 3, dimensions: int = 2) -> Tensor:
    return torch.randn(batch, channels, *(size,) * dimensions)


def of_torchvision(path: str, size: int = 32, **options: Any) -> Architecture:
    def build() -> tuple[nn.Module, Any]:
        torchvision = import_module("torchvision")
        options.setdefault("weights", None)
        if path.partition(".")[0] in ("detection", "segmentation"):
            options.setdefault("weights_backbone", None)
        return torchvision.models.get_model(path.rpartition(".")[2], **options), image(size)

    return Architecture("torchvision", build)


def of_timm(name: str, size: int = 32, **options: Any) -> Architecture:
    def build() -> tuple[nn.Module, Any]:
        timm = import_module("timm")
        return timm.create_model(name, pretrained=False, **options), image(size)

    return Architecture("timm", build)


def of_smp(cls: str, encoder: str, **options: Any) -> Architecture:
    def build() -> tuple[nn.Module, Any]:
        smp = import_module("segmentation_models_pytorch")
        return getattr(smp, cls)(encoder_name=encoder, encoder_weights=None, **options), image()

    return Architecture("segmentation-models-pytorch", build)


def of_transformers(cls: str, config: str, example: Callable[[], Any], **options: Any) -> Architecture:
    def build() -> tuple[nn.Module, Any]:
        transformers = import_module("transformers")
        return getattr(transformers, cls)(getattr(transformers, config)(**options)), example()

    return Architecture("transformers", build)


def of_monai(cls: str, example: Callable[[], Any], **options: Any) -> Architecture:
    def build() -> tuple[nn.Module, Any]:
        nets = import_module("monai.networks.nets")
        return getattr(nets, cls)(**options), example()

    return Architecture("MONAI", build)


def video() -> tuple[nn.Module, Any]:
    torchvision = import_module("torchvision")
    return torchvision.models.video.r3d_18(weights=None), torch.randn(2, 3, 4, 32, 32)


def volume() -> Tensor:
    return image(16, 2, 1, 3)


ARCHITECTURES = {
    "resnet18": of_torchvision("resnet18"),
    "resnext50_32x4d": of_torchvision("resnext50_32x4d"),
    "densenet121": of_torchvision("densenet121"),
    "googlenet": of_torchvision("googlenet", 64, init_weights=False),
    "inception_v3": of_torchvision("inception_v3", 80, init_weights=False, aux_logits=False),
    "mobilenet_v2": of_torchvision("mobilenet_v2"),
    "mobilenet_v3_large": of_torchvision("mobilenet_v3_large"),
    "efficientnet_b0": of_torchvision("efficientnet_b0"),
    "mnasnet1_0": of_torchvision("mnasnet1_0"),
    "shufflenet_v2_x1_0": of_torchvision("shufflenet_v2_x1_0"),
    "regnet_y_400mf": of_torchvision("regnet_y_400mf"),
    "r3d_18": Architecture("torchvision", video),
    "deeplabv3_resnet50": of_torchvision("segmentation.deeplabv3_resnet50"),
    "lraspp_mobilenet_v3_large": of_torchvision("segmentation.lraspp_mobilenet_v3_large"),
    "timm/mobilenetv3_large_100": of_timm("mobilenetv3_large_100"),
    "timm/mobilenetv4_conv_small": of_timm("mobilenetv4_conv_small"),
    "timm/tf_efficientnetv2_b0": of_timm("tf_efficientnetv2_b0"),
    "timm/resnetv2_50": of_timm("resnetv2_50"),
    "timm/repvgg_a0": of_timm("repvgg_a0"),
    "timm/mobileone_s0": of_timm("mobileone_s0"),
    "timm/tresnet_m": of_timm("tresnet_m"),
    "timm/regnety_004": of_timm("regnety_004"),
    "timm/hrnet_w18_small": of_timm("hrnet_w18_small"),
    "timm/dla34": of_timm("dla34"),
    "timm/ghostnet_100": of_timm("ghostnet_100"),
    "timm/levit_128s": of_timm("levit_128s", 224),
    "timm/fastvit_t8": of_timm("fastvit_t8"),
    "timm/cspresnet50": of_timm("cspresnet50"),
    "timm/ese_vovnet19b_dw": of_timm("ese_vovnet19b_dw"),
    "timm/rexnet_100": of_timm("rexnet_100"),
    "timm/skresnet18": of_timm("skresnet18"),
    "smp/Unet(resnet18)": of_smp("Unet", "resnet18"),
    "smp/UnetPlusPlus(efficientnet-b0)": of_smp("UnetPlusPlus", "efficientnet-b0"),
    "smp/DeepLabV3Plus(mobilenet_v2)": of_smp("DeepLabV3Plus", "mobilenet_v2"),
    "smp/FPN(timm-regnety_002)": of_smp("FPN", "tu-regnety_002"),
    "transformers/ResNet": of_transformers("ResNetModel", "ResNetConfig", image, depths=[2, 2, 2, 2]),
    "transformers/MobileNetV2": of_transformers("MobileNetV2Model", "MobileNetV2Config", image),
    "transformers/RegNet": of_transformers("RegNetModel", "RegNetConfig", image, depths=[1, 1, 2, 2]),
    "transformers/Levit": of_transformers("LevitModel", "LevitConfig", lambda: image(224)),
    "transformers/Wav2Vec2Conformer": of_transformers(
        "Wav2Vec2ConformerModel",
        "Wav2Vec2ConformerConfig",
        lambda: torch.randn(2, 8000),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        mask_time_prob=0.0,
    ),
    "monai/BasicUNet": of_monai("BasicUNet", volume, spatial_dims=3, norm="batch", features=(8, 8, 16, 16, 16, 8)),
    "monai/DenseNet121": of_monai(
        "DenseNet121", lambda: image(32, 4, 1), spatial_dims=2, in_channels=1, out_channels=3
    ),
    "monai/SegResNet": of_monai("SegResNet", volume, spatial_dims=3, norm="batch", out_channels=2),
    "monai/EfficientNetBN": of_monai("EfficientNetBN", image, model_name="efficientnet-b0", pretrained=False),
    "monai/UNet": of_monai(
        "UNet",
        volume,
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        channels=(8, 16, 32),
        strides=(2, 2),
        norm="batch",
    ),
}


# What is compared


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


def call(model: nn.Module, example: Any) -> list[Tensor]:
    torch.manual_seed(1)  # dropout and the like
    return [value for value in tensors(model(example)) if value.is_floating_point()]


def named(outputs: list[Tensor]) -> dict[str, Tensor]:
    return {f"output {i}": y for i, y in enumerate(outputs)}


def step(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of a training step."""
    outputs = call(model, example)
    weights = torch.Generator().manual_seed(2)
    loss = sum((torch.randn(y.shape, generator=weights, dtype=y.dtype) * y).sum() for y in outputs)
    model.zero_grad()
    assert isinstance(loss, Tensor)
    loss.backward()
    found = named([y.detach() for y in outputs])
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def differs(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> str:
    """The largest difference beyond the tolerance, in words; "" if there is none.

    A gradient that is zero but for rounding (of a bias before a batch norm) is compared with the model's largest one, and a running mean
    that is zero but for rounding (of what follows a batch norm without a bias) with the running deviation.
    """
    if found.keys() != wanted.keys():
        return f"{sorted(found.keys() ^ wanted.keys())[:3]} on one side only"
    gradients = [
        float(value.abs().max()) for name, value in wanted.items() if name.startswith("gradient") and value.numel()
    ]
    floor = 1e-3 * max(gradients, default=0.0)
    worst, words = 0.0, ""
    for name, value in wanted.items():
        if not value.numel():
            continue
        if not torch.equal(found[name].isfinite(), value.isfinite()):
            return f"{name} is finite on one side only"
        scale = max(float(value.abs().max()), 1e-30)
        if name.startswith("gradient"):
            scale = max(scale, floor)
        elif name.endswith("running_mean"):
            scale = max(scale, float(wanted[name.removesuffix("mean") + "var"].max()) ** 0.5)
        error = float((found[name].double() - value.double()).abs().nan_to_num(0.0).max()) / scale
        if error > max(tolerance, worst):
            worst, words = error, f"{name} is off by {error:.1e}"
    return words


class Said(logging.Handler):
    """What the library says while something runs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines = list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Trial:
    """One architecture, with torch's layers as the reference."""

    def __init__(self, name: str) -> None:
        import batchnorm

        self.bn = batchnorm
        self.row = Row(name, ARCHITECTURES[name].library)
        torch.manual_seed(0)
        model, self.example = ARCHITECTURES[name].build()
        self.example = self.example.double()
        self.model = model.double().train()
        for _ in range(2):  # running statistics other than 0 and 1
            with torch.no_grad():
                call(self.model, self.example)
        self.expected = step(copy.deepcopy(self.model), self.example)
        self.said = Said()
        logger = logging.getLogger("batchnorm")
        logger.addHandler(self.said)
        logger.setLevel(logging.INFO)

    def changed(self) -> nn.Module:
        return self.bn.convert(copy.deepcopy(self.model))

    def report(self, operation: str) -> tuple[int, int]:
        """Of how many, how many were changed; the reasons for the others are noted."""
        line = next(line for line in reversed(self.said.lines) if line.startswith(f"{operation}: ") and " of " in line)
        done, _, total = line.removeprefix(f"{operation}: ").partition(" batch norms")[0].partition(" of ")
        for reason in line.split("; ")[1:]:
            if reason.startswith("left "):
                names, _, why = reason.removeprefix("left ").partition(": ")
                more = names.rpartition(" and ")[2].removesuffix(" more")
                count = names.count(",") + 1 + (int(more) if more.isdigit() else 0)
                self.row.left[f"{operation}: {why}"] = count
        return int(done), int(total)

    def convert(self) -> str:
        model = self.changed()
        self.row.converted, self.row.total = self.report("convert")
        return differs(step(model, self.example), self.expected, TOLERANCE)

    def fuse(self) -> str:
        model = self.bn.fuse(self.changed())
        self.row.fused = self.report("fuse")[0]
        return differs(step(model, self.example), self.expected, TOLERANCE)

    def freeze(self) -> str:
        model = self.bn.freeze(copy.deepcopy(self.model)).train()
        reference = copy.deepcopy(self.model)
        for layer in reference.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval().requires_grad_(False)
        return differs(step(model, self.example), step(reference, self.example), TOLERANCE)

    def fold(self) -> str:
        reference = copy.deepcopy(self.model).eval()
        folded, report = self.bn.fold(self.model, self.example)
        self.row.folded, self.row.fold_total = len(report.folded), report.batch_norms_before
        for why in report.left.values():
            self.row.left[f"fold: {why}"] = self.row.left.get(f"fold: {why}", 0) + 1
        with torch.no_grad():
            found, wanted = call(folded, self.example), call(reference, self.example)
        return differs(named(found), named(wanted), FOLD_TOLERANCE)

    def revert(self) -> str:
        model = self.bn.revert(self.bn.fuse(self.changed()))
        kinds = [type(layer) for layer in model.modules()]
        if kinds != [type(layer) for layer in self.model.modules()]:
            return "a module is of another class than before"
        return differs(step(model, self.example), self.expected, 0.0)

    def deepcopy(self) -> str:
        model = self.bn.fuse(self.changed())
        twin = copy.deepcopy(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found = step(twin, self.example)
        words = differs(dict(model.state_dict()), before, 0.0)
        return f"the original changed: {words}" if words else differs(found, step(model, self.example), 0.0)

    def export(self) -> str:
        try:
            torch.export.export(copy.deepcopy(self.model).eval(), (self.example,))
        except Exception as error:  # whatever torch raises
            raise NotTriedError(f"torch.export refuses the model itself ({type(error).__name__})") from error
        model = self.changed().eval()
        program = torch.export.export(model, (self.example,)).module()
        with torch.no_grad():
            found, wanted = call(program, self.example), call(copy.deepcopy(self.model).eval(), self.example)
        return differs(named(found), named(wanted), TOLERANCE)


class NotTriedError(Exception):
    """Not for a reason of ours."""


OPERATIONS = ("convert", "fuse", "freeze", "fold", "revert", "deepcopy", "export")


def run(name: str) -> Row:
    """All operations on one architecture."""
    start = time.perf_counter()
    trial = Trial(name)
    for operation in OPERATIONS:
        try:
            words = getattr(trial, operation)()
            trial.row.cells[operation] = f"wrong: {words}" if words else "right"
        except NotTriedError as reason:
            trial.row.cells[operation] = f"not tried: {reason}"
        except Exception as error:  # it is what is looked for
            trial.row.cells[operation] = (
                f"wrong: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            )
    trial.row.seconds = round(time.perf_counter() - start, 1)
    return trial.row


def in_a_process(name: str) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return asdict(Row(name, ARCHITECTURES[name].library, cells={"build": f"wrong: not ready after {SECONDS} s"}))
    if done.returncode:
        words = (done.stderr.strip() or "nothing").splitlines()[-1]
        return asdict(Row(name, ARCHITECTURES[name].library, cells={"build": f"wrong: {words}"}))
    return json.loads(done.stdout.splitlines()[-1])


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "torchvision", "timm", "segmentation-models-pytorch", "transformers", "monai")
    return {package: version(package) for package in packages} | {"python": platform.python_version()}


def is_wrong(row: dict[str, Any]) -> bool:
    return any(cell.startswith("wrong") for cell in row["cells"].values())


# The page


def counted(left: dict[str, int]) -> Counter[str]:
    """How often each reason occurs, whatever the names of the modules in it."""
    reasons = Counter[str]()
    for why, count in left.items():
        reasons[re.sub(r"\w+(\.\w+)+", "…", why)] += count
    return reasons


def page(result: dict[str, Any]) -> str:
    """docs/models.md."""
    rows, packages = result["rows"], result["versions"]
    of = ", ".join(f"{name} {version}" for name, version in packages.items())
    notes = list[str]()

    def sign(cell: str) -> str:
        if cell == "right":
            return "✓"
        if cell not in notes:
            notes.append(cell)
        return f"[{notes.index(cell) + 1}]"

    lines = [
        "# Other people's models",
        "",
        f"{len(rows)} architectures with random weights, compared in float64 with the same model made of torch's layers:",
        "",
        "| operation | what is compared | tolerance |",
        "|---|---|---|",
        "| `convert`, `fuse`, `freeze` | outputs, all gradients and all buffers of a training step | 10⁻⁹ of the largest value |",
        "| `fold`, `export` | outputs in inference | 10⁻⁸, 10⁻⁹ of the largest value |",
        "| `revert` | classes, outputs, gradients and buffers | none: the same bits |",
        "| `deepcopy` | a step of the copy and of its original, and that neither changes the other | none: the same bits |",
        "",
        f"`make models` makes this page again, in about half an hour on two cores. It was made with {of}.",
        "",
        "| architecture | converted | fused | folded | " + " | ".join(OPERATIONS) + " |",
        "|---|---|---|---|" + "---|" * len(OPERATIONS),
    ]
    for row in rows:
        cells = [
            sign(row["cells"].get(operation, row["cells"].get("build", "wrong: nothing"))) for operation in OPERATIONS
        ]
        counts = f"{row['converted']}/{row['total']} | {row['fused']} | {row['folded']}/{row['fold_total']}"
        lines.append(f"| {row['name']} | {counts} | " + " | ".join(cells) + " |")
    lines += ["", "`fused` counts the batch norms that apply the activation or addition after them."]
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))] if notes else []
    lines += ["", "## What is left, and why", ""]
    for row in rows:
        if row["left"]:
            lines += [f"**{row['name']}**", ""]
            lines += [f"- {count} × {why}" for why, count in counted(row["left"]).items()]
            lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Operations on other people's architectures.")
    parser.add_argument("names", nargs="*", help="architectures; all if none is named")
    parser.add_argument("--json", type=Path, help="write the rows here; those of architectures not named stay")
    parser.add_argument("--page", type=Path, help="write the page here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.one:
        row = run(given.one)
        print(json.dumps(asdict(row)))
        return
    unknown = set(given.names) - ARCHITECTURES.keys()
    if unknown:
        parser.error(f"no such architecture: {', '.join(sorted(unknown))}; there are {', '.join(ARCHITECTURES)}")
    names, start = given.names or list(ARCHITECTURES), time.perf_counter()
    earlier = json.loads(given.json.read_text())["rows"] if given.json and given.json.exists() and given.names else []
    rows = {row["name"]: row for row in earlier}
    result: dict[str, Any] = {}
    for number, name in enumerate(names, 1):
        row = rows[name] = in_a_process(name)
        result = {"versions": versions(), "rows": [rows[name] for name in ARCHITECTURES if name in rows]}
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n")
        wrong = "; ".join(f"{operation} {cell}" for operation, cell in row["cells"].items() if cell != "right")
        counts = f"converted {row['converted']}/{row['total']}, fused {row['fused']}, folded {row['folded']}/{row['fold_total']}"
        print(
            f"[{time.perf_counter() - start:5.0f} s] {number}/{len(names)} {name}: {counts}; {wrong or 'all right'}",
            flush=True,
        )
    if given.page:
        given.page.write_text(page(result))
    sys.exit(any(is_wrong(rows[name]) for name in names))


if __name__ == "__main__":
    main()
