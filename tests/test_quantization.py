"""Quantization-aware training: pairs that are folded and go on learning, and torchao's PT2E with converted models."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.folding import Folded, FoldedPair
from batchnorm.statistics import Domains, Ghost, Renorm, Running
from tests.networks import FrozenBatchNorm2d, settle
from tests.test_folding import CONVOLUTIONS, NORMS, normal


@pytest.fixture(autouse=True)
def _without_measuring_long(monkeypatch):
    monkeypatch.setattr(bn.folding, "_SECONDS", 0.0)


class Rounded(nn.Module):
    """A fake quantizer: values on a grid of 15 steps, gradients as if it were not there."""

    def forward(self, weight):
        step = weight.detach().abs().max() / 7
        return weight + ((weight / step).round() * step - weight).detach()


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 3, padding=1), bn.BatchNorm1d(4)

    def forward(self, x, mask):
        return self.norm(self.conv(x), mask=mask)


class Added(Masked):
    """A residual block; the batch norm adds."""

    def forward(self, x):
        return self.norm(self.conv(x), residual=x)


class Twice(Masked):
    """Someone else reads the output of the convolution too."""

    def forward(self, x):
        z = self.conv(x)
        return self.norm(z) + z


class Overwritten(Masked):
    """The input of the convolution is another one when the batch norm is called."""

    def forward(self, x):
        z = self.conv(x)
        beside = x.mul_(2)
        return self.norm(z, residual=beside)


def trained(model, *args, mode=True):
    """Output, gradients and buffers of one forward and backward with the same dropout, by name."""
    torch.manual_seed(5)
    y = model.train(mode)(*args)
    y.backward(torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(6)))
    found = {"output": y.detach()}
    model = bn.unfold(model)  # names as before, the same parameters
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def pairs_equal_layers(model, *args, quantizer=nn.Identity, pairs=1):
    """In float64 a fake quantizer that changes nothing leaves outputs, gradients and statistics, in training and in inference."""
    model = settle(model).double()
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    folded, report = bn.fold(model, args, tolerance=1e-9, train=True, weight_fake_quant=quantizer)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == flags
    assert len(report.folded) == pairs == sum(isinstance(module, FoldedPair) for module in folded.modules())
    assert report.max_error < 1e-9
    for mode in (True, False):
        wanted = trained(copy.deepcopy(model), *args, mode=mode)
        torch.testing.assert_close(trained(copy.deepcopy(folded), *args, mode=mode), wanted, rtol=1e-9, atol=1e-9)
    final, report = bn.fold(folded, args, tolerance=1e-9)
    assert not any(isinstance(module, FoldedPair) for module in final.modules())
    torch.testing.assert_close(final(*args), model.eval()(*args), rtol=1e-9, atol=1e-9)
    return folded


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])
@pytest.mark.parametrize("options", [{}, {"groups": 2, "bias": False}], ids=str)
def test_pairs_equal_a_convolution_and_its_batch_norm(rank, transposed, options):
    convolution = CONVOLUTIONS[rank][transposed](4, 8, 3, padding=1, **options)
    norm = NORMS[rank](8, eps=0.01, momentum=0.3, affine=not options)
    folded = pairs_equal_layers(nn.Sequential(convolution, norm, nn.ReLU(), nn.Dropout(0.5)), normal(3, 4, *[4] * rank))
    assert (folded[0].batch_norm.eps, folded[0].batch_norm.momentum) == (0.01, 0.3)
    assert folded[0].batch_norm.num_batches_tracked == 0


def test_pairs_of_linear_layers_and_of_our_options():
    pairs_equal_layers(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), normal(5, 4))
    pairs_equal_layers(nn.Sequential(nn.Linear(4, 3), bn.BatchNorm(3, channel_axis=-1)), normal(2, 5, 4))
    pairs_equal_layers(
        nn.Sequential(nn.Conv1d(4, 3, 1), nn.Identity(), bn.BatchNorm1d(3, statistics=Ghost(2))), normal(4, 4, 3)
    )
    pairs_equal_layers(
        nn.Sequential(nn.Conv1d(4, 3, 1), bn.BatchNorm1d(3, statistics=Renorm(warmup=0))), normal(4, 4, 3)
    )
    norm = bn.BatchNorm1d(3, statistics=Running(), activation="silu", bias=False, momentum=None)
    pairs_equal_layers(nn.Sequential(nn.Conv1d(4, 3, 1), norm, nn.ReLU()), normal(4, 4, 3))
    pairs_equal_layers(nn.Sequential(nn.Conv2d(4, 3, 1), FrozenBatchNorm2d(3)), normal(4, 4, 3, 3))
    fused = bn.fuse(nn.Sequential(nn.Conv1d(4, 3, 1), nn.BatchNorm1d(3), nn.ReLU()))
    pairs_equal_layers(fused, normal(4, 4, 3))


def test_masks_and_residuals_reach_the_batch_norm():
    mask = torch.arange(5) < torch.tensor([[5], [3], [2]])
    folded = pairs_equal_layers(Masked(), normal(3, 4, 5), mask)
    assert isinstance(folded.norm, FoldedPair)
    assert str(folded.conv) == "InPair(linear)"
    pairs_equal_layers(Added(), normal(3, 4, 5))


def test_without_a_fake_quantizer_nothing_changes_not_even_bits():
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4), nn.ReLU()))
    x = normal(4, 3, 5, 5).float()
    folded, _ = bn.fold(model, x, train=True)
    for mode in (True, False):
        torch.testing.assert_close(
            trained(copy.deepcopy(folded), x, mode=mode), trained(copy.deepcopy(model), x, mode=mode), rtol=0, atol=0
        )


def test_training_outputs_are_those_of_the_papers_formula():
    """Krishnamoorthi 2018: fold by running deviations, quantize, correct by running / batch deviation."""
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).double()
    x = normal(4, 3, 5, 5)
    folded, report = bn.fold(model, x, train=True, weight_fake_quant=Rounded)
    assert report.folded == (Folded("1", ("0",), "in training"),)
    norm = copy.deepcopy(model[1])
    deviation = (norm.running_var + norm.eps).sqrt()
    z = F.conv2d(x, Rounded()(model[0].weight * (norm.weight / deviation).view(-1, 1, 1, 1)))
    mean = z.mean((0, 2, 3), keepdim=True)
    batch = (z / (norm.weight / deviation).view(1, -1, 1, 1)).var((0, 2, 3), correction=0) + norm.eps
    wanted = (z - mean) * (deviation / batch.sqrt()).view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(folded.train()(x), wanted)
    running = (norm.running_var, norm.running_mean)
    assert not torch.equal(folded[0].batch_norm.running_var, running[0])

    bn.freeze(folded, affine=False)  # from now on running statistics, in training too: what inference computes
    state = copy.deepcopy(folded[0].batch_norm.state_dict())
    frozen = folded.train()(x)
    torch.testing.assert_close(frozen, folded.eval()(x))
    torch.testing.assert_close(frozen[:1], folded.train()(x[:1]))
    torch.testing.assert_close(folded[0].batch_norm.state_dict(), state, rtol=0, atol=0)
    folded(x).sum().backward()
    assert folded[0].linear.weight.grad.abs().sum() > 0
    assert folded[0].batch_norm.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_finished_model_has_exactly_the_quantized_weights(dtype):
    layers = nn.Conv2d(3, 4, 3, bias=False), bn.BatchNorm2d(4, activation="relu"), nn.ConvTranspose2d(4, 4, 2, groups=2)
    model = settle(nn.Sequential(*layers, nn.BatchNorm2d(4)))
    model, x = model.to(dtype), normal(4, 3, 5, 5).to(dtype)
    folded, _ = bn.fold(model, x, train=True, weight_fake_quant=Rounded, tolerance=0.05)
    folded.train()(x)
    final, report = bn.fold(folded, x, tolerance=0.1 if dtype is torch.bfloat16 else 1e-5)
    assert report.batch_norms_after == 0
    for layer, pair in ((final[0], folded[0]), (final[2], folded[2])):
        wanted = pair.folded_weight().to(dtype)
        assert torch.equal(layer.weight, wanted)
        assert 2 < len(wanted.unique()) <= 15


def test_quantized_weights_take_no_other_batch_norm():
    """Also no other kernel: each would leave the grid."""
    model = settle(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    x = normal(4, 3, 5, 5).float()
    folded, report = bn.fold(model, x, train=True, weight_fake_quant=Rounded)
    assert [pair.batch_norm for pair in report.folded] == ["2"]
    final, report = bn.fold(folded, x)
    assert [pair.batch_norm for pair in report.folded] == ["2"]
    assert report.left["0"] == report.left["3"] == "1 has quantized weights"
    assert torch.equal(final[1].weight, folded[1].folded_weight())


def test_channels_with_weight_zero_stay_finite_and_learn():
    """Dividing the output by the scale makes NaN of them (pytorch#85744); residual blocks start with weight 0."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    nn.init.zeros_(model[1].weight)
    x = normal(4, 3, 5, 5).float()
    folded, _ = bn.fold(model, x, train=True, weight_fake_quant=Rounded)
    folded.train()(x).square().sum().backward()
    folded[0].weight_fake_quant = None
    y = folded(x)
    (y * y.new_tensor(range(y.numel())).view_as(y)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in folded.parameters())
    assert (folded[0].batch_norm.weight.grad != 0).all()


def test_unfold_restores_names_modules_and_what_was_learned():
    model = settle(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm2d(4)))
    )
    x = normal(4, 3, 5, 5).float()
    folded, report = bn.fold(model.train(), x, train=True, weight_fake_quant=Rounded)
    assert list(report.left) == ["2.1"]
    assert folded.training
    optimizer = torch.optim.SGD(folded.parameters(), 0.1)
    folded(x).square().mean().backward()
    optimizer.step()
    parameters = {id(parameter) for parameter in folded.parameters()}
    state = {
        name.replace("0.linear", "0").replace("0.batch_norm", "1"): value for name, value in folded.state_dict().items()
    }
    for copied in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        torch.testing.assert_close(copied(x), copy.deepcopy(folded)(x), rtol=0, atol=0)
        assert str(bn.unfold(copied)) == str(model)
    assert bn.unfold(folded) is folded
    assert str(folded) == str(model)
    assert {id(parameter) for parameter in folded.parameters()} == parameters
    torch.testing.assert_close(folded.state_dict(), state, rtol=0, atol=0)
    assert not torch.equal(folded[0].weight, model[0].weight)


