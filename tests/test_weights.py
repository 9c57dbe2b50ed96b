"""Sample weights: the weighted formula in float64, and integer weights as repeated samples, on every kernel and by every source."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import kernels
from batchnorm.errors import ArgumentError, DTypeError, InputError, ShapeError, StateError
from batchnorm.functional import batch_norm, moments, normalize
from batchnorm.functional.checks import epilogue_of
from batchnorm.kernels import cpu
from batchnorm.statistics import Batch, Domains, Ghost, Mixed, MovingAverage, Renorm, Running, TaskNorm
from tests.budget import assert_same_bits, assert_ulps

EPS = 1e-5
# N, C and *S; one value, odd planes, planes as vectors, several chunks of 64K positions.
SHAPES = [(5, 3), (9, 67), (6, 5, 7), (4, 3, 5, 9), (3, 20, 16, 19), (2, 2, 70_001)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def along(weights, x):
    """Weights (N,) or (N, *S) as (N, 1, *S)."""
    return weights.view(-1, *[1] * (x.dim() - 1)) if weights.dim() == 1 else weights.unsqueeze(1)


def rounding(dtype):
    """Of moments, which are float64: sums of float64 values are compensated, and those of others need not be."""
    return 1e-14 if dtype is torch.float64 else 2e-13


def by_formula(x, weights, gamma, beta):
    """The weighted formula in float64: y, the sum of the weights, mean and M2."""
    axes, weights = [0, *range(2, x.dim())], along(weights, x)
    channels = (-1, *[1] * (x.dim() - 2))
    count = weights.expand(x.shape[0], 1, *x.shape[2:]).sum()
    mean = (weights * x).sum(axes) / count
    m2 = (weights * (x - mean.view(channels)).square()).sum(axes)
    xhat = (x - mean.view(channels)) / ((m2 / count).view(channels) + EPS).sqrt()
    return gamma.view(channels) * xhat + beta.view(channels), count, mean, m2


def example(shape, dtype, positions):
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype)
    weights = torch.rand((shape[0], *shape[2:]) if positions else shape[:1], dtype=torch.float64) * 3
    weights.view(-1)[1] = 0
    return x, weights, torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weighted_formula(one_kernel, dtype):
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for shape, positions, last in itertools.product(SHAPES, (False, True), (False, True)):
        x, weights, dy = example(shape, dtype, positions)
        if last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        gamma, beta = (torch.linspace(*ends, shape[1], dtype=wide) for ends in ((0.5, 2), (-1, 1)))
        exact = [value.double().clone().requires_grad_() for value in (x, gamma, beta)]
        y, count, mean, m2 = by_formula(exact[0], weights, *exact[1:])
        y.backward(dy.double())
        given = [value.clone().requires_grad_() for value in (x, gamma, beta)]
        found, batch = normalize(*given, EPS, weights=weights)
        found.backward(dy)
        assert found.stride() == x.stride()
        assert given[0].grad.stride() == x.stride()
        for what, value, wanted in (("count", batch.count, count), ("mean", batch.mean, mean), ("M2", batch.m2, m2)):
            torch.testing.assert_close(value, wanted.detach(), rtol=rounding(dtype), atol=0, msg=what)
        assert_ulps("y", found, y, 4 if dtype is torch.float64 else 1.5)
        for what, value, wanted in zip(("dx", "dgamma", "dbeta"), given, exact, strict=True):
            assert_ulps(what, value.grad, wanted.grad, 16 if dtype is torch.float64 else 1.5)


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_the_kernels_for_cpus_compute_it():
    """Not the last kernel of the list in their place; and a mask, an activation and a residual beside weights."""
    for dtype, last, activation in itertools.product(DTYPES, (False, True), (None, "relu", "silu")):
        x, weights, dy = example((6, 18, 37), dtype, True)
        residual, mask = torch.randn(x.shape).to(dtype), torch.rand(6, 37) > 0.3
        if last:
            x, residual = (value.movedim(1, -1).contiguous().movedim(-1, 1) for value in (x, residual))
        results = []
        for accepting in (kernels.KERNELS, kernels.KERNELS[-1:]):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernels, "KERNELS", accepting)
                given = [value.clone().requires_grad_() for value in (x, residual)]
                options = {"activation": activation, "mask": mask, "weights": weights}
                assert kernels.select(x, epilogue_of(x, None, None, None, None, None, weights)) is accepting[0]
                y, batch = normalize(given[0], residual=given[1], **options)
                y.backward(dy)
                results.append((y, batch.mean, batch.m2, given[0].grad, given[1].grad))
        for what, found, wanted in zip(("y", "mean", "M2", "dx", "dresidual"), *results, strict=True):
            assert found.dim() == 1 or not found.movedim(1, -1)[~mask].any()
            if found.dim() == 1:
                torch.testing.assert_close(found, wanted, rtol=rounding(dtype), atol=0, msg=what)
            else:
                budget = 16 if dtype is torch.float64 else 3 if activation == "silu" else 1.5
                assert_ulps(f"{what}, {dtype}", found, wanted.double(), budget)


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("last", [False, True])
def test_no_bit_depends_on_the_number_of_threads(last):
    x, weights, dy = example((3, 40, 90, 90), torch.float32, True)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        y, batch = normalize(leaf, weights=weights)
        y.backward(dy)
        found.append((y, batch.mean, batch.m2, leaf.grad))
    for one, other in zip(*found, strict=True):
        assert_same_bits("threads", one, other)


def copies(x, weights):
    """x (N, C, *S) as its positions, (M, C), each as often as its weight says."""
    counts = along(weights, x).expand(x.shape[0], 1, *x.shape[2:]).flatten()
    return x.movedim(1, -1).flatten(0, -2).repeat_interleave(counts.long(), 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "source",
    [Batch(), Renorm(warmup=0), MovingAverage(window=2, warmup=0), Domains(("a", "b")), Running(), Mixed()],
    ids=lambda source: type(source).__name__,
)
def test_integer_weights_are_repeated_samples(source, dtype):
    """Outputs, gradients and buffers. A loss multiplied by the weights is that of the copies, and so are its gradients."""
    shapes = [((7, 4), False), ((5, 4, 6), False), ((5, 4, 3, 2), True)]
    for shape, positions in shapes[:1] if isinstance(source, Mixed) else shapes:  # which counts samples, not positions
        weighted, repeated = (
            bn.BatchNorm(4, statistics=source, activation="relu", dtype=dtype if dtype is torch.float64 else None)
            for _ in "12"
        )
        for layer in (weighted, repeated):
            nn.init.uniform_(layer.weight, 0.5, 2, generator=torch.Generator().manual_seed(1))
            layer.running_mean.fill_(2.5)
        for step in range(3):  # windows fill, and running statistics are read back
            weights = torch.randint(0, 4, (shape[0], *shape[2:]) if positions else shape[:1])
            weights.view(-1)[:2] = torch.tensor([0, 3])
            x, mix = (torch.randn(shape) * 2 + 3).to(dtype), torch.randint(-5, 5, shape).to(dtype)
            x, same = (x.clone().requires_grad_() for _ in "12")
            y, z = weighted(x, weights=weights), repeated(copies(same, weights))
            assert_close(copies(y, weights), z, 1e-12, 1.01)
            (y.double() * mix.double() * along(weights, x)).sum().backward()
            (z.double() * copies(mix, weights).double()).sum().backward()
            assert_close(x.grad, same.grad, 1e-11, 4)  # sums of up to three rounded gradients
            assert weighted.num_batches_tracked == (0 if isinstance(source, Running) else step + 1)
            assert_equal_layers(weighted, repeated, 2e-2 if dtype.itemsize == 2 else 1e-6)
        y, z = weighted.eval()(x, weights=weights), repeated.eval()(copies(x, weights))
        assert_close(copies(y, weights), z, 1e-12, 1.01)


def assert_close(value, expected, wide, ulps):
    exact = expected.detach().double()
    if value.dtype is torch.float64:
        torch.testing.assert_close(value, expected, rtol=wide, atol=wide * exact.abs().max().item())
    else:
        assert_ulps(str(value.dtype), value, exact, ulps)


def assert_equal_layers(one, other, of_gradients=1e-6):
    for name, value in one.state_dict().items():
        tolerance = of_gradients if "gradient" in name else 1e-6  # windows of gradients that were rounded
        torch.testing.assert_close(value, other.state_dict()[name], rtol=tolerance, atol=tolerance)
    for name, parameter in one.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(parameter.grad, other.get_parameter(name).grad, rtol=1e-5, atol=1e-5 * scale)


def test_running_statistics_of_weights_that_are_no_integers():
    """The variance has Bessel's correction for frequencies, W / (W - 1), also where W is less than 2."""
    for total in (40.0, 1.6):
        x, weights = torch.randn(6, 3, 4), torch.rand(6) + 0.2
        weights = weights * total / (4 * weights.sum())
        layer = bn.BatchNorm1d(3, momentum=1.0)
        layer(x, weights=weights)
        _, count, mean, m2 = by_formula(x.double(), weights.double(), torch.ones(3), torch.zeros(3))
        torch.testing.assert_close(layer.running_mean, mean.float())
        torch.testing.assert_close(layer.running_var, (m2 / (count - 1)).float())
        biased = bn.BatchNorm1d(3, momentum=1.0, running_variance="biased")
        biased(x, weights=weights)
        torch.testing.assert_close(biased.running_var, (m2 / count).float())
        scaled = bn.BatchNorm1d(3)
        assert_close(scaled(x, weights=weights * 1e3), layer(x, weights=weights), 0, 1)


