"""Torch's own operators as a kernel, forced on the CPU: against the formula in float64, in every layer, and in compiled code."""

import copy
import re

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import kernels
from batchnorm.kernels import Epilogue, Normalized, aten, eager
from batchnorm.measure import peak_bytes
from tests.layer_table import ACTIVATIONS, ROWS, Row

SHAPES = [(8, 3), (4, 3, 7), (4, 5, 6, 3), (2, 3, 2, 3, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _also_on_the_cpu(monkeypatch):
    monkeypatch.setattr(aten, "DEVICES", ("cpu",))


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", (aten, eager))


def budget(dtype: torch.dtype) -> float:
    """Torch's own error: float32 inside, rounded to the dtype."""
    return 64 * torch.finfo(dtype).eps if dtype is torch.float64 else 2e-6 + torch.finfo(dtype).eps


def close(what: str, found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    error = (found.double() - exact.double()).abs().max().item()
    assert error <= budget(dtype) * max(1.0, exact.abs().max().item()), f"{what}: {error}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", ["affine", "weight alone", "neither"])
def test_verbs_are_those_of_the_formula(shape, dtype, affine):
    x, dy = torch.randn(shape).to(dtype) + 3, torch.randn(shape).to(dtype)
    C = shape[1]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    weight, bias = torch.rand(C, dtype=wide) + 0.5, torch.randn(C, dtype=wide)
    e = {"affine": Epilogue(weight, bias), "weight alone": Epilogue(weight), "neither": Epilogue()}[affine]
    assert aten.refuses(x, e) is None
    exact_y, exact, exact_rstd, *_ = eager.forward(x.double(), 1e-5, e)
    y, batch, rstd, _, reserve = aten.forward(x, 1e-5, e)
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    close("y", y, exact_y, dtype)
    for moments in (batch, aten.moments(x, None)):
        assert moments.count == exact.count
        close("mean", moments.mean, exact.mean, wide)
        close("variance", moments.variance(), exact.variance(), wide)
    close("normalize", aten.normalize(x, batch.mean, rstd, e), exact_y, dtype)
    by, exact_by = Normalized(batch.mean, rstd, batch.count, reserve), Normalized(exact.mean, exact_rstd, exact.count)
    for without_reserve in (by, by._replace(reserve=None)):
        found = aten.backward(dy, x, without_reserve, e)
        expected = eager.backward(dy.double(), x.double(), exact_by, e)
        close("dx", found.input, expected.input, dtype)
        close("sum", found.sum_grad, expected.sum_grad, wide)
        close("sum of products", found.sum_grad_xhat, expected.sum_grad_xhat, wide)
    sums = aten.reduce_grad(dy, x, batch.mean, rstd, e)
    for one, other in zip(sums, eager.reduce_grad(dy.double(), x.double(), exact.mean, exact_rstd, e), strict=True):
        close("reduce_grad", one, other, wide)
    means = tuple(value / exact.count for value in sums)
    dx, _ = aten.input_grad(dy, x, batch.mean, rstd, e, means)
    close("input_grad", dx, expected.input, dtype)
    constants = aten.backward(dy, x, Normalized(batch.mean, rstd, None), e)
    expected = eager.backward(dy.double(), x.double(), exact_by._replace(count=None), e)
    close("dx with constants", constants.input, expected.input, dtype)
    assert aten.backward(dy, x, by, e, needs_input_grad=False).input is None


def test_a_variance_below_eps_is_exact():
    """It cannot be computed from 1 / sqrt(variance + eps), which is all that torch's operator returns."""
    x = torch.randn(64, 3) * torch.tensor([1e-4, 1e-6, 1e-12])
    variance = aten.forward(x, 1e-5, Epilogue()).moments.variance(unbiased=True)
    torch.testing.assert_close(variance.double(), x.double().var(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_every_layer_computes_the_same(row: Row, training, monkeypatch):
    layer = row.ours().train(training)
    other = copy.deepcopy(layer)
    x = torch.randn(row.shape)
    dy = torch.randn(row.shape)
    results = []
    for each, chosen in ((layer, (aten, eager)), (other, (eager,))):
        monkeypatch.setattr(kernels, "KERNELS", chosen)
        given = x.clone().requires_grad_()
        y = each(given)
        y.backward(dy)
        results.append([y, given.grad, *(p.grad for p in each.parameters()), *each.buffers()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_and_activation_come_after_it(name, dtype):
    layer = bn.BatchNorm2d(3, activation=name)
    x, residual = (torch.randn(4, 3, 5, 2).to(dtype).requires_grad_() for _ in "12")
    y = layer(x, residual=residual)
    z = F.batch_norm(x, None, None, layer.weight, layer.bias, True) + residual
    expected = z if name is None else ACTIVATIONS[name](z)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    for one, other in zip(
        torch.autograd.grad(y, (x, residual), dy), torch.autograd.grad(expected, (x, residual), dy), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("forced")
def test_it_refuses_what_torch_does_not_take():
    x = torch.randn(4, 3, 5)
    mask = torch.ones(4, 1, 5, dtype=torch.bool)
    for given, e, plain in (
        (x, Epilogue(mask=mask), True),
        (x, Epilogue(), False),
        (x[:1, :, :1], Epilogue(), True),
        (x, Epilogue(torch.ones(3, dtype=torch.float64)), True),
        (x.int(), Epilogue(), True),
        (x.to("meta"), Epilogue(), True),
    ):
        assert isinstance(aten.refuses(given, e, plain), str)
        assert kernels.select(given, e, plain) is eager


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_known_moments_have_the_gradients_of_a_batch(dtype):
    x, dy = torch.randn(4, 3, 7).to(dtype).requires_grad_(), torch.randn(4, 3, 7).to(dtype)
    weight, bias = torch.rand(3, requires_grad=True), torch.randn(3, requires_grad=True)
    inputs, moments = (x, weight, bias), bn.functional.moments(x)
    known, _ = bn.functional.normalize(x, weight, bias, moments=moments)
    exact = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), training=True)
    gradients, expected = torch.autograd.grad(known, inputs, dy), torch.autograd.grad(exact, inputs, dy.double())
    for name, gradient, exact_gradient in zip(("dx", "dweight", "dbias"), gradients, expected, strict=True):
        close(name, gradient, exact_gradient, dtype if name == "dx" else torch.float32)


@pytest.mark.usefixtures("forced")
def test_a_second_derivative_is_exact():
    layer = bn.BatchNorm1d(3).double()
    assert torch.autograd.gradgradcheck(lambda x: layer(x).pow(3), torch.randn(5, 3).double().requires_grad_())


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
    )


def generated(model: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], list[str]]:
    """Output and gradients of a compiled step, and the calls in the code of forward and backward."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)

    def step():
        y = compiled(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        return y

    y, codes = run_and_get_code(step)
    bodies = [code[code.index("def call(") :] for code in codes]
    return [y, *(p.grad for p in model.parameters())], bodies


@pytest.mark.parametrize("last", [False, True], ids=["planar", "channels_last"])
def test_a_compiled_step_is_that_of_torch(last):
    """As many kernels, no copy of a layout around them, and no operator beside them."""
    torchs = network()
    ours = bn.convert(copy.deepcopy(torchs))
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    expected, theirs = generated(torchs, x)
    found, code = generated(ours, x)
    assert len(code) == len(theirs) == 2
    for one, other in zip(code, theirs, strict=True):
        assert len(re.findall(r"^ +cpp_fused\w*\(", one, re.M)) == len(re.findall(r"^ +cpp_fused\w*\(", other, re.M))
    assert "torch.ops.batchnorm" not in "".join(code)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    for name, buffer in torchs.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    ("activation", "residual", "dtype"),
    [("relu", False, torch.float32), (nn.LeakyReLU(0.3), True, torch.float64), ("gelu", True, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("functional", [False, True], ids=["layer", "function"])
def test_compiled_code_calls_one_operator(activation, residual, dtype, training, functional):
    """So it checks few Python objects; the operator computes what the eager layer does."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.graph)
        return aot_eager(graph, inputs)

    own = torch.promote_types(dtype, torch.float32)
    layer = bn.BatchNorm1d(3, activation=activation, dtype=own).train(training)
    other = copy.deepcopy(layer)
    given = [torch.randn(9, 3).to(dtype).requires_grad_() for _ in range(1 + residual)]

    def call(of):
        if not functional:
            return of
        tensors = (of.running_mean, of.running_var, of.weight, of.bias)
        return lambda x, *residual: bn.functional.batch_norm(
            x, *tensors, training, activation=activation, residual=residual[0] if residual else None
        )

    torch._dynamo.reset()
    y, exact = torch.compile(call(layer), fullgraph=True, backend=backend)(*given), call(other)(*given)
    dy = torch.randn(9, 3).to(dtype)
    found, expected = (
        [each.detach(), *torch.autograd.grad(each, [*given, *of.parameters()], dy), *of.buffers()]
        for each, of in ((y, layer), (exact, other))
    )
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5  # torch rounds between its operations
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    (graph,) = graphs
    calls = [str(node.target) for node in graph.nodes if str(node.target).startswith("batchnorm.")]
    release = "v" + re.sub(r"\W", "_", bn.__version__)
    assert calls == [f"batchnorm.{'train' if training else 'infer'}_in_graph.{release}"]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_compiled_code_compares_no_two_objects(training):
    """An object that is read in two places is compared in Python at each call, which takes as long as a tiny layer."""
    guards = []

    def keep(entries):
        guards.extend(entries)
        return [True] * len(entries)

    torch._dynamo.reset()
    layer = bn.BatchNorm2d(3, activation="relu").train(training)
    x = torch.randn(2, 3, 4, 4)
    torch.compile(layer, backend="eager", options={"guard_filter_fn": keep})(x, x + 1)
    assert guards
    assert not [guard.name for guard in guards if guard.guard_type == "DUPLICATE_INPUT"]


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("shape", [(8, 3), (2000, 3), (8, 40)])
def test_a_batch_that_is_not_finite_is_skipped_and_counted(shape):
    layer, plain = bn.BatchNorm1d(shape[1]), nn.BatchNorm1d(shape[1])
    x = torch.randn(shape)
    layer(x), plain(x)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    before = [buffer.clone() for buffer in layer.buffers()]
    layer(x.masked_fill(x > 1, torch.nan))
    assert all(map(torch.equal, before, layer.buffers()))
    assert layer.num_nonfinite_batches == 1
    layer.on_nonfinite = "propagate"
    layer(x.masked_fill(x > 1, torch.nan))
    assert layer.running_mean.isnan().any()


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("large", [torch.inf, 1e30])
def test_a_batch_whose_variance_overflows_is_skipped_and_counted(large, channels):
    layer, x = bn.BatchNorm1d(channels), torch.randn(80, channels)
    before = [buffer.clone() for buffer in layer.buffers()]
    layer(x.masked_fill(x > 1, large))
    assert all(map(torch.equal, before, layer.buffers()))
    assert layer.num_nonfinite_batches == 1


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("channels", [3, 40])
def test_a_variance_whose_square_overflows_is_finite(channels):
    layer, plain = bn.BatchNorm1d(channels), nn.BatchNorm1d(channels)
    x = torch.randn(80, channels) * 1e12
    layer(x), plain(x)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert (layer.num_nonfinite_batches, layer.num_batches_tracked) == (0, 1)


@pytest.mark.usefixtures("forced")
def test_inference_can_be_differentiated_after_more_training():
    layer = bn.BatchNorm1d(3).eval()
    x = torch.randn(8, 3, requires_grad=True)
    y = layer(x)
    layer.train()(x.detach())
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x) / (1 + 1e-5) ** 0.5)


@pytest.mark.usefixtures("forced")
class TestOnTheCPU:
    """Where the C++ library is missing, torch's operator updates the running statistics itself."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_step_is_that_of_torch(self, dtype):
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        torchs, x = nn.BatchNorm1d(3, dtype=wide), torch.randn(8, 3, 5).to(dtype)
        ours = bn.convert(copy.deepcopy(torchs))
        results = []
        for layer in (torchs, ours):
            given = x.clone().requires_grad_()
            y = layer(given)
            y.square().sum().backward()
            results.append([y, given.grad, layer.weight.grad, layer.bias.grad, *layer.buffers(), layer.eval()(x)])
        assert all(map(torch.equal, *results))

    @pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
    @pytest.mark.parametrize("name", [None, "relu", "leaky_relu", "relu6", "hardswish"])
    def test_the_output_is_the_only_new_tensor(self, name, training):
        layer = bn.BatchNorm1d(3, activation=name).train(training)
        x, residual = torch.randn(64, 3, 500), torch.randn(64, 3, 500)
        kept = residual.clone()
        with torch.no_grad():
            layer(x, residual)
            peak = peak_bytes(lambda: layer(x, residual))
        assert x.nbytes <= peak < 1.1 * x.nbytes
        assert torch.equal(residual, kept)

    @pytest.mark.parametrize("slope", [-0.5, 0.0, 0.5])
    @pytest.mark.parametrize("residual", [False, True], ids=["alone", "add"])
    def test_a_leaky_relu_has_every_slope(self, slope, residual):
        layer, x = bn.BatchNorm1d(3, activation=nn.LeakyReLU(slope)), torch.randn(8, 3, requires_grad=True)
        beside = torch.randn(8, 3) if residual else None
        z = F.batch_norm(x, None, None, layer.weight, layer.bias, True)
        exact = F.leaky_relu(z if beside is None else z + beside, slope)
        y = layer(x, beside)
        assert torch.equal(y, exact)
        assert torch.equal(*(torch.autograd.grad(value.square().sum(), x)[0] for value in (y, exact)))

    @pytest.mark.parametrize("other", ["dtype", "shape"])
    def test_another_residual_takes_the_general_path(self, other):
        layer, x = bn.BatchNorm1d(3), torch.randn(8, 3)
        before = [buffer.clone() for buffer in layer.buffers()]
        if other == "dtype":
            y = layer(x, torch.ones(8, 3, dtype=torch.float64))
            torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True) + 1)
        else:
            with pytest.raises(bn.errors.ShapeError, match="residual"):
                layer(x, torch.ones(8, 1))
            assert all(map(torch.equal, before, layer.buffers()))

    @pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
    def test_the_function_is_that_of_torch(self, training):
        x, weight, bias = torch.randn(8, 3, 5), torch.rand(3), torch.randn(3)
        found, exact = [torch.zeros(3), torch.ones(3)], [torch.zeros(3), torch.ones(3)]
        y = bn.functional.batch_norm(x, *found, weight, bias, training, activation="relu", residual=x)
        assert torch.equal(y, F.relu(F.batch_norm(x, *exact, weight, bias, training) + x))
        assert all(map(torch.equal, found, exact))

    @pytest.mark.parametrize(
        "x", [torch.ones(3), torch.ones(()), torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 2)]
    )
    def test_the_function_refuses_what_it_always_refuses(self, x):
        found = [torch.zeros(3), torch.ones(3)]
        with pytest.raises(bn.errors.BatchNormError):
            bn.functional.batch_norm(x, *found, training=True)
        assert [value.sum() for value in found] == [0, 3]

    def test_a_checkpoint_updates_once(self):
        layer, plain, x = bn.BatchNorm1d(3), bn.BatchNorm1d(3), torch.randn(8, 3, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=False)
        assert y is not None
        y.square().sum().backward()
        found, x.grad = x.grad, None
        plain(x).square().sum().backward()
        assert torch.equal(found, x.grad)
        assert all(map(torch.equal, layer.buffers(), plain.buffers()))

    def test_statistics_that_were_not_finite_before_do_not_make_a_batch_so(self):
        layer, x = bn.BatchNorm1d(3), torch.randn(8, 3)
        layer.running_mean[1] = torch.nan
        layer(x)
        assert (layer.num_nonfinite_batches, layer.num_batches_tracked) == (0, 1)
        assert layer.running_mean.isnan().tolist() == [False, True, False]
        assert not torch.equal(layer.running_var, torch.ones(3))

    @pytest.mark.parametrize(
        "option", [{"running_variance": "biased"}, {"momentum": None}, {"on_nonfinite": "propagate"}]
    )
    def test_options_that_torch_does_not_have(self, option, monkeypatch):
        x = torch.randn(8, 3)
        found = bn.BatchNorm1d(3, **option)
        found(x)
        monkeypatch.setattr(kernels, "KERNELS", (eager,))
        expected = bn.BatchNorm1d(3, **option)
        expected(x)
        for one, other in zip(found.buffers(), expected.buffers(), strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("training", [True, False])
    def test_sizes_that_do_not_fit_are_named(self, training):
        layer = bn.BatchNorm1d(3).train(training)
        before = [buffer.clone() for buffer in layer.buffers()]
        with pytest.raises(bn.errors.ShapeError, match="3"):
            layer(torch.randn(8, 4))
        assert all(map(torch.equal, before, layer.buffers()))
