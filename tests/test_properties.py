"""Random shapes, dtypes, strides and options against the same formula composed in float64, and what must not change the result.

The composed reference shares nothing with the kernels: it picks the counted values of each channel, normalizes them by the
textbook, and leaves differentiation to autograd.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm import reference
from tests import layer_table
from tests.budget import assert_same_bits, assert_ulps, largest


def examples(number):
    """So many in `make test-all`, an eighth in `make test`; the same ones each time."""
    fewer = 1 if os.environ.get("BATCHNORM_ALL_EXAMPLES") else 8
    return settings(deadline=None, derandomize=True, database=None, max_examples=number // fewer)


# Results are computed wide and rounded once: half an ulp, and for float32 a little more from what is not wider than need be. In
# float64, which has nothing wider, a few operations of half an ulp each add up. Ulps are those of the largest term where terms
# may cancel.
ULPS = {torch.float64: 8, torch.float32: 2, torch.bfloat16: 1, torch.float16: 1}

DTYPES = tuple(ULPS)
GELU_TANH = nn.GELU("tanh")
ACTIVATIONS = {
    None: lambda z: z,
    **layer_table.ACTIVATIONS,
    nn.LeakyReLU(0.3): lambda z: F.leaky_relu(z, 0.3),
    GELU_TANH: lambda z: F.gelu(z, approximate="tanh"),
}
# Its derivative, torch's too, has a term (1 - tanh²) · z · slope / 2 in which 1 - tanh² cancels; the rest grows to this until
# tanh is 1, near z = 8.
GELU_TANH_TERM = 25.0
# Not dyadic, so that no pre-activation lands within rounding of a kink, where a derivative jumps.
EPS = (1e-5, 1e-3, 0.3)


@dataclass(frozen=True, repr=False)
class Call:
    """Arguments of `functional.batch_norm` and the gradient of its output."""

    x: Tensor
    dy: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    mask: Tensor | None = None
    activation: str | nn.Module | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5

    def __repr__(self) -> str:
        """Short enough to read in a failure; the values follow from the seed."""

        def told(value: object) -> str:
            return f"{value.dtype}{list(value.shape)}/{value.stride()}" if isinstance(value, Tensor) else repr(value)

        return f"Call({', '.join(f'{name}={told(value)}' for name, value in vars(self).items())})".replace("torch.", "")

    @property
    def count(self) -> int:
        return int(self.full_mask().sum())

    def full_mask(self) -> Tensor:
        """What counts, (N, *S)."""
        N, _, *S = self.x.shape
        return torch.ones(N, *S, dtype=torch.bool) if self.mask is None else self.mask.expand(N, *S)


@dataclass(frozen=True)
class Results:
    """Output, gradients by argument name, and running statistics afterwards."""

    y: Tensor
    gradients: dict[str, Tensor]
    running: tuple[Tensor, Tensor] | None
    scales: dict[str, float] = field(default_factory=dict)


def ours(call: Call) -> Results:
    leaves = leaves_of(call)
    running = None if call.running_mean is None else (call.running_mean.clone(), call.running_var.clone())
    y = bn.functional.batch_norm(
        leaves["x"],
        *(running or (None, None)),
        leaves.get("weight"),
        leaves.get("bias"),
        call.training,
        call.momentum,
        call.eps,
        activation=call.activation,
        residual=leaves.get("residual"),
        mask=call.mask,
    )
    return Results(y.detach(), gradients_of(y, leaves, call.dy), running)


def composed(call: Call) -> Results:
    """The textbook in float64, channel by channel, over the values that count; and the largest terms that are added up."""
    leaves = {name: value.double().detach().requires_grad_() for name, value in leaves_of(call).items()}
    x, residual, counts = leaves["x"], leaves.get("residual"), call.full_mask()
    channels, moments, normalized, rstds = [], [], [0.0], [0.0]
    for c in range(x.shape[1]):
        counted = x[:, c][counts]  # (count,)
        if call.training:
            mean = counted.mean()
            variance = (counted - mean).square().mean() if call.count else counted.sum()
        else:
            mean, variance = call.running_mean[c].double(), call.running_var[c].double()
        xhat = (counted - mean) / torch.sqrt(variance + call.eps)
        z = xhat * (leaves["weight"][c] if "weight" in leaves else 1.0)
        z = z + (leaves["bias"][c] if "bias" in leaves else 0.0)
        z = z if residual is None else z + residual[:, c][counts]
        y = x.new_zeros(counts.shape).index_put((counts,), ACTIVATIONS[call.activation](z))  # (N, *S), 0 where masked
        channels.append(y)
        moments.append((mean.detach(), variance.detach()))
        normalized.append(largest(xhat))
        rstds.append((variance.item() + call.eps) ** -0.5 if call.count else 0.0)
    y = torch.stack(channels, dim=1)
    gradients = gradients_of(y, leaves, call.dy.double())
    running = after_one_step(call, *map(torch.stack, zip(*moments, strict=True)))
    return Results(y.detach(), gradients, running, largest_terms(call, max(normalized), max(rstds)))


def after_one_step(call: Call, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor] | None:
    if call.running_mean is None:
        return None
    running = call.running_mean.double(), call.running_var.double()
    if not call.training or call.count < (1 if call.mask is None else 2):
        return running
    unbiased = variance * (call.count / (call.count - 1))
    return tuple(
        (1 - call.momentum) * old + call.momentum * new for old, new in zip(running, (mean, unbiased), strict=True)
    )


def largest_terms(call: Call, xhat: float, rstd: float) -> dict[str, float]:
    weight = 1.0 if call.weight is None else largest(call.weight)
    counted = call.full_mask().unsqueeze(1)
    steepest = 1.5  # the largest derivative of any activation: hardswish, at 3
    grad = largest(torch.where(counted, call.dy, 0)) * steepest
    residual = 0.0 if call.residual is None else largest(torch.where(counted, call.residual, 0))
    z = weight * xhat + (0.0 if call.bias is None else largest(call.bias)) + residual
    if (
        call.x.dtype is torch.float64 and call.activation is not None
    ):  # not wider than z: what rounds z bends a derivative
        grad *= max(1.0, z)
    running = [0.0 if value is None else largest(value) for value in (call.running_mean, call.running_var)]
    x = largest(torch.where(counted, call.x, 0))
    return {
        "y": z,
        "x": grad * weight * rstd * (1 + xhat**2),
        "weight": grad * xhat * call.count,
        "bias": grad * call.count,
        "residual": grad,
        "running": (1 + abs(call.momentum)) * max(*running, x, 2 * x**2),
    }


def leaves_of(call: Call) -> dict[str, Tensor]:
    values = {name: getattr(call, name) for name in ("x", "weight", "bias", "residual")}
    return {name: value.detach().requires_grad_() for name, value in values.items() if value is not None}


def gradients_of(y: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


# Data: multiples of 1/4 between -4 and 4, which every dtype holds.


def quarters(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-16, 17, shape, generator=generator, dtype=torch.float64) / 4


def generators() -> st.SearchStrategy[torch.Generator]:
    return st.integers(0, 2**32).map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def shapes(draw) -> tuple[int, ...]:
    rank = draw(st.integers(2, 5))
    sizes = st.sampled_from([2, 3, 4, 5, 7, 1, 0]) if rank > 3 else st.sampled_from([2, 3, 4, 5, 6, 7, 11, 13, 1, 0])
    shape = [draw(sizes) for _ in range(rank)]
    shape[1] = max(shape[1], 1)  # no channels: `test_no_channels`
    return tuple(shape)


@st.composite
def arranged(draw, value: Tensor) -> Tensor:
    """The value in other strides; expanded, it is one slice repeated."""
    kind = draw(st.sampled_from(["contiguous", "permuted", "sliced", "expanded"]))
    if kind == "permuted":
        order = draw(st.permutations(range(value.dim())))
        return value.permute(order).contiguous().permute([order.index(axis) for axis in range(value.dim())])
    if kind == "sliced":
        between = torch.full_like(value, torch.nan)
        axis = draw(st.integers(0, value.dim() - 1))
        return torch.stack([between, value], dim=axis + 1).flatten(axis, axis + 1)[
            tuple(slice(1, None, 2) if other == axis else slice(None) for other in range(value.dim()))
        ]
    if kind == "expanded":
        axis = draw(st.sampled_from([axis for axis in range(value.dim()) if axis != 1]))
        return value.narrow(axis, 0, min(1, value.shape[axis])).expand(value.shape)
    return value


@st.composite
def masks(draw, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """bool, in any form that broadcasts to (N, *S): whole, with axes of size 1, without leading axes."""
    wanted = [shape[0], *shape[2:]]
    sizes = [draw(st.sampled_from([size, size, 1])) for size in wanted]
    share = draw(st.sampled_from([0.7, 0.3, 1.0, 0.0]))
    return torch.rand(sizes[draw(st.integers(0, len(sizes))) :], generator=generator) < share


@st.composite
def calls(draw) -> Call:
    generator, shape, dtype = draw(generators()), draw(shapes()), draw(st.sampled_from(DTYPES))

    def channel_values(dtypes: tuple[torch.dtype, ...]) -> Tensor:
        return quarters(generator, shape[1]).to(draw(st.sampled_from(dtypes)))

    def maybe(value: Tensor) -> Tensor | None:
        return draw(st.sampled_from([value, None]))

    training = draw(st.booleans())
    running = [channel_values((torch.float32, torch.float64, dtype)), channel_values((torch.float32, dtype)).abs()]
    if training and draw(st.booleans()):
        running = [None, None]
    return Call(
        x=draw(arranged(quarters(generator, *shape).to(dtype))),
        dy=draw(arranged(quarters(generator, *shape).to(dtype))),
        weight=maybe(channel_values(DTYPES)),
        bias=maybe(channel_values(DTYPES)),
        residual=maybe(draw(arranged(quarters(generator, *shape).to(draw(st.sampled_from(DTYPES)))))),
        mask=maybe(draw(masks(shape, generator))),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        running_mean=running[0],
        running_var=running[1],
        training=training,
        momentum=draw(st.sampled_from([0.1, 0.0, 1.0, -1.2, 0.75])),
        eps=draw(st.sampled_from(EPS)),
    )


def is_single(call: Call) -> bool:
    """One value per channel in training: refused, as torch does."""
    return call.training and call.x.numel() == call.x.shape[1]


# Against the composed reference.


@examples(4000)
@given(calls())
def test_results_are_those_of_the_formula(call):
    if is_single(call):
        with pytest.raises(bn.errors.InputError, match="more than 1 value"):
            ours(call)
        return
    assert_results_agree(ours(call), composed(call), call)


def assert_results_agree(found: Results, expected: Results, call: Call) -> None:
    assert found.y.dtype == call.x.dtype
    assert_ulps("y", found.y, expected.y, ULPS[found.y.dtype], expected.scales["y"])
    for name, gradient in found.gradients.items():
        assert gradient.dtype == getattr(call, name).dtype
        scale = expected.scales[name]
        if call.activation is GELU_TANH and gradient.dtype == torch.float64:
            scale *= GELU_TANH_TERM
        exact = expected.gradients[name]
        rounded = exact.to(gradient.dtype)
        beyond = rounded.isinf()  # float16 ends at 65504
        assert_same_bits(f"d{name}", gradient[beyond], rounded[beyond])
        gradient, exact = gradient.masked_fill(beyond, 0), exact.masked_fill(beyond, 0)
        assert_ulps(f"d{name}", gradient, exact, ULPS[gradient.dtype], scale)
    if found.running is not None:
        for name, value, exact in zip(("running_mean", "running_var"), found.running, expected.running, strict=True):
            assert_ulps(name, value, exact, ULPS[value.dtype], expected.scales["running"])


@pytest.mark.parametrize(("x_dtype", "residual_dtype"), [("float32", "float64"), ("bfloat16", "float32")])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("how", ["eager", "compiled", "differentiable"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
def test_the_gradient_of_a_wider_residual_is_not_rounded_to_the_dtype_of_x(
    x_dtype, residual_dtype, training, how, affine, masked
):
    generator = torch.Generator().manual_seed(0)
    x, dy = (quarters(generator, 4, 3, 5).to(getattr(torch, x_dtype)) for _ in range(2))
    wide = getattr(torch, residual_dtype)
    weight, bias = (quarters(generator, 3).to(wide) if affine else None for _ in range(2))
    mask = torch.rand(4, 5, generator=generator) < 0.7 if masked else None
    call = Call(x, dy, weight, bias, quarters(generator, 4, 3, 5).to(wide), mask, "leaky_relu", training=training)
    call = replace(call, running_mean=quarters(generator, 3), running_var=quarters(generator, 3).abs())
    leaves = leaves_of(call)

    def forward(leaves: dict[str, Tensor]) -> Tensor:
        running = call.running_mean.clone(), call.running_var.clone()
        affine = leaves.get("weight"), leaves.get("bias")
        beside = {"activation": call.activation, "residual": leaves["residual"], "mask": mask}
        return bn.functional.batch_norm(leaves["x"], *running, *affine, training, **beside)

    y = (torch.compile(forward, backend="aot_eager") if how == "compiled" else forward)(leaves)
    (found,) = torch.autograd.grad(y, leaves["residual"], dy, create_graph=how == "differentiable")
    expected = composed(call)
    assert found.dtype == wide
    assert_ulps("dresidual", found, expected.gradients["residual"], ULPS[wide], expected.scales["residual"])


@pytest.mark.parametrize("change", ["eps", "weight", "mask", "momentum", "activation", "dy"])
def test_the_comparison_sees_a_change(change):
    """Of one argument in the reference's call alone, by little."""
    generator = torch.Generator().manual_seed(0)
    x, dy = quarters(generator, 4, 2, 3).float(), quarters(generator, 4, 2, 3).float()
    call = Call(x, dy, weight=torch.ones(2), mask=torch.ones(4, 3) > 0, activation="gelu", eps=1e-3)
    call = replace(call, running_mean=torch.zeros(2), running_var=torch.ones(2))
    assert_results_agree(ours(call), composed(call), call)
    mask = call.mask.clone()
    mask[0, 0] = False
    others = {
        "eps": 1.1e-3,
        "weight": 1.00001 * call.weight,
        "mask": mask,
        "momentum": 0.10001,
        "activation": GELU_TANH,
        "dy": 1.00001 * dy,
    }
    changed = replace(call, **{change: others[change]})
    with pytest.raises(AssertionError, match="the budget"):
        assert_results_agree(ours(call), composed(changed), call)


