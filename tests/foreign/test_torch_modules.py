"""torch's own module cases (`module_db`) for BatchNorm1d, 2d and 3d: every check torch makes of its layers on CPU, made of ours.

Each case is built twice from its `constructor_input`, with torch's class and with ours, and both get the same state.
"""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db
from torch.testing._internal.common_utils import freeze_rng_state, gradcheck, gradgradcheck, noncontiguous_like

import batchnorm as bn
from tests.budget import assert_same_bits, assert_ulps, largest

OURS = {nn.BatchNorm1d: bn.BatchNorm1d, nn.BatchNorm2d: bn.BatchNorm2d, nn.BatchNorm3d: bn.BatchNorm3d}
INFOS = [info for info in module_db if info.module_cls in OURS]

# Both sides compute in float64 and differ in the order of a few operations, each worth half an ulp of its terms.
ULPS = 8


@dataclass(frozen=True)
class Case:
    """One module input of one layer, in training or in evaluation."""

    info: ModuleInfo
    training: bool
    index: int
    description: str

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        return f"{self.info.module_cls.__name__}-{self.index}-{self.description or 'default'}-{mode}"

    def build(self, requires_grad: bool = True) -> tuple[nn.Module, nn.Module, Tensor]:
        """torch's layer, ours with the same state, and the input, float64."""
        inputs = module_inputs(self.info, self.training, requires_grad)[self.index]
        args, kwargs = inputs.constructor_input.args, inputs.constructor_input.kwargs
        theirs = self.info.module_cls(*args, **kwargs, dtype=torch.float64)
        for value in (*theirs.parameters(), *theirs.buffers()):
            if value.is_floating_point():
                value.data.uniform_(0.5, 1.5)
        ours = OURS[self.info.module_cls](*args, **kwargs, dtype=torch.float64)
        ours.load_state_dict(theirs.state_dict())
        (x,) = inputs.forward_input.args
        return theirs.train(self.training), ours.train(self.training), x


def module_inputs(info: ModuleInfo, training: bool, requires_grad: bool = True) -> list:
    with freeze_rng_state():
        torch.manual_seed(0)
        return list(
            info.module_inputs_func(
                info, device="cpu", dtype=torch.float64, requires_grad=requires_grad, training=training
            )
        )


