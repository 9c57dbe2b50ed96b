"""Batch renormalization on its ways: one read of x, the same numbers on all of them, and in a recomputation too."""

import copy
import threading
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import functional
from batchnorm.errors import DTypeError, InputError, ShapeError
from batchnorm.functional import fast_path
from batchnorm.functional.autograd import Call, StepCall
from batchnorm.kernels import Epilogue, Renormalization, cpu, eager
from batchnorm.statistics import Renorm, recomputed
from tests.budget import assert_same_bits
from tests.test_kernels_cpu import ACTIVATIONS, DTYPES, LAYOUTS, SHAPES, close, epilogue, tensors

needs_cpu = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
FAST, GENERAL = StepCall, Call


def renormalization_of(C, r_max=1.5, d_max=0.4, dtype=torch.float32) -> Renormalization:
    """Some channels are clipped, some not, where x has mean 3 and deviation 2."""
    numbers = torch.Generator().manual_seed(2)
    mean, variance = torch.randn(C, generator=numbers) + 3, torch.rand(C, generator=numbers) * 6 + 1
    return Renormalization(mean.to(dtype), variance.to(dtype), *torch.tensor([r_max, d_max], dtype=torch.float64))


def by_formula(x, weight, bias, eps, renormalization, activation=None, residual=None):
    """Algorithm 1 of Ioffe 2017 in plain torch, to be differentiated by it; r and d as constants."""
    axes, along = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    running_mean, running_var, r_max, d_max = (value.to(x.dtype) for value in renormalization)
    mean, variance = x.mean(axes), x.var(axes, correction=0)
    sigma, running_sigma = (variance + eps).sqrt(), (running_var + eps).sqrt()
    r = (sigma / running_sigma).clamp(1 / r_max, r_max).detach()
    d = ((mean - running_mean) / running_sigma).clamp(-d_max, d_max).detach()
    xhat = (x - mean.view(along)) / sigma.view(along) * r.view(along) + d.view(along)
    z = weight.view(along) * xhat + bias.view(along)
    z = z if residual is None else z + residual
    return z if activation is None else activation(z)


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_agree(dtype, shape, layout):
    x, _, residual = tensors(shape, dtype, layout)
    half = dtype in (torch.float16, torch.bfloat16)
    slack, wide = (2.0, 1e-6) if half else (8.0, 1e-11)  # sums of half precision are float32 over eight values
    renormalization = renormalization_of(shape[1])
    for activation, with_residual, masked in product(ACTIVATIONS, (False, True), (False, True)):
        e = epilogue(shape, residual if with_residual else None, masked, activation)
        y, batch, rstd, correction, _ = cpu.forward_renormalized(x, 1e-5, e, renormalization)
        exact_y, exact_batch, exact_rstd, exact, _ = eager.forward_renormalized(x, 1e-5, e, renormalization)
        terms = (x.abs().max() * exact_rstd.max()).item() if dtype == torch.float64 else 0.0
        close("y", y, exact_y, slack, terms)
        assert y.stride() == x.stride()
        torch.testing.assert_close(
            (batch.mean, batch.m2, rstd), (exact_batch.mean, exact_batch.m2, exact_rstd), rtol=wide, atol=wide
        )
        torch.testing.assert_close(tuple(correction), tuple(exact), rtol=wide, atol=wide)
        assert torch.as_tensor(batch.count).equal(torch.as_tensor(exact_batch.count))


@needs_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype, layout):
    shape = (16, 24, 30, 31)
    x, _, residual = tensors(shape, dtype, layout)
    e, renormalization = epilogue(shape, residual, True, ACTIVATIONS[1]), renormalization_of(24)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, batch, rstd, correction, _ = cpu.forward_renormalized(x, 1e-5, e, renormalization)
            found.append((y, batch.mean, batch.m2, rstd, *correction))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            assert_same_bits("threads", value, expected)


@needs_cpu
def test_within_wide_bounds_a_batch_is_normalized_as_in_inference():
    x, _, _ = tensors((8, 6, 5), torch.float32)
    renormalization = renormalization_of(6, 1e6, 1e6)
    y, *_ = cpu.forward_renormalized(x, 1e-5, epilogue(x.shape), renormalization)
    expected, *_ = cpu.infer(x, *renormalization[:2], 1e-5, epilogue(x.shape))
    torch.testing.assert_close(y, expected)


@needs_cpu
def test_without_room_it_is_the_plain_forward():
    for layout, dtype in product(LAYOUTS, DTYPES):
        x, _, _ = tensors((8, 6, 5), dtype, layout)
        y, _, _, (r, d), _ = cpu.forward_renormalized(x, 1e-5, epilogue(x.shape), renormalization_of(6, 1.0, 0.0))
        assert_same_bits("y", y, cpu.forward(x, 1e-5, epilogue(x.shape))[0])
        assert_same_bits("r", r, torch.ones_like(r))
        assert not d.any()