def test_weights_of_any_scale():
    x, dy = torch.randn(2, 6, 3, 5)
    weights = torch.rand(6, dtype=torch.float64) + 0.1
    results = []
    for scale in (1.0, 1e-60, 1e60):
        leaf = x.clone().requires_grad_()
        y = bn.BatchNorm1d(3, track_running_stats=False)(leaf, weights=weights * scale)
        y.backward(dy)
        results.append((y, leaf.grad))
    for y, dx in results[1:]:
        torch.testing.assert_close((y, dx), results[0])


def test_a_weight_of_zero_leaves_a_sample_out_of_the_statistics_and_not_out_of_the_batch():
    x, weights = torch.randn(5, 3, 4), torch.tensor([1, 1, 0, 1, 1])
    x[2] += 100
    layer, alone = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    leaf = x.clone().requires_grad_()
    y = layer(leaf, weights=weights)
    others = alone(x[weights > 0])
    torch.testing.assert_close(y[weights > 0], others)
    torch.testing.assert_close(layer.state_dict(), alone.state_dict())
    assert (y[2] > 10).all()  # normalized by the statistics of the others
    (own,) = torch.autograd.grad(y[2].sum(), leaf, retain_graph=True)
    variance = moments(x, weights=weights).variance()
    torch.testing.assert_close(own[2], (variance + EPS).rsqrt().float().view(3, 1).expand(3, 4))
    assert own[0].any()  # through the statistics
    through = torch.autograd.grad(y[:2].square().sum(), leaf)[0]
    assert not through[2].any()
    spoiled = x.clone()
    spoiled[2] = torch.nan
    found = bn.BatchNorm1d(3)(spoiled, weights=weights)
    assert_same_bits("others", found[weights > 0], y[weights > 0])
    assert found[2].isnan().all()


