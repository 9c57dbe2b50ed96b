"""What an experiment of the lab is: a question, the arms it compares, how one arm is measured, and how the claim is judged.

Each file of `experiments/` makes one `Experiment`. Everything around it (running, storing, tables, plots, the report) is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Literal, TypeVar

Size = Literal["quick", "default", "full"]
Answer = Literal["holds", "holds only when", "does not hold"]
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """What a measurement depends on besides its arm and the code.

    Attributes:
        seed: of everything random: both arms of a seed see the same data in the same order, and start alike where they can.
        size: how much is run: "quick" takes about 20 s an experiment on two cores, "default" about 2 minutes.
        device: where the networks are.
        data: a folder with the user's own data, for the experiments that take some.
    """

    seed: int
    size: Size = "default"
    device: str = "cpu"
    data: str | None = None

    def pick(self, quick: T, default: T, full: T | None = None) -> T:
        """The argument named as the size; "full" is `default` where it is not given."""
        return {"quick": quick, "default": default, "full": default if full is None else full}[self.size]


@dataclass(frozen=True)
class Measured:
    """What one arm gave with one seed.

    Attributes:
        values: by metric. NaN where there is nothing to measure, infinity for what never happened.
        curves: by name, points (x, y), x ascending. Beside a curve "a" there may be "a.low" and "a.high": its band.
    """

    values: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """How a number is called, printed and read: `form` is a format specification, ".1%" or "d" for example."""

    label: str
    form: str = ".3g"
    better: Literal["higher", "lower", "neither"] = "higher"

    def __call__(self, value: float) -> str:
        """The number as text: "never" for infinity, a dash for NaN."""
        if math.isinf(value):
            return "never"
        return "–" if math.isnan(value) else format(value, self.form)


@dataclass(frozen=True)
class Curve:
    """How curves of one name are drawn: one line for each arm, the mean over seeds in their range, or in its own band."""

    title: str
    x: str
    y: str
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Results:
    """All that was measured of one experiment: by arm, one `Measured` for each seed, in the order of the seeds."""

    by_arm: Mapping[str, Sequence[Measured]]

    def values(self, arm: str, metric: str) -> list[float]:
        """The metric's values, one for each seed."""
        return [measured.values[metric] for measured in self.by_arm[arm]]

    def mean(self, arm: str, metric: str) -> float:
        """Their mean."""
        return fmean(self.values(arm, metric))

    def means(self, metric: str) -> dict[str, float]:
        """The means of all arms."""
        return {arm: self.mean(arm, metric) for arm in self.by_arm}

    def deviation(self, arm: str, metric: str) -> float:
        """Their sample standard deviation; 0 of a single seed."""
        values = self.values(arm, metric)
        return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0


def listed(labels: Mapping[str, str], values: Mapping[str, float], form: str) -> str:
    """What each arm gave, as part of a sentence; `form` is a format specification."""
    return ", ".join(f"{labels[arm]} {value:{form}}" for arm, value in values.items())


@dataclass(frozen=True)
class Verdict:
    """Whether the claim holds on this machine's numbers, and the numbers that say so, as one sentence."""

    answer: Answer
    evidence: str


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        name: as the command line has it, "lr-range".
        question: what is asked, as a sentence.
        claim: what is said of batch normalization, as a sentence that can be false.
        source: who says so, with section.
        paper: the source's own number, to stand beside ours; "" where it gives none.
        arms: name to label; the first is the one without batch normalization, or what the others are compared with.
        metrics: by the names in `Measured.values`; the first is the headline.
        measure: one arm with one seed: module-level, for it runs in a worker process with one thread.
        judge: the verdict on the results of all seeds.
        curves: by the names in `Measured.curves`.
        protocol: data, networks, optimizer, and what was chosen on which split, as one paragraph.
        seconds: about what the default size takes for one seed, all arms, on one core: for estimates.
        data: what a folder given with `--data` is to hold; "" where the experiment takes none.
        cpu_only: whether another `Setting.device` is an error.
    """

    name: str
    question: str
    claim: str
    source: str
    paper: str
    arms: Mapping[str, str]
    metrics: Mapping[str, Metric]
    measure: Callable[[str, Setting], Measured]
    judge: Callable[[Results], Verdict]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    protocol: str = ""
    seconds: float = 60.0
    data: str = ""
    cpu_only: bool = False

    def fits(self, measured: Measured) -> bool:
        """Whether every metric has a value there: not where metrics were added or renamed since."""
        return self.metrics.keys() <= measured.values.keys()
