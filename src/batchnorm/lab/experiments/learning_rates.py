"""At which learning rates does the tutorial's network train, and how fast, with and without batch normalization?"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.lab.data import Dataset, load
from batchnorm.lab.fingerprint import code_version
from batchnorm.lab.networks import tutorial_network
from batchnorm.lab.result import Arm, Claim, Result, Training, environment
from batchnorm.lab.train import Schedule, accuracy, gradient_norms, look_inside, train

QUESTION = "Does batch normalization let the same network train faster, and over a wider range of learning rates?"
SOURCE = (
    "Ioffe & Szegedy 2015, sections 3.3 and 4.1 (arXiv:1502.03167); Bjorck et al. 2018 (arXiv:1806.02375): "
    "the benefit is the larger learning rate"
)
ARMS = {"plain": "without BN", "batch_norm": "with BN"}
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
COMMON = 0.1
TARGET = 0.95
QUANTILES = (0.15, 0.5, 0.85)
SELDOM = 10  # at other learning rates only the end matters, so they are measured less often by this factor


@dataclass(frozen=True)
class Job:
    """The arguments of a training: everything that its result depends on besides the code."""

    experiment: str
    arm: str
    learning_rate: float
    seed: int
    steps: int
    batch_size: int
    measure_every: int
    data: str | None
    fingerprint: str
    device: str = "cpu"

    @property
    def file_name(self) -> str:
        """A readable name that is unique for arguments and code; it depends on the fingerprint of the data, not on their path."""
        arguments = asdict(self) | {"data": None}
        key = hashlib.sha256(json.dumps([arguments, code_version(__name__)], sort_keys=True).encode()).hexdigest()
        return f"{self.arm}-lr{self.learning_rate:g}-seed{self.seed}-{key[:12]}.json"

    def pack(self, training: Training) -> dict[str, Any]:
        """The training as plain data for JSON."""
        return asdict(training)

    def unpack(self, data: Any) -> Training:
        """The inverse of `pack`; raises TypeError on other data."""
        return Training(**data)


@dataclass(frozen=True)
class Plan:
    """The grid of trainings."""

    seeds: int = 3
    learning_rates: tuple[float, ...] = LEARNING_RATES
    steps: int = 240
    batch_size: int = 64
    measure_every: int = 5
    data: str | None = None

    @classmethod
    def of(cls, data: str | None, quick: bool, seeds: int | None) -> Plan:
        """The plan of `batchnorm demo`; MNIST takes more steps than the smaller digits."""
        if quick:
            return cls(seeds or 1, learning_rates=(0.003, COMMON, 3.0), steps=120, data=data)
        if data is not None:
            return cls(seeds or 3, steps=1000, measure_every=10, data=data)
        return cls(seeds or 3)

    def jobs(self, dataset: Dataset) -> list[Job]:
        """All trainings: the common learning rate first, then the others by distance from it, with both arms next to each other.

        Raises:
            InputError: there are fewer training images than a batch needs.
        """
        if len(dataset.train) < self.batch_size:
            raise InputError(
                f"at least one batch of {self.batch_size} images must be left to learn from; of the {dataset.name} "
                f"{len(dataset.train)} are, beside {len(dataset.validation)} to validate: give more training images"
            )
        outward = sorted(self.learning_rates, key=lambda rate: abs(math.log(rate / COMMON)))
        return [
            Job(
                experiment="learning_rates",
                arm=arm,
                learning_rate=rate,
                seed=seed,
                steps=self.steps,
                batch_size=self.batch_size,
                measure_every=self.measure_every if rate == COMMON else SELDOM * self.measure_every,
                data=self.data,
                fingerprint=dataset.fingerprint,
            )
            for rate in outward
            for seed in range(self.seeds)
            for arm in ARMS
        ]


_load_once = lru_cache(maxsize=1)(load)


def measure(job: Job) -> Training:
    """Train one network, and measure it during training. Both arms of a seed start from the same weights and use the same batches."""
    start = time.perf_counter()
    data = _load_once(job.data).to(job.device)
    torch.manual_seed(job.seed)
    network = tutorial_network(batch_norm=job.arm == "batch_norm").to(job.device)
    watched = job.learning_rate == COMMON  # quantiles cost as much time as a training step
    steps, validation, losses, norms, received = list[int](), list[float](), [], [], []

    def look(step: int) -> None:
        steps.append(step)
        if watched:
            share, inputs = look_inside(network, data.validation)
            received.append(_quantiles(inputs))
        else:
            share = accuracy(network, data.validation)
        validation.append(share)

    look(0)
    for step, loss in train(network, data.train, Schedule(job.learning_rate, job.steps, job.batch_size, job.seed)):
        if step == 1:  # the gradient at initialization
            losses.append(loss)
            norms.append(gradient_norms(network))
        if step % job.measure_every == 0 or step == job.steps or not math.isfinite(loss):
            losses.append(loss)
            norms.append(gradient_norms(network))
            look(step)
    percentiles, drift = _typical(torch.stack(received)) if watched else ([], math.nan)
    return Training(
        arm=job.arm,
        seed=job.seed,
        learning_rate=job.learning_rate,
        steps=steps,
        validation_accuracy=validation,
        loss=[_finite(loss) for loss in losses],
        percentiles=[[_finite(value) for value in row] for row in percentiles],
        gradient_norms=[[_finite(norm) for norm in row] for row in norms],
        drift=_finite(drift),
        steps_to_target=next((step for step, share in zip(steps, validation, strict=True) if share >= TARGET), None),
        test_accuracy=accuracy(network, data.test),
        seconds=time.perf_counter() - start,
    )


def _quantiles(inputs: Tensor) -> Tensor:
    return torch.quantile(inputs.cpu(), torch.tensor(QUANTILES), dim=0)  # (N, units) -> (3, units)


def _typical(received: Tensor) -> tuple[list[list[float]], float]:
    """Select from quantiles over time (T, 3, units) those (T, 3) of the unit with the median drift; also returns this drift."""
    low, middle, high = received.unbind(1)  # (T, units) each
    drift = (middle - middle[0]).abs().amax(0) / (high[0] - low[0])  # (units,)
    unit = int(drift.argsort()[len(drift) // 2])
    return received[:, :, unit].tolist(), float(drift[unit])


def _finite(value: float) -> float | None:
    """A measurement rounded to six digits; None if not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def summarize(plan: Plan, dataset: Dataset, trainings: Sequence[Training], command: str) -> Result:
    """The result of the trainings so far. Claims are judged only if none is missing."""
    arms = [_arm(plan, name, [training for training in trainings if training.arm == name]) for name in ARMS]
    complete = len(trainings) == len(plan.jobs(dataset))
    return Result(
        experiment="learning_rates",
        question=QUESTION,
        source=SOURCE,
        protocol={
            "dataset": dataset.name,
            "sizes": dataset.sizes,
            "network": "784-512-256-10 with ReLU",
            "optimizer": "SGD, constant learning rate, no momentum, no weight decay",
            "target": TARGET,
            "common_learning_rate": COMMON,
            **asdict(plan),
        },
        arms=arms,
        claims=_claims(*arms) if complete else [],
        trainings=sorted(trainings, key=lambda training: (training.arm, training.learning_rate, training.seed)),
        environment=environment(),
        command=command,
        complete=complete,
    )