def test_unfold_of_what_is_not_whole(caplog):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), normal(4, 3).float()
    for place, wanted in ((0, "is no longer there"), (1, "only that of 0 is")):
        folded, _ = bn.fold(model, x, train=True)
        folded[place] = nn.Identity()
        before = str(folded)
        with pytest.raises(bn.errors.StateError, match=wanted):
            bn.unfold(folded)
        with pytest.raises(bn.errors.StateError, match=wanted):
            bn.fold(folded, x)
        assert str(folded) == before
    pair = FoldedPair(*model, Rounded())  # a pair of one's own, without a second place
    final, _ = bn.fold(pair, x)
    torch.testing.assert_close(final(x), pair.eval()(x))
    assert [type(layer) for layer in bn.unfold(pair)] == [nn.Linear, nn.BatchNorm1d]
    with caplog.at_level(logging.WARNING, "batchnorm"):
        bn.unfold(model)
    assert "the model has none" in caplog.text


def test_what_surgery_does_with_pairs():
    model, x = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())), normal(4, 3, 5, 5).float()
    folded, _ = bn.fold(model, x, train=True, weight_fake_quant=Rounded)
    wanted = copy.deepcopy(folded).train()(x)
    bn.fuse(folded)
    assert isinstance(folded[0].batch_norm, bn.BatchNorm2d)
    torch.testing.assert_close(copy.deepcopy(folded).train()(x), wanted)
    _, report = bn.fold(folded, x, train=True)  # pairs stay pairs
    assert (report.folded, report.left) == ((), {})
    with torch.no_grad():
        z = F.conv2d(torch.cat([x, x * 2]), folded[0].quantized_weight(), folded[0].linear.bias)
    bn.recalibrate(folded, [x, x * 2])
    torch.testing.assert_close(folded[0].batch_norm.running_mean, z.mean((0, 2, 3)))
    bn.revert(folded)
    assert type(folded[0].batch_norm) is nn.BatchNorm2d
    nn.SyncBatchNorm.convert_sync_batchnorm(folded)
    assert type(bn.unfold(folded)[1]) is nn.SyncBatchNorm


