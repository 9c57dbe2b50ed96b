"""The parts: each against its paper's formula in float64, and what they share."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import kernels
from batchnorm.errors import DTypeError, InputError, StateError
from batchnorm.statistics import Batch, Domains, Ghost, MovingAverage, Renorm, Running
from tests.budget import assert_same_bits

PARTS = [Batch(), Running(), Renorm(), Renorm(warmup=0), Ghost(2), Ghost(3)]
every_part = pytest.mark.parametrize("part", PARTS, ids=repr)
SHAPES = [(6, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 3, 2)]


class Ioffe2017:
    """Algorithm 1 of "Batch Renormalization", with the moving average of the variance in place of sigma's, in float64."""

    def __init__(self, momentum: float, eps: float, *, unbiased: bool) -> None:
        self.mean, self.variance = torch.zeros(3).double(), torch.ones(3).double()
        self.momentum, self.eps, self.unbiased = momentum, eps, unbiased

    def __call__(self, x, gamma, beta, r_max, d_max):
        axes = [0, *range(2, x.dim())]

        def along(values):
            return values.view(1, -1, *[1] * (x.dim() - 2))

        mu = x.mean(axes)
        variance = ((x - along(mu)) ** 2).mean(axes)
        sigma, running_sigma = torch.sqrt(self.eps + variance), torch.sqrt(self.eps + self.variance)
        r = torch.clamp(sigma.detach() / running_sigma, 1 / r_max, r_max)
        d = torch.clamp((mu.detach() - self.mean) / running_sigma, -d_max, d_max)
        xhat = (x - along(mu)) / along(sigma) * along(r) + along(d)
        m = x.numel() // 3
        followed = variance.detach() * (m / (m - 1) if self.unbiased else 1)
        self.mean = self.mean + self.momentum * (mu.detach() - self.mean)
        self.variance = self.variance + self.momentum * (followed - self.variance)
        return along(gamma) * xhat + along(beta)


@pytest.mark.parametrize("variance", ["unbiased", "biased"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("r_max", "d_max"), [(1.5, 0.5), (3.0, 5.0), (1.0, 2.0), (1.0, 0.0)])
def test_renorm_is_the_papers(shape, r_max, d_max, variance):
    part = Renorm(r_max, d_max, warmup=0)
    layer = bn.BatchNorm(3, eps=1e-3, dtype=torch.float64, statistics=part, running_variance=variance)
    layer.weight.data.uniform_(0.5, 1.5)
    layer.bias.data.uniform_(-1, 1)
    paper = Ioffe2017(0.1, 1e-3, unbiased=variance == "unbiased")
    for step in range(4):
        x = (torch.randn(shape, dtype=torch.float64) * (step + 1) + step).requires_grad_()
        inputs = (x, layer.weight, layer.bias)
        dy = torch.randn(shape, dtype=torch.float64)
        y, expected = layer(x), paper(x, layer.weight, layer.bias, r_max, d_max)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
        grads, exact = (torch.autograd.grad(value, inputs, dy) for value in (y, expected))
        torch.testing.assert_close(grads, exact, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close((layer.running_mean, layer.running_var), (paper.mean, paper.variance))


def test_renorm_schedule_is_the_papers():
    part = Renorm()
    wanted = {
        0: (1, 0),
        5000: (1, 0),
        15000: (1 + 2 * 10 / 35, 2.5),
        25000: (1 + 2 * 20 / 35, 5),
        40000: (3, 5),
        10**6: (3, 5),
    }
    for batches, bounds in wanted.items():
        torch.testing.assert_close(part.bounds(torch.tensor(batches)), tuple(torch.tensor(b).double() for b in bounds))


@pytest.mark.parametrize("part", [Renorm(1.0, 0.0), Renorm()], ids=repr)
def test_renorm_without_room_or_warming_up_is_plain(part):
    plain, layer = bn.BatchNorm2d(3), bn.BatchNorm2d(3, statistics=part)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 2) * 3 + 1
        assert_same_bits("y", layer(x), plain(x))
    for name, value in plain.state_dict().items():
        assert_same_bits(name, layer.state_dict()[name], value)


def test_renorm_trains_as_it_infers_where_nothing_is_clipped():
    layer = bn.BatchNorm1d(3, statistics=Renorm(100.0, 100.0, 0), dtype=torch.float64)
    layer.running_mean.uniform_(-1, 1)
    layer.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, dtype=torch.float64)
    inferred = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), inferred)


