"""What follows a batch norm in a model's own code goes into the same call; nothing else changes, and it can be undone."""

import contextlib
import copy
import logging
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.kernels import cpu
from batchnorm.lab.networks import Bottleneck
from tests.networks import settle
from tests.test_surgery import shape_of


class Block(nn.Module):
    """torchvision's: one activation for all, called again and again."""

    def __init__(self, act=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Functional(Block):
    def forward(self, x):
        y = F.relu6(self.bn1(self.conv1(x)), inplace=True)
        return torch.add(x, self.bn2(self.conv2(y))).relu_()


class Wrapped(nn.Module):
    """As in transformers: a layer with an activation of nothing, and the addition outside of it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(ConvLayer(nn.SiLU()), ConvLayer(nn.Identity()))
        self.shortcut, self.act = ConvLayer(nn.Identity()), nn.GELU()

    def forward(self, x):
        y = self.layer(x)
        y = y + self.shortcut(x)
        return self.act(y)


class ConvLayer(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), act

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


def sample():
    return torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def activations(model):
    """What each batch norm applies: by itself, or because a rewritten forward asks for it."""
    found = {name: str(m.activation) for name, m in model.named_modules() if isinstance(m, bn.BatchNorm)}
    for name, module in model.named_modules():
        for norm, what in getattr(vars(module).get("forward"), "applies", {}).items():
            found[f"{name}.{norm}".lstrip(".")] = what.removeprefix("an addition").removeprefix(" and ") or "None"
    return found


@pytest.mark.parametrize(
    ("build", "fused", "additions"),
    [
        (Block, {"bn1": "relu", "bn2": "relu"}, 1),
        (Functional, {"bn1": "relu6", "bn2": "relu"}, 1),
        (lambda: Bottleneck(4, 2, 1), {"body.1": "relu", "body.4": "relu", "body.7": "relu", "shortcut.1": "None"}, 1),
        (Wrapped, {"layer.0.norm": "silu", "layer.1.norm": "gelu", "shortcut.norm": "None"}, 1),
        (lambda: ConvLayer(nn.Hardswish()), {"norm": "hardswish"}, 0),
    ],
    ids=["torchvision", "functional", "bottleneck", "transformers", "layer"],
)
def test_patterns_are_fused_and_undone(build, fused, additions):
    torch.manual_seed(0)
    model = settle(build()).double()
    expected = copy.deepcopy(model)
    before, state = shape_of(model), copy.deepcopy(model.state_dict())
    assert bn.fuse(model) is model
    assert activations(model) == fused
    assert model.forward.source.count("residual = ") == additions
    assert model.forward.source.count(" + ") == 0
    assert list(model.state_dict()) == list(state)
    for training in (True, False):
        models = [m.train(training) for m in (expected, model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))]
        results = []
        for m in models:
            x = sample().requires_grad_()
            m.zero_grad()
            y = m(x)
            y.square().sum().backward()
            results.append((y, x.grad, [p.grad for p in m.parameters()], dict(m.state_dict())))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-10)
    again = copy.deepcopy(model)
    bn.fuse(again)
    torch.testing.assert_close(again(sample()), model(sample()), rtol=0, atol=0)
    model.train()
    bn.revert(model)
    assert shape_of(model) == before
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


@pytest.mark.skipif(cpu.unavailable() is not None, reason="plain torch adds by itself")
def test_a_pass_reads_and_writes_less():
    """The addition and the activation are no calls of their own any more."""
    model, calls = bn.fuse(Bottleneck(4, 2, 1)), []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Watch():
        model(sample().float())
    assert not {"add", "add_", "__add__", "__iadd__", "relu", "relu_"} & set(calls)


def test_fused_models_compile_and_move():
    model = bn.fuse(Bottleneck(4, 2, 1))
    twin = copy.deepcopy(model)
    x = sample().float()
    torch.testing.assert_close(torch.compile(twin, backend="aot_eager", fullgraph=True)(x), model(x))
    assert model.to(torch.float64)(sample()).dtype == torch.float64
    model.body[7] = copy.deepcopy(model.body[7])  # the forward calls what hangs there
    with torch.no_grad():
        model.body[7].weight.zero_()
        model.body[7].bias.fill_(-1e6)
    assert (model(sample()) == 0).all()


class Scripted(nn.Module):
    """A forward of the test's choice."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        self.norm, self.relu, self.conv = nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.relu(m.norm(x)) if x.sum() > 0 else x, "symbolically traced variables"),
        (lambda m, x: m.relu(m.norm(x)) if m.training else m.norm(x), "differs between training and inference"),
        (lambda m, x: m.relu(m.norm(x)) * torch.rand(()), "draws random numbers"),
        (lambda m, x: m.relu(y := m.norm(x)) + y, None),
        (lambda m, x: m.norm(m.relu(m.norm(x))), None),
        (lambda m, x: m.norm(x) + m.norm.weight.sum(), None),
        (lambda m, x: m.norm(x) + 1, None),
        (lambda m, x: m.norm(x).add(x, alpha=2), None),
        (lambda m, x: (y := m.conv(x)).add_(m.norm(x)) + y, None),
        (lambda m, x: m.norm(z := m.conv(x)) + z.relu_(), None),
        (lambda m, x: (y := m.norm(x)) + y, None),
        (lambda m, x: torch.tanh(m.norm(x)), None),
    ],
)  # fmt: skip
def test_what_cannot_be_fused_is_left_and_does_the_same(function, reason, caplog):
    model = Scripted(function)
    expected = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, "batchnorm"):
        bn.fuse(model)
    assert "forward" not in vars(model)
    assert model.norm.activation is None
    assert reason is None or reason in caplog.text
    torch.manual_seed(3)
    found = model(sample().float())
    torch.manual_seed(3)
    torch.testing.assert_close(found, expected(sample().float()))


