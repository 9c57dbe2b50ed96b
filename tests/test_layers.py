"""The layers: what a user of torch's expects, and what ours add."""

import gc
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from batchnorm.statistics import Batch, Domains, MovingAverage, Renorm, Running, TaskNorm

GOLDEN = Path(__file__).parent / "golden" / "state_layouts.json"
LAYERS = {
    "BatchNorm": lambda **k: bn.BatchNorm(3, **k),
    "BatchNorm1d": lambda **k: bn.BatchNorm1d(3, **k),
    "BatchNorm2d": lambda **k: bn.BatchNorm2d(3, **k),
    "BatchNorm3d": lambda **k: bn.BatchNorm3d(3, **k),
    "LazyBatchNorm1d": lambda **k: initialized(bn.LazyBatchNorm1d(**k), (2, 3)),
    "LazyBatchNorm2d": lambda **k: initialized(bn.LazyBatchNorm2d(**k), (2, 3, 2, 2)),
    "LazyBatchNorm3d": lambda **k: initialized(bn.LazyBatchNorm3d(**k), (2, 3, 2, 2, 2)),
}
VARIANTS = {
    "default": {},
    "no-affine": {"affine": False},
    "no-bias": {"bias": False},
    "no-tracking": {"track_running_stats": False},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "activation": {"activation": "relu"},
    "domains": {"statistics": Domains(("real", "fake"))},
    "domains-of-moving-averages": {"statistics": Domains(("real", "fake"), within=MovingAverage(window=4))},
    "domains-of-their-own-affine": {"statistics": Domains(("real", "fake"), affine=True)},
    "task-norm": {"statistics": TaskNorm("layer")},
    "moving-average": {"statistics": MovingAverage(window=4)},
    "renorm": {"statistics": Renorm()},
    "running": {"statistics": Running()},
}


def initialized(layer: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    dtype = next((p.dtype for p in layer.parameters()), torch.float32)
    layer(torch.randn(shape).to(dtype))
    return layer


def test_state_layouts_are_the_golden_ones():
    """Names, shapes and dtypes of every state_dict: a change here breaks checkpoints."""
    layouts = {
        f"{name}/{variant}": {
            key: [list(value.shape), str(value.dtype)] for key, value in layer(**options).state_dict().items()
        }
        for name, layer in LAYERS.items()
        for variant, options in VARIANTS.items()
    }
    if os.environ.get("UPDATE_GOLDEN"):
        lines = [f"{json.dumps(name)}: {json.dumps(layout)}" for name, layout in sorted(layouts.items())]
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert layouts == json.loads(GOLDEN.read_text()), "if this is meant, write it anew with UPDATE_GOLDEN=1 pytest"


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_is_torchs_class_with_torchs_repr(name):
    ours, torchs = getattr(bn, name)(3, momentum=0.2), getattr(nn, name)(3, momentum=0.2)
    assert isinstance(ours, getattr(nn, name))
    assert isinstance(ours, _BatchNorm)
    assert repr(ours) == repr(torchs)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    for lazy in (getattr(bn, "Lazy" + name)(), getattr(nn, "Lazy" + name)()):
        assert "0, eps=1e-05" in repr(lazy)


def test_repr_tells_our_options():
    layer = bn.BatchNorm(3, activation=nn.ReLU(), channel_axis=-1, on_single="running", statistics=Running())
    assert repr(layer).endswith("activation=relu, statistics=Running(), channel_axis=-1, on_single='running')")


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_checkpoints_go_both_ways(name):
    torchs = getattr(nn, name)(3)
    shape = (4, 3, 5, 2, 2)[: {"BatchNorm1d": 3, "BatchNorm2d": 4, "BatchNorm3d": 5}[name]]
    torchs(torch.randn(shape))
    ours = getattr(bn, name)(3)
    ours.load_state_dict(torchs.state_dict())
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), rtol=0, atol=0)
    ours(torch.randn(shape))
    torchs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), rtol=0, atol=0)


def test_checkpoints_older_than_the_counter_load():
    state = bn.BatchNorm2d(3).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    layer = bn.BatchNorm2d(3)
    layer(torch.randn(2, 3, 4, 4))
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 1


def test_half_precision_checkpoints_load_into_wide_statistics():
    state = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in nn.BatchNorm1d(3).state_dict().items()
    }
    layer = bn.BatchNorm1d(3)
    layer.load_state_dict(state, assign=True)
    assert layer.running_mean.dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16