def test_renorm_with_a_mask_is_the_batch_without_the_padding():
    one, other = (bn.BatchNorm1d(3, statistics=Renorm(warmup=0), dtype=torch.float64) for _ in range(2))
    x, mask = torch.randn(4, 3, 6, dtype=torch.float64), torch.arange(6) < torch.tensor([6, 2, 0, 4]).unsqueeze(1)
    padded = x.masked_fill(~mask.unsqueeze(1), torch.nan)
    y = one(padded, mask=mask)
    torch.testing.assert_close(y.movedim(1, -1)[mask], other(x.movedim(1, -1)[mask]))
    assert not y.movedim(1, -1)[~mask].any()
    torch.testing.assert_close(one.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    "arguments", [{"r_max": 0.5}, {"d_max": -1.0}, {"warmup": -1}, {"r_max": float("nan")}], ids=str
)
def test_renorm_refuses_what_means_nothing(arguments):
    with pytest.raises(InputError, match="r_max must be at least 1"):
        Renorm(**arguments)


def test_renorm_needs_running_statistics_and_real_input():
    with pytest.raises(StateError, match="track_running_stats=True"):
        bn.BatchNorm1d(3, track_running_stats=False, statistics=Renorm())(torch.randn(4, 3))
    with pytest.raises(DTypeError, match="real input"):
        bn.BatchNorm1d(3, dtype=torch.complex64, statistics=Renorm())(torch.randn(4, 3, dtype=torch.complex64))


@every_part
def test_checkpoints_go_both_ways(part):
    torchs = nn.BatchNorm2d(3)
    torchs(torch.randn(4, 3, 5, 2) + 2)
    layer = bn.BatchNorm2d(3, statistics=part)
    layer.load_state_dict(torchs.state_dict())
    x = torch.randn(4, 3, 5, 2)
    torch.testing.assert_close(layer.eval()(x), torchs.eval()(x))
    back = nn.BatchNorm2d(3)
    back.load_state_dict(layer.state_dict())
    for name, value in torchs.state_dict().items():
        assert_same_bits(name, back.state_dict()[name], value)


@pytest.mark.parametrize("part", [Batch(), Renorm(), Renorm(warmup=0), Ghost(2)], ids=repr)
def test_policies_hold_for_every_part(part):
    single = torch.randn(1, 3)
    with pytest.raises(InputError, match="Expected more than 1 value"):
        bn.BatchNorm1d(3, statistics=part)(single)
    for policy in ("running", "skip"):
        layer = bn.BatchNorm1d(3, statistics=part, on_single=policy)
        y = layer(single)
        expected = single / (1 + 1e-5) ** 0.5 if policy == "running" else torch.zeros(1, 3)
        torch.testing.assert_close(y, expected)
        assert layer.num_batches_tracked == 0
    broken = torch.randn(4, 3)
    broken[0] = torch.nan
    layer = bn.BatchNorm1d(3, statistics=part)
    layer(broken)
    assert layer.running_mean.isfinite().all()
    assert layer.num_nonfinite_batches == 1
    with pytest.raises(InputError, match="must be finite"):
        bn.BatchNorm1d(3, statistics=part, on_nonfinite="error")(broken)
    poisoned = bn.BatchNorm1d(3, statistics=part, on_nonfinite="propagate")
    poisoned(broken)
    assert poisoned.running_mean.isnan().all()


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 3), nn.BatchNorm1d(3), nn.ReLU(), bn.BatchNorm1d(3, statistics=Renorm()), nn.Linear(3, 2)
    )


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_layers_stay_through_an_epoch(affine):
    model = network()
    model(torch.randn(8, 5))
    expected = model.eval()(x := torch.randn(8, 5))
    bn.freeze(model, affine=affine).train()
    torch.testing.assert_close(model(x), expected)
    before, weights = buffers_of(model), model[1].weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(5):
        optimizer.zero_grad()
        model.train()(torch.randn(1 + step, 5)).square().sum().backward()
        optimizer.step()
    for name, value in buffers_of(model).items():
        assert_same_bits(name, value, before[name])
    assert torch.equal(model[1].weight, weights) == affine


