"""Padding changes nothing, bit for bit: neither what it holds, nor how much of it there is, nor where."""

import pytest
import torch
from torch import Tensor

from batchnorm import BatchNorm1d, kernels
from batchnorm.functional import batch_norm
from batchnorm.kernels import Epilogue
from batchnorm.statistics import MovingAverage
from tests.budget import assert_same_bits

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# C, and the tokens of each sample: 51 values; 4200 values, around the border of exact arithmetic; and above 65536 of a channel.
TOKENS = {
    "few": (3, [6, 2, 0, 9]),
    "some": (24, [90, 1, 77, 7]),
    "wide": (80, [300, 11, 0, 500]),
    "many": (2, [30000, 41000, 17]),
}
EXTRA = [(0, 0), (1, 0), (7, 1), (64, 5)]  # positions at the end of each sample, and samples of nothing but padding


def padded(tokens: list[Tensor], extra: tuple[int, int], layout: str, fill: float) -> Tensor:
    """Samples (C, length) as (N, C, L) with so much beside them."""
    positions, samples = extra
    C, L = tokens[0].shape[0], max(token.shape[1] for token in tokens) + positions
    x = tokens[0].new_full((len(tokens) + samples, C, L), fill)
    for i, token in enumerate(tokens):
        x[i, :, : token.shape[1]] = token
    return x if layout == "planar" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def valid(value: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([value[i, :, :length] for i, length in enumerate(lengths)], 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["planar", "channels_last"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_padding_changes_no_bit(one_kernel, tokens, layout, dtype, training):
    C, lengths = TOKENS[tokens]
    samples = [[torch.randn(C, length).mul(2).add(1).to(dtype) for length in lengths] for _ in range(3)]
    # Of torch's own exponentials vectors and what is left over round differently: where torch applies the activation it has none.
    activation = "silu" if one_kernel is kernels.cpu else "relu"
    affine = torch.float64 if dtype == torch.float64 else torch.float32
    found = []
    for i, extra in enumerate(EXTRA):
        fill = (torch.nan, 1e30)[i % 2]
        x, dy, residual = (padded(values, extra, layout, fill) for values in samples)
        mask = torch.arange(x.shape[2]) < torch.tensor(lengths + [0] * extra[1]).unsqueeze(1)
        weight, bias = torch.linspace(0.5, 2, C, dtype=affine), torch.linspace(-1, 1, C, dtype=affine)
        inputs = [value.requires_grad_() for value in (x, residual, weight, bias)]
        running = torch.zeros(C), torch.ones(C)
        y = batch_norm(
            x, *running, weight, bias, training, mask=mask, activation=activation, residual=residual, eps=1e-3
        )
        dx, dresidual, dweight, dbias = torch.autograd.grad(y, inputs, dy)
        values = (valid(value, lengths) for value in (y, dx, dresidual))
        found.append((*values, dweight, dbias, *running))
    assert all(value.isfinite().all() for value in found[0])
    for others in found[1:]:
        for name, value, expected in zip(
            ("y", "dx", "dresidual", "dweight", "dbias", "mean", "variance"), others, found[0], strict=True
        ):
            assert_same_bits(name, value, expected)


@pytest.mark.parametrize("layout", ["planar", "channels_last"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.usefixtures("one_kernel")
def test_sums_do_not_depend_on_where_runs_end(dtype, layout):
    C, lengths = 32, [13, 29, 1, 8, 29, 5]
    tokens, gradients = ([torch.randn(C, length).to(dtype) for length in lengths] for _ in range(2))
    found = []
    for extra in EXTRA:  # without any, samples of the greatest length are one run with the next
        x, dy = (padded(values, extra, layout, torch.nan) for values in (tokens, gradients))
        mask = torch.arange(x.shape[2]) < torch.tensor(lengths + [0] * extra[1]).unsqueeze(1)  # (N, L)
        kernel = kernels.select(x, Epilogue(mask=mask.unsqueeze(1)))
        _, mean, m2 = kernel.moments(x, mask.unsqueeze(1))
        sums = kernel.reduce_grad(dy, x, mean, m2.add(1).rsqrt(), Epilogue(mask=mask.unsqueeze(1)))
        found.append((mean, m2, *sums))
    for others in found[1:]:
        for name, value, expected in zip(("mean", "m2", "sum", "sum of products"), others, found[0], strict=True):
            assert_same_bits(name, value, expected)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_changes_no_bit_of_moving_averages(dtype, centered):
    lengths, part = [13, 29, 1, 5], MovingAverage(window=2, warmup=0, centered=centered)
    steps = [[[torch.randn(3, length).to(dtype) for length in lengths] for _ in range(2)] for _ in range(4)]
    found = []
    for extra in EXTRA:
        layer = BatchNorm1d(3, statistics=part, dtype=torch.promote_types(dtype, torch.float32))
        values = []
        for tokens, gradients in steps:
            x, dy = (padded(some, extra, "planar", torch.nan) for some in (tokens, gradients))
            y = layer(x.requires_grad_(), lengths=torch.tensor(lengths + [0] * extra[1]))
            y.backward(dy)
            values += [valid(y, lengths), valid(x.grad, lengths)]
        found.append((*values, *layer.buffers(), layer.weight.grad, layer.bias.grad))
    for others in found[1:]:
        for value, expected in zip(others, found[0], strict=True):
            assert_same_bits("value", value, expected)