@needs_cpu
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_channel(bad):
    x, _, _ = tensors((4, 3, 6), torch.float32)
    x[1, 1, 2] = bad
    for kernel in (cpu, eager):
        y, _, _, (r, d), _ = kernel.forward_renormalized(x, 1e-5, Epilogue(), renormalization_of(3))
        assert y[:, 1].isnan().any()
        assert all(value[[0, 2]].isfinite().all() for value in (y.movedim(1, 0), r, d))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["fast path", "residual", "plain torch"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_derivatives_of_both_orders(monkeypatch, activation, way, layout):
    """r and d depend on x, so numerical derivatives are no measure; the formula's are."""
    if way == "plain torch":
        monkeypatch.setattr(cpu, "refuses", lambda *_: "not wanted")
        monkeypatch.setattr(fast_path, "steps_for", lambda *_: None)
    layer = bn.BatchNorm(3, dtype=torch.float64, statistics=Renorm(1.2, 0.3, warmup=0), activation=activation)
    renormalization = renormalization_of(3, 1.2, 0.3, torch.float64)
    layer.running_mean.copy_(renormalization.running_mean)
    layer.running_var.copy_(renormalization.running_var)
    nn.init.uniform_(layer.weight)
    x, dy, residual = tensors((5, 3, 4), torch.float64, layout)
    given = (x.requires_grad_(), layer.weight, layer.bias)
    residual = None if way == "fast path" else residual.requires_grad_()
    given = given if residual is None else (*given, residual)
    y = layer(x) if residual is None else layer(x, residual)
    if cpu.unavailable() is None:
        assert type(y.grad_fn.call) is (GENERAL if way == "plain torch" else FAST)
    function = {None: None, "relu": torch.relu, "silu": nn.functional.silu}[activation]
    expected = by_formula(x, layer.weight, layer.bias, layer.eps, renormalization, function, residual)
    torch.testing.assert_close(y, expected)
    first = torch.autograd.grad(y, given, dy, retain_graph=True)
    found, exact = (torch.autograd.grad(value, given, dy, create_graph=True) for value in (y, expected))
    torch.testing.assert_close(first, exact)
    torch.testing.assert_close(found, exact)
    second = [
        torch.autograd.grad(sum(g.sin().sum() for g in grads), given[:3], materialize_grads=True)
        for grads in (found, exact)
    ]
    torch.testing.assert_close(*second)


def trained(make, shape, dtype, last, batches, **given):
    """Of a few steps: ways, outputs, gradients; and the buffers at the end."""
    layer = make()
    layer.num_batches_tracked.fill_(batches)
    ways, found = set(), []
    for step in range(3):
        x, dy, _ = tensors(shape, dtype, "interleaved" if last else "planar", seed=step)
        x = (x * (1 + step)).requires_grad_()
        y = layer(x, **given)
        ways.add(type(y.grad_fn.call))
        found += [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]
    return ways, [*found, *layer.buffers()]


@needs_cpu
@pytest.mark.parametrize(
    "options", [{}, {"activation": "silu"}, {"affine": False}, {"bias": False, "running_variance": "biased"}], ids=str
)
@pytest.mark.parametrize(
    ("warmup", "batches"), [(0, 0), (2, 0), (10, 30), (10, 79), (10, 500)], ids=lambda value: f"{value}"
)
def test_the_fast_path_gives_the_bits_of_the_general_one(monkeypatch, options, warmup, batches):
    for shape, last, dtype in product([(4, 5, 7), (6, 33)], [False, True], DTYPES):
        own = torch.float64 if dtype == torch.float64 else torch.float32
        part = Renorm(1.5, 0.4, warmup)
        make = partial(bn.BatchNorm, shape[1], dtype=own, statistics=part, **options)
        ways, found = trained(make, shape, dtype, last, batches)
        with monkeypatch.context() as patch:
            patch.setattr(fast_path, "steps_for", lambda *_: None)
            other_ways, expected = trained(make, shape, dtype, last, batches)
        assert (ways, other_ways) == ({FAST}, {GENERAL})
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=2 * torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0, atol=1e-12
            )


def test_plain_torch_says_the_same(monkeypatch):
    make = partial(bn.BatchNorm, 5, dtype=torch.float64, statistics=Renorm(1.5, 0.4, warmup=0), activation="gelu")
    mask = torch.rand(4, 7) > 0.3
    for given in ({}, {"mask": mask}):
        _, found = trained(make, (4, 5, 7), torch.float64, False, 0, **given)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "refuses", lambda *_: "not wanted")
            patch.setattr(fast_path, "steps_for", lambda *_: None)
            _, expected = trained(make, (4, 5, 7), torch.float64, False, 0, **given)
        torch.testing.assert_close(found, expected)


