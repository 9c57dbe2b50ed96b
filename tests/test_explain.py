"""`bn.explain` against torch's autograd, the tutorial's example, and bad input."""

import json
import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from batchnorm.errors import ArgumentError, InputError
from batchnorm.explain import explain

TUTORIAL = [0.8, 1.2, 0.9, 1.1]


def test_the_tutorials_example_with_the_right_numbers():
    it = explain(TUTORIAL, gamma=0.5, beta=2)
    assert it.sum == pytest.approx(4)
    assert it.mean == pytest.approx(1)
    assert it.deviations == pytest.approx([-0.2, 0.2, -0.1, 0.1])
    assert it.squared_deviations == pytest.approx([0.04, 0.04, 0.01, 0.01])
    assert it.variance == pytest.approx(0.025)
    assert it.std == pytest.approx(math.sqrt(0.02501))
    assert it.normalized == pytest.approx([-1.2647, 1.2647, -0.6323, 0.6323], abs=5e-5)
    assert it.output == pytest.approx([1.3677, 2.6323, 1.6838, 2.3162], abs=5e-5)
    assert it.running_mean == pytest.approx(0.1)
    assert it.running_variance == pytest.approx(0.9 + 0.1 * 0.1 / 3)


numbers = st.floats(-100, 100, width=32)


@settings(deadline=None, max_examples=50)
@given(
    pairs=st.lists(st.tuples(numbers, numbers), min_size=2, max_size=6),
    gamma=st.floats(-3, 3),
    beta=numbers,
    eps=st.sampled_from([1e-5, 1e-3, 1.0]),
    momentum=st.floats(0, 1),
)
def test_output_statistics_and_gradients_are_torchs(pairs, gamma, beta, eps, momentum):
    values, upstream = (torch.tensor(row, dtype=torch.float64) for row in zip(*pairs, strict=True))
    it = explain(values, gamma, beta, eps, momentum, grad_output=upstream)
    x = values[:, None].clone().requires_grad_()
    weight, bias = (torch.tensor([number], dtype=torch.float64, requires_grad=True) for number in (gamma, beta))
    mean, variance = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    y = F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=momentum, eps=eps)
    dx, dgamma, dbeta = torch.autograd.grad(y, (x, weight, bias), upstream[:, None])
    close = {"rel": 1e-7, "abs": 1e-9 * (1 + float(upstream.abs().max()) * (1 + abs(gamma)) / eps)}
    assert it.output == pytest.approx(y.flatten().tolist(), **close)
    assert it.running_mean == pytest.approx(mean.item(), rel=1e-9, abs=1e-9)
    assert it.running_variance == pytest.approx(variance.item(), rel=1e-9)
    assert it.grad_input == pytest.approx(dx.flatten().tolist(), **close)
    assert it.grad_gamma == pytest.approx(dgamma.item(), **close)
    assert it.grad_beta == pytest.approx(dbeta.item(), rel=1e-9, abs=1e-9)


def test_every_step_of_the_backward_is_autograds():
    gamma, eps, upstream = 0.7, 1e-3, torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    it = explain(TUTORIAL, gamma, 2.0, eps, grad_output=upstream)
    x = torch.tensor(TUTORIAL, dtype=torch.float64)
    mean = x.mean().requires_grad_()
    variance = ((x - mean.detach()) ** 2).mean().requires_grad_()
    direct = x.clone().requires_grad_()  # the path of x through x̂ alone: mean and variance are held
    normalized = (direct - mean) / (variance + eps).sqrt()
    normalized.retain_grad()
    (gamma * normalized + 2.0).backward(upstream)
    assert it.grad_normalized == pytest.approx(normalized.grad.tolist())
    assert it.grad_variance == pytest.approx(variance.grad.item())
    assert it.grad_mean == pytest.approx(mean.grad.item())  # the paper's second term is 0: deviations add up to nothing
    assert it.grad_through_normalized == pytest.approx(direct.grad.tolist())
    parts = zip(it.grad_through_normalized, it.grad_through_variance, strict=True)
    assert it.grad_input == pytest.approx([a + b + it.grad_through_mean for a, b in parts])


def test_the_default_gradient_is_that_of_the_first_output():
    it = explain([3.0, -1.0, 2.0])
    assert it.grad_output == (1.0, 0.0, 0.0)
    assert sum(it.grad_input) == pytest.approx(0, abs=1e-12)  # a common shift of the values changes nothing
    assert "how the first output depends on every xᵢ" in str(it)
    assert "for the given dL/dyᵢ" in str(explain([3.0, -1.0, 2.0], grad_output=[0, 1, 0]))


@pytest.mark.parametrize("values", [TUTORIAL, tuple(TUTORIAL), torch.tensor(TUTORIAL, dtype=torch.float64)])
def test_sequences_and_tensors_are_alike(values):
    assert explain(values) == explain(TUTORIAL)