class TutorialBatchNorm(nn.Module):
    """The layer of the tutorial's section 5, as far as its state goes: statistics are plain attributes."""

    def __init__(self, num_features):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((num_features,), 2.0))
        self.beta = nn.Parameter(torch.full((num_features,), 3.0))


def test_the_tutorials_checkpoints_load(caplog):
    network = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3), nn.Linear(3, 2))
    tutorials = nn.Sequential(nn.Linear(4, 3), TutorialBatchNorm(3), nn.Linear(3, 2))
    with caplog.at_level(logging.WARNING, "batchnorm"):
        keys = network.load_state_dict(tutorials.state_dict())
    assert keys.missing_keys == keys.unexpected_keys == []
    assert "no running statistics" in caplog.text
    assert network[1].weight.eq(2).all()
    assert network[1].bias.eq(3).all()
    assert "gamma" not in network[1].state_dict()


def test_the_tutorials_checkpoints_may_hold_statistics(caplog):
    layer = bn.BatchNorm1d(3)
    layer.load_state_dict(
        {"gamma": torch.ones(3), "beta": torch.ones(3), "running_mean": torch.ones(3), "running_var": torch.ones(3)}
    )
    assert layer.running_mean.eq(1).all()
    assert not caplog.records


def test_gamma_and_beta_are_weight_and_bias():
    layer = bn.BatchNorm1d(3)
    assert layer.gamma is layer.weight
    assert layer.beta is layer.bias
    layer.gamma = nn.Parameter(torch.full((3,), 2.0))
    layer.beta = None
    assert layer.weight.eq(2).all()
    assert layer.bias is None
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_thousand_steps_hold_no_graph():
    """The tutorial's statistics keep every step's graph alive; ours keep none: the tensors alive after 1000 steps are those after 10."""
    layer = bn.BatchNorm1d(8)
    counts = []
    for step in range(1000):
        layer(torch.randn(16, 8)).sum().backward()
        if step in (9, 999):
            gc.collect()
            counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert counts[1] <= counts[0]  # what earlier tests left may go meanwhile
    assert layer.running_mean.grad_fn is None
    assert {"running_mean", "running_var", "num_batches_tracked"} <= set(layer.state_dict())


def test_momentum_weighs_the_new_value():
    """The tutorial has it upside down: a larger momentum follows the new batch faster."""
    x = torch.full((4, 3), 10.0) + torch.randn(4, 3)
    slow, fast = bn.BatchNorm1d(3, momentum=0.01), bn.BatchNorm1d(3, momentum=0.9)
    slow(x)
    fast(x)
    torch.testing.assert_close(slow.running_mean, 0.01 * x.mean(0))
    torch.testing.assert_close(fast.running_mean, 0.9 * x.mean(0))


def test_momentum_none_averages_all_batches():
    layer = bn.BatchNorm1d(3, momentum=None)
    batches = [torch.randn(4, 3) * k + k for k in range(1, 6)]
    for batch in batches:
        layer(batch)
    torch.testing.assert_close(layer.running_mean, torch.stack([batch.mean(0) for batch in batches]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([batch.var(0) for batch in batches]).mean(0))


def test_running_variance_may_be_biased():
    x = torch.randn(4, 3)
    layer = bn.BatchNorm1d(3, momentum=1.0, running_variance="biased")
    layer(x)
    torch.testing.assert_close(layer.running_var, x.var(0, unbiased=False))


@pytest.mark.parametrize("axis", [-1, 1, 2, 3, -2])
def test_channel_axis(axis):
    x = torch.randn(4, 3, 3, 3)
    ours, torchs = bn.BatchNorm(3, channel_axis=axis), nn.BatchNorm2d(3)
    expected = torchs(x.movedim(axis, 1)).movedim(1, axis)
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    residual, mask = torch.randn_like(x), torch.rand([4, 3, 3]) > 0.5
    y = ours(x, residual, mask)
    moved = bn.BatchNorm(3)(x.movedim(axis, 1), residual.movedim(axis, 1), mask)
    torch.testing.assert_close(y, moved.movedim(1, axis))


@pytest.mark.parametrize("policy", ["running", "skip"])
def test_single_value_by_policy(policy):
    layer = bn.BatchNorm1d(3, on_single=policy)
    layer.beta.data.fill_(0.5)
    layer.running_mean.fill_(1.0)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(1, 3, requires_grad=True)
    y = layer(x)
    expected = (x - 1) / (1 + 1e-5) ** 0.5 + 0.5 if policy == "running" else torch.full((1, 3), 0.5)
    torch.testing.assert_close(y, expected)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_nonfinite_batches_are_skipped_and_counted(value, momentum):
    layer, twin = bn.BatchNorm1d(3, momentum=momentum), bn.BatchNorm1d(3, momentum=momentum)
    bad = torch.randn(4, 3)
    bad[1, 2] = value
    for _ in range(2):
        x = torch.randn(4, 3)
        for batch in (x, bad):
            layer(batch)
        twin(x)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert layer.num_nonfinite_batches == 2
    layer.reset_running_stats()
    assert layer.num_nonfinite_batches == 0


def test_nonfinite_batches_propagate_as_in_torch():
    ours, torchs = bn.BatchNorm1d(3, on_nonfinite="propagate"), nn.BatchNorm1d(3)
    bad = torch.randn(4, 3)
    bad[1, 2] = float("nan")
    torch.testing.assert_close(ours(bad), torchs(bad), equal_nan=True)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), equal_nan=True)