def test_a_mask_and_lengths_beside_weights():
    x, weights, lengths = torch.randn(4, 3, 6), torch.rand(4) + 0.5, torch.tensor([6, 2, 0, 4])
    mask = torch.arange(6) < lengths.unsqueeze(1)
    results = []
    for options in (
        {"mask": mask, "weights": weights},
        {"lengths": lengths, "weights": weights},
        {"weights": weights.unsqueeze(1) * mask},
    ):
        layer, leaf = bn.BatchNorm1d(3), x.clone().requires_grad_()
        spoiled = leaf.masked_fill(~mask.unsqueeze(1), torch.nan) if next(iter(options)) != "weights" else leaf
        y = layer(spoiled, **options)
        y.movedim(1, -1)[mask].square().sum().backward()
        results.append((y.movedim(1, -1)[mask], leaf.grad.movedim(1, -1)[mask], layer.running_var))
        if len(options) == 2:
            assert not y.movedim(1, -1)[~mask].any()
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-5, atol=1e-6)
    kept = bn.BatchNorm1d(3, padded="input")(x, mask=mask, weights=weights)
    assert_same_bits("padded", kept.movedim(1, -1)[~mask], x.movedim(1, -1)[~mask])
    garbage = torch.where(mask, weights.unsqueeze(1), torch.nan)
    assert_same_bits("y", bn.BatchNorm1d(3)(x, mask=mask, weights=garbage).movedim(1, -1)[mask], results[0][0])