def test_a_tensor_in_a_graph_is_only_read():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert explain(values * 2).values == (2.0, 4.0)


def test_integers_are_numbers():
    assert explain([1, 2, 3]).mean == 2.0
    assert explain(torch.tensor([1, 2, 3])).mean == 2.0


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64, torch.tensor])
def test_scalars_of_other_libraries_are_numbers(kind):
    it = explain([kind(1), kind(2)], gamma=kind(2), beta=kind(0), eps=kind(1), momentum=kind(1))
    assert it == explain([1, 2], gamma=2, beta=0, eps=1, momentum=1)
    assert {type(number) for number in (it.gamma, it.beta, it.eps, it.momentum)} == {float}


@pytest.mark.parametrize("name", ["gamma", "beta", "eps", "momentum"])
@pytest.mark.parametrize("value", ["a", "1", None, 1j, [1.0], torch.ones(2), np.ones(2)], ids=repr)
def test_what_is_no_number_is_named(name, value):
    with pytest.raises(ArgumentError, match=f"^{name} must be one real number, but got .*; give"):
        explain([1, 2], **{name: value})


@pytest.mark.parametrize("name", ["values", "grad_output"])
@pytest.mark.parametrize("value", ["a", 3.0, ["a", "b"], [None, 1], {1, 2}, {}, object(), [[1], [2, 3]], [10**400, 1]])
def test_what_is_no_row_is_named(name, value):
    with pytest.raises(InputError, match=f"^{name} must be .*; "):
        explain(**{"values": [1, 2], name: value})


def test_it_is_frozen_and_json():
    it = explain(TUTORIAL)
    with pytest.raises(FrozenInstanceError):
        it.mean = 0.0
    read = json.loads(json.dumps(it.to_dict(), allow_nan=False))
    assert read["values"] == TUTORIAL
    assert read["grad_input"] == list(it.grad_input)
    assert set(read) == set(type(it).__dataclass_fields__)


def test_the_table_is_aligned():
    lines = str(explain(TUTORIAL, gamma=0.5, beta=2)).splitlines()
    start = next(index for index, line in enumerate(lines) if line.split()[:2] == ["i", "xᵢ"])
    widths = {len(line.replace("\N{COMBINING CIRCUMFLEX ACCENT}", "")) for line in lines[start : start + 5]}
    assert len(widths) == 1
    assert lines[start + 1].split() == ["1", "0.8", "-0.2", "0.04", "-1.26466", "1.36767"]
    assert not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize("width", [40, 64, 80, 100, 160])
def test_the_table_fits_a_width_and_says_the_same(width):
    it = explain(TUTORIAL, gamma=0.5, beta=2)
    text = it.text(width)
    assert max(len(line.replace("\N{COMBINING CIRCUMFLEX ACCENT}", "")) for line in text.splitlines()) <= width
    assert set(str(it).split()) <= set(text.split())


def test_a_long_table_is_shortened():
    lines = explain(range(100)).text(rows=8).splitlines()
    start = next(index for index, line in enumerate(lines) if line.split()[:2] == ["i", "xᵢ"])
    assert [line.split()[0] for line in lines[start + 1 : start + 9]] == ["1", "2", "3", "4", "5", "…", "99", "100"]
    assert lines[start + 9] == ""
    assert explain(range(8)).text(rows=8) == str(explain(range(8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": [1.0]}, "at least 2.*got 1"),
        ({"values": []}, "at least 2.*got 0"),
        ({"values": [1.0, math.nan]}, "finite"),
        ({"values": [1.0, math.inf]}, "finite"),
        ({"values": [[1.0, 2.0]]}, r"one row.*\(1, 2\)"),
        ({"values": 3.0}, "one row"),
        ({"values": "1 2"}, "real numbers"),
        ({"values": ["a", "b"]}, "real numbers"),
        ({"values": [1j, 2]}, "real numbers"),
        ({"values": torch.tensor([1j, 2])}, "real numbers"),
        ({"values": [1e200, -1e200]}, "small enough"),
        ({"values": [1.0, 2.0], "eps": 0.0}, "eps must be above 0"),
        ({"values": [1.0, 2.0], "eps": math.nan}, "eps must be a finite"),
        ({"values": [1.0, 2.0], "momentum": 1.5}, "momentum weighs the new value and must be from 0 to 1"),
        ({"values": [1.0, 2.0], "gamma": math.inf}, "gamma must be a finite"),
        ({"values": [1.0, 2.0], "beta": 10**400}, "beta must be a finite"),
        ({"values": [1.0, 2.0], "grad_output": [1.0]}, "one number per value, but got 1 for 2"),
    ],
)
def test_bad_input_says_what_came(arguments, message):
    with pytest.raises(InputError, match=message):
        explain(**arguments)
