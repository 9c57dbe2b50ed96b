"""Batch norms of Keras, Flax and Haiku themselves, where they are installed: what they give is what ours gives, there and back."""

import os

import numpy
import pytest
import torch

import batchnorm as bn
from batchnorm import interop

os.environ.setdefault("KERAS_BACKEND", "torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # the other libraries' own
STEPS = [numpy.random.default_rng(seed).normal(1, 2, (6, 5, 3)).astype(numpy.float32) for seed in range(3)]  # (N, L, C)


def close(value, expected):
    torch.testing.assert_close(
        torch.tensor(numpy.asarray(value)), torch.as_tensor(expected).detach(), rtol=1e-5, atol=1e-5
    )


def alike(layer, outputs, mean, variance):
    """Ours goes on as the other one did."""
    for x, y in zip(STEPS[1:], outputs, strict=True):
        close(y, layer(torch.tensor(x)))
    close(mean, layer.running_mean)
    close(variance, layer.running_var)


@pytest.mark.parametrize("options", [{}, {"center": False}, {"scale": False}, {"epsilon": 0.1, "momentum": 0.7}])
def test_keras(options):
    keras = pytest.importorskip("keras")

    def run(layer, x):
        return layer(x, training=True).detach().cpu().numpy()

    theirs = keras.layers.BatchNormalization(**options)
    run(theirs, STEPS[0])
    ours = interop.from_keras(theirs)
    made = interop.to_keras(ours)
    again = keras.layers.BatchNormalization(**made.config)
    again.build(STEPS[0].shape)
    again.set_weights(made.weights)
    by_name = {variable.name: variable.numpy() for variable in again.weights}
    for variable in theirs.weights:
        assert numpy.array_equal(variable.numpy(), by_name[variable.name])  # exact
    outputs = [run(theirs, x) for x in STEPS[1:]]
    alike(ours, outputs, theirs.moving_mean.numpy(), theirs.moving_variance.numpy())
    close(theirs(STEPS[0]).detach().cpu().numpy(), ours.eval()(torch.tensor(STEPS[0])))


@pytest.mark.parametrize("options", [{}, {"use_bias": False}, {"epsilon": 0.1, "momentum": 0.7}])
def test_flax_linen(options):
    jax, linen = pytest.importorskip("jax"), pytest.importorskip("flax.linen")
    theirs = linen.BatchNorm(use_running_average=False, **options)
    variables = theirs.init(jax.random.key(0), STEPS[0])
    outputs = []
    _, moved = theirs.apply(variables, STEPS[0], mutable=["batch_stats"])
    variables = {**variables, **moved}
    settings = {name: getattr(theirs, name) for name in ("momentum", "epsilon", "axis")}
    ours = interop.from_flax(variables, **settings)
    made = interop.to_flax(ours)
    assert all(numpy.array_equal(made.batch_stats[name], value) for name, value in variables["batch_stats"].items())
    assert {**settings, "use_bias": options.get("use_bias", True), "use_scale": True} == made.config
    for x in STEPS[1:]:
        y, moved = theirs.apply(variables, x, mutable=["batch_stats"])
        variables = {**variables, **moved}
        outputs.append(y)
    alike(ours, outputs, variables["batch_stats"]["mean"], variables["batch_stats"]["var"])


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")
    theirs = nnx.BatchNorm(3, rngs=nnx.Rngs(0), momentum=0.8, epsilon=0.01)
    theirs(STEPS[0])
    ours = interop.from_flax(theirs)
    made = interop.to_flax(ours)
    again = nnx.BatchNorm(3, rngs=nnx.Rngs(1), **made.config)
    for name, value in {**made.params, **made.batch_stats}.items():
        getattr(again, name)[...] = value
        assert numpy.array_equal(getattr(again, name)[...], getattr(theirs, name)[...])  # exact
    alike(ours, [theirs(x) for x in STEPS[1:]], theirs.mean[...], theirs.var[...])


def test_haiku():
    haiku, jax = pytest.importorskip("haiku"), pytest.importorskip("jax")
    program = haiku.transform_with_state(lambda x: haiku.BatchNorm(True, True, 0.9)(x, is_training=True))
    params, state = program.init(jax.random.key(0), STEPS[0])
    _, state = program.apply(params, state, None, STEPS[0])
    ours = interop.from_haiku(params["batch_norm"], state, decay_rate=0.9)
    made = interop.to_haiku(ours, dimensions=3)
    for name in ("mean_ema", "var_ema"):
        for part, value in state[f"batch_norm/~/{name}"].items():
            assert made.state[name][part].shape == value.shape
            close(made.state[name][part], torch.tensor(numpy.asarray(value)))
    inference = haiku.transform_with_state(lambda x: haiku.BatchNorm(**made.config)(x, is_training=False))
    back = {f"batch_norm/~/{name}": values for name, values in made.state.items()}
    y, _ = inference.apply({"batch_norm": made.params}, back, None, STEPS[1])
    close(y, ours.eval()(torch.tensor(STEPS[1])))
    assert isinstance(ours, bn.BatchNorm)