def test_ghost_groups_have_weights_of_their_own():
    x, weights = torch.randn(7, 3, 4), torch.rand(7) + 0.5
    for dtype in (torch.float32, torch.float64):
        layer, leaf = bn.BatchNorm1d(3, statistics=Ghost(3), dtype=dtype), x.to(dtype, copy=True).requires_grad_()
        mask = torch.rand(7, 4) > 0.2
        y = layer(leaf, weights=weights, mask=mask)
        y.square().sum().backward()
        other = x.to(dtype, copy=True).requires_grad_()
        each = [
            normalize(other[cut], weights=weights[cut], mask=mask[cut])
            for cut in (slice(0, 3), slice(3, 6), slice(6, 7))
        ]
        expected = torch.cat([part for part, _ in each])
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(leaf.grad, other.grad)
        pooled = each[0][1].merge(each[1][1]).merge(each[2][1])
        torch.testing.assert_close(layer.running_var, (0.9 + 0.1 * pooled.variance(unbiased=True)).to(dtype))


@pytest.mark.parametrize("positions", [False, True])
def test_derivatives_by_the_weights(positions):
    """Exact, to the second order, also of a weight of 0, beside an activation, a mask and groups."""
    x, weights, _ = example((3, 2, 2), torch.float64, positions)
    gamma, mask = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.rand(3, 2) > 0.2
    for options in ({}, {"activation": "silu", "mask": mask}, {"group_size": 2}):

        def function(x, weights, gamma, options=options):
            return normalize(x, gamma, weights=weights, **options)[0]

        given = [value.clone().requires_grad_() for value in (x, weights, gamma)]
        given[1].data.clamp_(min=1e-4)  # for finite differences; the derivative at 0 follows
        assert torch.autograd.gradcheck(function, given)
        assert options or torch.autograd.gradgradcheck(function, given)
    at_zero = weights.requires_grad_()
    (found,) = torch.autograd.grad(normalize(x, weights=at_zero)[0].square().sum(), at_zero)
    formula = by_formula(x, at_zero, torch.ones(2), torch.zeros(2))[0].square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(formula, at_zero)[0])
    layer = bn.BatchNorm1d(2, dtype=torch.float64)
    (again,) = torch.autograd.grad(layer(x, weights=at_zero).square().sum(), at_zero)
    torch.testing.assert_close(found, again)
    assert not layer.running_var.requires_grad


def test_derivatives_under_torch_func_and_twice():
    x, weights, _ = example((4, 2, 3), torch.float64, False)

    def function(x, weights):
        return batch_norm(x, None, None, training=True, weights=weights).sin().sum()

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf, weights), leaf, create_graph=True)
    torch.testing.assert_close(torch.func.grad(function)(x, weights), first.detach())
    assert torch.autograd.gradgradcheck(lambda x: normalize(x, weights=weights)[0], leaf)
    batches = torch.rand(3, 4, dtype=torch.float64) + 0.1
    each = torch.vmap(function, (None, 0))(x, batches)
    torch.testing.assert_close(each, torch.stack([function(x, one) for one in batches]))


def test_several_batches_as_one():
    x, weights = torch.randn(6, 3, 4, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.5
    one, parts = (bn.BatchNorm1d(3, dtype=torch.float64, activation="silu") for _ in "12")
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    one(leaf, weights=weights).sin().sum().backward()
    pieces = [(other[:2], weights[:2]), (other[2:], weights[2:])]
    torch.stack(bn.as_one_batch(lambda piece: parts(piece[0], weights=piece[1]).sin().sum(), pieces)).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    assert_equal_layers(one, parts)
    merged = bn.BatchNorm1d(3, dtype=torch.float64)
    with bn.accumulate(2):
        for piece in pieces:
            merged(piece[0].detach(), weights=piece[1])
    torch.testing.assert_close(merged.state_dict()["running_var"], one.running_var)
    assert merged.num_batches_tracked == 1
    with pytest.raises(StateError, match="require a gradient"):
        bn.as_one_batch(lambda piece: parts(piece[0], weights=piece[1].clone().requires_grad_()), pieces)


@pytest.mark.parametrize("source", [Batch(), Renorm(warmup=0), Ghost(4)], ids=repr)
def test_saved_memory_and_checkpoints_change_nothing(source):
    x, weights = torch.randn(8, 3, 6), torch.rand(8) + 0.1
    results = []
    for kind in ("plain", "save_memory", "checkpoint"):
        torch.manual_seed(1)
        layer = bn.BatchNorm1d(3, statistics=source)
        model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU(), nn.Conv1d(3, 2, 1))
        leaf = x.clone().requires_grad_()

        def call(x, layer=layer, model=model):
            return model(layer(x, weights=weights))

        if kind == "save_memory":
            with bn.save_memory():
                y = call(leaf)
        else:
            y = checkpoint(call, leaf, use_reentrant=False) if kind == "checkpoint" else call(leaf)
        y.sin().sum().backward()
        results.append((y, leaf.grad, layer.running_mean, layer.running_var, layer.num_batches_tracked))
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert_same_bits("recomputed", value, expected)