@pytest.mark.parametrize("place", ["norm", "act", "", "inner"])
def test_hooks_still_run(place):
    model = Wrapped() if place == "inner" else ConvLayer(nn.ReLU())
    watched = model.layer[1] if place == "inner" else model.get_submodule(place)
    seen = []
    watched.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    expected = copy.deepcopy(model)
    torch.testing.assert_close(bn.fuse(model)(sample().float()), expected(sample().float()))
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1])


def test_optional_arguments_keep_the_forward_but_not_those_below(caplog):
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.norm = Block(), nn.BatchNorm2d(4)

        def forward(self, x, mask=None):
            y = F.relu(self.norm(self.block(x)))
            return y if mask is None else y * mask

    model = Optional()
    expected = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, "batchnorm"):
        bn.fuse(model)
    assert "left the model: its forward takes optional arguments" in caplog.text
    assert activations(model) == {"block.bn1": "relu", "block.bn2": "relu", "norm": "None"}
    x = sample().float()
    torch.testing.assert_close(model(x, x), expected(x, x))


def test_of_what_cannot_be_traced_the_modules_below_are_fused():
    class Unclear(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block(nn.Tanh())])
            self.norm, self.tail = nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.tail(torch.relu(self.norm(x)) if bool(x.sum() < 1e9) else x)

    model = Unclear()
    expected = copy.deepcopy(model)
    bn.fuse(model)
    assert activations(model) == {
        "blocks.0.bn1": "relu", "blocks.0.bn2": "relu", "blocks.1.bn1": "None", "blocks.1.bn2": "None", "norm": "None",
        "tail.0": "relu",
    }  # fmt: skip
    assert "residual" in model.blocks[1].forward.source
    torch.testing.assert_close(model(sample().float()), expected(sample().float()))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


_reverse = Reversed.apply


def _in(context):
    def function(m, x):
        with context():
            y = m.conv(x)
        return m.relu(m.norm(y))

    return function


def _without_gradients(m, x):
    return m.relu(m.norm(torch.no_grad()(m.conv)(x)))


def _writes(name):
    def function(m, x):
        if name == "buffer":
            m.count += 1
        elif name == "list":
            m.seen.append(1)
        else:
            setattr(m, name, getattr(m, name) + 1)
        return m.relu(m.norm(x))

    return function


