"""Frozen layers that save no input: gradients are those of torch's layers in eval mode, and the inputs are freed."""

import contextlib
import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.lab.networks import Bottleneck, resnet50
from batchnorm.measure import peak_bytes, saved_bytes
from batchnorm.statistics import Running

NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
BEFORE = {  # a layer with six outputs, and the shape of its input
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (3, 4, 7, 8)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same"), (3, 4, 7, 8)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (3, 4, 7, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1, padding_mode="reflect"), (3, 6, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (3, 4, 3, 4, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (3, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1, bias=False), (3, 4, 5, 6)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 2, 3)),
    "linear": (lambda: nn.Linear(4, 6), (7, 4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), (7, 4)),
}


def settled(norm):
    """The batch norm with affine parameters and statistics that are not those of a new one."""
    for value in (norm.weight, norm.bias, norm.running_mean):
        if value is not None:
            value.data.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def pair(name="conv2d", affine=True, dtype=torch.float64):
    build, shape = BEFORE[name]
    model = nn.Sequential(build(), settled(NORMS[len(shape)](6, affine=affine))).to(dtype)
    return model, torch.randn(shape, dtype=dtype)


def frozen(model, **options):
    return bn.freeze(copy.deepcopy(model), **{"affine": False, "save_memory": True, **options}).train()