def test_nonfinite_batches_may_raise():
    layer = bn.BatchNorm1d(3, on_nonfinite="error")
    layer(torch.randn(4, 3))
    before = {name: value.clone() for name, value in layer.named_buffers()}
    with pytest.raises(bn.errors.InputError, match="NaN or Inf"):
        layer(torch.full((4, 3), float("nan")))
    torch.testing.assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)


def test_masked_batches_too_small_are_not_counted():
    layer = bn.BatchNorm1d(3)
    layer(torch.randn(4, 3), mask=torch.tensor([True, False, False, False]))
    assert layer.num_batches_tracked == 0
    assert layer.running_var.eq(1).all()
    layer(torch.randn(4, 3), mask=torch.tensor([True, True, False, False]))
    assert layer.num_batches_tracked == 1


def test_statistics_in_half_precision_do_not_stall():
    """torch's bfloat16 running mean of data with mean 10 stalls at 4.0 with momentum 0.001."""
    layer = bn.BatchNorm1d(1, momentum=0.001).bfloat16()
    x = (torch.randn(64, 1) * 0.1 + 10).bfloat16()
    for _ in range(3000):
        layer(x)
    assert abs(layer.running_mean.item() - 10 * (1 - 0.999**3000)) < 0.01


def test_wide_statistics_can_be_given_up():
    layer = bn.BatchNorm1d(3)
    layer.keep_wide_statistics = False
    assert layer.bfloat16().running_mean.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_wide_statistics_survive_a_round_trip(dtype):
    layer = bn.BatchNorm1d(3)
    layer.running_mean.fill_(1 / 3)
    layer.to(dtype)
    assert layer.running_mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer.float().running_mean[0] == torch.tensor(1 / 3)


def test_complex_layers():
    layer = bn.BatchNorm1d(3, dtype=torch.complex64)
    x = torch.randn(16, 3, dtype=torch.complex64)
    layer.running_var.fill_(1 + 1j)
    y = layer(x)
    torch.testing.assert_close(y.real.var(0, unbiased=False), torch.ones(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))
    assert layer.eval()(x).dtype == torch.complex64


def test_without_running_statistics_inference_uses_the_batch():
    ours, torchs = (kind(3, track_running_stats=False).eval() for kind in (bn.BatchNorm1d, nn.BatchNorm1d))
    x = torch.randn(4, 3)
    torch.testing.assert_close(ours(x), torchs(x))


def test_running_statistics_part_is_a_frozen_layer():
    layer = bn.BatchNorm1d(3, statistics=Running())
    layer.running_mean.fill_(1.0)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)
    assert bn.BatchNorm1d(3).statistics == Batch()


def test_lazy_layers_become_what_they_are():
    layer = bn.LazyBatchNorm2d(activation="relu", dtype=torch.bfloat16, bias=False)
    layer(torch.randn(2, 5, 3, 3).bfloat16())
    assert type(layer) is bn.BatchNorm2d
    assert (layer.num_features, layer.weight.shape, layer.bias) == (5, (5,), None)
    assert layer.running_mean.dtype == torch.float32
    assert layer.running_var.ne(1).all()


def test_lazy_layers_load_before_their_first_input():
    layer = bn.LazyBatchNorm1d()
    layer.load_state_dict(bn.BatchNorm1d(4).state_dict())
    assert layer.running_mean.shape == (4,)


def test_reset_parameters():
    layer = bn.BatchNorm1d(3)
    layer.weight.data.fill_(2.0)
    layer(torch.randn(4, 3))
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), bn.BatchNorm1d(3).state_dict(), rtol=0, atol=0)