def test_unfreeze_puts_everything_back():
    model = network()
    model[1].bias.requires_grad_(False)
    model[1].momentum = 0.3
    bn.freeze(model, affine=False)
    bn.freeze(model)
    assert not any(p.requires_grad for i in (1, 3) for p in model[i].parameters())
    bn.unfreeze(model)
    assert [p.requires_grad for i in (1, 3) for p in model[i].parameters()] == [True, False, True, True]
    assert model[1].statistics == Batch()
    assert model[3].statistics == Renorm()
    assert model[1].momentum == 0.3
    model(torch.randn(8, 5))
    assert model[1].num_batches_tracked == 1
    assert type(bn.revert(model)[1]) is nn.BatchNorm1d


def test_freeze_leaves_what_has_no_running_statistics(caplog):
    layer = bn.freeze(bn.BatchNorm1d(3, track_running_stats=False))
    assert layer.statistics == Batch()
    assert "no running statistics" in caplog.text


def test_gradients_of_single_samples_through_a_frozen_layer():
    model = bn.freeze(network(), affine=False).train()
    parameters = dict(model.named_parameters())
    x = torch.randn(4, 5)

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample.unsqueeze(0),)).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        alone = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        torch.testing.assert_close([found[name][i] for name in parameters], list(alone))


def test_convert_gives_every_layer_the_part_and_revert_takes_it_back():
    model = network()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    bn.convert(model, statistics=Renorm(2.0))
    assert model[1].statistics == model[3].statistics == Renorm(2.0)
    bn.revert(model)
    assert type(model[1]) is nn.BatchNorm1d
    assert model[3].statistics == Renorm()
    torch.testing.assert_close(dict(model.state_dict()), state)
    with pytest.raises(InputError, match="must be a statistics source"):
        bn.convert(model, statistics=Renorm)
    assert type(model[1]) is nn.BatchNorm1d


def test_revert_takes_back_running_statistics_that_convert_gave():
    model = bn.revert(bn.convert(network(), statistics=Running()))
    assert type(model[1]) is nn.BatchNorm1d
    assert model[3].statistics == Renorm()


def test_convert_leaves_the_frozen_frozen():
    model = bn.freeze(network())
    bn.convert(model, statistics=Renorm(2.0))
    assert isinstance(model[1].statistics, Running)
    assert bn.unfreeze(model)[1].statistics == Renorm(2.0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("shape", [(7, 3, 5), (7, 3, 4, 2), (8, 3, 2)], ids=str)
def test_ghost_is_the_papers(shape, size, masked):
    """Every group alone through plain batch normalization, and the running statistics of the whole batch."""
    layer, whole = (bn.BatchNorm(3, dtype=torch.float64, statistics=part) for part in (Ghost(size), Batch()))
    layer.weight.data.uniform_(0.5, 1.5)
    layer.bias.data.uniform_(-1, 1)
    for step in range(3):
        x = (torch.randn(shape, dtype=torch.float64) + step).requires_grad_()
        mask = torch.rand(shape[0], *shape[2:]) > 0.2 if masked else None
        groups = [] if mask is None else mask.split(size)
        expected = torch.cat(
            [
                bn.functional.batch_norm(
                    part, None, None, layer.weight, layer.bias, True, mask=groups[i] if masked else None
                )
                for i, part in enumerate(x.split(size))
            ]
        )
        y, dy = layer(x, mask=mask), torch.randn_like(x)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
        inputs = (x, layer.weight, layer.bias)
        torch.testing.assert_close(
            torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), rtol=1e-9, atol=1e-10
        )
        whole(x.detach(), mask=mask)
    state, of_whole = layer.state_dict(), whole.state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(state[name], of_whole[name])


