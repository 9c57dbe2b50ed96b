"""The functions: what torch's does, and what ours do beyond it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm import Moments, kernels
from batchnorm.functional import batch_norm, normalize, normalize_with, update_running_statistics
from batchnorm.kernels import Activation, parse
from batchnorm.kernels.activation import NAMES
from tests.layer_table import ACTIVATIONS


@pytest.mark.skipif(kernels.cpu.unavailable() is not None, reason="needs the C++ kernels")
@pytest.mark.parametrize(
    "of",
    [lambda x: x[..., ::2], lambda x: x[:, ::2], lambda x: x.permute(3, 1, 0, 2), lambda x: x.expand(2, -1, -1, -1)],
)
@pytest.mark.parametrize("training", [True, False])
def test_any_strides_run_on_the_fast_kernels(of, training, monkeypatch):
    storage = torch.randn(1, 4, 6, 8)
    x, plain = (of(storage.clone().requires_grad_()) for _ in "12")
    plain = plain.detach().contiguous().requires_grad_()
    layer = bn.BatchNorm2d(x.shape[1], activation="silu").train(training)
    dy = torch.randn(x.shape)
    expected = layer(plain)
    (dx,) = torch.autograd.grad(expected, plain, dy)
    monkeypatch.setattr(kernels, "KERNELS", (kernels.cpu,))
    y = layer(x)
    assert torch.equal(y, expected)
    (found,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(found, dx)


def test_every_activation_is_tested():
    assert tuple(ACTIVATIONS) == NAMES


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("momentum", [-1.2, 0.0, 0.1, 1.0])
def test_signature_and_effects_are_torchs(training, momentum):
    x = torch.randn(4, 3, 5)
    buffers = [(torch.full((3,), 0.5), torch.full((3,), 2.0)) for _ in range(2)]
    w, b = torch.rand(3), torch.rand(3)
    ours = batch_norm(x, *buffers[0], w, b, training, momentum, 1e-3)
    torchs = F.batch_norm(x, *buffers[1], w, b, training, momentum, 1e-3)
    torch.testing.assert_close(ours, torchs)
    torch.testing.assert_close(*buffers)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_activation_and_residual_come_after(name, training):
    x, r, w, b = leaves((4, 3, 5), (4, 3, 5), 3, 3)
    mean, variance = torch.rand(3).double(), torch.rand(3).double()
    y = batch_norm(x, mean.clone(), variance.clone(), w, b, training, activation=name, residual=r)
    expected = ACTIVATIONS[name](F.batch_norm(x, mean.clone(), variance.clone(), w, b, training) + r)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, r, w, b), dy), torch.autograd.grad(expected, (x, r, w, b), dy)
    )


@pytest.mark.parametrize("module", [nn.LeakyReLU(0.3), nn.GELU(approximate="tanh"), *ACTIVATIONS.values()], ids=str)
def test_derivatives_are_torchs_everywhere(module):
    """At the kinks and far out. (At NaN torch's own vectorized and scalar code differ.)"""
    kinks = [0.0, -0.0, 6.0, -3.0, 3.0, 1e-30, -1e-30, 50.0, -50.0]
    z = torch.cat([torch.tensor(kinks, dtype=torch.float64), torch.linspace(-8, 8, 401).double()]).requires_grad_()
    activation = parse(module)
    (expected,) = torch.autograd.grad(module(z).sum(), z)
    torch.testing.assert_close(activation(z), module(z), rtol=0, atol=0)
    torch.testing.assert_close(activation.derivative(z.detach()), expected)


def test_activation_of_a_subclass_is_not_guessed():
    class Mine(nn.ReLU):
        def forward(self, x):
            return -x

    with pytest.raises(bn.errors.InputError, match="activation must be"):
        parse(Mine())
    assert str(parse("leaky_relu")) == "leaky_relu(0.01)"
    assert parse(Activation("relu")) == Activation("relu")


def counted(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values that count, (M, C)."""
    return x.movedim(1, -1)[mask.expand(x.shape[0], *x.shape[2:])]


@pytest.mark.parametrize("shape", [(4, 6), (1, 6), (4, 1), (6,), (1, 1)], ids=str)
def test_mask_is_the_batch_without_what_it_hides(shape):
    x, w, b = leaves((4, 3, 6), 3, 3)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(4)) > 0.4
    mask.view(-1)[0] = True
    y = batch_norm(x, None, None, w, b, True, mask=mask)
    alone = F.batch_norm(counted(x, mask), None, None, w, b, True)
    torch.testing.assert_close(counted(y, mask), alone)
    assert not y.movedim(1, -1)[~mask.expand(4, 6)].any()
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, w, b), dy)
    torch.testing.assert_close(grads, torch.autograd.grad(alone, (x, w, b), counted(dy, mask)))


@pytest.mark.parametrize("padding", [0.0, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_padding_may_hold_anything(padding, training):
    """Bit for bit: output, gradients and running statistics do not know what lies under the mask."""
    mask = torch.arange(6) < torch.tensor([6, 2, 0, 4]).unsqueeze(1)  # (N, L)
    results = []
    for fill in (0.0, padding):
        torch.manual_seed(3)
        x, r, w, b = leaves((4, 3, 6), (4, 3, 6), 3, 3, dtype=torch.float32)
        hidden = ~mask.unsqueeze(1).expand(4, 3, 6)
        dy = torch.randn(4, 3, 6).masked_fill(hidden, fill)
        padded = [value.detach().masked_fill(hidden, fill).requires_grad_() for value in (x, r)]
        buffers = torch.zeros(3), torch.ones(3)
        y = batch_norm(padded[0], *buffers, w, b, training, mask=mask, activation="silu", residual=padded[1])
        results.append((y, *buffers, *torch.autograd.grad(y, (*padded, w, b), dy)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_mask_that_hides_all_moves_nothing():
    buffers = torch.full((3,), 0.5), torch.full((3,), 2.0)
    for mask in (torch.zeros(4, 6, dtype=torch.bool), torch.arange(24).view(4, 6) == 5):  # none, and one value
        y = batch_norm(torch.randn(4, 3, 6), *buffers, training=True, mask=mask)
        assert not y.any()
    assert buffers[0].eq(0.5).all()
    assert buffers[1].eq(2.0).all()


def test_empty_batch_moves_nothing():
    buffers = torch.full((3,), 0.5), torch.full((3,), 2.0)
    x = torch.randn(0, 3, 4, requires_grad=True)
    w = torch.ones(3, requires_grad=True)
    y = batch_norm(x, *buffers, w, training=True)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 4)
    assert not w.grad.any()
    assert buffers[0].eq(0.5).all()


def test_normalize_is_pure_and_returns_the_moments():
    x = (torch.randn(4, 3, 5) + 7).requires_grad_()
    y, moments = normalize(x, eps=1e-3)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True, eps=1e-3))
    assert moments.count == 20
    assert not moments.mean.requires_grad
    torch.testing.assert_close(moments.mean, x.double().mean((0, 2)).detach())
    torch.testing.assert_close(moments.variance(unbiased=True), x.double().transpose(0, 1).flatten(1).var(1).detach())
    again, same = normalize(x.detach(), eps=1e-3)
    torch.testing.assert_close((again, tuple(same)), (y.detach(), tuple(moments)), rtol=0, atol=0)


def test_normalize_with_takes_constants():
    x, mean, variance = leaves((4, 3), 3, 3)
    y = normalize_with(x, mean, variance.detach().abs().requires_grad_(), eps=0.0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, variance.detach().abs().rsqrt().expand(4, 3))
    assert y.grad_fn is not None
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(normalize_with(x, mean, torch.ones(3)).sum(), mean)


def test_weight_computed_from_the_input_differentiates_twice():
    """A hypernetwork: the second derivative must not count the path through the weight twice."""
    (x,) = leaves((5, 3))
    call = lambda x: batch_norm(x, None, None, x.square().mean(0), x.sum(0), True)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))


def test_only_what_needs_a_gradient_gets_one():
    x, w, b = leaves((4, 3), 3, 3)
    y = batch_norm(x.detach(), None, None, w, b, True, residual=None)
    y.square().sum().backward()
    assert x.grad is None
    assert w.grad is not None
    assert b.grad is not None
    (dw,) = torch.autograd.grad(batch_norm(x.detach(), None, None, w, None, True).square().sum(), w, create_graph=True)
    assert dw.requires_grad


def test_statistics_hold_no_graph():
    x, _ = leaves((4, 3), 3)
    mean, variance = torch.zeros(3), torch.ones(3)
    batch_norm(x, mean, variance, training=True)
    assert not mean.requires_grad
    assert not variance.requires_grad


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32, torch.float64), (torch.float32, torch.float16, torch.bfloat16)]
)
def test_any_mix_of_dtypes(dtypes):
    input_dtype, parameter_dtype, buffer_dtype = dtypes
    x = torch.randn(64, 3).to(input_dtype).requires_grad_()
    w = torch.rand(3).to(parameter_dtype).requires_grad_()
    buffers = torch.zeros(3, dtype=buffer_dtype), torch.ones(3, dtype=buffer_dtype)
    y = batch_norm(x, *buffers, w, training=True)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, w.grad.dtype, buffers[0].dtype) == (
        input_dtype,
        input_dtype,
        parameter_dtype,
        buffer_dtype,
    )
    expected = F.batch_norm(x.double(), None, None, w.double(), training=True)
    torch.testing.assert_close(y.detach(), expected.to(input_dtype), rtol=2 * torch.finfo(input_dtype).eps, atol=0)


@pytest.mark.parametrize("activation", [None, "relu"], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_complex_input_is_normalized_part_by_part(activation, training):
    x, r = (torch.randn(4, 3, 5, dtype=torch.complex128).requires_grad_() for _ in range(2))
    w, b = (torch.randn(3, dtype=torch.complex128).requires_grad_() for _ in range(2))
    mean, variance = (
        torch.randn(3, dtype=torch.complex128),
        torch.complex(torch.rand(3), torch.rand(3)).to(torch.complex128),
    )
    parts = [(mean.real.clone(), variance.real.clone()), (mean.imag.clone(), variance.imag.clone())]
    y = batch_norm(x, mean, variance, w, b, training, activation=activation, residual=r)
    expected = torch.complex(
        *(
            batch_norm(p(x), *buffers, p(w), p(b), training, activation=activation, residual=p(r))
            for p, buffers in zip((torch.real, torch.imag), parts, strict=True)
        )
    )
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(mean, torch.complex(parts[0][0], parts[1][0]))
    torch.testing.assert_close(variance, torch.complex(parts[0][1], parts[1][1]))
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, r, w, b), dy), torch.autograd.grad(expected, (x, r, w, b), dy)
    )


def test_complex_input_with_real_weight_and_moments():
    x = torch.randn(8, 3, dtype=torch.complex64)
    y, moments = normalize(x, torch.full((3,), 2.0))
    torch.testing.assert_close(y.real, F.batch_norm(x.real, None, None, torch.full((3,), 2.0), training=True))
    torch.testing.assert_close(moments.mean.to(torch.complex64), x.mean(0))
    torch.testing.assert_close(moments.variance().imag.float(), x.imag.var(0, unbiased=False))


def test_vmap_gives_each_slice_its_own_statistics():
    x = torch.randn(2, 5, 4, 3)
    expected = torch.stack([torch.stack([F.batch_norm(v, None, None, training=True) for v in row]) for row in x])
    call = torch.vmap(torch.vmap(lambda v: batch_norm(v, None, None, training=True)))
    torch.testing.assert_close(call(x), expected)
    outputs, means = torch.vmap(lambda v: (normalize(v)[0], normalize(v)[1].mean))(x[0])
    torch.testing.assert_close(outputs, expected[0])
    torch.testing.assert_close(means, x[0].double().mean(1))


def test_vmap_over_shared_buffers_says_what_to_do():
    buffers = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="map over the buffers too"):
        torch.vmap(lambda v: batch_norm(v, *buffers, training=True))(torch.randn(2, 4, 3))
    assert not buffers[0].any()


def test_per_sample_gradients_of_a_frozen_layer():
    layer = bn.BatchNorm1d(3).eval()
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    x = torch.randn(6, 3)

    def layer_loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    grads = torch.vmap(torch.func.grad(lambda p, sample: layer_loss(p, sample.unsqueeze(0))), in_dims=(None, 0))(
        parameters, x
    )
    of_all = torch.func.grad(lambda parameters: layer_loss(parameters, x))(parameters)
    torch.testing.assert_close({name: grad.sum(0) for name, grad in grads.items()}, of_all)


def test_grad_of_captured_buffers_moves_them_as_torch_does():
    ours, torchs = (torch.zeros(3), torch.ones(3)), (torch.zeros(3), torch.ones(3))
    x = torch.randn(4, 3)
    grads = [
        torch.func.grad(lambda v, f=f, buffers=buffers: f(v, *buffers, training=True).square().sum())(x)
        for f, buffers in ((batch_norm, ours), (F.batch_norm, torchs))
    ]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours, torchs)


def test_forward_mode_leaves_values_in_buffers():
    buffers = torch.zeros(3), torch.ones(3)
    x = torch.randn(4, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.randn(4, 3))
        batch_norm(dual, *buffers, training=True)
        assert torch.autograd.forward_ad.unpack_dual(buffers[0]).tangent is None
    torch.testing.assert_close(buffers[0], 0.1 * x.mean(0))


def test_momentum_may_be_a_tensor():
    one, other = (torch.zeros(3), torch.ones(3)), (torch.zeros(3), torch.ones(3))
    x = torch.randn(4, 3)
    batch_norm(x, *one, training=True, momentum=0.25)
    batch_norm(x, *other, training=True, momentum=torch.tensor(0.25))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_update_running_statistics_skips_what_is_not_finite():
    good = Moments(4, torch.ones(2), torch.ones(2))
    for bad in (
        Moments(4, torch.tensor([1.0, float("nan")]), torch.ones(2)),
        Moments(4, torch.ones(2), torch.tensor([1e39, 1.0]).double()),
    ):
        buffers = torch.zeros(2), torch.ones(2)
        assert not update_running_statistics(*buffers, bad, skip_nonfinite=True)
        assert torch.equal(torch.stack(buffers), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        assert update_running_statistics(*buffers, good, skip_nonfinite=True)
        assert update_running_statistics(*buffers, bad) is None
        assert not torch.stack(buffers).isfinite().all()


def test_gradient_of_nothing_is_nothing():
    """A node whose output nobody differentiates returns no gradients."""
    x = torch.randn(4, 3, requires_grad=True)
    y = batch_norm(x, None, None, training=True)
    (grad,) = torch.autograd.grad(y.detach().sum() + x.sum(), x)
    assert grad.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module", [nn.GELU(approximate="tanh"), *ACTIVATIONS.values()], ids=str)
@pytest.mark.parametrize("size", [9, 9000])
def test_activations_far_out(module, dtype, size):
    """Where e^z overflows the function is a line, and so is ours."""
    z = torch.cat([torch.linspace(-1e5, 1e5, size), torch.linspace(-800, 800, size)]).to(dtype).unsqueeze(1)
    z.requires_grad_()
    y = batch_norm(z, torch.zeros(1), torch.ones(1), eps=0.0, activation=module)
    (dz,) = torch.autograd.grad(y.sum(), z)
    wide = z.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(module(wide).sum(), wide)
    eps = torch.finfo(dtype).eps  # terms of size up to 25 cancel in the tails of the derivatives, torch's too
    torch.testing.assert_close(y, module(wide).to(dtype), rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(dz, exact.to(dtype), rtol=2 * eps, atol=25 * eps)
