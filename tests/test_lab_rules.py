"""The rules that judge claims, on made-up numbers: every claim can hold, and one seed against it is enough."""

import math

import pytest

from batchnorm.lab.experiment import Measured, Metric, Results, Verdict
from batchnorm.lab.experiments import NAMES, load
from batchnorm.lab.rules import Rules, beats

NEVER = math.inf
HIGH, LOW = Metric("share", ".2f"), Metric("error", ".1f", "lower")


@pytest.mark.parametrize(
    ("metric", "values", "others", "options", "better"),
    [
        (HIGH, [0.9, 0.8], [0.7, 0.6], {}, True),
        (HIGH, [0.9, 0.7], [0.7, 0.6], {}, False),  # equal is not better
        (HIGH, [0.9, 0.65], [0.7, 0.1], {}, False),  # the mean is, a seed is not
        (HIGH, [0.875], [0.75], {"by": 0.125}, True),
        (HIGH, [0.874], [0.75], {"by": 0.125}, False),
        (HIGH, [0.625], [0.75], {"by": -0.125}, True),
        (HIGH, [0.9, 0.624], [0.75], {"by": -0.125}, False),
        (HIGH, [6.0], [2.0], {"times": 3}, True),
        (HIGH, [5.9], [2.0], {"times": 3}, False),
        (LOW, [1.0, 2.0], [3.0, 6.0], {}, True),
        (LOW, [1.0, 3.0], [3.0, 6.0], {}, False),
        (LOW, [1.0, 2.0], [6.0], {"times": 3}, True),
        (LOW, [1.0, 2.1], [6.0], {"times": 3}, False),
        (LOW, [1.0], [2.0], {"by": 1.0}, True),
        (LOW, [1.1], [2.0], {"by": 1.0}, False),
        (LOW, [3.0], [2.0], {"by": -1.0}, True),
        (LOW, [3.1], [2.0], {"by": -1.0}, False),
        (LOW, [9.0], [NEVER], {}, True),
        (LOW, [NEVER], [9.0], {}, False),
        (LOW, [NEVER], [NEVER], {}, False),
        (LOW, [1.0, math.nan], [2.0], {}, False),
        (HIGH, [1.0], [0.0, math.nan], {}, False),
    ],
)
def test_every_seed_must_be_better(metric, values, others, options, better):
    assert beats(metric, values, others, **options) is better


def test_the_evidence_has_every_seed():
    results = Results({"a": [Measured({"error": 1.0}), Measured({"error": 2.5})], "b": [Measured({"error": NEVER})]})
    rules = Rules({"a": "with it", "b": "without"}, {"error": LOW})
    told = "For each seed, error: 1.0, 2.5 (with it); never (without)."
    assert rules.better("error", "a", "b")(results) == Verdict("holds", told)
    assert rules.as_good("error", "b", "a", within=0.5)(results) == Verdict(
        "does not hold",
        "For each seed, error: never (without); 1.0, 2.5 (with it). Up to 0.5 worse is as good.",
    )


