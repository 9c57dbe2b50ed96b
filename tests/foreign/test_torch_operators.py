"""torch's own samples of its batch-norm operators (`op_db`), run against ours, and the three places where torch's operator is wrong."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_utils import freeze_rng_state, gradcheck, gradgradcheck
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

import batchnorm as bn
from batchnorm import reference
from tests.budget import assert_ulps, assert_within_budget, largest, max_error

NAMES = ("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update", "nn.functional.batch_norm")
OPERATORS = [operator for operator in op_db if operator.name in NAMES]

# Both sides compute float64 results in float64 and differ in the order of a few operations, each worth half an ulp of its terms.
ULPS = 8


@dataclass
class Call:
    """A sample's arguments by name, whichever operator's signature they came in."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float

    def __call__(self, function: Callable = bn.functional.batch_norm) -> Tensor:
        return function(
            self.input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )

    def copy(self, dtype: torch.dtype = torch.float64) -> "Call":
        """The same values in tensors of their own, all leaves."""
        copied = {
            name: value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)
            if isinstance(value, Tensor)
            else value
            for name, value in vars(self).items()
        }
        return Call(**copied)

    def differentiable(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and value.requires_grad}


@dataclass(frozen=True)
class Sample:
    """One sample of one operator."""

    operator: OpInfo
    index: int

    def __str__(self) -> str:
        return f"{self.operator.formatted_name}-{self.index}"

    def call(self) -> Call:
        """The sample's arguments, in tensors of their own."""
        return by_name(self.operator, DRAWN[self.operator.formatted_name][self.index]).copy()

    def theirs(self, call: Call) -> tuple[Tensor, ...]:
        """torch's operator on the call's tensors: output, and the saved mean and rstd where it returns them."""
        values = {
            "native_batch_norm": (call.training, call.momentum, call.eps),
            "_native_batch_norm_legit": (call.training, call.momentum, call.eps),
            "_batch_norm_with_update": (call.momentum, call.eps),
        }
        statistics = (call.running_mean, call.running_var)
        if self.operator.name == "nn.functional.batch_norm":
            return (call(F.batch_norm),)
        if self.operator.name == "_native_batch_norm_legit" and call.running_mean is None:
            statistics = ()
        return self.operator(call.input, call.weight, call.bias, *statistics, *values[self.operator.name])[:3]


def samples_of(operator: OpInfo) -> list[SampleInput]:
    with freeze_rng_state():
        torch.manual_seed(0)
        return list(operator.sample_inputs("cpu", torch.float64, requires_grad=True))


def by_name(operator: OpInfo, sample: SampleInput) -> Call:
    if operator.name == "nn.functional.batch_norm":
        running_mean, running_var, weight, bias = sample.args
        options = {"training": False, "momentum": 0.1, "eps": 1e-5} | sample.kwargs
        return Call(sample.input, weight, bias, running_mean, running_var, **options)
    if operator.name == "_batch_norm_with_update":  # always trains
        *tensors, momentum, eps = sample.args
        return Call(sample.input, *tensors, True, momentum, eps)
    *tensors, training, momentum, eps = sample.args
    tensors += [None] * (4 - len(tensors))  # the overload of `_native_batch_norm_legit` without running statistics
    return Call(sample.input, *tensors, training, momentum, eps)


# Once: torch makes all samples of an operator together, which takes as long as most tests here.
DRAWN = {operator.formatted_name: samples_of(operator) for operator in OPERATORS}
SAMPLES = [Sample(operator, index) for operator in OPERATORS for index in range(len(DRAWN[operator.formatted_name]))]
every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)


def test_there_are_53_samples():
    counts = {name: len(samples) for name, samples in DRAWN.items()}
    assert counts == {
        "native_batch_norm": 10,
        "_native_batch_norm_legit": 10,
        "_batch_norm_with_update": 9,
        "nn_functional_batch_norm": 12,
        "nn_functional_batch_norm_without_cudnn": 12,
    }
    assert len(SAMPLES) == 53


@every_sample
def test_values_equal_torchs(sample):
    ours, theirs = sample.call(), sample.call()
    output, *saved = sample.theirs(theirs)
    assert_ulps("output", ours(), output.detach(), ULPS)
    for name in ("running_mean", "running_var"):
        if getattr(ours, name) is not None:
            assert_ulps(name, getattr(ours, name), getattr(theirs, name), ULPS)
    if saved and ours.training:
        _, moments = bn.functional.normalize(ours.input, ours.weight, ours.bias, ours.eps)
        assert_ulps("saved mean", moments.mean, saved[0].detach(), ULPS)
        assert_ulps("saved rstd", moments.rstd(ours.eps), saved[1].detach(), ULPS)