def gradients(model, x, forward=None):
    """The output, and the gradients of the input and of every parameter that learns."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = (forward or model)(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(value.grad for value in model.parameters() if value.requires_grad)]


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@contextlib.contextmanager
def outputs_alive(*modules):
    """Which outputs of these modules exist: one entry for each call."""
    found = []
    handles = [module.register_forward_hook(lambda _, __, y: found.append(weakref.ref(y))) for module in modules]
    yield lambda: [reference() is not None for reference in found]
    for handle in handles:
        handle.remove()


class TestWithFrozenWeight:
    """Nothing depends on the input then."""

    @pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu"])
    @pytest.mark.parametrize("extra", ["", "residual", "mask", "channels_last", "expanded gradient"])
    def test_gradients_do_not_change(self, one_kernel, activation, extra):
        layer = settled(bn.BatchNorm2d(6, activation=activation, statistics=Running())).double()
        x, residual, dy = (torch.randn(3, 6, 4, 5, dtype=torch.float64).requires_grad_() for _ in range(3))
        if extra == "channels_last":
            x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        given = {"residual": residual} if extra == "residual" else {}
        given |= {"mask": torch.rand(3, 4, 5) > 0.3} if extra == "mask" else {}
        inputs = [x, layer.bias, *given.values()][: 3 if extra == "residual" else 2]
        dy = dy.detach()[:, :, :1, :1].expand_as(x) if extra == "expanded gradient" else dy.detach()
        expected = torch.autograd.grad(layer(x, **given), [*inputs, layer.weight], dy)
        layer.weight.requires_grad_(False)
        for found, wanted in zip(torch.autograd.grad(layer(x, **given), inputs, dy), expected, strict=False):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
    def test_a_slope_does_not_round_the_gradient_of_a_wider_bias(self, one_kernel, dtype, wide):
        layer = settled(bn.BatchNorm1d(3, activation=nn.LeakyReLU(0.3), statistics=Running(), dtype=wide))
        layer.weight.requires_grad_(False)
        x, dy = torch.randn(50, 3).to(dtype), torch.randn(50, 3).to(dtype)
        (found,) = torch.autograd.grad(layer(x), layer.bias, dy)
        layer.weight.requires_grad_(True)
        exact, _ = torch.autograd.grad(layer(x), (layer.bias, layer.weight), dy)
        torch.testing.assert_close(found, exact, rtol=0, atol=64 * torch.finfo(wide).eps)

    @pytest.mark.parametrize("activation", [None, "relu"])
    @pytest.mark.parametrize("residual", [False, True])
    def test_derivatives_of_any_order(self, activation, residual):
        layer = bn.freeze(settled(bn.BatchNorm(3, activation=activation)).double())
        inputs = [torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_() for _ in range(1 + residual)]
        assert torch.autograd.gradcheck(layer, inputs, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(layer, inputs)

    def test_the_input_is_freed_and_the_activated_output_is_what_the_next_layer_saves(self):
        x = torch.randn(4, 6, 32, 32)
        size = 4 * x.numel()
        model = nn.Sequential(nn.Conv2d(6, 6, 1), settled(nn.BatchNorm2d(6)), nn.ReLU(), nn.Conv2d(6, 6, 1))
        for change, tensors in ((nn.Module.eval, 2), (bn.freeze, 1), (lambda m: bn.fuse(bn.freeze(m)), 1)):
            changed = change(copy.deepcopy(model))
            assert saved_bytes(lambda changed=changed: changed(x).sum()) // size == tensors

    @pytest.mark.parametrize("numel", [2**15, 2**18])
    def test_torchs_operator_is_called_where_it_saves_nothing_in_vain(self, monkeypatch, numel):
        monkeypatch.setattr(bn.kernels.aten, "DEVICES", ("cpu",))
        monkeypatch.setattr(bn.kernels, "KERNELS", bn.kernels.KERNELS[-2:])
        layer, x = bn.freeze(settled(bn.BatchNorm2d(8))), torch.randn(1, 8, numel // 8, 1).requires_grad_()
        y = layer(x)
        assert ("NativeBatchNorm" in y.grad_fn.name()) == (numel < 2**16)
        expected = torch.autograd.grad(F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight), x, x)
        torch.testing.assert_close(torch.autograd.grad(y, x, x), expected)

    def test_in_place_changes_of_the_input_do_not_matter_now(self):
        layer, x = bn.freeze(settled(bn.BatchNorm2d(6))), torch.randn(2, 6, 4, 4, requires_grad=True)
        z = x * 1
        loss = layer(z).square().sum()
        z.zero_()
        loss.backward()
        assert x.grad.abs().sum() > 0


class TestWithLearningWeight:
    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("name", BEFORE)
    def test_gradients_are_torchs(self, name, affine):
        model, x = pair(name, affine)
        mine = frozen(model)
        with outputs_alive(mine[0]) as alive:
            found = gradients(mine, x)
            assert alive() == [False]
        same(found, gradients(model.eval(), x))
        assert torch.equal(found[0], gradients(frozen(model, save_memory=False), x)[0])

    def test_without_it_the_input_is_saved(self):
        model, x = pair()
        for changed in (frozen(model, save_memory=False), model.eval()):
            with outputs_alive(changed[0]) as alive:
                y = changed(x)
                assert alive() == [True]
            assert y.requires_grad

    @pytest.mark.parametrize("name", ["conv2d groups", "transposed2d", "linear"])
    def test_second_derivatives_are_torchs(self, name):
        model, x = pair(name)

        def penalty(model):
            given = x.detach().requires_grad_()
            inputs = [given, *model.parameters()]
            grads = torch.autograd.grad(model(given).sigmoid().sum(), inputs, create_graph=True)
            return torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

        torch.testing.assert_close(penalty(frozen(model)), penalty(model.eval()), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("name", ["conv2d groups", "transposed2d", "linear"])
    def test_batches_of_gradients(self, name):
        model, x = pair(name)
        mine = frozen(model)
        y, inputs = mine(x), [*mine.parameters()]
        directions = torch.randn(3, *y.shape, dtype=x.dtype)
        found = torch.autograd.grad(y, inputs, directions, is_grads_batched=True, retain_graph=True)
        alone = [torch.autograd.grad(y, inputs, direction, retain_graph=True) for direction in directions]
        same(list(found), [torch.stack(grads) for grads in zip(*alone, strict=True)])

    @pytest.mark.parametrize("shape", [(0, 4, 7, 8), (1, 4, 3, 3)])
    def test_empty_and_single_values(self, shape):
        model, _ = pair()
        x = torch.randn(shape, dtype=torch.float64)
        same(gradients(frozen(model), x), gradients(model.eval(), x))

    @pytest.mark.parametrize("fused", [False, True])
    def test_activation_residual_and_mask(self, one_kernel, fused):
        x, shortcut = torch.randn(3, 4, 7, 8).double(), torch.randn(3, 6, 4, 4).double().requires_grad_()
        conv, norm = pair()[0]
        mask = torch.rand(3, 4, 4) > 0.3 if fused else None
        layer = bn.convert(copy.deepcopy(norm))
        layer.activation, layer.statistics = bn.kernels.Activation("leaky_relu"), Running(save_memory=True)
        inputs = [x.requires_grad_(), shortcut, *conv.parameters(), layer.weight, layer.bias]

        def grads(statistics):
            layer.statistics = statistics
            with outputs_alive(conv) as alive:
                y = layer(conv(x), residual=shortcut, mask=mask)
                assert alive() == [not statistics.save_memory]
            return [y, *torch.autograd.grad(y.square().sum(), inputs)]

        same(grads(Running(save_memory=True)), grads(Running()))

    def test_the_gradient_of_a_wider_residual_is_not_rounded(self, one_kernel):
        (conv, norm), x = pair(dtype=torch.float32)
        layer = bn.convert(copy.deepcopy(norm))
        layer.activation, layer.statistics = bn.kernels.Activation("leaky_relu"), Running(save_memory=True)
        shortcut = torch.randn(3, 6, 4, 4, dtype=torch.float64).requires_grad_()
        with outputs_alive(conv) as alive:
            y = layer(conv(x), residual=shortcut)
            assert alive() == [False]
        (found,) = torch.autograd.grad(y.sum(), shortcut)
        assert torch.equal(found, torch.full_like(shortcut, 0.01).masked_fill(y > 0, 1.0))

    def test_the_gradient_of_a_narrower_residual_is_that_of_a_separate_layer(self, one_kernel):
        """Where the output, in the residual's dtype, would be 0."""
        conv, shortcut = nn.Conv1d(1, 1, 1, bias=False), torch.zeros(2, 1, 1, dtype=torch.float16).requires_grad_()
        nn.init.ones_(conv.weight)
        layer = bn.BatchNorm1d(1, activation="leaky_relu", statistics=Running(save_memory=True), eps=0.0)
        layer(conv(torch.full((2, 1, 1), 1e-8)), residual=shortcut).sum().backward()
        assert (shortcut.grad == 1).all()

    def test_channels_last_under_autocast_and_in_half_precision(self):
        """Beside float64, the error is at most twice that of separate layers."""
        model, x = pair("conv2d same")
        exact = gradients(model.eval(), x)
        casts = {
            "autocast": (torch.float32, torch.autocast("cpu", torch.bfloat16)),
            "bfloat16": (torch.bfloat16, contextlib.nullcontext()),
        }
        for dtype, context in casts.values():
            half = model.to(dtype).to(memory_format=torch.channels_last)
            errors = []
            for options in ({}, {"save_memory": False}):
                mine = frozen(half, **options)
                with context, outputs_alive(mine[0]) as alive:
                    grads = gradients(mine, x.to(dtype).contiguous(memory_format=torch.channels_last))
                    assert alive() == [False] if not options else True
                errors.append([(g.double() - e).norm() / e.norm() for g, e in zip(grads, exact, strict=True)])
            for ours, separate in zip(*errors, strict=True):
                assert ours <= 2 * separate + 1e-3

    @pytest.mark.parametrize("name", ["conv2d", "linear"])
    def test_a_backward_under_autocast_does_not_round(self, name):
        model, x = pair(name, dtype=torch.float32)
        mine = frozen(model)
        expected = gradients(mine, x)
        y = mine(x.requires_grad_())
        mine.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
        for value, grad in zip(mine.parameters(), expected[2:], strict=True):
            torch.testing.assert_close(value.grad, grad, rtol=0, atol=0)

    def test_a_channel_whose_weight_is_zero_learns(self):
        """Its gradient could not be computed from the output: residual branches start at zero."""
        model, x = pair()
        model[1].weight.data[:3] = 0
        same(gradients(frozen(model), x), gradients(model.eval(), x))

    def test_one_convolution_before_two_norms_and_one_output_used_twice(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.one, self.other = (
                    nn.Conv2d(4, 4, 3, padding=1),
                    settled(nn.BatchNorm2d(4)),
                    settled(nn.BatchNorm2d(4)),
                )

            def forward(self, x):
                z = self.conv(x)
                return self.one(z) * z.sigmoid() + self.other(self.conv(z))

        model, x = Twice().double(), torch.randn(2, 4, 5, 5).double()
        same(gradients(frozen(model), x), gradients(model.eval(), x))

    def test_layers_before_it_may_be_partly_frozen(self):
        model, x = pair("conv2d")
        model[0].requires_grad_(False)
        same(gradients(frozen(model), x), gradients(model.eval(), x))
        y = frozen(model)(x)  # x needs no gradient either, so there is no graph before the batch norm
        assert y.requires_grad

    def test_compiled_code_is_left_to_the_compiler(self):
        model, x = pair()
        compiled = torch.compile(frozen(model), backend="eager", fullgraph=True)
        same(gradients(compiled, x), gradients(model.eval(), x))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpoints(self, reentrant, caplog):
        model, x = pair()
        mine = frozen(model)
        same(
            gradients(mine, x, lambda x: checkpoint(mine, x, use_reentrant=reentrant)),
            gradients(model.eval(), x),
        )
        assert not caplog.records

    def test_a_checkpoint_around_the_layer_before_alone(self, caplog):
        """What it saved is packed, and what unpacking returns is not part of the graph."""
        model, x = pair()
        mine = frozen(model)
        found = gradients(mine, x, lambda x: mine[1](checkpoint(mine[0], x, use_reentrant=False)))
        same(found, gradients(model.eval(), x))
        assert "held by hooks of saved tensors" in caplog.text

    def test_under_save_memory(self):
        model, x = pair()
        mine = frozen(model)
        same(gradients(mine, x, bn.save_memory()(mine)), gradients(model.eval(), x))


LEFT = {  # what is between a convolution and its batch norm, or how they are called: the reason why the input is saved
    "an addition": (lambda conv, x: conv(x) + 1, "comes from AddBackward0"),
    "a view": (lambda conv, x: conv(x)[:2], "comes from SliceBackward0"),
    "nothing": (lambda _, x: x.repeat(1, 2, 1, 1)[:, :6].detach(), "needs no gradient"),
    "a hook": (lambda conv, x: hooked(conv(x)), "has hooks"),
    "a write": (lambda conv, x: written(conv(x)), "modified in place"),
    "a backward hook of the module": (lambda conv, x: watched(conv)(x), "comes from BackwardHookFunctionBackward"),
    "a frozen bias": (lambda conv, x: F.conv2d(x, conv.weight, conv.bias.detach()), "bias of the layer before it"),
    "a computed bias": (lambda conv, x: F.conv2d(x, conv.weight, conv.bias * 2), "bias of the layer before it"),
    "a convolution of other dtype": (lambda conv, x: conv.float()(x.float()).double(), "comes from ToCopyBackward0"),
}


def hooked(z):
    z.register_hook(lambda grad: None)
    return z


def written(z):
    with torch.no_grad():
        return z.mul_(2)


def watched(conv):
    conv.register_full_backward_hook(lambda *_: None)
    return conv


class TestLeft:
    """Batch norms that save their input all the same, and say why, once."""

    @pytest.mark.parametrize("name", LEFT)
    def test_what_is_left_is_named(self, name, caplog):
        before, reason = LEFT[name]
        model, x = pair("conv2d")
        model[0] = nn.Conv2d(4, 6, 3).double()
        grads = []
        for mine in (frozen(model), copy.deepcopy(model).eval()):
            for _ in range(2):
                found = gradients(mine, x, lambda x, mine=mine: mine[1](before(mine[0], x)) + 0 * x.sum())
            grads.append([0 if value is None else value for value in found])
        same(*grads)
        assert len(caplog.records) == 1
        assert caplog.records[0].message.startswith("freeze: 1 saves its input for the gradient of weight: ")
        assert reason in caplog.text

    def test_an_activation_that_needs_its_input(self, caplog):
        model = bn.fuse(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.SiLU()))
        frozen(model)(torch.randn(2, 4, 5, 5))
        assert "the gradient of silu needs it" in caplog.text

    def test_classes_that_cannot_be_converted(self, caplog):
        class Doubled(nn.BatchNorm2d):
            def forward(self, x):
                return 2 * super().forward(x)

        bn.freeze(nn.Sequential(nn.Conv2d(4, 6, 3), Doubled(6)), affine=False, save_memory=True)
        assert "freeze: 1 saves its input for the backward: it is a Doubled" in caplog.text

    def test_an_output_that_is_differentiated_afterwards(self):
        model, x = pair()
        z = model[0](x)
        y = frozen(model)[1](z)
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(y.sum(), z)

    def test_input_that_is_not_what_it_was(self, caplog):
        conv, norm = frozen(pair()[0])
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        z = conv(x)
        x.zero_()
        norm(z)
        assert "no longer what it was" in caplog.text