ACCURACY, STEPS = (tuple(f"{what}_{name}" for name in ("alexnet", "vgg", "resnet")) for what in ("accuracy", "steps"))
MIXED = ("noise", "blur", "contrast")
# The metrics of a claim, numbers with which it holds, and the changes of arms with each of which it does not.
CLAIMS = {
    ("lr-range", 0): (("rates",), {"batch_norm": (7, 5), "plain": (3, 2)}, {"batch_norm": (7, 4)}, {"plain": (3, 4)}),
    ("lr-range", 1): (("deviations",), {"batch_norm": (5, 4), "plain": (3, 2)}, {"batch_norm": (5, 3)}),
    ("paper-4.1", 0): (("steps",), {"batch_norm": (80, 100), "plain": (1000, NEVER)}, {"batch_norm": (80, 101)}, {"plain": (1000, 990)}),
    ("paper-4.1", 1): (
        ("tuned_steps",), {"batch_norm": (80, 100), "plain": (300, NEVER)},
        {"batch_norm": (80, NEVER)}, {"plain": (900, 290)},
    ),
    ("paper-4.1", 2): (("shift",), {"batch_norm": (0.2, 0.3), "plain": (0.4, 0.5)}, {"batch_norm": (0.2, 0.4)}),
    ("depth", 0): (
        ("accuracy_30",), {"batch_norm": (0.9, 0.85), "plain": (0.1, 0.15)},
        {"batch_norm": (0.9, 0.84)}, {"plain": (0.1, 0.16)},
    ),
    ("depth", 1): (("gradient",), {"batch_norm": (1, 1e-3), "plain": (0, 4e-26)}, {"batch_norm": (1, 9e-4)}, {"plain": (0, 1e-19)}),
    ("depth", 2): (("gradient_relu",), {"batch_norm": (1, 12), "plain": (0.2, 12)}, {"batch_norm": (1, 13)}),
    ("image-classification", 0): (ACCURACY, {"batch_norm": (0.9, 0.8), "plain": (0.7, 0.1)}, {"plain": (0.7, 0.8)}),
    ("image-classification", 1): (ACCURACY, {"he": (0.9, 0.8), "plain": (0.7, 0.1)}, {"plain": (0.7, 0.8)}),
    ("image-classification", 2): (ACCURACY, {"batch_norm": (0.9, 0.8), "he": (0.7, 0.1)}, {"he": (0.7, 0.8)}),
    ("image-classification", 3): (STEPS, {"batch_norm": (30, 50), "he": (60, NEVER)}, {"he": (50, NEVER)}, {"batch_norm": (30, NEVER)}),
    ("smoothness", 0): (
        ("accuracy",),
        {"noisy": (0.9, 0.85), "batch_norm": (0.95, 0.9), "plain": (0.1, 0.2), "noisy/moved": (2, 3)},
        {"noisy": (0.9, 0.8)}, {"plain": (0.1, 0.4)}, {"noisy/moved": (2, 1)}, {"plain/moved": (1, 2)},
    ),
    ("smoothness", 1): (("turn",), {"batch_norm": (0.9, 1), "plain": (5, 2)}, {"plain": (5, 1)}),
    ("smoothness", 2): (("usual_turn",), {"batch_norm": (0.9, 1), "plain": (5, 2)}, {"plain": (5, 1)}),
    ("regularization", 0): (("accuracy",), {"batch_norm": (0.95, 0.94), "dropout": (0.93, 0.92)}, {"dropout": (0.93, 0.94)}),
    ("regularization", 1): (("accuracy",), {"batch_norm": (0.95, 0.94), "both": (0.944, 0.9)}, {"both": (0.946, 0.9)}),
    ("regularization", 2): (("accuracy",), {"groups_16": (0.96, 0.97), "batch_norm": (0.95, 0.94)}, {"groups_16": (0.954, 0.97)}),
    ("regularization", 3): (("accuracy",), {"groups_4": (0.96, 0.97), "batch_norm": (0.95, 0.94)}, {"groups_4": (0.954, 0.97)}),
    ("detection", 0): (("precision",), {"both": (0.9, 0.8), "none": (0.6, 0.3)}, {"none": (0.71, 0.3)}),
    ("detection", 1): (("recall",), {"both": (1, 0.99), "none": (0.98, 0.9)}, {"none": (1, 0.9)}),
    ("detection", 2): (("precision",), {"regions": (0.9, 0.8), "none": (0.6, 0.3)}, {"none": (0.8, 0.3)}),
    ("detection", 3): (("precision",), {"proposals": (0.9, 0.8), "none": (0.6, 0.3)}, {"none": (0.8, 0.3)}),
    ("speech", 0): (("letters",), {"both": (0.1, 0.05), "none": (0.4, 0.6)}, {"none": (0.2, 0.6)}),
    ("speech", 1): (("letters",), {"both": (0.1, 0.05), "convolutions": (0.2, 0.3), "recurrent": (0.2, 0.3)}, {"recurrent": (0.2, 0.1)}),
    ("speech", 2): (("letters",), {"both": (0.1, 0.05), "per_step": (0.2, 0.3)}, {"per_step": (0.2, 0.1)}),
    ("gan", 0): (("distance",), {"both": (8, 9), "none": (27, 90)}, {"none": (26, 90)}),
    ("gan", 1): (("distance",), {"both": (8, 9), "tuned": (27, 90)}, {"tuned": (26, 90)}),
    ("gan", 2): (("distance",), {"both": (8, 9), "generator": (10, 11), "discriminator": (10, 11)}, {"discriminator": (9, 11)}),
    ("gan", 3): (("distance",), {"both": (8, 9), "joint": (27, 90)}, {"joint": (26, 90)}),
    ("dqn", 0): (("mean_return",), {"joint": (100, 200), "none": (99, 9)}, {"joint": (24, 400)}, {"none": (100, 9)}),
    ("dqn", 1): (("mean_return",), {"joint": (160, 200), "separate": (150, 90)}, {"separate": (160, 90)}),
    ("dqn", 2): (("mean_return",), {"joint": (150, 200), "target": (200, 110)}, {"joint": (149, 500)}),
    ("dqn", 3): (("mean_return",), {"joint": (150, 200), "layer_norm": (200, 110)}, {"joint": (149, 500)}),
    ("policy-gradient", 0): (
        ("solved",), {"input": (4096, 8192), "none": (NEVER, NEVER)},
        {"input": (4096, NEVER)}, {"none": (NEVER, 9999)},
    ),
    ("policy-gradient", 1): (("solved",), {"hidden": (4096, 8192)}, {"hidden": (4096, NEVER)}),
    ("policy-gradient", 2): (("last_return",), {"input": (450, 500), "si": (500, 490)}, {"input": (449, 500)}),
    ("recommender", 0): (("area",), {"both": (0.75, 0.8), "none": (0.7, 0.6)}, {"none": (0.74, 0.6)}),
    ("recommender", 1): (("area",), {"both": (0.75, 0.8), "logarithm": (0.7, 0.6)}, {"logarithm": (0.74, 0.6)}),
    ("translation", 0): (("right",), {"batch_norm": (0.9, 0.95), "none": (0.8, 0.7)}, {"none": (0.9, 0.7)}),
    ("translation", 1): (("right",), {"batch_norm": (0.9, 0.95), "layer_norm": (0.91, 0.7)}, {"layer_norm": (0.93, 0.7)}),
    ("driving", 0): (("error",), {"both": (1, 0.5), "none": (1.2, 3)}, {"none": (1.1, 3)}),
    ("driving", 1): (("error",), {"both": (1, 0.5), "input": (1.2, 3)}, {"input": (1, 3)}),
    ("batch-size", 0): (("noise_2",), {"plain": (0.2, 0.3), "plain/noise_64": (0.1, 0.05)}, {"plain": (0.1, 0.3)}),
    ("batch-size", 1): (("sorted_4",), {"plain": (0.2, 0.3), "plain/sorted_64": (0.1, 0.05)}, {"plain": (0.1, 0.3)}),
    ("batch-size", 2): (
        ("noise_2",),
        {"plain": (0.2, 0.3), "plain/noise_64": (0.1, 0.1), "renorm": (0.14, 0.18), "renorm/noise_2_validation": (0, 0)},
        {"renorm": (0.15, 0.1)}, {"plain": (0.1, 0.3)},
    ),
    ("batch-size", 3): (
        ("sorted_4",),
        {"plain": (0.2, 0.3), "plain/sorted_64": (0.1, 0.1), "renorm": (0.11, 0.12), "renorm/sorted_4_validation": (0, 0)},
        {"renorm": (0.12, 0.1)}, {"plain": (0.1, 0.3)},
    ),
    ("batch-size", 4): (
        ("noise_2",), {"renorm": (0.1, 0.2), "renorm/noise_2_validation": (0, 0), "group_norm": (0.3, 0.4)},
        {"group_norm": (0.2, 0.4)},
    ),
    ("batch-size", 5): (
        ("sorted_4",), {"renorm": (0.1, 0.2), "renorm/sorted_4_validation": (0, 0), "group_norm": (0.3, 0.4)},
        {"group_norm": (0.2, 0.4)},
    ),
    ("alternatives", 0): (("accuracy_64",), {"group": (0.9, 0.895), "batch": (0.9, 0.9)}, {"group": (0.9, 0.88)}),
    ("alternatives", 1): (("accuracy_2",), {"group": (0.9, 0.8), "batch": (0.7, 0.7)}, {"group": (0.9, 0.7)}),
    ("alternatives", 2): (("accuracy_64",), {"group": (0.9, 0.8), "layer": (0.7, 0.7)}, {"layer": (0.8, 0.7)}),
    ("alternatives", 3): (("accuracy_64",), {"group": (0.9, 0.8), "instance": (0.7, 0.7)}, {"instance": (0.8, 0.7)}),
    ("alternatives", 4): (("accuracy_64",), {"standardized": (0.9, 0.92), "group": (0.8, 0.88)}, {"group": (0.8, 0.9)}),
    ("alternatives", 5): (("accuracy_64",), {"rms": (0.9, 0.895), "layer": (0.9, 0.9)}, {"rms": (0.9, 0.88)}),
    ("alternatives", 6): (("accuracy_64",), {"tanh": (0.9, 0.895), "layer": (0.9, 0.9)}, {"tanh": (0.9, 0.88)}),
    ("alternatives", 7): (("accuracy_64",), {"none": (0.9, 0.895), "batch": (0.9, 0.9)}, {"none": (0.9, 0.88)}),
    ("alternatives", 8): (("accuracy_2",), {"none": (0.9, 0.8), "batch": (0.7, 0.7)}, {"none": (0.9, 0.7)}),
    ("alternatives", 9): (("accuracy_64",), {"none": (0.9, 0.8), "plain": (0.7, 0.7)}, {"none": (0.9, 0.7)}),
    ("population", 0): (("early",), {"population": (0.9, 0.8), "running": (0.7, 0.2)}, {"running": (0.8, 0.2)}),
    ("population", 1): (("early",), {"population": (0.9, 0.8), "usual": (0.7, 0.2)}, {"usual": (0.8, 0.2)}),
    ("population", 2): (("end",), {"population": (0.9, 0.8), "usual": (0.7, 0.2)}, {"usual": (0.8, 0.2)}),
    ("corruption", 0): (MIXED, {"statistics": (0.9, 0.8), "trained": (0.7, 0.2)}, {"trained/blur": (0.7, 0.8)}),
    ("corruption", 1): (MIXED, {"tent": (0.9, 0.8), "trained": (0.7, 0.2)}, {"trained/noise": (0.7, 0.8)}),
    ("corruption", 2): (MIXED, {"tent": (0.9, 0.8), "statistics": (0.7, 0.2)}, {"statistics/contrast": (0.7, 0.8)}),
    ("corruption", 3): (("sorted",), {"trained": (0.9, 0.8), "statistics_unguarded": (0.7, 0.2)}, {"trained": (0.9, 0.7)}),
    ("corruption", 4): (("sorted",), {"trained": (0.9, 0.8), "statistics": (0.9, 0.9)}, {"mixed": (0.9, 0.88)}),
    ("corruption", 5): (("sorted_noise",), {"trained": (0.4, 0.3), "sar": (0.36, 0.5)}, {"trained": (0.42, 0.3)}),
    ("federated", 0): (("labels_server",), {"merged": (0.9, 0.8), "parameters": (0.7, 0.2)}, {"parameters": (0.8, 0.2)}),
    ("federated", 1): (("labels_server",), {"merged": (0.9, 0.8), "averaged": (0.7, 0.2)}, {"averaged": (0.8, 0.2)}),
    ("federated", 2): (("labels_server",), {"recalibrated": (0.9, 0.8), "merged": (0.7, 0.2)}, {"merged": (0.8, 0.2)}),
    ("federated", 3): (("features_clients",), {"fedbn": (0.9, 0.8), "merged": (0.7, 0.2)}, {"merged": (0.8, 0.2)}),
    ("federated", 4): (("features_clients",), {"fedbn": (0.9, 0.8), "parameters": (0.7, 0.2)}, {"parameters": (0.8, 0.2)}),
    ("cost", 0): (("memory_vgg", "memory_resnet"), {"save_memory": (1.4, 1.1), "torch": (2, 2)}, {"save_memory/memory_resnet": (1.6, 1.1)}),
    ("cost", 1): (("time_vgg", "time_resnet"), {"save_memory": (1.21, 1.1), "torch": (1.2, 1.3)}, {"save_memory/time_vgg": (1.23, 1.1)}),
}  # fmt: skip


