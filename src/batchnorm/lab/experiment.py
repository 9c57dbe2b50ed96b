"""The interface of an experiment: a question, the arms to compare, a function that measures one arm, and claims with their judges.

Each file of `experiments/` defines one `Experiment`. Running, storing, tables, plots and the report are shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal, TypeVar, get_args

from batchnorm.language import marked, tr

Size = Literal["quick", "default", "full"]
Kind = Literal["claim", "application", "remedy"]
Answer = Literal["holds", "holds only when", "does not hold"]
ANSWERS: tuple[Answer, ...] = get_args(Answer)
WORDS: Mapping[str, str] = {
    "holds": marked("holds"),
    "holds only when": marked("holds only when"),
    "does not hold": marked("does not hold"),
}
T = TypeVar("T")

# The machine of `Experiment.timed_on`; it did other work too.
AVX2 = marked("an AMD EPYC with AVX2")

KINDS: Mapping[Kind, str] = {
    "claim": marked("Claims about training"),
    "application": marked("Applications"),
    "remedy": marked("Costs and remedies"),
}


@dataclass(frozen=True)
class Setting:
    """The arguments of a measurement besides its arm.

    Attributes:
        seed: seed of everything random. All arms of a seed use the same data in the same order, and the same start if possible.
        size: "quick" takes about 20 s per experiment on two cores, "default" about 2 minutes.
        device: the device of the networks.
        data: a folder with the user's own data, for experiments that accept it.
    """

    seed: int
    size: Size = "default"
    device: str = "cpu"
    data: str | None = None

    def pick(self, quick: T, default: T, full: T | None = None) -> T:
        """The argument for this size; "full" is `default` if not given."""
        return {"quick": quick, "default": default, "full": default if full is None else full}[self.size]


@dataclass(frozen=True)
class Measured:
    """The measurements of one arm with one seed.

    Attributes:
        values: numbers by metric; NaN if there is nothing to measure, infinity if something never happened.
        curves: points (x, y) by name, x ascending. A curve "a" may have a band, "a.low" and "a.high".
    """

    values: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """Name and format of a number, and whether higher is better; `form` is a format specification such as ".1%" or "d".

    With `each`, tables show every seed in place of mean and deviation, for numbers that are chosen from a short list.
    """

    label: str
    form: str = ".3g"
    better: Literal["higher", "lower", "neither"] = "higher"
    each: bool = False

    def __call__(self, value: float) -> str:
        """The number as text: "never" for infinity, a dash for NaN."""
        if math.isinf(value):
            return tr("never")
        return "–" if math.isnan(value) else format(value, self.form)


@dataclass(frozen=True)
class Curve:
    """How the curves with one name are drawn: for each arm the mean over seeds, in a band that is the seeds' range or the curve's own.

    Attributes:
        title: what is drawn.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        caption: what to see in the plot, as sentences.
        log_x: whether x is logarithmic; points that are not positive are left out.
        log_y: whether y is logarithmic.
        level: a value of y that the claims name, drawn as a dotted line.
        slider: if the name is "a@1", the label of a slider over all curves named "a@" and a number.
    """

    title: str
    x: str
    y: str
    caption: str
    log_x: bool = False
    log_y: bool = False
    level: float | None = None
    slider: str = ""


@dataclass(frozen=True)
class Results:
    """All measurements of an experiment: for each arm, one `Measured` per seed, in the order of the seeds."""

    by_arm: Mapping[str, Sequence[Measured]]

    def values(self, arm: str, metric: str) -> list[float]:
        """The metric's values, one for each seed."""
        return [measured.values[metric] for measured in self.by_arm[arm]]

    def mean(self, arm: str, metric: str) -> float:
        """The mean over the seeds."""
        return fmean(self.values(arm, metric))


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds for the numbers of this machine, and the evidence as one sentence."""

    answer: Answer
    evidence: str


Judge = Callable[[Results], Verdict]


def summary(verdicts: Mapping[str, Verdict]) -> str:
    """The answer to a single claim, or how many of several hold."""
    answers = [verdict.answer for verdict in verdicts.values()]
    if len(answers) == 1:
        return tr(WORDS[answers[0]])
    return tr("{held} of {claims} hold", held=answers.count("holds"), claims=len(answers))


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        name: its name on the command line, such as "lr-range".
        question: the question, as a sentence.
        kind: its group in lists: a claim about training, an application, or a cost with its remedy.
        claims: claims about batch normalization, as sentences that can be false, each with the function that judges it.
        source: the source of the claims, with section.
        paper: the number in the source, to compare with ours; "" if there is none.
        arms: names and labels; the first arm is without batch normalization, or the baseline of the others.
        metrics: metrics by the names in `Measured.values`; the first is the headline.
        measure: measures one arm with one seed; a module-level function, since it runs in a worker process with one thread.
        curves: curves by the names in `Measured.curves`.
        protocol: data, networks, optimizer, and what was chosen on which split, as one paragraph.
        seconds: estimated processor seconds of the default size for one seed and all arms.
        timed_on: the machine on which `seconds` was measured; "" if it is a guess.
        revised: how and why claims or rules were changed after the first results, as sentences; "" if they were not.
        data: what a folder given with `--data` must contain; "" if the experiment accepts none.
        cpu_only: whether the experiment runs on the CPU only.
    """

    name: str
    question: str
    claims: Mapping[str, Judge]
    source: str
    paper: str
    arms: Mapping[str, str]
    metrics: Mapping[str, Metric]
    measure: Callable[[str, Setting], Measured]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    kind: Kind = "claim"
    protocol: str = ""
    seconds: float = 60.0
    timed_on: str = ""
    revised: str = ""
    data: str = ""
    cpu_only: bool = False

    def fits(self, measured: Measured) -> bool:
        """Whether every metric has a value; false if metrics were added or renamed since the measurement."""
        return self.metrics.keys() <= measured.values.keys()