def network(**options):
    torch.manual_seed(0)
    layers = [bn.BatchNorm2d(C, statistics=Renorm(1.5, 0.5, warmup=0), **options) for C in (6, 4)]
    return nn.Sequential(nn.Conv2d(3, 6, 3), layers[0], nn.SiLU(), nn.Conv2d(6, 4, 1), layers[1], nn.Conv2d(4, 2, 1))


def steps(model, call, several):
    """Gradients of a few steps, each of so many micro-batches whose backwards come after all forwards; and the buffers."""
    found, numbers, dtype = [], torch.Generator().manual_seed(1), next(model.parameters()).dtype
    for step in range(3):
        inputs = [
            ((1 + step + i) * torch.randn(4, 3, 6, 6, generator=numbers, dtype=dtype) + i).requires_grad_()
            for i in range(several)
        ]
        losses = [call(x).square().mean() for x in inputs]
        for loss in losses:
            loss.backward()
        found += [value.grad.clone() for value in (*inputs, *model.parameters())]
        model.zero_grad()
    return [*found, *(value.clone() for value in model.buffers())]


def same(found, expected) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("several", [1, 3], ids=["one batch", "micro-batches"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_is_corrected_as_the_forward_was(monkeypatch, reentrant, several):
    one = network()
    other, forgetful = copy.deepcopy(one), copy.deepcopy(one)
    expected = steps(one, one, several)
    found = steps(other, lambda x: checkpoint(other, x, use_reentrant=reentrant), several)
    for ours, theirs in zip(found, expected, strict=True):  # of the first node's kernel, or of plain torch, to the bit
        assert_same_bits("checkpointed", ours, theirs)
    monkeypatch.setattr(recomputed, "is_needed", lambda: False)
    assert not same(steps(forgetful, lambda x: checkpoint(forgetful, x, use_reentrant=reentrant), several), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("plainly", [False, True], ids=["as ever", "plain torch"])
def test_a_recomputation_with_residual_and_mask(monkeypatch, reentrant, plainly):
    if plainly:
        monkeypatch.setattr(cpu, "refuses", lambda *_: "not wanted")
    one = bn.BatchNorm1d(3, statistics=Renorm(1.5, 0.5, warmup=2), activation="gelu")
    other, mask = copy.deepcopy(one), torch.arange(6) < torch.tensor([6, 2, 5, 4]).unsqueeze(1)
    for step in range(6):
        x, dy, residual = tensors((4, 3, 6), torch.float32, seed=step)
        found = []
        for layer, call in ((one, one), (other, partial(checkpoint, other, use_reentrant=reentrant))):
            given = [(x * step).requires_grad_(), residual.clone().requires_grad_()]
            call(*given, mask if step % 2 else None).backward(dy)
            found.append([value.grad.clone() for value in (*given, *layer.parameters())])
            layer.zero_grad()
        assert same(*found)
    assert same(one.buffers(), other.buffers())


def test_so_many_forwards_are_remembered_and_no_longer_than_the_layer_lives():
    before = len(recomputed._stored)
    layer = bn.BatchNorm1d(3, statistics=Renorm(warmup=0))
    layer(torch.randn(4, 3))
    assert len(recomputed._stored) == before  # nothing could recompute it
    with torch.no_grad():
        for _ in range(2 * recomputed.FORWARDS):
            layer(torch.randn(4, 3))
    assert len(recomputed._stored[layer][None]) == recomputed.FORWARDS
    del layer
    assert len(recomputed._stored) == before


def test_memory_is_saved_to_the_same_bits():
    def saving(x, model):
        with bn.save_memory():
            return model(x)

    one = network(activation="relu")
    other = copy.deepcopy(one)
    assert same(steps(other, partial(saving, model=other), 3), steps(one, one, 3))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("aot_eager_decomp_partition", marks=pytest.mark.slow)])
@pytest.mark.parametrize("plainly", [False, True], ids=["as ever", "plain torch"])
def test_compiled(monkeypatch, backend, plainly):
    """Two micro-batches: what the first one's backward needs must not be computed again from buffers the second moved."""
    torch._dynamo.reset()
    if plainly:
        monkeypatch.setattr(cpu, "refuses", lambda *_: "not wanted")
    one = network(activation="gelu").double()
    other = copy.deepcopy(one)
    compiled = torch.compile(other, backend=backend, fullgraph=True)
    found, expected = steps(other, compiled, 2), steps(one, one, 2)
    torch.testing.assert_close(found, expected)


def test_under_transforms_the_gradient_is_that_of_autograd():
    layer = bn.BatchNorm1d(3, dtype=torch.float64, statistics=Renorm(1.2, 0.3, warmup=0), activation="silu")
    layer.running_mean.fill_(1.0)
    twin, x = copy.deepcopy(layer), torch.randn(6, 3, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).sin().sum(), x)
    found = torch.func.grad(lambda x: twin(x).sin().sum())(x)
    torch.testing.assert_close(found, expected)
    fresh, direction = copy.deepcopy(layer), torch.randn_like(x)
    fresh.load_state_dict(bn.BatchNorm1d(3, dtype=torch.float64).state_dict())
    fresh.running_mean.fill_(1.0)
    _, tangent = torch.func.jvp(lambda x: fresh(x).sin().sum(), (x.detach(),), (direction,))
    torch.testing.assert_close(tangent, (expected * direction).sum())


