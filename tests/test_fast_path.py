"""The fast path of a layer's call: it is taken where it should be, with the same bits as the general path."""

from contextlib import nullcontext
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from batchnorm.errors import InputError, ShapeError
from batchnorm.functional import fast_path
from batchnorm.functional.autograd import Call, StepCall
from batchnorm.kernels import cpu
from tests.budget import assert_same_bits

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

SHAPES = [(2, 4, 3, 3), (1, 3, 5), (9, 33), (4, 1, 7), (40, 6, 12, 13)]
DECOMPOSITIONS = core_aten_decompositions()
GENERAL, FAST, TORCHS_NODE = Call, StepCall, "CudnnBatchNormBackward0"


def path_of(y):
    """How y was computed."""
    node = y.grad_fn
    return TORCHS_NODE if node.name() == TORCHS_NODE else type(node.call)


def data(shape, dtype=torch.float32, last=False, seed=0):
    """x with mean 3 and deviation 2, and dy."""
    numbers = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype) for _ in range(2))
    x, dy = (value.movedim(1, -1).contiguous().movedim(-1, 1) if last else value for value in (2 * x + 3, dy))
    return x.requires_grad_(), dy


def layer_of(channels, training=True, **options):
    layer = bn.BatchNorm(channels, **options).train(training)
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in (*layer.parameters(), layer.running_mean):
            value.copy_(torch.randn(channels, generator=numbers))
    return layer


def outcome(layer, x, dy, residual=None):
    """How it went, y, all gradients, all buffers, and the counter of skipped batches."""
    y = layer(x, residual=residual)
    inputs = [
        value for value in (x, *layer.parameters(), residual) if isinstance(value, torch.Tensor) and value.requires_grad
    ]
    path = path_of(y) if inputs else None
    grads = torch.autograd.grad(y, inputs, dy) if inputs else ()
    skipped = [] if layer.num_nonfinite_batches is None else [layer.num_nonfinite_batches]
    return path, [y.detach(), *grads, *layer.buffers(), *skipped]


def both_paths(monkeypatch, make, x, dy, residual=None):
    """The outcomes of the fast path and of the general path, of layers made alike."""
    fast = outcome(make(), x, dy, residual)
    with monkeypatch.context() as patch:
        patch.setattr(fast_path, "steps_for", lambda *_: None)
        general = outcome(make(), x, dy, residual)
    return fast, general


OPTIONS = [
    {},
    {"activation": "relu"},
    {"activation": nn.LeakyReLU(0.3), "momentum": 0.7},
    {"activation": "gelu", "running_variance": "biased"},
    {"bias": False, "activation": "silu"},
    {"affine": False, "eps": 1e-3},
    {"on_nonfinite": "propagate"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("last", [False, True], ids=["planar", "channels last"])
@pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
def test_to_the_same_bits(monkeypatch, options, training, last, added):
    dtypes = [(dtype, torch.float32) for dtype in cpu.DTYPES if dtype != torch.float64] + [(torch.float64,) * 2]
    for shape, (dtype, own) in product(SHAPES, dtypes):
        make = partial(layer_of, shape[1], training, dtype=own, **options)
        residual = data(shape, dtype, last, seed=2)[0] if added else None
        x, dy = data(shape, dtype, last)
        (path, found), (other_path, expected) = both_paths(monkeypatch, make, x, dy, residual)
        plain = training and not added and "activation" not in options and options.get("affine", True)
        assert (path, other_path) == (TORCHS_NODE if plain and x.is_contiguous() else FAST, GENERAL)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.stride() == theirs.stride()
            assert_same_bits(path, ours, theirs)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext], ids=lambda c: c.__name__)
def test_nothing_recorded(monkeypatch, context):
    x, dy = data((8, 5, 3))
    frozen = layer_of(5).requires_grad_(False)
    with context():
        (_, found), (_, expected) = both_paths(monkeypatch, lambda: frozen, x.detach(), dy)
        assert frozen.num_batches_tracked == 2
    assert_same_bits("y", found[0], expected[0])


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
def test_gradients_of_one_alone(monkeypatch, wanted, activation, training):
    x, dy = data((8, 5, 3))
    residual = data((8, 5, 3), seed=2)[0].requires_grad_(wanted == "residual")
    x.requires_grad_(wanted == "x")

    def make():
        layer = layer_of(5, training, activation=activation)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name == wanted)
        return layer

    (path, found), (_, expected) = both_paths(monkeypatch, make, x, dy, residual)
    assert path == FAST
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(path, ours, theirs)