def _arm(plan: Plan, name: str, trainings: Sequence[Training]) -> Arm:
    """The summary of an arm. Choices use validation accuracy, among the learning rates that all seeds have finished."""
    by_rate: dict[float, list[Training]] = {}
    for training in sorted(trainings, key=lambda training: training.seed):
        by_rate.setdefault(training.learning_rate, []).append(training)
    finished = {rate: group for rate, group in sorted(by_rate.items()) if len(group) == plan.seeds}
    best = max(finished, key=lambda rate: fmean(_validation(finished[rate])), default=None)
    common = finished.get(COMMON, [])
    return Arm(
        name=name,
        label=ARMS[name],
        best_learning_rate=best,
        test_accuracy=[] if best is None else [training.test_accuracy for training in finished[best]],
        common_test_accuracy=[training.test_accuracy for training in common],
        steps_to_target=[training.steps_to_target for training in common],
        drift=[training.drift for training in common],
        trains_at=[rate for rate, group in finished.items() if min(_validation(group)) >= TARGET],
    )


def _validation(trainings: Sequence[Training]) -> list[float]:
    return [training.validation_accuracy[-1] for training in trainings]


def _claims(plain: Arm, normalized: Arm) -> list[Claim]:
    """The claims. A comparison holds only if it holds for every seed, against the same seed of the other arm."""
    steps = _paired(plain.steps_to_target, normalized.steps_to_target)
    drifts = _paired(plain.drift, normalized.drift)
    accuracies = list(zip(plain.test_accuracy, normalized.test_accuracy, strict=True))
    return [
        Claim(
            f"It reaches {TARGET:.0%} validation accuracy in fewer steps at learning rate {COMMON:g}.",
            all(with_it < without for without, with_it in steps),
            _evidence("Steps per seed", steps, "g"),
        ),
        Claim(
            "It trains at learning rates at which the plain network does not.",
            not set(normalized.trains_at) <= set(plain.trains_at),
            f"Every seed ends at {TARGET:.0%} or more for {_rates(normalized)} with BN, for {_rates(plain)} without.",
        ),
        Claim(
            "It is more accurate on the test images, each network at its own best learning rate.",
            all(with_it > without for without, with_it in accuracies),
            _evidence("Test accuracy per seed", accuracies, ".1%"),
        ),
        Claim(
            "What a hidden unit receives moves less while the network learns.",
            all(with_it < without for without, with_it in drifts),
            _evidence(
                "Largest move of a typical unit's median over the validation images, in widths of its first distribution",
                drifts,
                ".2f",
            ),
        ),
    ]


def _paired(plain: Sequence[float | None], normalized: Sequence[float | None]) -> list[tuple[float, float]]:
    """Pair the values of both arms by seed; None, for never or diverged, becomes infinity."""
    pairs = zip(plain, normalized, strict=True)
    return [(math.inf if a is None else a, math.inf if b is None else b) for a, b in pairs]


def _evidence(what: str, pairs: Sequence[tuple[float, float]], form: str) -> str:
    def listed(values: Iterable[float]) -> str:
        return ", ".join("never" if math.isinf(value) else format(value, form) for value in values)

    return f"{what}: {listed(b for _, b in pairs)} with BN; {listed(a for a, _ in pairs)} without."


def _rates(arm: Arm) -> str:
    return "the learning rates " + ", ".join(f"{rate:g}" for rate in arm.trains_at) if arm.trains_at else "none"