@every_sample
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_in_other_dtypes_are_as_near_to_float64_as_torchs(sample, dtype):
    ours, theirs = sample.call().copy(dtype), sample.call().copy(dtype)
    exact = ours.copy(torch.float64)
    expected = exact_output(exact)
    output, *_ = sample.theirs(theirs)
    assert_within_budget("output", ours(), output, expected)
    if exact.training and exact.running_mean is not None and exact.input.numel():
        statistics = reference.running(exact.running_mean, exact.running_var, exact.input, exact.momentum)
        for name, value in zip(("running_mean", "running_var"), statistics, strict=True):
            assert_within_budget(name, getattr(ours, name), getattr(theirs, name), value.detach())


def exact_output(call: Call) -> Tensor:
    if call.input.numel() == 0:
        return call.input
    if call.training:
        return reference.forward(call.input, call.weight, call.bias, call.eps).y
    return reference.inference(call.input, call.running_mean, call.running_var, call.weight, call.bias, call.eps)


@every_sample
def test_gradients_equal_torchs(sample):
    ours, theirs = sample.call(), sample.call()
    dy = torch.randn_like(ours.input)
    ours().backward(dy)
    sample.theirs(theirs)[0].backward(dy)
    for name, value in ours.differentiable().items():
        expected = theirs.differentiable()[name].grad
        assert_ulps(f"d{name}", value.grad, expected, ULPS, scale=largest_term_of_gradient(name, ours, dy))


def largest_term_of_gradient(name: str, call: Call, dy: Tensor) -> float:
    """The size of what is added up, and may cancel: Σ dy, or weight · rstd · dy in dx."""
    if call.input.numel() == 0:
        return 0.0
    if name != "input":
        return largest(dy) * dy.numel() / dy.shape[1]
    moments = bn.functional.normalize(call.input.detach(), eps=call.eps)[1]
    rstd = moments.rstd(call.eps) if call.training else (call.running_var + call.eps).rsqrt()
    return largest(dy) * largest(rstd) * (1.0 if call.weight is None else largest(call.weight))


def as_function(sample: Sample) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The sample as a pure function of the tensors that need gradients."""
    call = sample.call()
    names, values = zip(*call.differentiable().items(), strict=True)

    def output(*values: Tensor) -> Tensor:
        arguments = vars(call) | dict(zip(names, values, strict=True))
        for name in ("running_mean", "running_var"):  # each call its own: training moves them
            if arguments[name] is not None:
                arguments[name] = arguments[name].clone()
        return Call(**arguments)()

    return output, values


@every_sample
def test_first_derivatives_are_right(sample):
    """Reverse mode, batched reverse mode, forward mode, batched forward mode: what torch's own test of an operator asks."""
    operator = sample.operator
    assert operator.supports_forward_ad
    assert gradcheck(
        *as_function(sample),
        check_batched_grad=operator.check_batched_grad,
        check_forward_ad=True,
        check_batched_forward_grad=operator.check_batched_forward_grad,
        check_undefined_grad=True,
        fast_mode=False,
    )


@every_sample
def test_second_derivatives_are_right(sample):
    """Reverse over reverse, and forward over reverse."""
    operator = sample.operator
    assert operator.supports_gradgrad
    assert operator.supports_fwgrad_bwgrad
    assert gradgradcheck(
        *as_function(sample),
        gen_non_contig_grad_outputs=True,
        check_batched_grad=operator.check_batched_gradgrad,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_undefined_grad=True,
    )


# Where torch is wrong. Each claim about torch is a test that skips, with a word, once torch is right: the guard may then go.


