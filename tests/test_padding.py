"""Lengths, padded outputs and nested tensors: padding is nowhere in the statistics."""

import warnings

import pytest
import torch

import batchnorm as bn
from batchnorm.errors import ArgumentError, DTypeError, InputError, ShapeError
from batchnorm.functional import batch_norm, moments, normalize, normalize_with
from batchnorm.statistics import Batch, Domains, Ghost, MovingAverage, Renorm, Running
from tests.budget import assert_same_bits

LENGTHS = torch.tensor([6, 2, 0, 4])
MASK = torch.arange(6) < LENGTHS.unsqueeze(1)


@pytest.mark.parametrize("shape", [(4, 3, 6), (4, 3, 2, 6)], ids=str)
def test_lengths_say_what_a_mask_says(shape):
    x, mean, variance = torch.randn(shape), torch.randn(3), torch.rand(3) + 0.5
    mask = MASK if len(shape) == 3 else MASK.unsqueeze(1)
    for function in (
        lambda **k: batch_norm(x, None, None, training=True, **k),
        lambda **k: batch_norm(x, mean, variance, **k),
        lambda **k: normalize(x, **k)[0],
        lambda **k: normalize_with(x, mean, variance, **k),
        lambda **k: moments(x, **k).mean,
        lambda **k: bn.BatchNorm(3)(x, **k),
    ):
        assert_same_bits("lengths", function(lengths=LENGTHS), function(mask=mask))


def test_beside_a_mask_both_have_to_hold():
    x, extra = torch.randn(4, 3, 6), torch.tensor([False, True, True, True, True, True])
    assert_same_bits("y", bn.BatchNorm1d(3)(x, lengths=LENGTHS, mask=extra), bn.BatchNorm1d(3)(x, mask=MASK & extra))


@pytest.mark.parametrize(
    "part", [Batch(), Running(), Renorm(warmup=0), Ghost(2), Domains(("a", "b")), MovingAverage(warmup=0)], ids=repr
)
def test_outputs_and_gradients_do_not_depend_on_padding(part):
    def run(filling: float, more: int):
        layer = bn.BatchNorm(3, channel_axis=-1, statistics=part)
        torch.manual_seed(0)
        x = torch.randn(4, 6, 3)
        x = torch.cat([x, torch.zeros(4, more, 3)], 1)
        counts = torch.arange(6 + more) < LENGTHS.unsqueeze(1)
        x = x.masked_fill(~counts.unsqueeze(-1), filling).requires_grad_()
        y = layer(x, lengths=LENGTHS)
        y.square().sum().backward()
        assert not y[~counts].any()
        assert not x.grad[~counts].any()
        return y[counts], x.grad[counts], layer.weight.grad, layer.running_mean, layer.running_var

    plain = run(0.0, 0)
    for filling in (1e30, torch.nan):
        for value, expected in zip(run(filling, 0), plain, strict=True):
            assert_same_bits(f"padding {filling}", value, expected)
    for value, expected in zip(run(torch.nan, 7), plain, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("axis", [1, -1])
def test_padded_outputs_stay_untouched_on_request(axis):
    x = torch.randn(4, 3, 6, requires_grad=True)
    layer = bn.BatchNorm(3, activation="relu", padded="input", channel_axis=axis)
    y = layer(x.movedim(1, axis), lengths=LENGTHS).movedim(axis, 1)
    assert_same_bits("padded", y.movedim(1, -1)[~MASK], x.movedim(1, -1)[~MASK])
    zeros = bn.BatchNorm1d(3, activation="relu")(x, lengths=LENGTHS)
    assert_same_bits("valid", y.movedim(1, -1)[MASK], zeros.movedim(1, -1)[MASK])
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (gradient.movedim(1, -1)[~MASK] == 1).all()


def test_lengths_and_padded_outputs_compile_to_one_graph():
    layer, eager = (bn.BatchNorm1d(3, padded="input") for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 6)
    torch.testing.assert_close(compiled(x, lengths=LENGTHS), eager(x, lengths=LENGTHS))
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())


def nested(x: torch.Tensor) -> torch.Tensor:
    pieces = [sample[:length] for sample, length in zip(x, LENGTHS, strict=True)]
    return torch.nested.nested_tensor(pieces, layout=torch.jagged)


