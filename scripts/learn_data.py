"""Writes src/batchnorm/learn/recorded.mjs, what the page of `batchnorm learn` shows of the rows in benchmarks/results/.

python -m scripts.learn_data
"""

import json
from pathlib import Path
from typing import Any

from batchnorm.files import write

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TARGET = ROOT / "src" / "batchnorm" / "learn" / "recorded.mjs"
DIGITS = 4

# The metrics that panels show: for each experiment its metrics, and for each metric the arms.
VALUES = {
    "batch-size": {
        "noise_64": ("plain", "group_norm"),
        "noise_2": ("plain", "frozen", "renorm", "moving_average", "group_norm"),
        "sorted_4": ("plain", "renorm", "moving_average", "group_norm"),
    },
    "depth": {
        "gradient": ("plain", "batch_norm"),
        "gradient_relu": ("plain", "batch_norm"),
        "accuracy_30": ("plain", "batch_norm"),
    },
    "detection": {"precision": ("none", "both")},
    "dqn": {"mean_return": ("joint", "target", "layer_norm")},
    "gan": {"distance": ("tuned", "both", "joint", "domains")},
    "image-classification": {"accuracy_alexnet": ("he", "batch_norm"), "accuracy_vgg": ("plain", "he", "batch_norm")},
    "smoothness": dict.fromkeys(("accuracy", "moved", "turn", "usual_turn"), ("plain", "batch_norm", "noisy")),
    "speech": {"letters": ("none", "both", "per_step")},
    "translation": {"right": ("none", "batch_norm", "layer_norm")},
}
CURVES = {"smoothness": {"course": ("plain", "batch_norm", "noisy")}}


def recorded() -> str:
    """The module's text."""
    results = {name: json.loads((RESULTS / "lab" / f"{name}.json").read_text()) for name in VALUES}
    broken = json.loads((RESULTS / "learn" / "broken_layer.json").read_text())
    data = {
        "values": {name: _values(results[name], metrics) for name, metrics in VALUES.items()},
        "curves": {name: _curves(results[name], curves) for name, curves in CURVES.items()},
        "made": {name: _made(result) for name, result in results.items()},
        "broken": broken["trials"],
        "broken_made": {name: broken["environment"][name] for name in ("command", "date", "torch")},
    }
    lines = ",\n".join(
        f"  {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in data.items()
    )
    return (
        "// Made by scripts/learn_data.py from benchmarks/results/: do not edit it.\n\n"
        "// `values` by experiment, metric and arm, and `curves` of points, both one entry a seed; `made` says by what, and when.\n"
        "// `broken` are outcomes by trial and mended defects (defects.mjs).\n"
        f"export const RECORDED = {{\n{lines},\n}};\n"
    )


def _values(result: dict[str, Any], metrics: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    by_arm = result["by_arm"]
    return {
        metric: {arm: [_rounded(unit["values"][metric]) for unit in by_arm[arm]] for arm in arms}
        for metric, arms in metrics.items()
    }


def _curves(result: dict[str, Any], curves: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    by_arm = result["by_arm"]
    return {
        curve: {
            arm: [[[_rounded(x), _rounded(y)] for x, y in unit["curves"][curve]] for unit in by_arm[arm]]
            for arm in arms
        }
        for curve, arms in curves.items()
    }


def _made(result: dict[str, Any]) -> dict[str, str]:
    return {"command": result["command"], "size": result["size"], "date": result["environment"]["date"][:10]}


def _rounded(value: float) -> float:
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e6 else rounded


if __name__ == "__main__":
    write(TARGET, recorded())
