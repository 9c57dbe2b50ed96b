"""Bad input: the invariant, what came, the remedy; torch's exception type; nothing moved."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import batchnorm as bn
from batchnorm.errors import ArgumentError, BatchNormError, DTypeError, InputError, ShapeError, StateError
from batchnorm.functional import batch_norm, normalize, normalize_with
from batchnorm.statistics import Domains, MovingAverage, Renorm
from tests.budget import assert_same_bits
from tests.layer_table import ROWS, Row

X = torch.randn(4, 3, 5)


def layer(**options):
    return bn.BatchNorm1d(3, **options)


def with_buffers(mean, variance=None, **options):
    """A layer of three channels, whose running statistics are as wide as pruning or loading left them."""
    built = layer(**options)
    built.running_mean, built.running_var = torch.full((mean,), 7.0), torch.full((variance or mean,), 2.0)
    return built


LAYER_CASES = {
    "rank-1d": (layer, (torch.randn(2, 3, 4, 4),), InputError, ValueError, r"expected 2D or 3D input \(got 4D input\)"),
    "rank-2d": (lambda: bn.BatchNorm2d(3), (X,), InputError, ValueError, r"expected 4D input \(got 3D input\)"),
    "rank-3d": (lambda: bn.BatchNorm3d(3), (X,), InputError, ValueError, r"expected 5D input \(got 3D input\)"),
    "rank-any": (lambda: bn.BatchNorm(3), (torch.randn(3),), InputError, ValueError, r"at least 2D.*got 1D"),
    "axis": (lambda: bn.BatchNorm(3, channel_axis=4), (X,), InputError, ValueError, r"channel_axis=4 is out of range"),
    "channels": (layer, (torch.randn(4, 2, 5),), ShapeError, RuntimeError, r"should contain 2 elements.*\(3,\)"),
    "channels-without-affine": (
        lambda: layer(affine=False),
        (torch.randn(4, 2),),
        ShapeError,
        RuntimeError,
        "2 elements",
    ),
    "buffers-too-wide": (lambda: with_buffers(6), (X,), ShapeError, RuntimeError, r"contain 3 elements.*\(6,\)"),
    "buffers-too-narrow": (lambda: with_buffers(1), (X,), ShapeError, RuntimeError, r"contain 3 elements.*\(1,\)"),
    "buffers-under-mask": (
        lambda: with_buffers(6),
        (X, None, torch.ones(4, 5, dtype=torch.bool)),
        ShapeError,
        RuntimeError,
        "contain 3 elements",
    ),
    "variance-too-wide": (lambda: with_buffers(3, 6), (X,), ShapeError, RuntimeError, "running_var should contain 3"),
    **{
        f"buffers-{name}": (
            lambda source=source: with_buffers(6, statistics=source()),
            (X,),
            ShapeError,
            RuntimeError,
            "3 elements",
        )
        for name, source in {
            "ghost": lambda: bn.statistics.Ghost(2),
            "renorm": bn.statistics.Renorm,
            "running": bn.statistics.Running,
            "domains": lambda: bn.statistics.Domains(("a", "b")),
        }.items()
    },
    "channels-untracked": (
        lambda: layer(track_running_stats=False),
        (torch.randn(4, 2),),
        ShapeError,
        RuntimeError,
        "weight should contain 2 elements",
    ),
    "integers": (
        layer,
        (torch.ones(4, 3, dtype=torch.long),),
        DTypeError,
        NotImplementedError,
        "not implemented for torch.int64",
    ),
    "booleans": (
        layer,
        (torch.ones(4, 3, dtype=torch.bool),),
        DTypeError,
        RuntimeError,
        "not implemented for torch.bool",
    ),
    "float8": (layer, (torch.ones(4, 3).to(torch.float8_e4m3fn),), DTypeError, TypeError, "at least 16 bits"),
    "one-value": (
        layer,
        (torch.randn(1, 3),),
        InputError,
        ValueError,
        "Expected more than 1 value per channel when training",
    ),
    "one-value-3d": (layer, (torch.randn(1, 3, 1),), InputError, ValueError, "Expected more than 1 value per channel"),
    "eps-zero": (
        lambda: layer(eps=0.0),
        (X,),
        InputError,
        ValueError,
        "batch_norm eps must be positive during training, but got 0.0",
    ),
    "eps-negative": (
        lambda: layer(eps=-1.0).eval(),
        (X,),
        InputError,
        ValueError,
        "batch_norm eps must be non-negative",
    ),
    "residual-shape": (
        layer,
        (X, torch.randn(4, 3, 1)),
        ShapeError,
        ValueError,
        r"residual must have the input's shape \(4, 3, 5\)",
    ),
    "mask-dtype": (layer, (X, None, torch.ones(4, 5)), DTypeError, TypeError, "mask must be boolean"),
    "mask-shape": (
        layer,
        (X, None, torch.ones(4, 3, dtype=torch.bool)),
        ShapeError,
        ValueError,
        r"broadcast.*\(4, 5\).*\(4, 3\)",
    ),
    "mask-rank": (
        layer,
        (X, None, torch.ones(4, 1, 5, dtype=torch.bool)),
        ShapeError,
        ValueError,
        "without its channel axis",
    ),
    "momentum-text": (
        lambda: layer(momentum="fast"),
        (X,),
        ArgumentError,
        TypeError,
        "momentum must be a number.*'fast'",
    ),
    "complex-residual": (
        lambda: bn.BatchNorm1d(3, dtype=torch.complex64),
        (X.to(torch.complex64), X),
        DTypeError,
        TypeError,
        "residual must be complex",
    ),
    "complex-into-real": (
        layer,
        (X.to(torch.complex64),),
        DTypeError,
        TypeError,
        "running statistics must be complex for complex input",
    ),
    "no-running": (
        lambda: layer(track_running_stats=False, statistics=bn.statistics.Running()),
        (X,),
        StateError,
        RuntimeError,
        "this layer has none",
    ),
    "axis-batch": (
        lambda: bn.BatchNorm(3, channel_axis=-2),
        (X[:, :, 0],),
        InputError,
        ValueError,
        "axis 0, the batch's",
    ),
    "axis-residual": (
        lambda: bn.BatchNorm(5, channel_axis=-1),
        (X, torch.randn(3)),
        ShapeError,
        ValueError,
        r"residual must have the input's shape \(4, 3, 5\)",
    ),
    "residual-number": (layer, (X, 3), ArgumentError, TypeError, "residual must be a tensor"),
    "residual-complex": (layer, (X, X.to(torch.complex64)), DTypeError, TypeError, "residual must be floating"),
    "residual-integer": (layer, (X, X.long()), DTypeError, TypeError, "residual must be floating"),
    "mask-list": (layer, (X, None, [True]), ArgumentError, TypeError, "mask must be a boolean tensor"),
    "lazy-list": (bn.LazyBatchNorm1d, ([1, 2],), ArgumentError, TypeError, "input must be a tensor"),
    "not-a-tensor": (layer, ([[1.0, 2.0, 3.0]],), ArgumentError, TypeError, "input must be a tensor, but got list"),
}


@pytest.mark.parametrize("case", LAYER_CASES)
def test_layers_refuse_and_nothing_moves(case):
    make, inputs, ours, torchs, message = LAYER_CASES[case]
    built = make()
    before = {name: value.clone() for name, value in built.named_buffers() if not is_lazy(value)}
    with pytest.raises(ours, match=message) as raised:
        built(*inputs)
    assert isinstance(raised.value, torchs)
    assert isinstance(raised.value, BatchNormError)
    after = {name: value for name, value in built.named_buffers() if not is_lazy(value)}
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("given", [[1.0, 2.0], None, np.ones((4, 3), np.float32)], ids=["list", "None", "array"])
def test_compiled_layers_refuse_what_is_no_tensor(given):
    torch._dynamo.reset()
    with pytest.raises(ArgumentError, match=f"input must be a tensor, but got {type(given).__name__}"):
        torch.compile(layer(), backend="eager")(given)


CONSTRUCTOR_CASES = {
    "no-channels": (lambda: bn.BatchNorm1d(0), InputError, "num_features must be at least 1, but got 0"),
    "negative-channels": (lambda: bn.BatchNorm1d(-3), InputError, "at least 1, but got -3"),
    "channels-text": (lambda: bn.BatchNorm1d("3"), ArgumentError, "num_features must be an int.*'3'"),
    "channels-float": (lambda: bn.BatchNorm1d(3.0), ArgumentError, "num_features must be an int"),
    "channels-bool": (lambda: bn.BatchNorm1d(True), ArgumentError, "num_features must be an int"),
    "activation": (
        lambda: layer(activation="sigmoid"),
        InputError,
        "activation must be None, one of 'relu'.*'sigmoid'",
    ),
    "activation-module": (lambda: layer(activation=nn.Tanh()), InputError, r"Tanh\(\).*after the layer"),
    "axis-batch": (lambda: bn.BatchNorm(3, channel_axis=0), InputError, "other than 0"),
    "axis-text": (lambda: bn.BatchNorm(3, channel_axis="last"), ArgumentError, "channel_axis must be an int"),
    "axis-bool": (lambda: bn.BatchNorm(3, channel_axis=True), ArgumentError, "channel_axis must be an int"),
    "statistics-class": (lambda: layer(statistics=bn.statistics.Running), InputError, "must be a statistics source"),
    "variance": (
        lambda: layer(running_variance="sample"),
        InputError,
        "running_variance must be one of 'unbiased', 'biased'",
    ),
    "on-single": (lambda: layer(on_single="ignore"), InputError, "on_single must be one of"),
    "on-nonfinite": (lambda: layer(on_nonfinite=None), InputError, "on_nonfinite must be one of"),
    "statistics": (
        lambda: layer(statistics="running"),
        InputError,
        r"must be a statistics source such as batchnorm.statistics.Batch\(\)",
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTOR_CASES)
def test_constructors_refuse(case):
    make, ours, message = CONSTRUCTOR_CASES[case]
    with pytest.raises(ours, match=message):
        make()


FUNCTION_CASES = {
    "one-buffer": (
        lambda: batch_norm(X, torch.zeros(3), None, training=True),
        InputError,
        ValueError,
        "both be None or neither",
    ),
    "no-buffers": (lambda: batch_norm(X, None, None), StateError, RuntimeError, "must be defined in evaluation mode"),
    "weight": (
        lambda: batch_norm(X, None, None, torch.ones(4), training=True),
        ShapeError,
        RuntimeError,
        "weight should contain 3",
    ),
    "weight-rank": (
        lambda: normalize(X, torch.ones(3, 1)),
        ShapeError,
        RuntimeError,
        r"weight should contain 3.*\(3, 1\)",
    ),
    "bias": (lambda: normalize(X, None, torch.ones(4)), ShapeError, RuntimeError, "bias should contain 3"),
    "vector": (lambda: normalize(torch.randn(3)), ShapeError, RuntimeError, r"batch axis and a channel axis.*\(3,\)"),
    "scalar": (lambda: normalize(torch.tensor(1.0)), ShapeError, RuntimeError, "batch axis and a channel axis"),
    "eps": (lambda: normalize(X, eps=0.0), InputError, ValueError, "eps must be positive during training"),
    "eps-given": (
        lambda: normalize_with(X, torch.zeros(3), torch.ones(3), eps=-1.0),
        InputError,
        ValueError,
        "but got -1.0",
    ),
    "mean": (
        lambda: normalize_with(X, torch.zeros(4), torch.ones(4)),
        ShapeError,
        RuntimeError,
        "running_mean should contain 3",
    ),
    "one-value": (
        lambda: batch_norm(X[:1, :, :1], None, None, training=True),
        InputError,
        ValueError,
        "drop_last=True",
    ),
    "momentum": (
        lambda: batch_norm(X, torch.zeros(3), torch.ones(3), training=True, momentum=None),
        ArgumentError,
        TypeError,
        "momentum must be a number",
    ),
}


@pytest.mark.parametrize("case", FUNCTION_CASES)
def test_functions_refuse(case):
    call, ours, torchs, message = FUNCTION_CASES[case]
    with pytest.raises(ours, match=message) as raised:
        call()
    assert isinstance(raised.value, torchs)


def test_no_channels_is_torchs_nothing():
    buffers = torch.zeros(0), torch.zeros(0)
    assert batch_norm(torch.randn(2, 0, 3), *buffers, training=True).shape == (2, 0, 3)
    assert batch_norm(torch.randn(0), *buffers, training=True).shape == (0,)
    assert batch_norm(torch.randn(0), *buffers).shape == (0,)
    assert normalize(torch.randn(0))[1].mean.shape == (0,)


def with_source(name, source):
    return Row(name, lambda **k: bn.BatchNorm2d(3, statistics=source, **k), (4, 3, 5, 2))


EVERY_ROW = [
    *ROWS,
    with_source("moving-average", MovingAverage(4, warmup=0)),
    with_source("moving-average-warming-up", MovingAverage(4)),
    with_source("centered", MovingAverage(4, warmup=0, centered=True)),
    with_source("domains-moving-average", Domains(("real", "fake"), MovingAverage(4, warmup=0))),
    with_source("domains-renorm", Domains(("real", "fake"), Renorm(warmup=0))),
    Row(
        "moving-average-last-axis",
        lambda **k: bn.BatchNorm(3, channel_axis=-1, statistics=MovingAverage(4), **k),
        (4, 5, 3),
    ),
]


def other_channels(number):
    def call(layer, x):
        axis = getattr(layer, "channel_axis", 1)
        return layer(torch.randn([number if i == axis % x.dim() else size for i, size in enumerate(x.shape)]))

    return call


def one_value(layer, x):
    for axis in set(range(x.dim())) - {layer.channel_axis % x.dim()}:
        x = x.narrow(axis, 0, 1)
    return layer(x)


def masked(x, layer):
    """What counts of x, (N, *S): everything; the fast path takes no mask."""
    return torch.ones_like(x.movedim(layer.channel_axis, 1)[:, 0], dtype=torch.bool)


def spoiled(name, value):
    def call(layer, x):
        if name in layer._buffers or name in layer._parameters:
            store = layer._buffers if name in layer._buffers else layer._parameters
            store[name] = value(store[name])
        else:
            setattr(layer, name, value(None))
        try:
            return layer(x, mask=masked(x, layer))
        finally:
            vars(layer)["spoiled"] = name  # its own value is not compared

    return call


def wider(tensor):
    return nn.Parameter(torch.ones(7)) if tensor is None or isinstance(tensor, nn.Parameter) else torch.ones(7)


def raises_on_nan(layer, x):
    layer.on_nonfinite = "error"
    return layer(torch.full_like(x, float("nan")))


def in_an_unknown_domain(layer, x):
    with bn.domain("unknown"):
        return layer(x)


def windows_too_long(layer, x):
    layer._buffers["running_var_gradient"] = torch.zeros(9, 3)
    vars(layer)["spoiled"] = "running_var_gradient"
    return layer(x)


BAD_CALLS = {
    "one-channel": other_channels(1),
    "more-channels": other_channels(5),
    "lower-rank": lambda layer, x: layer(x.reshape(-1)),
    "higher-rank": lambda layer, x: layer(x[..., None, None, None]),
    "integers": lambda layer, x: layer(x.long()),
    "booleans": lambda layer, x: layer(x > 0),
    "float8": lambda layer, x: layer(x.to(torch.float8_e4m3fn)),
    "complex": lambda layer, x: layer(x.to(torch.complex64)),
    "a-list": lambda layer, x: layer(x.tolist()),
    "one-value": one_value,
    "residual-shape": lambda layer, x: layer(x, x[:1]),
    "residual-rank": lambda layer, x: layer(x, torch.randn(3, 3)),
    "residual-integers": lambda layer, x: layer(x, x.long()),
    "residual-complex": lambda layer, x: layer(x, x.to(torch.complex64)),
    "residual-number": lambda layer, x: layer(x, 3),
    "mask-dtype": lambda layer, x: layer(x, mask=masked(x, layer).float()),
    "mask-shape": lambda layer, x: layer(x, mask=torch.ones(3, 7, dtype=torch.bool)),
    "mask-rank": lambda layer, x: layer(x, mask=masked(x, layer)[None, None, None]),
    "mask-list": lambda layer, x: layer(x, mask=[True]),
    "mask-and-residual": lambda layer, x: layer(x, x[:1], masked(x, layer)),
    "lengths-float": lambda layer, x: layer(x, lengths=torch.ones(x.shape[0])),
    "lengths-shape": lambda layer, x: layer(x, lengths=torch.ones(9, dtype=torch.long)),
    "lengths-list": lambda layer, x: layer(x, lengths=[1]),
    "momentum": spoiled("momentum", lambda _: "fast"),
    "eps-zero": spoiled("eps", lambda _: 0.0),
    "eps-negative": spoiled("eps", lambda _: -1.0),
    "weight": spoiled("weight", wider),
    "bias": spoiled("bias", wider),
    "running_mean": spoiled("running_mean", wider),
    "running_var": spoiled("running_var", wider),
    "windows": windows_too_long,
    "unknown-domain": in_an_unknown_domain,
    "nan-raises": raises_on_nan,
}

# What is no mistake for some layers, by their names in the table.
FINE = {
    "complex": {"no-tracking"},
    "windows": {row.name for row in EVERY_ROW if "moving-average" not in row.name and row.name != "centered"},
    "unknown-domain": {row.name for row in EVERY_ROW if "domains" not in row.name},
    "nan-raises": {"running", "no-tracking"},
    "momentum": {"running", "no-tracking"},
    "eps-zero": {"running"},
    "one-value": {"running"},
    "running_mean": {"no-tracking"},
    "running_var": {"no-tracking"},
}


@pytest.mark.parametrize("row", EVERY_ROW, ids=lambda row: row.name)
def test_a_call_that_raises_writes_nothing(row):
    for bad, grad in itertools.product(BAD_CALLS, (False, True)):
        if row.name not in FINE.get(bad, ()):
            raises_and_writes_nothing(row, bad, grad)


def raises_and_writes_nothing(row, bad, grad):
    layer, x = row.ours(), torch.randn(row.shape, requires_grad=grad)
    if bad == "higher-rank" and type(layer) is bn.BatchNorm:  # it takes any
        return
    for _ in range(2):
        y = layer(torch.randn(row.shape, requires_grad=grad))
        if grad:
            y.sum().backward()
    named = {**dict(layer.named_buffers()), "nonfinite": layer.num_nonfinite_batches}
    before = {name: value.clone() for name, value in named.items() if value is not None}
    try:
        with torch.set_grad_enabled(grad):
            BAD_CALLS[bad](layer, x)
    except BatchNormError:
        pass
    else:
        pytest.fail(f"{bad}, grad={grad}: nothing was raised")
    for name, value in before.items():
        if name != vars(layer).get("spoiled"):
            assert_same_bits(f"{bad}, grad={grad}: {name}", named[name], value)
            assert name not in layer._buffers or layer._buffers[name] is named[name]


def test_windows_hold_no_infinity():
    """Statistics that are finite in float64 alone stay out of windows of float32, as they stay out of the running statistics."""
    layer = bn.BatchNorm1d(3, statistics=MovingAverage(4, warmup=0))
    for scale in (1.0, 1e25, 1.0):
        x = (torch.randn(16, 3) * scale).requires_grad_()
        (layer(x) * torch.randn(16, 3) * 1e30).sum().backward()
    assert all(value.isfinite().all() for value in layer.buffers())
    assert layer.num_nonfinite_batches == 1