def judged(name, index, metrics, numbers):
    """The verdict on numbers by arm, or by arm and metric; everything else is 1."""
    experiment = load(name)
    values = {arm: [dict.fromkeys(experiment.metrics, 1.0) for _ in range(2)] for arm in experiment.arms}
    if name == "batch-size":
        hidden = {f"{metric}_validation": 1.0 for metric in experiment.metrics}
        values = {arm: [each | hidden for each in seeds] for arm, seeds in values.items()}
    for key, seeds in numbers.items():
        arm, _, metric = key.partition("/")
        for each, value in zip(values[arm], seeds, strict=True):
            each.update(dict.fromkeys([metric] if metric else metrics, value))
    curves = {"course": [(4000.0, 1.0)]}
    by_arm = {arm: [Measured(each, curves) for each in seeds] for arm, seeds in values.items()}
    return list(experiment.claims.values())[index](Results(by_arm))


def test_every_claim_is_here():
    claims = [(name, index) for name in NAMES for index in range(len(load(name).claims))]
    assert [*CLAIMS] == [claim for claim in claims if claim[0] != "demo"]  # its claims are in test_lab.py


@pytest.mark.parametrize(("name", "index"), CLAIMS)
def test_a_claim_holds_and_one_seed_against_it_is_enough(name, index):
    metrics, numbers, *changes = CLAIMS[name, index]
    found = judged(name, index, metrics, numbers)
    assert found.answer == ("holds only when" if name == "translation" else "holds")
    for change in changes:
        found = judged(name, index, metrics, numbers | change)
        assert found.answer == "does not hold", change
        assert "inf" not in found.evidence


def test_a_claim_about_several_networks_names_those_for_which_it_holds():
    metrics, numbers, *_ = CLAIMS["image-classification", 2]
    found = judged("image-classification", 2, metrics, numbers | {"he/accuracy_alexnet": (0.7, 0.85)})
    assert found.answer == "holds only when"
    assert found.evidence.startswith("The network is VGG-like or ResNet-like. For each seed, test accuracy, AlexNet: ")
