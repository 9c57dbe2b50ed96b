"""At which learning rates does the tutorial's network train, and how fast, with and without batch normalization? The demonstration."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.lab.data import Dataset, load
from batchnorm.lab.experiment import AVX2, Curve, Experiment, Judge, Measured, Metric, Results, Setting, Verdict
from batchnorm.lab.networks import tutorial_network
from batchnorm.lab.rules import beats, verdict
from batchnorm.lab.train import Schedule, accuracy, look_inside, train
from batchnorm.language import marked, tr

COMMON = 0.1
RATES = (0.003, 0.01, 0.03, COMMON, 0.3, 1.0, 3.0)
TARGET = 0.95
SELDOM = 4  # at other learning rates the end matters most, so they are measured less often by this factor
COURSE = f"course@{COMMON:g}"


class Training(NamedTuple):
    """Validation accuracy by step, mean and standard deviation (2, units) of what hidden units receive at these steps, and test accuracy
    at the end. Only the common learning rate has the former.
    """

    course: list[tuple[float, float]]
    received: list[Tensor]
    test: float

    @property
    def validation(self) -> float:
        return self.course[-1][1]


def schedule(rate: float, setting: Setting) -> Schedule:
    """The steps at a learning rate; MNIST takes more than the smaller digits."""
    steps = setting.pick(quick=120, default=240 if setting.data is None else 1000)
    return Schedule(rate, steps, batch_size=64, seed=setting.seed)


def measure(arm: str, setting: Setting) -> Measured:
    """Both arms of a seed start from the same weights and use the same batches."""
    data = load(setting.data).to(setting.device)
    rates = setting.pick((0.003, COMMON, 3.0), RATES)
    trainings = {rate: _trained(arm, data, schedule(rate, setting), setting) for rate in rates}
    best, common = max(trainings, key=lambda rate: trainings[rate].validation), trainings[COMMON]
    drift, moved = _typical(torch.stack(common.received))
    values = {
        "accuracy": trainings[best].test,
        "best_rate": best,
        "common_accuracy": common.test,
        "steps": next((step for step, share in common.course if share >= TARGET), math.inf),
        "rates": sum(training.validation >= TARGET for training in trainings.values()),
        "drift": drift,
    }
    steps = [step for step, _ in common.course]
    curves = {f"course@{rate:g}": training.course for rate, training in trainings.items()}
    curves |= {
        "sweep": [(rate, training.test) for rate, training in trainings.items()],
        "validation": [(rate, training.validation) for rate, training in trainings.items()],
        "drift": list(zip(steps, moved, strict=True)),
    }
    return Measured(values, curves)


def _trained(arm: str, data: Dataset, schedule: Schedule, setting: Setting) -> Training:
    """Train one network, and measure it during training."""
    torch.manual_seed(setting.seed)
    network = tutorial_network(batch_norm=arm == "batch_norm").to(setting.device)
    watched = schedule.learning_rate == COMMON
    every = (10 if schedule.steps == 1000 else 5) * (1 if watched else SELDOM)
    course, received = list[tuple[float, float]](), list[Tensor]()

    def look(step: int) -> None:
        if watched:
            share, inputs = look_inside(network, data.validation)
            received.append(
                torch.stack((inputs.mean(0), inputs.std(0, correction=0))).cpu()
            )  # (N, units) -> (2, units)
        else:
            share = accuracy(network, data.validation)
        course.append((step, share))

    look(0)
    for step, loss in train(network, data.train, schedule):
        if step % every == 0 or step == schedule.steps or not math.isfinite(loss):
            look(step)
    return Training(course, received, accuracy(network, data.test))


def _typical(received: Tensor) -> tuple[float, list[float]]:
    """Of means and standard deviations over time (T, 2, units), the hidden unit with the median drift: this drift, and the way there.

    The way is the distance of the mean from its start in standard deviations at the start, (T,); the drift is its maximum.
    """
    moved = (received[:, 0] - received[0, 0]).abs() / received[0, 1]  # (T, units)
    drift = moved.amax(0)
    unit = int(drift.argsort()[len(drift) // 2])
    found = float(drift[unit])
    return found if math.isfinite(found) else math.inf, moved[:, unit].tolist()


ARMS = {"plain": "without BN", "batch_norm": "with BN"}
METRICS = {
    "accuracy": Metric("test accuracy, best learning rate", ".1%"),
    "best_rate": Metric("best learning rate (on validation)", ".3g", "neither", each=True),
    "common_accuracy": Metric(f"test accuracy, learning rate {COMMON:g}", ".1%"),
    "steps": Metric(f"steps to {TARGET:.0%}, learning rate {COMMON:g}", ".0f", "lower"),
    "rates": Metric("learning rates that train", ".3g"),
    "drift": Metric("largest move of a hidden unit's mean", ".2f", "lower"),
}


def _for_every_seed(metric: str, told: str) -> Judge:
    """Judges that the metric is better for every seed with batch normalization than for every seed without."""

    def judge(results: Results) -> Verdict:
        plain, normalized = (results.values(arm, metric) for arm in ARMS)
        shown, others = (", ".join(map(METRICS[metric], values)) for values in (normalized, plain))
        evidence = tr("{told}: {shown} with BN; {others} without.", told=tr(told), shown=shown, others=others)
        return verdict(beats(METRICS[metric], normalized, plain), evidence)

    return judge


def _wider(results: Results) -> Verdict:
    """Whether there are learning rates at which every seed trains with batch normalization, and no seed without."""
    plain, normalized = (_trains_at(results, arm, seeds) for arm, seeds in (("plain", max), ("batch_norm", min)))
    shown, others = (
        tr("the learning rates {rates}", rates=", ".join(map("{:g}".format, rates))) if rates else tr("none")
        for rates in (normalized, plain)
    )
    evidence = tr(
        "Every seed ends at {target:.0%} or more for {shown} with BN; at least one seed for {others} without.",
        target=TARGET,
        shown=shown,
        others=others,
    )
    return verdict(bool(set(normalized) - set(plain)), evidence)


def _trains_at(results: Results, arm: str, seeds: Callable[[Iterable[float]], float]) -> list[float]:
    """The learning rates at which the target accuracy on validation is reached by every seed (`min`), or by one at least (`max`)."""
    ends = [dict(measured.curves["validation"]) for measured in results.by_arm[arm]]
    return [rate for rate in ends[0] if seeds(end[rate] for end in ends) >= TARGET]


EXPERIMENT = Experiment(
    name="demo",
    question="Does batch normalization let the same network train faster, and over a wider range of learning rates?",
    claims={
        f"It reaches {TARGET:.0%} validation accuracy in fewer steps at learning rate {COMMON:g}.": _for_every_seed(
            "steps", marked("Steps per seed")
        ),
        "It trains at learning rates at which the plain network does not.": _wider,
        "It is more accurate on the test images, each network at its own best learning rate.": _for_every_seed(
            "accuracy", marked("Test accuracy per seed")
        ),
        "What a hidden unit receives moves less while the network learns.": _for_every_seed(
            "drift",
            marked(
                "Largest move of a typical unit's mean over the validation images, in standard deviations at the start"
            ),
        ),
    },
    source=(
        "Ioffe & Szegedy 2015, sections 3.3 and 4.1 (arXiv:1502.03167); Bjorck et al. 2018 (arXiv:1806.02375), who attribute "
        "the benefit to the larger learning rate"
    ),
    paper="",
    arms=ARMS,
    metrics=METRICS,
    measure=measure,
    curves={
        COURSE: Curve(
            "How fast it learns",
            "step",
            "validation accuracy",
            f"Compare the steps at which the lines reach {TARGET:.0%} (dotted). Lines are means of the seeds, bands reach from the least "
            f"to the greatest. The learning rate is {COMMON:g} for both arms.",
            log_x=True,
            level=TARGET,
            slider="learning rate",
        ),
        "sweep": Curve(
            "Which learning rates train",
            "learning rate",
            "test accuracy",
            "Compare how wide the plateau of each line is: at these learning rates the network trains. Accuracy after the last step.",
            log_x=True,
        ),
        "drift": Curve(
            "How far the mean of a hidden unit's input moves",
            "step",
            "standard deviations at the start",
            "Distance of the mean over the validation images, in inference, from its start, for the hidden unit that moves neither more "
            f"nor less than most, at learning rate {COMMON:g}. Less movement with BN is no discovery: in training, BN sets the mean of "
            "every mini-batch to the layer's bias by construction. Whether it makes training faster is another question "
            "(Santurkar et al. 2018, arXiv:1805.11604).",
        ),
    },
    protocol=(
        "784-512-256-10 with ReLU, with BN a BatchNorm1d before each ReLU, on scikit-learn's digits resized to 28x28 (1197 train, 240 "
        "validate, 360 test; or MNIST's files), standardized with the training images' mean and deviation. Plain SGD at a constant "
        f"learning rate, 240 steps (MNIST: 1000, quick: 120) of 64 images; learning rates {', '.join(map('{:g}'.format, RATES))} "
        f"(quick: 0.003, {COMMON:g}, 3). Both arms of a seed start from the same weights and see the same batches. A seed's best "
        f"learning rate is chosen on validation and reported on test; a learning rate trains if a training ends with {TARGET:.0%} on "
        "validation; validation accuracy is measured every 5 steps (MNIST: 10), at other learning rates than "
        f"{COMMON:g} every 20 (MNIST: 40). What a hidden unit receives is the input of the last ReLU for the "
        "validation images in inference. A comparison holds if every seed with BN is better than every seed without."
    ),
    seconds=18,
    revised=(
        "Seeds were compared one by one with the same seed of the other arm, which three seeds of equal arms pass in one of "
        "eight cases. Every seed is compared with every seed of the other arm now."
    ),
    timed_on=AVX2,
    data="MNIST's IDX files",
)