def test_lazy_layers_keep_what_a_checkpoint_brought():
    layer = bn.LazyBatchNorm1d()
    layer.load_state_dict({"gamma": torch.full((4,), 2.0), "beta": torch.ones(4)})
    layer(torch.randn(3, 4))
    assert layer.weight.eq(2).all()
    assert layer.bias.eq(1).all()
    assert layer.num_batches_tracked == 1


def test_meta_layers_load_and_move():
    with torch.device("meta"):
        assigned, emptied = bn.BatchNorm1d(4), bn.BatchNorm1d(4)
    assigned.load_state_dict(bn.BatchNorm1d(4).state_dict(), assign=True)
    assert assigned.double().to("cpu").num_nonfinite_batches == 0
    emptied.to_empty(device="cpu").load_state_dict(bn.BatchNorm1d(4).state_dict())
    assert emptied.num_nonfinite_batches == 0


def test_poisoned_running_statistics_do_not_make_batches_bad():
    """Judged is the batch, not what it meets: a NaN from an old checkpoint stays where it is and the other channels move."""
    layer = bn.BatchNorm1d(3)
    layer.running_mean[0] = float("nan")
    layer(torch.randn(4, 3))
    assert layer.num_nonfinite_batches == 0
    assert layer.num_batches_tracked == 1
    assert layer.running_mean[1:].ne(0).all()


def test_values_whose_variance_leaves_float32_are_normalized_but_not_remembered():
    layer = bn.BatchNorm1d(3)
    y = layer(torch.randn(64, 3) * 1e25)
    torch.testing.assert_close(y.var(0, unbiased=False), torch.ones(3))
    assert layer.num_nonfinite_batches == 1
    assert layer.running_var.eq(1).all()


def test_an_error_on_nonfinite_needs_somebody_to_wait():
    layer = bn.BatchNorm1d(3, on_nonfinite="error")
    bad = torch.full((4, 3), float("nan"))
    torch.compile(layer, fullgraph=True, backend="aot_eager")(bad)
    torch.func.grad(lambda x: layer(x).sum())(bad)
    assert layer.num_nonfinite_batches == 2


def test_float64_inference_can_be_differentiated_after_more_training():
    layer = bn.BatchNorm1d(3, dtype=torch.float64).eval()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    layer.train()(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((4, 3), (1 + 1e-5) ** -0.5, dtype=torch.float64))


def test_residual_may_be_the_input_in_compiled_code():
    layer = bn.BatchNorm1d(3, activation="relu")
    x = torch.randn(4, 3, requires_grad=True)
    grads = [
        torch.autograd.grad(call(x, residual=x).square().sum(), x)[0]
        for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager"))
    ]
    torch.testing.assert_close(*grads)


def test_nothing_is_kept_for_a_residual_without_activation():
    layer = bn.BatchNorm2d(4)
    x, residual = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x, residual=residual)
    assert [t.shape for t in kept if t.numel() == x.numel()] == [x.shape]
    with torch.no_grad():
        residual.add_(1)
        layer.bias.add_(1)
    first = torch.autograd.grad(y.square().sum(), (x, residual, layer.bias), create_graph=True)
    assert all(grad.requires_grad for grad in first)
    torch.testing.assert_close(first[2], first[1].sum((0, 2, 3)))


def test_numpy_numbers_are_numbers():
    layer = bn.BatchNorm1d(np.int64(3), momentum=np.float32(0.25))
    x = torch.randn(4, 3)
    layer(x)
    torch.testing.assert_close(layer.running_mean, 0.25 * x.mean(0))


def test_gamma_can_be_deleted():
    layer = bn.BatchNorm1d(3)
    del layer.gamma
    assert "weight" not in dict(layer.named_parameters())


def test_functionalize_takes_the_buffers_as_arguments():
    ours, torchs = bn.BatchNorm1d(3), nn.BatchNorm1d(3)
    buffers, x = dict(ours.named_buffers()), torch.randn(4, 3)
    call = torch.func.functionalize(lambda buffers, x: torch.func.functional_call(ours, buffers, (x,)))
    torch.testing.assert_close(call(buffers, x), torchs(x))
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())


def test_vmap_moves_all_buffers_or_none():
    layer = bn.BatchNorm1d(3)
    means, variance = torch.zeros(2, 3), torch.ones(3)

    def call(mean, x):
        state = {"running_mean": mean, "running_var": variance}
        return torch.func.functional_call(layer, state, (x,))

    with pytest.raises(bn.errors.StateError, match="map over the buffers too"):
        torch.vmap(call)(means, torch.randn(2, 4, 3))
    assert not means.any()