# How torch 2.11 saves the inputs of a checkpoint is found first.
CHECKPOINT = "calls an autograd.Function" if torch.__version__.startswith("2.11.") else "switches gradients"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_in(torch.no_grad), "switches gradients"),
        (_in(torch.enable_grad), "switches gradients"),
        (_without_gradients, "switches gradients"),
        (_in(lambda: torch.autocast("cpu", torch.bfloat16)), "switches gradients"),
        (_in(lambda: torch.autocast("cpu", enabled=False)), "switches gradients"),
        (_in(torch.autograd.graph.save_on_cpu), "switches gradients"),
        (lambda m, x: m.relu(m.norm(checkpoint(m.conv, x, use_reentrant=False))), CHECKPOINT),
        (lambda m, x: m.relu(m.norm(checkpoint(m.conv, x, use_reentrant=True))), "calls an autograd.Function"),
        (lambda m, x: m.relu(m.norm(Reversed.apply(x))), "calls an autograd.Function"),
        (lambda m, x: m.relu(m.norm(_reverse(x))), "calls an autograd.Function"),
        (_writes("aux"), "writes attributes"),
        (_writes("count"), "writes attributes"),
        (_writes("buffer"), "writes attributes"),
        (_writes("list"), "writes attributes"),
    ],
)  # fmt: skip
def test_what_a_graph_does_not_hold_keeps_the_forward(function, reason, caplog):
    model = Scripted(function)
    model.aux, model.seen = 0, []
    model.register_buffer("count", torch.zeros(()))
    expected = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, "batchnorm"):
        bn.fuse(model)
    assert "forward" not in vars(model)
    assert f"left the model: its forward {reason}" in caplog.text or f"left the model: it {reason}" in caplog.text
    assert (model.aux, model.seen, model.count) == (0, [], 0)
    results = []
    for each in (expected, model):
        x = sample().float().requires_grad_()
        y = each(x)
        y.square().sum().backward()
        conv = each.conv.weight.grad
        results.append(
            (y, x.grad, *([] if conv is None else [conv]), torch.tensor([each.aux, len(each.seen), each.count]))
        )
    assert len(results[0]) == len(results[1])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
    assert Reversed.apply(torch.ones(1)).item() == 1  # nothing of the tracing stays


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.norm(a := x * 2) + m.act(a),
        lambda m, x: (m.norm(a := x * 2), b := F.relu(a, True))[0] + b,
        lambda m, x: (m.norm(v := x * 2), v.view(3, 4, 25).relu_())[0] + v,
        lambda m, x: (m.norm(v := x * 2), v.mul_(2))[0] + x,
        lambda m, x: (m.norm(v := x * 2), m.opaque(v))[0] + x,
        lambda m, x: (x * 2).add_(m.norm(x)),
    ],
    ids=["container", "positional", "view", "method", "module", "target"],
)
def test_what_is_written_in_place_keeps_its_order(function):
    class Opaque(nn.Module):
        def forward(self, x):
            return x.mul_(3)

    model = settle(Scripted(function, act=nn.Sequential(nn.ReLU(inplace=True)), opaque=Opaque())).eval()
    expected = copy.deepcopy(model)
    bn.fuse(model)
    assert "forward" not in vars(model)
    with torch.no_grad():
        torch.testing.assert_close(model(sample().float()), expected(sample().float()), rtol=1e-5, atol=1e-5)


def test_a_container_that_writes_in_place_keeps_its_order_beside_another_pattern():
    act = nn.Sequential(nn.ReLU(inplace=True))
    model = Scripted(lambda m, x: (m.norm(a := x * 2) + m.act(a)) * torch.relu(m.other(x)), act=act)
    model.other = nn.BatchNorm2d(4)
    settle(model).eval()
    expected = copy.deepcopy(model)
    bn.fuse(model)
    assert activations(model) == {"norm": "None", "other": "relu"}
    assert "residual" not in model.forward.source
    with torch.no_grad():
        torch.testing.assert_close(model(sample().float()), expected(sample().float()), rtol=1e-5, atol=1e-5)