@pytest.fixture
def exportable():
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu")))
    x = normal(4, 3, 5, 5).float()
    return bn.fold(model, x, train=True, weight_fake_quant=Rounded)[0], x


def test_pairs_export(exportable):
    folded, x = exportable
    program = torch.export.export(copy.deepcopy(folded), (x,))
    assert sum(node.target is torch.ops.aten.batch_norm.default for node in program.graph.nodes) == 1
    torch.testing.assert_close(program.module()(x), folded(x))


@pytest.mark.slow
def test_pairs_compile(exportable):
    folded, x = exportable
    compiled = torch.compile(copy.deepcopy(folded), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), folded(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.BatchNorm2d(4)), "before it is 1, a Dropout"),
        (lambda: nn.Sequential(nn.BatchNorm2d(3)), "before it is the input"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), bn.BatchNorm2d(4, statistics=Domains(("a", "b")))), "statistics source is Domains"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), "no running statistics"),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)), "parametrized"),
        (Twice, "the output of conv also goes elsewhere"),
        (Overwritten, "mul_ writes in place between it and conv"),
    ],
)  # fmt: skip
def test_what_is_left(model, reason):
    model = model().eval()
    x = normal(4, 4, 5) if isinstance(model, Masked) else normal(4, 3, 5, 5)
    folded, report = bn.fold(model, x.float(), train=True)
    assert not report.folded
    assert [reason in found for found in report.left.values()] == [True]
    assert not folded.training