CASES = [
    Case(info, training, index, inputs.desc)
    for info in INFOS
    for training in (False, True)
    for index, inputs in enumerate(module_inputs(info, training))
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def test_there_are_44_cases():
    assert len(CASES) == 44


@every_case
def test_forward_and_buffers_equal_torchs(case):
    theirs, ours, x = case.build()
    for step in range(3):
        assert_ulps(f"output {step}", ours(x), theirs(x).double(), ULPS)
    assert_equal_buffers(ours, theirs, x)


def assert_equal_buffers(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    buffers = dict(ours.named_buffers())
    for name, expected in theirs.named_buffers():
        if name == "num_batches_tracked":
            # An empty batch has no statistics. torch counts it all the same, and momentum=None then averages over one too many.
            counted = expected if x.numel() else torch.zeros_like(expected)
            assert_same_bits(name, buffers[name], counted)
        else:
            scale = largest(x) if name == "running_mean" else largest(x) ** 2  # of the terms that are added up
            assert_ulps(name, buffers[name], expected, ULPS, scale)


@every_case
def test_gradients_equal_torchs(case):
    theirs, ours, x = case.build()
    twin = x.detach().clone().requires_grad_()
    dy = torch.randn_like(x)
    theirs(twin).backward(dy)
    ours(x).backward(dy)
    assert_ulps("dx", x.grad, twin.grad, ULPS, scale=largest_term_of_dx(theirs, x, dy))
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = theirs.get_parameter(name).grad
        assert_ulps(f"d{name}", parameter.grad, expected, ULPS, scale=largest(dy) * x.numel() / x.shape[1])


def largest_term_of_dx(layer: nn.Module, x: Tensor, dy: Tensor) -> float:
    """The size of the terms that cancel in dx = weight · rstd · (dy - mean dy - ...): of dy · weight · rstd."""
    if x.numel() == 0:
        return 0.0
    weight = 1.0 if layer.weight is None else largest(layer.weight)
    batch = layer.training or layer.running_var is None
    variance = x.detach().movedim(1, 0).flatten(1).var(1, correction=0) if batch else layer.running_var
    return largest(dy) * weight / (variance.min().item() + layer.eps) ** 0.5


@every_case
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=["first", "second"])
def test_derivatives_are_right(case, check):
    _, ours, x = case.build()
    names, parameters = zip(*ours.named_parameters(), strict=True) if ours.affine else ((), ())

    def output(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(ours, dict(zip(names, parameters, strict=True)), (x,))

    assert check(output, (x, *parameters), nondet_tol=case.info.gradcheck_nondet_tol)


@every_case
def test_pickle(case):
    _, ours, x = case.build()
    assert_same_layer(pickle.loads(pickle.dumps(ours)), ours, x)


@every_case
def test_deepcopy(case):
    _, ours, x = case.build()
    assert_same_layer(copy.deepcopy(ours), ours, x)


@every_case
def test_save_and_load(case, tmp_path):
    _, ours, x = case.build()
    torch.save(ours, tmp_path / "layer.pt")
    assert_same_layer(torch.load(tmp_path / "layer.pt", weights_only=False), ours, x)


def assert_same_layer(copied: nn.Module, layer: nn.Module, x: Tensor) -> None:
    assert type(copied) is type(layer)
    assert repr(copied) == repr(layer)
    assert_same_bits("output", copied(x), layer(x))
    torch.testing.assert_close(dict(copied.state_dict()), dict(layer.state_dict()), rtol=0, atol=0)


@every_case
def test_repr_is_torchs(case):
    theirs, ours, _ = case.build()
    assert repr(ours) == repr(theirs)


@every_case
def test_non_contiguous_input_and_gradient(case):
    _, ours, x = case.build()
    other = copy.deepcopy(ours)
    strided = noncontiguous_like(x.detach()).requires_grad_()
    assert x.numel() == 0 or not strided.is_contiguous()
    dy = torch.randn_like(x)
    expected, output = ours(x), other(strided)
    assert_ulps("output", output, expected.detach(), ULPS)
    expected.backward(dy)
    output.backward(noncontiguous_like(dy))
    assert_ulps("dx", strided.grad, x.grad, ULPS, scale=largest_term_of_dx(ours, x, dy))
    for (name, parameter), twin in zip(other.named_parameters(), ours.parameters(), strict=True):
        assert_ulps(f"d{name}", parameter.grad, twin.grad, ULPS, scale=largest(dy) * x.numel() / x.shape[1])


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@every_case
def test_memory_format_is_kept(case):
    theirs, ours, x = case.build()
    formats = [torch.contiguous_format]
    if x.dim() in FORMATS:
        formats.append(FORMATS[x.dim()])
    for memory_format in formats:
        laid_out = x.detach().to(memory_format=memory_format).requires_grad_()
        output = ours.to(memory_format=memory_format)(laid_out)
        assert output.is_contiguous(memory_format=memory_format)
        assert output.stride() == laid_out.stride()
        assert_ulps(f"output, {memory_format}", output, theirs(x).detach(), ULPS)
        output.backward(torch.ones_like(output))
        assert laid_out.grad.is_contiguous(memory_format=memory_format)


@every_case
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "non_contiguous"])
def test_a_batch_of_gradients_at_once(case, layout):
    """What `torch.autograd.functional.jacobian(..., vectorize=True)` asks: each gradient as if it came alone."""
    _, ours, x = case.build()
    x = x.detach()
    if layout == "non_contiguous":
        x = noncontiguous_like(x)
    elif layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)  # of any rank
    y = ours(x.requires_grad_())
    dys = torch.randn(3, *x.shape, dtype=x.dtype)
    (batched,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    one_by_one = torch.stack([torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys])
    assert_ulps("dx", batched, one_by_one, ULPS, scale=largest_term_of_dx(ours, x, dys))


@every_case
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_factory_arguments(case, device, dtype):
    inputs = module_inputs(case.info, case.training)[case.index].constructor_input
    layer = OURS[case.info.module_cls](*inputs.args, **inputs.kwargs, device=device, dtype=dtype)
    for name, value in layer.named_parameters():
        assert (value.device.type, value.dtype) == (device, dtype), name
    for name, value in layer.named_buffers():
        wide = torch.promote_types(dtype, torch.float32)  # running statistics stay float32: ours by design
        expected = wide if name in ("running_mean", "running_var") else torch.int64
        assert (value.device.type, value.dtype) == (device, expected), name


@every_case
def test_device_context_and_to_empty(case):
    inputs = module_inputs(case.info, case.training)[case.index].constructor_input
    with torch.device("meta"):
        layer = OURS[case.info.module_cls](*inputs.args, **inputs.kwargs)
    assert all(value.is_meta for value in (*layer.parameters(), *layer.buffers()))
    layer.to_empty(device="cpu").reset_parameters()
    fresh = OURS[case.info.module_cls](*inputs.args, **inputs.kwargs)
    torch.testing.assert_close(dict(layer.state_dict()), dict(fresh.state_dict()), rtol=0, atol=0)


@every_case
def test_to_dtype(case):
    theirs, ours, x = case.build()
    for layer in (theirs, ours):
        layer.to(torch.float32)
    assert {name: value.dtype for name, value in ours.state_dict().items()} == {
        name: value.dtype for name, value in theirs.state_dict().items()
    }
    assert ours(x.float()).dtype == torch.float32


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
def test_training_and_evaluation_differ_as_torch_says(info):
    """torch's rule: what a layer of default options gives for the first input, in training and in evaluation."""
    inputs = module_inputs(info, training=True)[0]
    (x,) = inputs.forward_input.args
    layer = OURS[info.module_cls](
        *inputs.constructor_input.args, **inputs.constructor_input.kwargs, dtype=torch.float64
    )
    evaluated = layer.eval()(x)
    assert torch.equal(layer.train()(x), evaluated) is not info.train_and_eval_differ


def error_cases(training: bool) -> list:
    arguments = {"device": "cpu", "dtype": torch.float64, "requires_grad": False, "training": training}
    return [(info, error) for info in INFOS for error in info.module_error_inputs_func(info, **arguments)]


@pytest.mark.parametrize(("info", "error"), error_cases(training=True))
def test_error_inputs(info, error):
    assert error.error_on is ModuleErrorEnum.FORWARD_ERROR
    inputs = error.module_error_input
    args, kwargs = inputs.constructor_input.args, inputs.constructor_input.kwargs
    layer = OURS[info.module_cls](*args, **kwargs, dtype=torch.float64)
    state = copy.deepcopy(dict(layer.state_dict()))
    with pytest.raises(error.error_type, match=error.error_regex):
        layer(*inputs.forward_input.args, **inputs.forward_input.kwargs)
    torch.testing.assert_close(dict(layer.state_dict()), state, rtol=0, atol=0)


@pytest.mark.parametrize(("info", "error"), error_cases(training=False))
def test_error_inputs_in_evaluation(info, error):
    """torch's list is of training; in evaluation its layer takes eps = 0, so torch itself is asked what is an error."""
    inputs = error.module_error_input
    args, kwargs = inputs.constructor_input.args, inputs.constructor_input.kwargs
    theirs, ours = (
        kind(*args, **kwargs, dtype=torch.float64).eval() for kind in (info.module_cls, OURS[info.module_cls])
    )
    (x,) = inputs.forward_input.args
    try:
        expected = theirs(x)
    except ValueError as refused:
        with pytest.raises(type(refused), match="eps must be positive"):
            ours(x)
    else:
        assert_ulps("output", ours(x), expected.detach(), ULPS)