def test_a_model_that_cannot_be_copied_is_left_and_what_is_below_is_fused(caplog):
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.lock, self.saved = threading.Lock(), []
            self.block, self.norm = Block(), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(self.block(x))
            self.saved[:] = [y]
            return F.relu(y)

    model = Locked()
    with caplog.at_level(logging.INFO, "batchnorm"):
        bn.fuse(model)
    assert "left the model: it cannot be copied: cannot pickle" in caplog.text
    assert activations(model) == {"block.bn1": "relu", "block.bn2": "relu", "norm": "None"}
    del model.lock
    model(sample().float())
    bn.revert(model)
    with caplog.at_level(logging.INFO, "batchnorm"):
        bn.fuse(model)
    assert "it cannot be copied: Only Tensors created explicitly by the user" in caplog.text
    assert activations(model)["block.bn2"] == "relu"


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.norm(x) + x.mean((2, 3), keepdim=True),
        lambda m, x: torch.relu(m.norm(x) + m.scale),
        lambda m, x: m.relu(m.norm(x.mean((2, 3), keepdim=True)) + x),
        lambda m, x: m.norm(x) + x.size(1),
        lambda m, x: m.relu(m.norm(x) + x.double()),
    ],
    ids=["mean", "parameter", "larger", "number", "dtype"],
)
def test_what_has_another_shape_is_added_afterwards(function):
    model = Scripted(function, scale=nn.Parameter(torch.linspace(-1, 1, 4).reshape(1, 4, 1, 1)))
    settle(model)
    expected = copy.deepcopy(model)
    bn.fuse(model)
    assert "residual = " in model.forward.source
    for training in (True, False):
        results = []
        for each in (expected.train(training), model.train(training)):
            x = sample().float().requires_grad_()
            each.zero_grad()
            y = each(x)
            (y.square().sum()).backward()
            results.append((y, x.grad, each.norm.weight.grad, dict(each.state_dict())))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert str(bn.revert(model)) == str(expected)


def _exchanged(model):  # as ultralytics' own fuse() does it
    conv = model.cv2
    folded, _ = bn.fold(nn.Sequential(conv.conv, conv.norm).eval(), sample().float())
    conv.conv = folded[0]
    del conv.norm
    conv.forward = lambda x: conv.act(conv.conv(x))


def _hooked(model):
    model.cv2.register_forward_hook(lambda module, args, output: output * 2)


def _hooked_inside(model):
    model.cv2.norm.register_forward_hook(lambda module, args, output: output * 2)


def _reactivated(model):
    model.cv2.act = nn.Tanh()


def _activated(model):
    model.cv2.norm.activation = bn.kernels.Activation("relu6")


class TwoLayers(nn.Module):
    """A sum of a layer's output and its input, as in YOLO's bottleneck."""

    def __init__(self):
        super().__init__()
        self.cv1, self.cv2 = ConvLayer(nn.SiLU()), ConvLayer(nn.Identity())

    def forward(self, x):
        return F.silu(self.cv2(self.cv1(x)) + x)