@pytest.mark.parametrize("wanted", [("x",), ("x", "weight"), ("x", "bias"), ("weight", "bias")])
def test_gradients_in_torchs_node(monkeypatch, wanted):
    x, dy = data((8, 5, 3))
    x.requires_grad_("x" in wanted)

    def make():
        layer = layer_of(5)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name in wanted)
        return layer

    (path, found), (_, expected) = both_paths(monkeypatch, make, x, dy)
    assert path == (TORCHS_NODE if "x" in wanted else FAST)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(path, ours, theirs)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_residual_in_any_layout(monkeypatch, activation):
    x, dy = data((8, 5, 4))
    for residual in (torch.randn(4, 5, 8).transpose(0, 2), torch.ones(1).expand(8, 5, 4), torch.randn(16, 5, 4)[::2]):
        make = partial(layer_of, 5, activation=activation)
        (path, found), (_, expected) = both_paths(monkeypatch, make, x, dy, residual.requires_grad_())
        assert path == FAST
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_bits(path, ours, theirs)


@pytest.mark.parametrize(
    "dy",
    [torch.ones(()).expand(8, 5, 4), torch.randn(4, 5, 8).transpose(0, 2), torch.randn(16, 5, 4)[::2]],
    ids=range(3),
)
def test_gradient_in_any_layout(monkeypatch, dy):
    (path, found), (_, expected) = both_paths(monkeypatch, partial(layer_of, 5), data((8, 5, 4))[0], dy)
    assert path == TORCHS_NODE
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(path, ours, theirs)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("on_nonfinite", ["skip", "propagate"])
def test_batches_that_are_not_finite(monkeypatch, poison, on_nonfinite):
    x, dy = data((8, 5, 3))
    with torch.no_grad():
        x[2, 3, 1] = poison
    (path, found), (_, expected) = both_paths(monkeypatch, partial(layer_of, 5, on_nonfinite=on_nonfinite), x, dy)
    assert path == TORCHS_NODE
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    *_, moved, skipped = found
    assert (moved, skipped) == ((0, 1) if on_nonfinite == "skip" else (1, 0))


def pruned(layer):
    prune.identity(layer, "weight")
    return layer


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


class Tagged(torch.Tensor):
    """A subclass without a rule of its own."""


X = data((4, 3, 6))[0].detach()
UNUSUAL = {
    "momentum=None": (partial(layer_of, 3, momentum=None), X, {}),
    "on_nonfinite='error'": (partial(layer_of, 3, on_nonfinite="error"), X, {}),
    "a wider residual": (partial(layer_of, 3), X, {"residual": X.double()}),
    "a residual of a subclass": (partial(layer_of, 3), X, {"residual": X.as_subclass(Tagged)}),
    "a mask": (partial(layer_of, 3), X, {"mask": torch.ones(4, 6, dtype=torch.bool)}),
    "gaps": (partial(layer_of, 3), data((4, 3, 12))[0].detach()[..., ::2], {}),
    "half-precision parameters": (lambda: layer_of(3).bfloat16(), X.bfloat16(), {}),
    "wider parameters": (lambda: layer_of(3).double(), X, {}),
    "a pruned weight": (lambda: pruned(layer_of(3)), X, {}),
    "a parametrized weight": (lambda: parametrized(layer_of(3)), X, {}),
    "one value": (partial(layer_of, 3, on_single="skip"), X[:1, :, :1].contiguous(), {}),
}


@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("case", UNUSUAL)
def test_what_is_unusual_goes_the_long_way(case, recorded):
    make, x, given = UNUSUAL[case]
    if recorded and x.is_contiguous():
        x = x.clone().requires_grad_()
    assert path_of(make()(x, **given)) is GENERAL


@pytest.mark.parametrize("case", ["a wider residual", "a mask", "gaps", "wider parameters", "a pruned weight"])
def test_what_is_unusual_in_inference_goes_the_long_way(case):
    make, x, given = UNUSUAL[case]
    assert path_of(make().eval()(x, **given)) is GENERAL


def test_a_frozen_layer_takes_the_fast_path():
    layer = layer_of(3, statistics=bn.statistics.Running())
    before = [value.clone() for value in layer.buffers()]
    assert path_of(layer(X)) is FAST
    assert all(map(torch.equal, before, layer.buffers()))


def test_subclasses_go_the_long_way():
    assert path_of(layer_of(3)(X.as_subclass(Tagged))) is GENERAL