@examples(400)
@given(calls())
def test_what_is_masked_changes_no_bit(call):
    assume(call.mask is not None and not is_single(call))
    counted = call.full_mask().unsqueeze(1)

    def filled(value: float) -> Results:
        names = [name for name in ("x", "dy", "residual") if getattr(call, name) is not None]
        return ours(replace(call, **{name: torch.where(counted, getattr(call, name), value) for name in names}))

    clean, poisoned = filled(1.0), filled(float("nan"))
    assert_same_bits("y", poisoned.y, clean.y)
    assert_same_bits("y where masked", poisoned.y, torch.where(counted, clean.y, 0))
    for name, gradient in clean.gradients.items():
        assert_same_bits(f"d{name}", poisoned.gradients[name], gradient)
    if clean.running is not None:
        for name, value, expected in zip(("mean", "variance"), poisoned.running, clean.running, strict=True):
            assert_same_bits(f"running {name}", value, expected)


@pytest.mark.parametrize("shape", [(3, 0), (3, 0, 4), (0, 0, 2, 2)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_channels(shape, training):
    """Nothing to normalize: torch's operator returns the empty input, and so do we."""
    x = torch.zeros(shape, requires_grad=True)
    running = torch.zeros(0), torch.ones(0)
    y = bn.functional.batch_norm(x, *running, training=training)
    assert_same_bits("y", y.detach(), F.batch_norm(x, *running, training=training).detach())
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == shape


# Buffers after several steps.


@dataclass(frozen=True, repr=False)
class Step:
    """One batch of a layer, float32, channels on axis 1."""

    x: Tensor
    mask: Tensor | None


@st.composite
def steps(draw, channels: int, generator: torch.Generator) -> Step:
    shape = (draw(st.sampled_from([5, 2, 3, 7, 0])), channels, *draw(st.sampled_from([(3,), (), (2, 5), (1, 4)])))
    assume(shape[0] * torch.Size(shape[2:]).numel() != 1)
    x = draw(arranged(quarters(generator, *shape).float()))
    if x.numel() and draw(st.sampled_from([False, False, False, True])):
        x = x.clone()
        x[0, 0] = float("nan")
    mask = draw(st.sampled_from([None, draw(masks(shape, generator))]))
    return Step(x, mask)


@st.composite
def trainings(draw) -> tuple[bn.BatchNorm, list[Step]]:
    generator, channels = draw(generators()), draw(st.sampled_from([3, 1, 2, 7]))
    layer = bn.BatchNorm(
        channels,
        eps=draw(st.sampled_from(EPS)),
        momentum=draw(st.sampled_from([0.1, None, 0.0, 1.0, -1.2])),
        channel_axis=draw(st.sampled_from([1, -1])),
        running_variance=draw(st.sampled_from(["unbiased", "biased"])),
    )
    return layer, [draw(steps(channels, generator)) for _ in range(draw(st.integers(1, 5)))]


@examples(400)
@given(trainings())
def test_buffers_after_several_steps(training):
    layer, batches = training
    mean, variance = torch.zeros(layer.num_features).double(), torch.ones(layer.num_features).double()
    moved = skipped = 0
    largest_seen = 1.0
    for step in batches:
        layer(step.x.movedim(1, layer.channel_axis), mask=step.mask)
        counts = Call(step.x, step.x, mask=step.mask).full_mask()
        counted = step.x.double().movedim(1, -1)[counts]  # (count, C)
        if not counted.isfinite().all():
            skipped += 1
            continue
        if len(counted) < 2:  # no variance to learn from
            continue
        moved += 1
        momentum = 1 / moved if layer.momentum is None else layer.momentum
        batch = counted.mean(0), counted.var(0, correction=int(layer.running_variance == "unbiased"))
        mean, variance = (
            (1 - momentum) * old + momentum * new for old, new in zip((mean, variance), batch, strict=True)
        )
        largest_seen = max(
            largest_seen * (1 + 2 * abs(momentum)), largest(mean), largest(variance), *map(largest, batch)
        )
    assert layer.num_batches_tracked == moved
    assert layer.num_nonfinite_batches == skipped
    assert_ulps("running_mean", layer.running_mean, mean, ULPS[torch.float32], largest_seen)
    assert_ulps("running_var", layer.running_var, variance, ULPS[torch.float32], largest_seen)
    if (layer.running_var + layer.eps > 0).all():  # a negative momentum may lead below 0
        x = batches[0].x.nan_to_num()
        y = layer.eval()(x.movedim(1, layer.channel_axis)).movedim(layer.channel_axis, 1)
        expected = reference.inference(x, layer.running_mean, layer.running_var, eps=layer.eps)
        assert_ulps("y in evaluation", y.detach(), expected, ULPS[torch.float32])


# What must not matter.


@st.composite
def batches(draw, dtype: torch.dtype = torch.float32) -> tuple[Tensor, torch.Generator]:
    """Values that count, (N, C, *S), at least two of each channel."""
    generator, shape = draw(generators()), draw(shapes())
    assume(torch.Size(shape).numel() > shape[1])
    return quarters(generator, *shape).to(dtype), generator


@examples(200)
@given(batches())
def test_the_order_of_the_batch_does_not_matter(batch):
    x, generator = batch
    order = torch.randperm(len(x), generator=generator)
    (y, moments), (y_shuffled, shuffled) = bn.functional.normalize(x), bn.functional.normalize(x[order])
    assert_ulps("y", y_shuffled, y[order].double(), 1)  # sums in another order may round to the other neighbor
    assert_moments_agree(shuffled, moments, x)


def assert_moments_agree(found: bn.Moments, expected: bn.Moments, x: Tensor) -> None:
    assert found.count == expected.count
    assert_ulps("mean", found.mean, expected.mean, ULPS[torch.float64], largest(x))
    assert_ulps("M2", found.m2, expected.m2, ULPS[torch.float64], largest(x) ** 2 * expected.count)


@examples(200)
@given(batches(), st.lists(st.integers(-3, 12), min_size=13, max_size=13), st.booleans())
def test_adding_a_constant_to_a_channel_does_not_matter(batch, exponents, negative):
    x, _ = batch
    shift = torch.tensor([2.0**exponent for exponent in exponents])[: x.shape[1]]
    shift = (-shift if negative else shift).view(-1, *[1] * (x.dim() - 2))
    shifted = x + shift
    assert torch.equal(shifted - shift, x), "the shift must be exact"
    # The mean carries half a float64 ulp of 2^12, 5e-13, which rstd, at most 316, makes 1.5e-10: less than an ulp of float32.
    assert_ulps("y", bn.functional.normalize(shifted)[0], bn.functional.normalize(x)[0].double(), 1, scale=1.0)


@examples(300)
@given(batches(torch.float64), st.data())
def test_moments_of_any_split_merge_to_those_of_the_whole(batch, data):
    x, _ = batch
    axis = data.draw(st.sampled_from([axis for axis in range(x.dim()) if axis != 1]))
    cuts = sorted(data.draw(st.lists(st.integers(0, x.shape[axis]), max_size=4)))
    bounds = itertools.pairwise([0, *cuts, x.shape[axis]])  # some pieces may be empty
    pieces = [bn.functional.normalize(x.narrow(axis, start, end - start))[1] for start, end in bounds]
    merged = bn.Moments(0, torch.zeros(x.shape[1]).double(), torch.zeros(x.shape[1]).double())
    for piece in data.draw(st.permutations(pieces)):
        merged = merged.merge(piece)
    assert_moments_agree(merged, bn.functional.normalize(x)[1], x)


@examples(200)
@given(st.lists(batches(torch.float64).map(lambda batch: batch[0][:, :1]), min_size=3, max_size=3))
def test_merging_is_associative_and_commutative(sets):
    a, b, c = (bn.functional.normalize(x)[1] for x in sets)
    everything = torch.cat([x.flatten() for x in sets])
    assert_moments_agree(a.merge(b).merge(c), a.merge(b.merge(c)), everything)
    assert_moments_agree(a.merge(b), b.merge(a), everything)