def test_ghost_of_all_samples_is_plain():
    plain, layer = bn.BatchNorm2d(3), bn.BatchNorm2d(3, statistics=Ghost(4))
    x = torch.randn(4, 3, 5, 2)
    assert_same_bits("y", layer(x), plain(x))
    for name, value in plain.state_dict().items():
        assert_same_bits(name, layer.state_dict()[name], value)


@pytest.mark.parametrize("layout", ["planar", "channels_last"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("one_kernel")
def test_each_ghost_group_is_plain_bit_for_bit(masked, layout):
    """Residual, activation and mask with it; channels and planes around the widths of vectors; a mask that is the same for all samples."""
    for shape, broadcast in (((7, 5, 17), False), ((9, 64, 4, 3), False), ((8, 1, 9), True), ((6, 3, 1), False)):
        x, residual, dy = (torch.randn(shape) for _ in range(3))
        if layout == "channels_last":
            x, residual, dy = (v.movedim(1, -1).contiguous().movedim(-1, 1) for v in (x, residual, dy))
        mask = torch.rand(1 if broadcast else shape[0], *shape[2:]) > 0.3 if masked else None
        weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
        inputs = [v.requires_grad_() for v in (x, residual, weight, bias)]
        y, _ = bn.functional.normalize(x, weight, bias, activation="silu", residual=residual, mask=mask, group_size=3)
        found = torch.autograd.grad(y, inputs, dy)
        assert y.stride() == x.stride()
        assert found[0].stride() == x.stride()
        expected, sums = [], []
        for start in range(0, shape[0], 3):
            cut = slice(start, start + 3)
            parts = [x[cut].detach().requires_grad_(), residual[cut].detach().requires_grad_(), weight, bias]
            part_mask = mask if mask is None or broadcast else mask[cut]
            part, _ = bn.functional.normalize(
                parts[0], weight, bias, activation="silu", residual=parts[1], mask=part_mask
            )
            grads = torch.autograd.grad(part, parts, dy[cut])
            expected.append((part, *grads[:2]))
            sums.append(grads[2:])
        whole = [torch.cat(values) for values in zip(*expected, strict=True)]
        for name, value, exact in zip(("y", "dx", "dresidual"), (y, *found[:2]), whole, strict=True):
            assert_same_bits(name, value, exact)
        for value, terms in zip(found[2:], zip(*sums, strict=True), strict=True):
            torch.testing.assert_close(value, sum(terms), rtol=1e-5, atol=1e-5)


def test_known_moments_are_not_reduced_again(monkeypatch):
    x, dy = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, 5, dtype=torch.float64)
    expected, moments = bn.functional.normalize(x)
    for kernel in kernels.KERNELS:
        monkeypatch.setattr(kernel, "forward", None)
        monkeypatch.setattr(kernel, "moments", None)
    y, found = bn.functional.normalize(x, moments=moments)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))
    torch.testing.assert_close(found, moments)
    torch.testing.assert_close(bn.functional.normalize(x.detach(), moments=moments)[0], expected.detach())
    with pytest.raises(InputError, match="one of the two"):
        bn.functional.normalize(x, moments=moments, group_size=2)
    with pytest.raises(InputError, match="group_size must be at least 1"):
        bn.functional.normalize(x, group_size=0)


def test_a_sample_left_over_joins_the_group_before_it():
    x = torch.randn(9, 3, dtype=torch.float64)
    y = bn.BatchNorm1d(3, dtype=torch.float64, statistics=Ghost(4))(x)
    torch.testing.assert_close(y, torch.cat([bn.BatchNorm1d(3, dtype=torch.float64)(part) for part in x.split([4, 5])]))


def test_ghost_groups_of_one_value_follow_on_single():
    x = torch.randn(4, 3)
    with pytest.raises(InputError, match="more than 1 value"):
        bn.BatchNorm1d(3, statistics=Ghost(1))(x)
    layer = bn.BatchNorm1d(3, statistics=Ghost(1), on_single="skip")
    assert not layer(x).any()
    assert layer.num_batches_tracked == 0
    with pytest.raises(InputError, match="size must be at least 1"):
        Ghost(0)