def test_a_function_takes_it_too():
    x, _, _ = tensors((4, 3, 6), torch.float64)
    renormalization = renormalization_of(3, dtype=torch.float64)
    y, batch = functional.normalize(x, torch.full((3,), 2.0).double(), renormalization=renormalization)
    expected = by_formula(x, torch.full((3,), 2.0).double(), torch.zeros(3).double(), 1e-5, renormalization)
    torch.testing.assert_close(y, expected)
    known, _ = functional.normalize(
        x, torch.full((3,), 2.0).double(), renormalization=renormalization, moments=functional.moments(x)
    )
    torch.testing.assert_close(known, expected)
    torch.testing.assert_close(batch.mean, x.mean((0, 2)))


def test_what_a_function_refuses():
    x, given = torch.randn(4, 3, 6), renormalization_of(3)
    with pytest.raises(ShapeError, match="running_mean should contain 3"):
        functional.normalize(x, renormalization=renormalization_of(4))
    with pytest.raises(InputError, match="group_size"):
        functional.normalize(x, renormalization=given, group_size=2)
    with pytest.raises(DTypeError, match="real input"):
        functional.normalize(x.to(torch.complex64), renormalization=given)


def test_bounds_that_grow_are_finite():
    for bounds in ({"r_max": torch.inf}, {"d_max": torch.inf}):
        with pytest.raises(InputError, match="finite"):
            Renorm(**bounds)
    layer = bn.BatchNorm1d(3, statistics=Renorm(torch.inf, torch.inf, warmup=0))
    x = torch.randn(4, 3) + 9
    torch.testing.assert_close(layer(x), x / (1 + 1e-5) ** 0.5)  # the running statistics are 0 and 1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["same mean, other spread", "a NaN channel"])
def test_a_recomputation_is_told_by_all_of_its_batch(kind, reentrant):
    half = torch.randn(8, 3, 5)
    x = torch.cat([half, -half])
    batches = [x, 3 * x] if kind == "same mean, other spread" else [x + 1, x - 1]
    if kind == "a NaN channel":
        for batch in batches:
            batch[0, 1, 0] = torch.nan
    found = []
    for wrap in (lambda layer: layer, lambda layer: partial(checkpoint, layer, use_reentrant=reentrant)):
        torch.manual_seed(0)
        layer = bn.BatchNorm1d(3, statistics=Renorm(warmup=0), on_nonfinite="propagate")
        given = [batch.clone().requires_grad_() for batch in batches]
        sum(wrap(layer)(batch).pow(3).sum() for batch in given).backward()
        found.append([*(batch.grad for batch in given), layer.weight.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_threads_may_share_a_checkpointed_layer():
    layer, errors = bn.BatchNorm1d(3, statistics=Renorm(warmup=0)), []

    def work():
        try:
            for _ in range(20):
                checkpoint(layer, torch.randn(16, 3, requires_grad=True), use_reentrant=False).pow(3).sum().backward()
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors


def test_a_checkpoint_loads_where_torch_swaps_tensors():
    layer = bn.BatchNorm1d(3, statistics=Renorm(warmup=0))
    with torch.no_grad():
        layer(torch.randn(4, 3))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("bound", [3.0, torch.tensor([3.0]), torch.tensor(3), torch.empty(0)], ids=str)
def test_bounds_are_floating_tensors_without_axes(bound):
    x, zeros = torch.randn(4, 3), torch.zeros(3)
    with pytest.raises(InputError, match="r_max must be a floating tensor without axes"):
        functional.normalize(x, renormalization=Renormalization(zeros, zeros + 1, bound, torch.tensor(5.0)))


def test_a_constant_channel_has_no_gradient_of_its_weight():
    for value in (1e9, 1e12, 1e20):
        layer = bn.BatchNorm2d(3)
        layer(torch.full((16, 3, 4, 4), value)).backward(torch.randn(16, 3, 4, 4))
        assert layer.weight.grad.tolist() == [0.0] * 3