class TestSurgery:
    def test_layers_stay_what_they_are(self):
        model, x = pair("conv2d", dtype=torch.float32)
        names, parameters = list(model.state_dict()), list(map(id, model.parameters()))
        bn.freeze(model, affine=False, save_memory=True)
        assert "statistics=Running(save_memory=True)" in repr(model)
        assert list(model.state_dict()) == names
        assert list(map(id, model.parameters())) == parameters
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.train()):
            with outputs_alive(copied[0]) as alive:
                assert copied(x).requires_grad
                assert alive() == [False]
        bn.convert(model, statistics=bn.statistics.Ghost(2))
        assert model[1].statistics == Running(save_memory=True, before=bn.statistics.Ghost(2))
        bn.freeze(model, affine=False)
        assert repr(model[1].statistics) == "Running()"
        assert type(bn.revert(bn.unfreeze(model))[1]) is nn.BatchNorm2d


class TestMemory:
    """Against torch's layers in eval mode, with the ReLU in place."""

    def test_saved_by_a_resnet(self):
        x, labels = torch.randn(2, 3, 64, 64), torch.randint(1000, (2,))
        model = resnet50().eval()

        def saved(model):
            return saved_bytes(lambda: F.cross_entropy(model(x), labels))

        eager = saved(model)
        assert saved(bn.freeze(model, affine=False, save_memory=True)) <= 0.55 * eager
        assert saved(bn.freeze(model)) <= 0.55 * eager

    @pytest.mark.parametrize("affine", [True, False])
    def test_peak_of_a_step(self, affine):
        x = torch.randn(8, 32, 32, 32)
        model = nn.Sequential(*(Bottleneck(32, 8, stride=1) for _ in range(6))).eval()
        models = model, bn.freeze(copy.deepcopy(model), affine=affine, save_memory=True).train()
        for each in models:
            each(x).sum().backward()
        peaks = [peak_bytes(lambda each=each: each(x).sum().backward()) for each in models]
        assert peaks[1] <= 0.6 * peaks[0]
