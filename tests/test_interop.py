"""Numbers and conventions of other libraries' batch norms; with the libraries themselves in tests/foreign/test_interop_packages.py."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import interop
from batchnorm.errors import ArgumentError, InputError, ShapeError, StateError
from batchnorm.interop.numbers import complement
from batchnorm.interop.tutorial import is_hand_written

GAMMA, BETA, MEAN, VARIANCE = [2.0, -1.0, 0.5], [0.1, 0.2, 0.3], [1.0, -2.0, 3.0], [4.0, 0.25, 1.0]
PARAMETERS = ("weight", "bias")
STATISTICS = ("running_mean", "running_var")


def trained(**options):
    torch.manual_seed(0)
    layer = bn.BatchNorm(3, dtype=torch.float64, **options)
    for _ in range(4):
        layer(torch.randn(8, 3, dtype=torch.float64) * 3 + 1)
    with torch.no_grad():
        for name in PARAMETERS:
            if getattr(layer, name) is not None:
                getattr(layer, name).normal_()
    return layer


def the_same(layer, other):
    assert (layer.eps, layer.momentum, layer.channel_axis) == (other.eps, other.momentum, other.channel_axis)
    for name in (*PARAMETERS, *STATISTICS):
        value, expected = getattr(layer, name), getattr(other, name)
        assert (value is None) == (expected is None), name
        assert value is None or (value.dtype == expected.dtype and torch.equal(value, expected)), name


def infers_by_hand(layer, eps):
    """y = gamma · (x - mean) / sqrt(variance + eps) + beta, of x = 2 in every channel."""
    gamma, beta, mean, variance = (torch.tensor(value, dtype=torch.float64) for value in (GAMMA, BETA, MEAN, VARIANCE))
    expected = gamma * (2 - mean) / (variance + eps).sqrt() + beta
    y = copy.deepcopy(layer).double().eval()(torch.full((1, 3), 2.0, dtype=torch.float64))[0]
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert layer.running_variance == "biased"


@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.99, 0.999, 0.01, 1 / 3, 1.0, 0.0, 1e-7])
def test_the_complement_of_a_momentum_goes_back(momentum):
    assert complement(complement(momentum)) == momentum
    assert complement(0.99) == 0.01
    assert complement(0.9) == 0.1


class TestKeras:
    def test_arrays(self):
        arrays = {"gamma": GAMMA, "beta": BETA, "moving_mean": MEAN, "moving_variance": VARIANCE}
        layer = interop.from_keras(arrays)
        infers_by_hand(layer, 1e-3)
        assert (layer.momentum, layer.channel_axis) == (0.01, -1)

    def test_momentum_weighs_the_other_one(self):
        """Keras: moving = moving · momentum + batch · (1 - momentum), of the biased variance. 1 and 5: mean 3, variance 4."""
        layer = interop.from_keras({"moving_mean": [1.0], "moving_variance": [2.0]}, momentum=0.75)
        layer(torch.tensor([[1.0], [5.0]]))
        torch.testing.assert_close(layer.running_mean, torch.tensor([0.75 * 1 + 0.25 * 3]))
        torch.testing.assert_close(layer.running_var, torch.tensor([0.75 * 2 + 0.25 * 4]))

    def test_there_and_back(self):
        for options in ({}, {"bias": False}, {"affine": False}, {"channel_axis": -1, "eps": 0.25, "momentum": 0.3}):
            layer = trained(**options)
            made = interop.to_keras(layer)
            names = [name for name in ("gamma", "beta") if made.config[{"gamma": "scale", "beta": "center"}[name]]]
            arrays = dict(zip((*names, "moving_mean", "moving_variance"), made.weights, strict=True))
            config = {name: made.config[name] for name in ("axis", "momentum", "epsilon")}
            the_same(interop.from_keras(arrays, **config), layer)

    def test_without_a_scale_the_weight_is_one_and_does_not_learn(self):
        layer = interop.from_keras({"beta": BETA, "moving_mean": MEAN, "moving_variance": VARIANCE})
        assert layer.weight.eq(1).all()
        assert [layer.weight.requires_grad, layer.bias.requires_grad] == [False, True]

    def test_a_layer_is_asked_for_its_settings(self):
        class Keras:
            def __init__(self, **config):
                self.config = {"axis": [3], "momentum": 0.9, "epsilon": 0.01, "scale": False, "center": True} | config

            def get_config(self):
                return self.config

            def get_weights(self):
                return [BETA, MEAN, VARIANCE] if self.config.get("built", True) else []

        layer = interop.from_keras(Keras())
        assert (layer.channel_axis, layer.momentum, layer.eps) == (3, 0.1, 0.01)
        assert layer.running_mean.tolist() == MEAN
        with pytest.raises(StateError, match="built"):
            interop.from_keras(Keras(built=False))
        with pytest.raises(InputError, match="Renorm"):
            interop.from_keras(Keras(renorm=True))


class TestFlax:
    def test_linen_variables(self):
        variables = {"params": {"scale": GAMMA, "bias": BETA}, "batch_stats": {"mean": MEAN, "var": VARIANCE}}
        layer = interop.from_flax(variables, momentum=0.9)
        infers_by_hand(layer, 1e-5)
        assert (layer.momentum, layer.channel_axis) == (0.1, -1)
        the_same(interop.from_flax({**variables["params"], **variables["batch_stats"]}, momentum=0.9), layer)

    def test_there_and_back(self):
        for options in ({}, {"bias": False}, {"affine": False}, {"channel_axis": -1, "eps": 0.25, "momentum": 0.3}):
            layer = trained(**options)
            made = interop.to_flax(layer)
            variables = {"params": made.params, "batch_stats": made.batch_stats}
            settings = {name: made.config[name] for name in ("momentum", "epsilon", "axis")}
            the_same(interop.from_flax(variables, **settings), layer)

    def test_several_axes(self):
        with pytest.raises(InputError, match="single axis"):
            interop.from_flax({"mean": MEAN, "var": VARIANCE}, axis=(1, 2))


class TestHaiku:
    def test_the_corrected_average_counts(self):
        """Decay .5 and one batch of mean 4: hidden = .5 · 0 + .5 · 4 = 2, corrected 2 / (1 - .5) = 4."""
        state = {
            "batch_norm/~/mean_ema": {"hidden": [[2.0]], "average": [[4.0]], "counter": 1},
            "batch_norm/~/var_ema": {"hidden": [[0.5]], "average": [[1.0]], "counter": 1},
        }
        layer = interop.from_haiku({"scale": [[2.0]], "offset": [[0.5]]}, state, decay_rate=0.5)
        assert (layer.running_mean.item(), layer.running_var.item(), layer.momentum) == (4.0, 1.0, 0.5)
        assert layer.num_batches_tracked == 1

    def test_there_and_back(self):
        for options in ({}, {"bias": False}, {"affine": False}, {"channel_axis": -1, "eps": 0.25, "momentum": 0.3}):
            layer = trained(**options)
            made = interop.to_haiku(layer, dimensions=2)
            back = interop.from_haiku(
                made.params,
                made.state,
                decay_rate=made.config["decay_rate"],
                eps=made.config["eps"],
                channel_axis=layer.channel_axis,
            )
            the_same(back, layer)
            average = made.state["mean_ema"]
            begun = 1 - made.config["decay_rate"] ** 4
            torch.testing.assert_close(
                torch.tensor(average["hidden"]), torch.tensor(average["average"]) * begun, rtol=1e-12, atol=0
            )

    def test_shapes_and_axes(self):
        made = interop.to_haiku(trained(), dimensions=4)
        assert made.params["scale"].shape == (1, 3, 1, 1)
        assert made.config["data_format"] == "channels_first"
        with pytest.raises(InputError, match="the layer's is 2"):
            interop.to_haiku(trained_on_axis(2), dimensions=4)
        with pytest.raises(InputError, match="at least 2"):
            interop.to_haiku(trained(), dimensions=1)
        with pytest.raises(InputError, match="average"):
            interop.from_haiku({}, {"mean_ema": {"hidden": [1.0]}, "var_ema": {"hidden": [1.0]}}, decay_rate=0.9)


def trained_on_axis(axis):
    layer = bn.BatchNorm(3, channel_axis=axis)
    layer(torch.randn(2, 4, 3, 4))
    return layer


class TestONNX:
    def test_there_and_back(self, tmp_path):
        onnx = pytest.importorskip("onnx")
        layer = trained(eps=1e-3, momentum=0.2)
        made = interop.to_onnx(layer, "first")
        graph = onnx.helper.make_graph(
            [made.node],
            "one layer",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, [None, 3])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, [None, 3])],
            made.initializers,
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=9)
        onnx.checker.check_model(model)
        onnx.save(model, tmp_path / "model.onnx")
        for source in (model, tmp_path / "model.onnx", str(tmp_path / "model.onnx")):
            found = interop.from_onnx(source)
            assert list(found) == ["first"]
            the_same(found["first"], layer)
        x = torch.randn(5, 3, dtype=torch.float64)
        y = pytest.importorskip("onnx.reference").ReferenceEvaluator(model).run(None, {"x": x.numpy()})[0]
        torch.testing.assert_close(torch.tensor(y), layer.eval()(x), rtol=1e-6, atol=1e-6)  # epsilon is a float32 there

    def test_two_nodes_of_one_name_and_numbers_of_nine_digits(self):
        onnx = pytest.importorskip("onnx")
        layers = [trained(eps=1.234567891e-5, momentum=0.876543211) for _ in range(2)]
        first, second = (interop.to_onnx(layer, name) for layer, name in zip(layers, ("one", "two"), strict=True))
        second.node.name, second.node.output[0] = "one", "z"
        graph = onnx.helper.make_graph(
            [first.node, second.node], "both", [], [], [*first.initializers, *second.initializers]
        )
        found = interop.from_onnx(onnx.helper.make_model(graph))
        assert list(found) == ["one", "z"]
        single = torch.tensor([found["one"].eps, 1 - found["one"].momentum], dtype=torch.float64).float()
        assert torch.equal(single, torch.tensor([1.234567891e-5, 1 - 0.876543211], dtype=torch.float64).float())

    def test_numbers_that_are_computed_and_files_that_are_none(self, tmp_path):
        onnx = pytest.importorskip("onnx")
        made = interop.to_onnx(trained())
        graph = onnx.helper.make_graph([made.node], "no numbers", [], [], [])
        with pytest.raises(InputError, match="fold constants"):
            interop.from_onnx(onnx.helper.make_model(graph))
        (tmp_path / "text.onnx").write_text("not a model")
        for name in ("text.onnx", "missing.onnx"):
            with pytest.raises(InputError, match=name):
                interop.from_onnx(tmp_path / name)
        with pytest.raises(InputError, match="transpose"):
            interop.to_onnx(bn.BatchNorm(3, channel_axis=-1))


class Tutorial(nn.Module):
    """As hand-written layers are: statistics that are no buffers and grow a graph."""

    def __init__(self, features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.gamma, self.beta = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.running_mean, self.running_var = torch.zeros(features), torch.ones(features)

    def forward(self, x):
        if self.training:
            mean, variance = x.mean(0), x.var(0, unbiased=False)
            self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
            self.running_var = (1 - self.momentum) * self.running_var + self.momentum * variance
        else:
            mean, variance = self.running_mean, self.running_var
        return self.gamma * (x - mean) / torch.sqrt(variance + self.eps) + self.beta


class DiveIntoDeepLearning(nn.Module):
    """As in d2l.ai, section 8.5: other names, four axes, and numbers in the function that it calls."""

    def __init__(self, features):
        super().__init__()
        self.gamma, self.beta = (
            nn.Parameter(torch.ones(1, features, 1, 1)),
            nn.Parameter(torch.zeros(1, features, 1, 1)),
        )
        self.moving_mean, self.moving_var = torch.zeros(1, features, 1, 1), torch.ones(1, features, 1, 1)

    def forward(self, x):
        mean, variance = self.moving_mean, self.moving_var
        if self.training:
            mean = x.mean((0, 2, 3), keepdim=True)
            variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
            self.moving_mean = (0.9 * self.moving_mean + 0.1 * mean).detach()
            self.moving_var = (0.9 * self.moving_var + 0.1 * variance).detach()
        return self.gamma * (x - mean) / torch.sqrt(variance + 1e-5) + self.beta


class TestTutorial:
    def test_moving_statistics_are_running_statistics(self, caplog):
        theirs = DiveIntoDeepLearning(3)
        nn.init.normal_(theirs.gamma)
        theirs(torch.randn(4, 3, 5, 5))
        assert is_hand_written(theirs)
        bn.convert(nn.Sequential(theirs, nn.BatchNorm2d(3)))
        assert "written by hand" in caplog.text
        with pytest.raises(ArgumentError, match="lacks eps, momentum; pass eps= and momentum="):
            interop.from_tutorial(theirs)
        ours = interop.from_tutorial(theirs, eps=1e-5, momentum=0.1)
        x = torch.randn(4, 3, 5, 5)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
        back = interop.to_tutorial(ours, DiveIntoDeepLearning(3)).eval()
        torch.testing.assert_close(back(x), theirs(x))
        assert back.moving_mean.shape == (1, 3, 1, 1)

    def test_it_goes_on_as_the_layer_would(self):
        torch.manual_seed(0)
        theirs = Tutorial(3, momentum=0.3)
        theirs(torch.randn(6, 3, requires_grad=True))
        ours = interop.from_tutorial(theirs)
        assert theirs.running_mean.requires_grad  # the defect
        assert not ours.running_mean.requires_grad
        x = torch.randn(6, 3)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.running_var, theirs.running_var.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-6)

    def test_there_and_back(self):
        layer = trained(eps=0.25, momentum=0.3)
        the_same(interop.from_tutorial(interop.to_tutorial(layer, Tutorial(3).double())), layer)

    def test_it_is_recognized(self):
        layer = Tutorial(3)
        assert is_hand_written(layer)
        layer.running_mean = torch.zeros(4)  # of another size
        assert not is_hand_written(layer)
        layer.running_mean = None
        assert not is_hand_written(layer)
        for other in (nn.BatchNorm1d(3), bn.BatchNorm1d(3), nn.LazyBatchNorm1d(), nn.Linear(3, 3), nn.LayerNorm(3)):
            assert not is_hand_written(other)

    def test_convert_names_it_and_the_way_to_take_it_over(self, caplog):
        model = nn.Sequential(nn.Linear(3, 3), Tutorial(3), nn.BatchNorm1d(3))
        bn.convert(model)
        what = "it is a batch norm written by hand (Tutorial with gamma, beta, running_mean, running_var); its statistics are no buffers"
        (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert warning.startswith(f"convert: 1 of 2 batch norms changed; left 1: {what}")
        assert "batchnorm.interop.from_tutorial(layer), if" in warning
        for operation, count in ((bn.freeze, "1 of 2"), (bn.fuse, "0 of 2")):
            caplog.clear()
            operation(model)
            assert f"{operation.__name__}: {count} batch norms" in caplog.text
            assert f"left 1: {what}" in caplog.text
        model[1] = interop.from_tutorial(model[1])
        caplog.clear()
        bn.convert(model)
        assert "written by hand" not in caplog.text

    def test_arguments_and_buffers_are_named(self, caplog):
        layer = DiveIntoDeepLearning(3)
        for name in ("moving_mean", "moving_var"):
            value = getattr(layer, name)
            delattr(layer, name)
            layer.register_buffer(name, value)
        assert bn.convert(layer) is layer
        assert (
            "left the model: it is a batch norm written by hand (DiveIntoDeepLearning with gamma, beta, moving_mean"
            in caplog.text
        )
        assert "from_tutorial(layer, eps=..., momentum=...)" in caplog.text
        assert "no buffers" not in caplog.text
        caplog.clear()
        bn.recalibrate(layer, [torch.randn(4, 3, 5, 5)])
        assert "no batch norm to recalibrate; the model left: it is a batch norm written by hand" in caplog.text

    def test_something_else(self):
        with pytest.raises(ArgumentError, match="gamma"):
            interop.from_tutorial(nn.Linear(2, 2))


class TestWhatHasNoCounterpart:
    def test_layers(self):
        for layer, error, match in (
            (nn.Linear(2, 2), ArgumentError, "Linear"),
            (bn.BatchNorm(3, track_running_stats=False), StateError, "track_running_stats"),
            (nn.LazyBatchNorm1d(), StateError, "lazy"),
            (nn.BatchNorm1d(3, momentum=None), InputError, "momentum"),
            (bn.BatchNorm(3, activation="relu"), InputError, "relu"),
            (bn.BatchNorm(3, statistics=bn.statistics.Ghost(2)), InputError, "Ghost"),
        ):
            with pytest.raises(error, match=match):
                interop.to_flax(layer)

    def test_numbers(self):
        with pytest.raises(ShapeError, match="one size"):
            interop.from_flax({"mean": MEAN, "var": [1.0]})
        with pytest.raises(ShapeError, match=r"\(2, 2\)"):
            interop.from_flax({"mean": [[1.0, 2.0], [3.0, 4.0]], "var": VARIANCE})
        with pytest.raises(ArgumentError, match="str"):
            interop.from_flax({"mean": "three", "var": VARIANCE})
        with pytest.raises(InputError, match="'var' must be among"):
            interop.from_flax({"mean": MEAN})

    def test_what_is_no_layer(self):
        for call in (interop.from_keras, interop.from_flax, interop.from_onnx):
            with pytest.raises(ArgumentError, match="but got NoneType"):
                call(None)
        with pytest.raises(ArgumentError, match="momentum must be a number"):
            interop.from_flax({"mean": MEAN, "var": VARIANCE}, momentum=None)
        with pytest.raises(ArgumentError, match="eps must be a number"):
            interop.from_flax({"mean": MEAN, "var": VARIANCE}, epsilon="small")

    def test_dtypes_stay_each_its_own(self):
        half = torch.tensor(MEAN, dtype=torch.float16)
        arrays = {
            "gamma": torch.tensor(GAMMA, dtype=torch.float64) / 3,
            "moving_mean": half,
            "moving_variance": [1, 4, 9],
        }
        layer = interop.from_keras(arrays)
        assert torch.equal(layer.weight, arrays["gamma"])
        assert torch.equal(layer.running_mean, half.float())
        assert layer.running_var.tolist() == [1, 4, 9]
        made = interop.to_keras(nn.BatchNorm1d(3, dtype=torch.bfloat16))
        assert [value.dtype.name for value in made.weights] == ["float32"] * 4

    def test_torchs_layers_and_frozen_ones_go_too(self):
        layer = nn.BatchNorm2d(3)
        layer(torch.randn(2, 3, 4, 4))
        made = interop.to_keras(layer)
        assert made.config["axis"] == 1
        assert torch.equal(torch.tensor(made.weights[2]), layer.running_mean)
        assert interop.to_keras(bn.freeze(layer)).config == made.config