def test_copy_statistics_to_an_average():
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model)
    model(torch.randn(8, 5))
    assert bn.copy_statistics(model, average) is average
    for name, value in model.named_buffers():
        assert_same_bits(name, dict(average.module.named_buffers())[name], value)
    wider = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(4))
    before = buffers_of(wider)
    with pytest.raises(StateError, match="3 has none"):
        bn.copy_statistics(model, wider)
    torch.testing.assert_close(buffers_of(wider), before)


@pytest.mark.parametrize("wrapped", ["compiled", "parallel", "both", "a part"])
def test_wrappers_do_not_count(wrapped):
    model, average = network(), torch.optim.swa_utils.AveragedModel(network())
    model(torch.randn(8, 5))
    match wrapped:
        case "compiled":
            outer = torch.compile(model, backend="eager")
        case "parallel":
            outer = nn.DataParallel(model)
        case "both":
            outer = torch.compile(nn.DataParallel(model), backend="eager")
        case _:
            outer = copy.deepcopy(model)
            outer[1] = torch.compile(outer[1], backend="eager")
    bn.copy_statistics(outer, average)
    assert_same_bits("mean", average.module[1].running_mean, model[1].running_mean)
    average.module[1].running_mean.fill_(3)
    bn.copy_statistics(average, outer)
    assert all((v == 3).all() for name, v in outer.named_buffers() if name.endswith("1.running_mean"))
    assert any((value == 3).all() for value in outer.buffers())


@pytest.mark.parametrize(
    "part", [Batch(), Ghost(2), Renorm(warmup=0), MovingAverage(2, warmup=0), Domains(("a", "b"))], ids=repr
)
def test_one_value_that_a_mask_leaves_goes_by_the_running_statistics_on_request(part):
    layer = bn.BatchNorm1d(3, statistics=part, on_single="running", activation="silu")
    for _ in range(3):
        layer(torch.randn(4, 3, 5) * 2 + 1)
    before = buffers_of(layer)
    x, residual = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3, 5)
    several = torch.ones(4, 5, dtype=torch.bool)
    one = several & (torch.arange(20).view(4, 5) == 7)
    for mask in (one, ~several):
        y = layer(x, residual=residual, mask=mask)
        (dx,) = torch.autograd.grad(y.sum(), x)
        expected = layer.eval()(x, residual=residual, mask=mask)
        assert_same_bits("y", y, expected)
        assert_same_bits("dx", dx, torch.autograd.grad(expected.sum(), x)[0])
        layer.train()
    torch.testing.assert_close(buffers_of(layer), before, rtol=0, atol=0)
    other = copy.deepcopy(layer)
    other.on_single = "skip"
    assert_same_bits("several", layer(x, mask=several), other(x, mask=several))


class Shifted:
    """A source of somebody's own: `Batch` of a stand-in whose running mean is another."""

    class StandIn:
        def __init__(self, owner):
            self.owner, self.running_mean = owner, owner.running_mean + 1

        def __getattr__(self, name):
            return getattr(self.owner, name)

    def __call__(self, layer, x, residual, mask):
        return Batch()(self.StandIn(layer), x, residual, mask)


@pytest.mark.parametrize("activation", [None, bn.kernels.parse("relu")], ids=["its own", "of the call"])
def test_compiled_code_reads_a_stand_in_for_the_layer(activation):
    layer = bn.BatchNorm1d(3, statistics=Shifted()).eval()
    x = torch.randn(4, 3)
    expected = layer(x, activation=activation)
    assert not torch.equal(expected, bn.BatchNorm1d(3).eval()(x, activation=activation))
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(x, activation=activation), expected)


def test_ghost_batches_compile_for_any_number_of_samples():
    layer = bn.BatchNorm1d(3, statistics=Ghost(3))
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (9, 7, 5):
        x = torch.randn(samples, 3)
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(buffers_of(layer), buffers_of(eager))