def test_moved_elsewhere_the_long_way_has_the_word():
    layer = layer_of(3).to("meta")
    assert path_of(layer(X.to("meta"))) is GENERAL


@pytest.mark.parametrize(
    ("break_it", "error"),
    [
        (lambda layer: setattr(layer, "eps", 0.0), InputError),
        (lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(4))), ShapeError),
    ],
)
def test_refusals_leave_the_buffers_alone(break_it, error):
    layer = layer_of(3)
    before = [value.clone() for value in layer.buffers()]
    break_it(layer)
    for x in (X, X.clone().requires_grad_()):
        with pytest.raises(error):
            layer(x)
    assert all(map(torch.equal, before, layer.buffers()))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_differentiated_twice(activation, training):
    layer = layer_of(3, training, dtype=torch.float64, activation=activation)
    x, residual = (data((4, 3, 2), torch.float64, seed=seed)[0] for seed in (0, 2))
    assert path_of(layer(x, residual=residual)) is FAST

    def run(x, weight, bias, residual=None):
        layer.weight, layer.bias = None, None
        del layer.weight, layer.bias
        layer.register_parameter("weight", weight), layer.register_parameter("bias", bias)
        return layer(x, residual=residual)

    given = x, nn.Parameter(torch.rand(3, dtype=torch.float64)), nn.Parameter(torch.rand(3, dtype=torch.float64))
    for inputs in (given, (*given, residual)):
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_are_the_same_in_both_nodes(monkeypatch, dtype):
    def gradients():
        layer, (x, dy) = layer_of(5), data((16, 5, 8), dtype)
        y = layer(x)
        first = torch.autograd.grad(y, (x, *layer.parameters()), dy.requires_grad_(), create_graph=True)
        loss = sum(grad.double().square().sum() for grad in first)
        return path_of(y), (*first, *torch.autograd.grad(loss, (x, dy, layer.weight)))

    path, found = gradients()
    monkeypatch.setattr(fast_path, "MOST_IN_TORCHS_NODE", -1)
    other_path, expected = gradients()
    assert (path, other_path) == (TORCHS_NODE, FAST)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(path, ours, theirs)


def test_third_derivatives_in_torchs_node():
    """Torch's formula for the second takes mean and rstd for constants, so its third is wrong."""
    layer, x = layer_of(3, dtype=torch.float64), data((6, 3, 2), torch.float64)[0]
    assert path_of(layer(x)) == TORCHS_NODE

    def second(x):
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, (x,))


def test_gradients_mapped_by_torch_func():
    layer, (x, dy) = layer_of(3), data((8, 3, 5))
    y, inputs = layer(x), (x, *layer.parameters())
    assert path_of(y) == TORCHS_NODE
    many = torch.stack([dy, -2 * dy])
    at_once = torch.func.vmap(lambda dy: torch.autograd.grad(y, inputs, dy, retain_graph=True))(many)
    for i, one in enumerate(many):
        for found, expected in zip(at_once, torch.autograd.grad(y, inputs, one, retain_graph=True), strict=True):
            torch.testing.assert_close(found[i], expected)