class Asking(Masked):
    """Its code needs an attribute of a layer."""

    def forward(self, x):
        return self.norm(self.conv(x)) * self.conv.out_channels


def test_a_forward_that_reads_attributes_of_a_pair():
    with pytest.raises(bn.errors.FoldingError, match=r"AttributeError.*'out_channels'; the model did not change"):
        bn.fold(Asking(), normal(3, 4, 5).float(), train=True)


def test_bad_arguments():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), normal(4, 3).float()
    with pytest.raises(bn.errors.ArgumentError, match="pass train=True"):
        bn.fold(model, x, weight_fake_quant=Rounded)
    with pytest.raises(bn.errors.ArgumentError, match="a function that returns a new fake quantizer"):
        bn.fold(model, x, train=True, weight_fake_quant=Rounded())
    with pytest.raises(bn.errors.ArgumentError, match="it returned a int"):
        bn.fold(model, x, train=True, weight_fake_quant=lambda: 3)
    with pytest.raises(bn.errors.InputError, match="a batch that the model can train with"):
        bn.fold(model, x[:1], train=True)


class Block(nn.Module):
    """A residual block as in ResNet; each activation is a module of its own, as X86InductorQuantizer needs it."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        z = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(z)) + self.down(x))


class DenseLayer(nn.Module):
    """A layer of DenseNet: its first batch norm reads a concatenation, so it folds into nothing."""

    def __init__(self, inputs, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        z = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(z)))], 1)


def residual_network():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 16, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def dense_network():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(DenseLayer(8, 4), DenseLayer(12, 4), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("numpy")
    from batchnorm.lab.data import digits

    return digits.load(8)


def learn(model, data, steps, rate):
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    for chosen in torch.randint(len(data.train), (steps, 64), generator=torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        F.cross_entropy(model(data.train.images[chosen]), data.train.labels[chosen]).backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model, data):
    return (model(data.test.images).argmax(1) == data.test.labels).float().mean().item()


def mates(model, x):
    """How much the output for the first sample changes with the others of its batch."""
    model = copy.deepcopy(model)  # whose running statistics change in training
    with torch.no_grad():
        return (model(x)[0] - model(torch.cat([x[:1], 9 * x[1:]]))[0]).abs().max().item()


@pytest.fixture(scope="module", params=[residual_network, dense_network], ids=["residual", "dense"])
def float_network(request, digits):
    torch.manual_seed(0)
    return learn(request.param(), digits, 100, 0.1)


def test_quantization_aware_training_of_a_whole_network(float_network, digits):
    """The case of pytorch#115715: batch norms that nothing absorbs must infer by running statistics too."""
    x, dense = digits.train.images[:64], any(isinstance(module, DenseLayer) for module in float_network)
    folded, report = bn.fold(
        float_network, x, train=True, weight_fake_quant=torch.ao.quantization.default_per_channel_weight_fake_quant
    )
    assert len(report.folded) == (3 if dense else 4)
    assert sorted(report.left) == (["3.norm1", "4.norm1", "5"] if dense else [])
    learn(folded, digits, 10, 0.01)
    assert mates(folded, x) > 0.01
    bn.freeze(folded, affine=False).apply(torch.ao.quantization.disable_observer)
    assert mates(folded, x) < 1e-5
    learn(folded, digits, 10, 0.01)
    final, _ = bn.fold(folded, x)
    assert mates(final, x) < 1e-5
    torch.testing.assert_close(final(x), folded.eval()(x), rtol=1e-4, atol=1e-4)
    with_float_weights = bn.unfold(copy.deepcopy(folded))
    assert accuracy(final, digits) > max(0.8, accuracy(with_float_weights, digits) - 0.03)