def torchs(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def ours(x: Tensor) -> Tensor:
    return bn.functional.batch_norm(x, None, None, training=True)


def textbook(x: Tensor) -> Tensor:
    return reference.forward(x).y


def weigh(normalize: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """A scalar function of x with derivatives of every order."""
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    return lambda x: (weight * normalize(x)).sin().sum()


def second_by_forward_mode(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    return jvp(lambda x: jvp(function, (x,), (direction,))[1], (x,), (direction,))[1]


def third_by_reverse_mode(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    def along(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: (grad(function)(x) * direction).sum()

    return along(along(along(function)))(x)


def third_by_autograd(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    value = function(x)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        value = (gradient * direction).sum()
    return value.detach()


def by_differences(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, order: int) -> float:
    """The derivative of that order along a direction by central differences of values, extrapolated once (Richardson)."""
    stencils = {2: ((-1, 1), (0, -2), (1, 1)), 3: ((-2, -0.5), (-1, 1), (1, -1), (2, 0.5))}

    def difference(step: float) -> float:
        terms = [weight * function(x + offset * step * direction).item() for offset, weight in stencils[order]]
        return sum(terms) / step**order

    step = 2e-2
    return (4 * difference(step / 2) - difference(step)) / 3


HIGHER_ORDER = {
    "second-order-forward-mode": (second_by_forward_mode, 2),
    "third-order-reverse-mode": (third_by_reverse_mode, 3),
    "third-order-reverse-mode-by-autograd": (third_by_autograd, 3),
}
every_higher_order = pytest.mark.parametrize(("derivative", "order"), HIGHER_ORDER.values(), ids=HIGHER_ORDER)


@pytest.fixture
def point():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2)]


@every_higher_order
def test_higher_derivatives_are_right(derivative, order, point):
    x, direction = point
    found = derivative(weigh(ours, x), x, direction)
    # The same derivative of the textbook formula in plain torch: both are exact but for float64, and a derivative of a higher
    # order adds some hundred terms of about its own size.
    assert_ulps("derivative", found, derivative(weigh(textbook, x), x, direction), ulps=500)
    # And values of the textbook formula alone, for which no differentiation is trusted. Truncation leaves about 1e-6.
    differences = by_differences(weigh(textbook, x), x, direction, order)
    assert found.item() == pytest.approx(differences, rel=1e-4)


@every_higher_order
def test_torch_is_wrong_in_higher_derivatives_or_refuses_them(derivative, order, point):
    x, direction = point
    exact = derivative(weigh(textbook, x), x, direction).item()
    try:
        found = derivative(weigh(torchs, x), x, direction).item()
    except RuntimeError as error:  # since 2.14, by autograd
        if "does not support 3rd+ order derivatives" in str(error):
            return
        raise
    torchs_error = abs(found - exact) / abs(exact)
    if torchs_error < 1e-6:
        pytest.skip(f"torch {torch.__version__} is right here: this guard may go")
    assert torchs_error > 1e-2


def test_hessian_by_forward_over_forward(point):
    x, _ = point
    hessians = [
        torch.func.jacfwd(torch.func.jacfwd(weigh(normalize, x)))(x).reshape(x.numel(), x.numel())
        for normalize in (ours, textbook)
    ]
    assert_ulps("hessian", *hessians, ulps=500)
    assert_ulps("its symmetry", hessians[0], hessians[0].mT, ulps=500)


# The largest error of torch 2.13's output on channels_last input of this shape at mean 1e4, where the deviation is 1.
ERROR_OF_TORCH_CHANNELS_LAST = 5.3
CHANNELS_LAST_SHAPE = (64, 8, 56, 56)


def channels_last_input(mean: float) -> Tensor:
    x = torch.randn(CHANNELS_LAST_SHAPE, generator=torch.Generator().manual_seed(0)) + mean
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4])
def test_channels_last_is_as_accurate_as_planar(mean):
    x = channels_last_input(mean)
    exact = reference.forward(x).y
    output = bn.functional.batch_norm(x, None, None, training=True)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_within_budget("output", output, torchs(x.contiguous()), exact)
    assert max_error(output, exact) < 1e-3 * ERROR_OF_TORCH_CHANNELS_LAST


def test_channels_last_running_variance():
    x = channels_last_input(1e4)
    start = torch.zeros(8), torch.ones(8)
    ours, planar = [[value.clone() for value in start] for _ in range(2)]
    bn.functional.batch_norm(x, *ours, training=True)
    F.batch_norm(x.contiguous(), *planar, training=True)
    exact = reference.running(*start, x)
    for name, *values in zip(("running_mean", "running_var"), ours, planar, exact, strict=True):
        assert_within_budget(name, *values)


def test_torch_is_wrong_on_channels_last_input():
    x = channels_last_input(1e4)
    torchs_error = max_error(torchs(x), reference.forward(x).y)
    if torchs_error < 1e-2:
        pytest.skip(f"torch {torch.__version__} is right here: this guard may go")
    assert torchs_error > 1.0