class Weighted(nn.Module):
    """A model that passes weights on."""

    def __init__(self):
        super().__init__()
        self.norm = bn.BatchNorm1d(3, activation="relu")

    def forward(self, x, weights):
        return self.norm(x, weights=weights)


def test_compiled_exported_traced_and_copied():
    x, weights = torch.randn(4, 3, 6), torch.rand(4) + 0.5
    model = Weighted()
    plain, compiled, exported = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = plain(leaf, weights)
    y.sin().sum().backward()
    program = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    z = program(other, weights)
    z.sin().sum().backward()
    torch.testing.assert_close((z, other.grad), (y, leaf.grad))
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())
    with pytest.warns(UserWarning, match="its call has sample weights"):
        graph = torch.export.export(exported, (x, weights)).module()
    torch.testing.assert_close(graph(x, weights), y)
    torch.testing.assert_close(dict(graph.named_buffers())["norm.running_var"], plain.norm.running_var)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    torch.testing.assert_close(traced(x, weights), y)
    inferring = torch.export.export(copy.deepcopy(model).eval(), (x, weights)).module()
    torch.testing.assert_close(inferring(x, weights), model.eval()(x, weights))
    assert program(x, -weights).isnan().all()  # compiled code cannot wait for the values
    assert compiled.norm.num_batches_tracked == compiled.norm.num_nonfinite_batches == 1


@pytest.mark.parametrize("gaps", [False, True])
def test_samples_of_nested_tensors_have_a_weight_each(gaps):
    x, weights, lengths = torch.randn(4, 6, 3), torch.rand(4) + 0.5, torch.tensor([5, 2, 0, 4])
    mask = torch.arange(6) < lengths.unsqueeze(1)
    plain, layer = bn.BatchNorm(3, channel_axis=-1), bn.BatchNorm(3, channel_axis=-1)
    expected = plain(x, mask=mask, weights=weights)[mask]
    if gaps:
        nested = torch.nested.narrow(x, 1, torch.zeros(4, dtype=torch.int64), lengths, layout=torch.jagged)
    else:
        pieces = [sample[:length] for sample, length in zip(x, lengths, strict=True)]
        nested = torch.nested.nested_tensor(pieces, layout=torch.jagged)
    y = layer(nested, weights=weights)
    torch.testing.assert_close(torch.cat(y.unbind()), expected)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    for wrong in (weights[:3], torch.rand(4, 6), [1.0] * 4):
        with pytest.raises(ShapeError, match="one for each sample"):
            layer(nested, weights=wrong)


def test_complex_components_share_the_weights():
    x, weights = torch.randn(5, 3, 4, dtype=torch.complex64), torch.tensor([2, 1, 0, 3, 1])
    weighted, repeated = (bn.BatchNorm1d(3, dtype=torch.complex64) for _ in "12")
    y, z = weighted(x, weights=weights), repeated(x.repeat_interleave(weights, 0))
    torch.testing.assert_close(y.repeat_interleave(weights, 0), z)
    torch.testing.assert_close(weighted.state_dict(), repeated.state_dict())


def test_recalibration_counts_as_training_does():
    items = [{"x": torch.randn(6, 3, 4), "weights": torch.randint(1, 4, (6,))} for _ in range(3)]
    model, repeated = Weighted(), bn.BatchNorm1d(3)
    bn.recalibrate(model, items)
    bn.recalibrate(repeated, [item["x"].repeat_interleave(item["weights"], 0) for item in items])
    torch.testing.assert_close(model.norm.running_var, repeated.running_var)
    lengths = torch.tensor([4, 1, 2, 4, 3, 4])
    padded = bn.BatchNorm1d(3)
    bn.recalibrate(padded, [items[0]["x"]], forward=lambda layer, x: layer(x, lengths=lengths))
    torch.testing.assert_close(padded.running_mean, moments(items[0]["x"], lengths=lengths).mean.float())