@pytest.fixture(scope="module")
def torchs(float_network, digits):
    pytest.importorskip("torchao.quantization.pt2e")
    return pt2e(copy.deepcopy(float_network), digits)


def prepared(model, x, *, train=True):
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(model.train(train), (x,), dynamic_shapes=shapes).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=train))
    return (quantize_pt2e.prepare_qat_pt2e if train else quantize_pt2e.prepare_pt2e)(program, quantizer)


def pt2e(model, digits):
    from torchao.quantization.pt2e import disable_observer, move_exported_model_to_eval, quantize_pt2e

    x = digits.train.images[:64]
    after = prepared(copy.deepcopy(model), x, train=False)
    after(x)
    trained = prepared(model, x)
    found = {"first": trained(x).detach(), "pairs": count(trained, torch.ops.aten.div.Tensor) // 2}
    found["batch norms"] = count(trained, torch.ops.aten.batch_norm.default)
    found["fake quantizers"] = sum(node.op == "call_module" for node in trained.graph.nodes)
    learn(trained, digits, 10, 0.01)
    found["training"], found["mates in training"] = trained(x).detach(), mates(trained, x)
    converted = quantize_pt2e.convert_pt2e(copy.deepcopy(trained))
    move_exported_model_to_eval(trained.apply(disable_observer))
    move_exported_model_to_eval(converted)
    for name, program in (("prepared", trained), ("QAT", converted), ("PTQ", quantize_pt2e.convert_pt2e(after))):
        left = count(program, torch.ops.aten.batch_norm.default)
        found[name] = (left, mates(program, x), accuracy(program, digits), program(x).detach())
    return found


def count(program, target):
    return sum(node.target is target for node in program.graph.nodes)


@pytest.mark.filterwarnings("ignore")  # torchao's own
@pytest.mark.parametrize("kind", ["converted", "fused", "reverted"])
def test_pt2e_does_with_our_layers_what_it_does_with_torchs(torchs, float_network, digits, kind):
    change = {
        "converted": bn.convert,
        "fused": bn.fuse,
        "reverted": lambda model: bn.revert(bn.fuse(model)),
    }[kind]
    ours = pt2e(change(copy.deepcopy(float_network)), digits)
    dense = any(isinstance(module, DenseLayer) for module in float_network)
    for found in (torchs, ours):
        assert (found["pairs"], found["batch norms"]) == ((3, 6) if dense else (4, 4))
        assert found["mates in training"] > 0.01
        assert (found["prepared"][0], found["QAT"][0], found["PTQ"][0]) == ((6, 3, 3) if dense else (4, 0, 0))
        for name in ("prepared", "QAT", "PTQ"):
            assert found[name][1] == 0  # moving to inference changes the outputs to inference's
        assert (found["training"] - found["prepared"][3]).abs().max() > 0.01
    for name in ("QAT", "PTQ"):
        assert abs(ours[name][2] - torchs[name][2]) < 0.03
    if kind == "reverted":
        assert torch.equal(ours["first"], torchs["first"])
        return
    # the quantizer looks for torch's classes, and puts fewer fake quantizers into a converted model: it is closer to the float one
    assert ours["fake quantizers"] < torchs["fake quantizers"]
    wanted = copy.deepcopy(float_network).train()(digits.train.images[:64])
    distances = [(found["first"] - wanted).abs().mean() / wanted.abs().mean() for found in (ours, torchs)]
    assert distances[0] < min(0.02, distances[1])