def test_compiled_code_takes_a_mask_after_sizes_became_dynamic():
    layer = bn.BatchNorm1d(3)
    program = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (5, 7, 9):
        program(torch.randn(4, 3, length))
    x, mask = torch.randn(4, 3, 6), torch.arange(6) < 4
    torch.testing.assert_close(program(x, mask=mask), layer(x, mask=mask))
    torch.testing.assert_close(program(x, lengths=LENGTHS), layer(x, lengths=LENGTHS))


@pytest.mark.parametrize("transposed", [False, True])
def test_nested_tensors_are_their_valid_positions(transposed):
    x, residual = torch.randn(4, 6, 3), torch.randn(4, 6, 3)
    plain = bn.BatchNorm(3, channel_axis=-1, activation="relu")
    expected = plain(x, residual=residual, lengths=LENGTHS)
    jagged = nested(x).requires_grad_()
    beside = torch.nested.nested_tensor_from_jagged(nested(residual).values(), jagged.offsets())
    if transposed:
        layer = bn.BatchNorm1d(3, activation="relu")
        y = layer(jagged.transpose(1, 2), residual=beside.transpose(1, 2)).transpose(1, 2)
    else:
        layer = bn.BatchNorm(3, channel_axis=-1, activation="relu")
        y = layer(jagged, residual=beside)
    assert y.shape == jagged.shape
    torch.testing.assert_close(y.values(), expected[MASK])
    torch.testing.assert_close(layer.running_var, plain.running_var)
    y.values().square().sum().backward()
    assert jagged.grad.values().isfinite().all()


@pytest.mark.parametrize("padded", ["zero", "input"])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_lies_between_the_samples_of_a_nested_tensor_does_not_count(transposed, padded):
    starts, lengths = torch.tensor([1, 0, 0, 2]), torch.tensor([5, 2, 0, 4])
    counts = (torch.arange(6) >= starts.view(-1, 1)) & (torch.arange(6) < (starts + lengths).view(-1, 1))
    x, residual = torch.randn(4, 6, 3), torch.randn(4, 6, 3)
    plain = bn.BatchNorm(3, channel_axis=-1, activation="relu")
    clean = x.clone().requires_grad_()
    expected = plain(clean, residual=residual, mask=counts)
    expected.square().sum().backward()

    whole = x.masked_fill(~counts.unsqueeze(2), float("nan")).requires_grad_()
    gaps = torch.nested.narrow(whole, 1, starts, lengths, layout=torch.jagged)
    beside = torch.nested.nested_tensor_from_jagged(
        residual.flatten(0, 1), gaps.offsets(), gaps.lengths(), jagged_dim=1
    )
    layer = bn.BatchNorm(3, channel_axis=1 if transposed else -1, activation="relu", padded=padded)
    turned = (lambda nested: nested.transpose(1, 2)) if transposed else (lambda nested: nested)
    y = turned(layer(turned(gaps), residual=turned(beside)))
    assert y.shape == gaps.shape
    y = torch.cat(y.unbind())
    assert_same_bits("y", y, expected[counts])
    y.square().sum().backward()
    assert_same_bits("dx", whole.grad[counts], clean.grad[counts])
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_what_lengths_and_nesting_refuse():
    x, layer = torch.randn(4, 3, 6), bn.BatchNorm1d(3)
    with pytest.raises(ArgumentError, match="tensor of N integers"):
        layer(x, lengths=[6, 2, 0, 4])
    with pytest.raises(DTypeError, match="must be integers"):
        layer(x, lengths=torch.rand(4))
    for wrong in (LENGTHS[:3], LENGTHS.unsqueeze(1)):
        with pytest.raises(ShapeError, match="lengths must be"):
            layer(x, lengths=wrong)
    with pytest.raises(ShapeError, match="lengths must be"):
        layer(torch.randn(4, 3), lengths=LENGTHS)
    with pytest.raises(InputError, match="padded must be one of"):
        bn.BatchNorm1d(3, padded="same")
    last = bn.BatchNorm(3, channel_axis=-1)
    jagged = nested(torch.randn(4, 6, 3))
    with pytest.raises(ArgumentError, match="no padding"):
        last(jagged, lengths=LENGTHS)
    with pytest.raises(InputError, match="ragged"):
        layer(jagged)
    with pytest.raises(ShapeError, match="same offsets"):
        last(jagged, residual=torch.randn(4, 6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its older layout
        strided = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])
    with pytest.raises(ArgumentError, match="layout"):
        last(strided)
    assert layer.num_batches_tracked == last.num_batches_tracked == 0