@pytest.mark.parametrize(
    "change", [_exchanged, _hooked, _hooked_inside, _reactivated, _activated], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("copied", [False, True], ids=["same", "copied"])
def test_a_change_of_what_a_fused_forward_passes_by_counts(change, copied):
    model = settle(TwoLayers()).eval()
    plain = copy.deepcopy(model)
    bn.fuse(model)
    assert activations(model) == {"cv1.norm": "silu", "cv2.norm": "silu"}
    if change is _activated:
        bn.convert(plain)
    if copied:
        model = pickle.loads(pickle.dumps(model))
    for each in (model, plain):
        change(each)
    torch.testing.assert_close(model(sample().float()), plain(sample().float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "build",
    [Block, TwoLayers, Wrapped, lambda: nn.Sequential(Block(), nn.BatchNorm2d(4), nn.ReLU())],
)
def test_what_torch_fx_traces_of_a_fused_model_computes_the_same(build):
    model = settle(build()).eval()
    expected = model(sample().float())
    bn.fuse(model)
    for traced in (torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(nn.Sequential(model))):
        torch.testing.assert_close(traced(sample().float()), expected, rtol=1e-5, atol=1e-5)


def test_threads_may_call_a_fused_model_at_once():
    """The sum has another shape than the batch norm's input: no layer may change for the time of the call."""
    model = settle(bn.fuse(Scripted(lambda m, x: torch.relu(m.norm(x.mean((2, 3), keepdim=True)) + x)))).eval()
    before = dict(vars(model.norm))
    seen = []
    relu = F.relu

    def watch(z, *rest):
        seen.append(dict(vars(model.norm)) == before)
        return relu(z, *rest)

    with pytest.MonkeyPatch.context() as patch:
        row = bn.kernels.activation.ROWS["relu"]
        patch.setitem(bn.kernels.activation.ROWS, "relu", row._replace(function=watch))
        model(sample().float())
    assert seen == [True]


def test_an_exchanged_layer_without_an_activation_still_adds():
    model = settle(bn.fuse(Scripted(lambda m, x: m.norm(x) + x))).eval()
    expected = model(sample().float())
    exchanged = nn.BatchNorm2d(4).eval()
    exchanged.load_state_dict(model.norm.state_dict())
    model.norm = exchanged
    torch.testing.assert_close(model(sample().float()), expected, rtol=1e-5, atol=1e-5)


def test_what_has_another_shape_is_added_afterwards_in_a_compiled_model():
    model = Scripted(lambda m, x: torch.relu(m.norm(x) + x.mean((2, 3), keepdim=True)))
    expected = copy.deepcopy(model)
    compiled = torch.compile(bn.fuse(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(sample().float()), expected(sample().float()), rtol=1e-4, atol=1e-4)


def test_an_exchanged_layer_does_not_lose_its_activation():
    model = bn.fuse(settle(nn.Sequential(ConvLayer(nn.ReLU()))).eval())
    expected = model(sample().float())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.testing.assert_close(model(sample().float()), expected, rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(bn.revert(model)[0])
    torch.testing.assert_close(model(sample().float()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["joint", "layerwise"])
def test_fused_models_are_recalibrated(method):
    torch.manual_seed(0)
    model = nn.Sequential(Bottleneck(4, 2, 1), Block2())
    expected = copy.deepcopy(model)
    batches = [torch.randn(4, 4, 5, 5) for _ in range(3)]
    for each in (expected, bn.fuse(model)):
        bn.recalibrate(each, batches, method=method)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


def test_memory_is_saved_in_fused_models():
    torch.manual_seed(0)
    model = bn.fuse(nn.Sequential(Bottleneck(4, 2, 1), Block2())).double()
    grads = []
    for context in (contextlib.nullcontext(), bn.save_memory()):
        model.zero_grad()
        with context:
            y = model(sample()).square().sum()
        y.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_fused_and_folded():
    model = settle(nn.Sequential(Bottleneck(4, 2, 1), Bottleneck(8, 2, 1), Block2())).double()
    expected = copy.deepcopy(model).eval()
    found, report = bn.fold(bn.fuse(model), sample(), tolerance=1e-10)
    assert report.batch_norms_after == 0
    torch.testing.assert_close(found(sample()), expected(sample()), rtol=1e-10, atol=1e-10)


class Block2(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return F.silu(self.norm(self.conv(x)))


@pytest.mark.parametrize("statistics", [None, bn.statistics.Renorm(), bn.statistics.Domains(("a", "b"))], ids=str)
def test_sources_and_contexts_see_through_a_call_with_an_activation(statistics):
    """The layer is not changed for the call, so what a source is given stands for it."""
    plain = bn.convert(settle(TwoLayers()).double(), statistics=statistics)
    fused = bn.fuse(copy.deepcopy(plain))
    assert activations(fused) == {"cv1.norm": "silu", "cv2.norm": "silu"}
    parts = [sample()[:1], sample()[1:]]
    for model in (plain, fused):
        with bn.domain("b"):
            with bn.accumulate(2):
                for part in (sample(), sample() + 1):
                    model(part).sum().backward()
            losses = bn.as_one_batch(lambda part, model=model: model(part).square().sum(), parts)
            torch.stack(losses).sum().backward()
            torch.utils.checkpoint.checkpoint(model, sample().requires_grad_(), use_reentrant=False).sum().backward()
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())
    grads = [[value.grad for value in model.parameters()] for model in (fused, plain)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)