X = torch.randn(4, 3, 5)
REFUSED = {
    "negative": (torch.tensor([1.0, -0.5, 1, 1]), InputError, r"non-negative and finite, but one is -0\.5"),
    "nan": (torch.tensor([1.0, torch.nan, 1, 1]), InputError, "but one is nan"),
    "infinite": (torch.tensor([1.0, torch.inf, 1, 1]), InputError, "but one is inf"),
    "list": ([1.0] * 4, ArgumentError, "must be a tensor, but got list"),
    "bool": (torch.ones(4, dtype=torch.bool), DTypeError, "use mask="),
    "complex": (torch.ones(4, dtype=torch.complex64), DTypeError, "complex64"),
    "length": (torch.ones(5), ShapeError, r"\(N,\) or broadcast to \(N, \*S\).*\(4, 5\), but have shape \(5,\)"),
    "rank": (torch.ones(4, 3, 5), ShapeError, r"\(4, 3, 5\)"),
    "number": (torch.ones(()), ShapeError, r"shape \(\)"),
    "positions": (torch.ones(4, 3), ShapeError, r"shape \(4, 3\)"),
    "device": (torch.ones(4, device="meta"), ArgumentError, "on the input's device, cpu, but are on meta"),
    "one sample": (torch.full((4,), 0.05), InputError, r"must sum to more than 1\.5 .*they sum to 1: .*Scale"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("source", [Batch(), Renorm(warmup=0), MovingAverage(window=2), Ghost(2)], ids=repr)
def test_what_weights_are_refused(name, source):
    weights, error, message = REFUSED[name]
    layer = bn.BatchNorm1d(3, statistics=source)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=message):
        layer(X, weights=weights)
    for key, value in layer.state_dict().items():
        assert_same_bits(key, value, before[key])
    with pytest.raises(error, match=message):
        batch_norm(X, torch.zeros(3), torch.ones(3), training=True, weights=weights)
    if error is not InputError:
        with pytest.raises(error, match=message):
            layer.eval()(X, weights=weights)
        with pytest.raises(error, match=message):
            batch_norm(X, torch.zeros(3), torch.ones(3), weights=weights)


def test_at_most_one_sample_is_as_one_value_per_channel():
    weights = torch.full((4,), 0.05)  # of 20 positions
    skipping, running = (bn.BatchNorm1d(3, on_single=choice) for choice in ("skip", "running"))
    torch.testing.assert_close(skipping(X, weights=weights), bn.BatchNorm1d(3)(X))
    assert skipping.num_batches_tracked == running.num_batches_tracked == 0
    torch.testing.assert_close(running(X, weights=weights), copy.deepcopy(running).eval()(X))
    torch.testing.assert_close(bn.BatchNorm1d(3, track_running_stats=False)(X, weights=weights), skipping(X))
    empty = bn.BatchNorm1d(3)
    torch.testing.assert_close(empty(X, weights=torch.zeros(4)), X / EPS**0.5)
    assert empty.num_batches_tracked == 0
    assert bn.BatchNorm1d(3)(X[:0], weights=torch.ones(0)).shape == (0, 3, 5)
    with pytest.raises(InputError, match="more than 1 value per channel"):
        bn.BatchNorm1d(3)(torch.randn(1, 3), weights=torch.tensor([5.0]))


def test_sources_that_take_no_weights():
    def source(layer, x, residual, mask):
        return Batch()(layer, x, residual, mask)

    layer = bn.BatchNorm1d(3, statistics=source)
    layer(X)
    with pytest.raises(ArgumentError, match="a statistics source that takes them"):
        layer(X, weights=torch.ones(4))
    for other in (Domains(("a",), within=source), TaskNorm()):
        with pytest.raises(ArgumentError, match="does not"):
            bn.BatchNorm1d(3, statistics=other)(X, weights=torch.ones(4))
    average = bn.BatchNorm1d(3, statistics=MovingAverage())
    with pytest.raises(StateError, match="require a gradient"):
        average(X, weights=torch.ones(4, requires_grad=True))
    assert average.num_batches_tracked == 0
