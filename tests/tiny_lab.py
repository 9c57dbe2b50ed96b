"""The command with one tiny experiment in place of the lab's own, in the parent and in its workers, which read this file again."""

import math
import time

from batchnorm.errors import InputError
from batchnorm.lab import experiments
from batchnorm.lab.experiment import Curve, Experiment, Measured, Metric, Results, Setting, Verdict


def measure(arm: str, setting: Setting) -> Measured:
    time.sleep(0.3)
    if setting.data is not None:
        raise InputError("data must be real; these are not: bring others")
    share = 0.9 if arm == "with" else 0.5
    steps = math.inf if arm == "without" else 10.0
    values = {"share": share + setting.seed / 100, "steps": steps, "gap": math.nan}
    return Measured(values, {"course": [(1.0, 0.1), (2.0, share)]})


def judge(results: Results) -> Verdict:
    better = results.mean("with", "share") > results.mean("without", "share")
    return Verdict("holds" if better else "does not hold", f"{results.mean('with', 'share'):.1%} with it.")


EXPERIMENT = Experiment(
    name="tiny",
    question="Does <it> work?",
    claims={"It works.": judge},
    source="Nobody 2026",
    paper="3.14",
    arms={"without": "without it", "with": "with it"},
    metrics={
        "share": Metric("share", ".1%"),
        "steps": Metric("steps", ".0f", "lower"),
        "gap": Metric("gap", ".2f", "neither"),
    },
    measure=measure,
    curves={"course": Curve("Share by step", "step", "share", "Higher is better.")},
    protocol="Nothing is trained.",
    seconds=1,
    data="anything",
)


def load(name: str) -> Experiment:
    if name != "tiny":
        raise InputError(f"there is no experiment {name}; there are tiny")
    return EXPERIMENT


experiments.NAMES = ("tiny",)
experiments.load = load

if __name__ == "__main__":
    from batchnorm.cli import commands

    commands()