@pytest.mark.parametrize("way", ["decompositions", "before dispatch", "python dispatcher"])
def test_where_torch_takes_its_operator_apart(way):
    layer, (x, _) = layer_of(3), data((8, 3, 5))
    expected = layer(x)
    if way == "python dispatcher":
        with enable_python_dispatcher():
            found = layer(x)
    else:
        options = {"pre_dispatch": True} if way == "before dispatch" else {"decomposition_table": DECOMPOSITIONS}
        found = make_fx(layer, **options)(x)(x)
    assert_same_bits(way, found, expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_batch_of_gradients_at_once(activation, training):
    layer, (x, dy) = layer_of(3, training, activation=activation), data((4, 3, 2))
    y, inputs = layer(x), (x, *layer.parameters())
    many = torch.stack([dy, -2 * dy])
    at_once = torch.autograd.grad(y, inputs, many, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(many):
        for found, expected in zip(at_once, torch.autograd.grad(y, inputs, one, retain_graph=True), strict=True):
            torch.testing.assert_close(found[i], expected)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_what_is_saved(activation):
    kept = list[torch.Tensor]()
    layer = layer_of(3, activation=activation)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        layer(X)  # which needs no gradient
    x, statistics, *parameters = kept
    assert x.data_ptr() == X.data_ptr()
    assert statistics.shape == (2, 3)
    assert parameters == [layer.weight] if activation is None else [layer.weight, layer.bias]


@pytest.mark.parametrize(("activation", "kept"), [(None, 3), ("relu", 5), ("silu", 5)])
def test_what_is_saved_of_a_residual(activation, kept):
    """Nothing, the output, which the next layer saves too, or the residual."""
    saved = list[torch.Tensor]()
    layer, residual = layer_of(3, activation=activation), torch.randn(X.shape)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):
        y = layer(X, residual=residual)
    assert len(saved) == kept
    beside = {"relu": y, "silu": residual}.get(activation)
    assert beside is None or beside.data_ptr() == saved[-1].data_ptr()


def test_what_was_changed_in_place_is_refused():
    layer, (x, dy) = layer_of(3), data((4, 3, 2))
    y = layer(x)
    y.backward(dy, retain_graph=True)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_what_torchs_node_saves():
    kept = list[torch.Tensor]()
    layer, x = layer_of(3), X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        assert path_of(layer(x)) == TORCHS_NODE
    assert [value.shape for value in kept] == [x.shape, (3,), (3,), (3,), (10,)]
    assert [value.data_ptr() for value in kept[:2]] == [x.data_ptr(), layer.weight.data_ptr()]


def test_a_large_tensor_gets_our_node():
    layer, most = layer_of(2), fast_path.MOST_IN_TORCHS_NODE
    for rows, path in ((most // 2, TORCHS_NODE), (most // 2 + 1, FAST)):
        assert path_of(layer(torch.randn(rows, 2, requires_grad=True))) == path


def test_images_of_one_channel_or_one_value():
    """Torch takes some without gaps for channels_last, whose gradients `vmap` cannot copy."""
    shapes = (4, 1, 3, 2), (4, 1, 3, 1), (4, 1, 1, 1), (4, 3, 1, 1), (4, 3, 1, 1, 1)
    for shape, last in product(shapes, (True, False)):
        x, _ = data(shape)
        if last:
            x = x.detach().to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
        y = layer_of(shape[1])(x.requires_grad_())
        torch.autograd.grad(y, x, torch.randn(2, *y.shape), is_grads_batched=True)


def test_what_the_update_does_not_take_goes_the_long_way(monkeypatch):
    def make():
        layer = layer_of(3)
        layer.num_batches_tracked = layer.num_batches_tracked.float()
        return layer

    x, dy = data((8, 3, 5))
    (path, found), (_, expected) = both_paths(monkeypatch, make, x, dy)
    assert path == GENERAL
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(path, ours, theirs)


def test_under_autocast(monkeypatch):
    with torch.autocast("cpu"):
        x, dy = data((8, 5, 3), torch.bfloat16)
        (path, found), (_, expected) = both_paths(monkeypatch, partial(layer_of, 5), x, dy)
    assert path == TORCHS_NODE
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(path, ours, theirs)


def test_the_cause_of_an_error_in_the_backward_is_named(capfd):
    x = data((8, 3))[0]
    y = layer_of(3)(x)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="could not compute the backward") as error:
        y.sum().backward()
    assert "storage must not be smaller" in str(error.value) + capfd.readouterr().err  # torch 2.11 prints it


def test_torchs_operator_on_the_cpu_is_for_us_alone():
    x, weight, running = torch.randn(4, 3), torch.ones(3), torch.zeros(3)
    for arguments in ((running, running, True), (None, None, False)):
        with pytest.raises(RuntimeError, match="without running statistics"):
            torch.cudnn_batch_norm(x, weight, None, *arguments, 0.1, 1e-5)


def test_where_another_library_has_those_kernels_ours_is_the_node(monkeypatch):
    monkeypatch.setattr(cpu, "has_kernel", lambda operator, _: operator == "aten::cudnn_batch_norm_backward")
    library = SimpleNamespace(
        batchnorm_operator_of_node=[b"cudnn_batch_norm", b"cudnn_batch_norm_backward", None].__getitem__,
        batchnorm_key_of_node=[b"CPU", b"AutogradCPU", None].__getitem__,
        batchnorm_register_in_torchs_node=pytest.fail,
    )
    assert not cpu._joins_torchs_node(library)


def test_without_torchs_node(monkeypatch):
    steps = cpu._STEPS
    x, dy = data((8, 5, 3))
    expected = outcome(layer_of(5), x, dy)
    monkeypatch.setattr(cpu, "_STEPS", steps._replace(training=steps.training._replace(in_torchs_node=None)))
    found = outcome(layer_of(5), x, dy)
    assert (expected[0], found[0]) == (TORCHS_NODE, FAST)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert_same_bits("a node in Python", ours, theirs)
