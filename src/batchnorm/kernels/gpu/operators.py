"""The launches as operators, for compilers and tracers: `torch.library.triton_op` lets Inductor see the programs inside.

Outside of them `gpu` launches directly, since an operator in Python costs as much as a small tensor. Arguments come flat, as a schema
wants them; results that were not asked for are empty.
"""

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from batchnorm.kernels.activation import Activation
from batchnorm.kernels.contract import Epilogue
from batchnorm.kernels.gpu import launches, memory, plans


def _given(x: Tensor, epilogue: Epilogue) -> launches.Given:
    shape = plans.shape_of(x)
    assert shape is not None, "`refuses` was asked"
    cut = plans.cut(shape)
    assert not isinstance(cut, str), "`refuses` was asked"
    return launches.operands(x, epilogue, cut, wrap_triton)


def _epilogue(
    weight: Tensor | None,
    bias: Tensor | None,
    beside: Tensor | None,
    mask: Tensor | None,
    activation: tuple[str, float],
    is_output: bool = False,
) -> Epilogue:
    name, slope = activation
    found = None if name == "identity" else Activation(name, slope)
    residual, output = (None, beside) if is_output else (beside, None)
    return Epilogue(weight, bias, residual, mask, found, output)


def _channels(x: Tensor, *rows: int) -> Tensor:
    return x.new_empty((*rows, x.shape[1]), dtype=torch.float64)


@triton_op("batchnorm::gpu_moments", mutates_args={})
def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    statistics = memory.empty(x, 3 * x.shape[1] + 1, dtype=torch.float64)
    launches.moments(x, statistics, _given(x, Epilogue(mask=mask)))
    return statistics


@triton_op("batchnorm::gpu_forward", mutates_args={})
def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    y, statistics = memory.like(x), memory.empty(x, 3 * x.shape[1] + 1, dtype=torch.float64)
    epilogue = _epilogue(weight, bias, residual, mask, (activation, slope))
    launches.forward(x, y, statistics, _given(x, epilogue), eps)
    return y, statistics


@triton_op("batchnorm::gpu_normalize", mutates_args={})
def normalize(
    x: Tensor,
    mean: Tensor,
    spread: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float | None,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    y = memory.like(x)
    epilogue = _epilogue(weight, bias, residual, mask, (activation, slope))
    return y, launches.normalize(x, y, _given(x, epilogue), mean, spread, eps)


@triton_op("batchnorm::gpu_reduce_grad", mutates_args={})
def reduce_grad(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    beside: Tensor | None,
    mask: Tensor | None,
    activation: str,
    slope: float,
    is_output: bool,
) -> Tensor:
    sums = memory.empty(x, 2, x.shape[1], dtype=torch.float64)
    epilogue = _epilogue(weight, bias, beside, mask, (activation, slope), is_output)
    dy = memory.laid_out_as(x, dy)
    launches.gradient_sums(dy, x, sums, _given(x, epilogue), (mean, rstd), launches.Wanted())
    return sums


@triton_op("batchnorm::gpu_input_grad", mutates_args={})
def input_grad(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    mean_grad: Tensor | None,
    mean_grad_xhat: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    beside: Tensor | None,
    mask: Tensor | None,
    activation: str,
    slope: float,
    is_output: bool,
    wants_residual: bool,
) -> tuple[Tensor, Tensor]:
    epilogue = _epilogue(weight, bias, beside, mask, (activation, slope), is_output)
    dx, dresidual = memory.like(x), memory.like(x) if wants_residual else None
    means = launches.Means(mean_grad, mean_grad_xhat)
    dy, wanted = memory.laid_out_as(x, dy), launches.Wanted(dx, dresidual)
    launches.input_grad(dy, x, _given(x, epilogue), (mean, rstd), means, wanted)
    return dx, x.new_empty(0) if dresidual is None else dresidual


@triton_op("batchnorm::gpu_backward", mutates_args={})
def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    count: Tensor | None,
    constant: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    beside: Tensor | None,
    mask: Tensor | None,
    activation: str,
    slope: float,
    is_output: bool,
    wants_dx: bool,
    wants_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    epilogue = _epilogue(weight, bias, beside, mask, (activation, slope), is_output)
    dx, dresidual = (memory.like(x) if each else None for each in (wants_dx, wants_residual))
    sums = memory.empty(x, 2, x.shape[1], dtype=torch.float64)
    divisor = None if constant else 0 if count is None else count
    dy, wanted = memory.laid_out_as(x, dy), launches.Wanted(dx, dresidual)
    launches.backward(dy, x, sums, _given(x, epilogue), (mean, rstd), divisor, wanted)
    return x.new_empty(0) if dx is None else dx, x.new_empty(0) if dresidual is None else dresidual, sums


# What they return, without values: shapes, strides and dtypes.
_FAKES = {
    moments: lambda x, *_: x.new_empty(3 * x.shape[1] + 1, dtype=torch.float64),
    forward: lambda x, *_: (memory.like(x), x.new_empty(3 * x.shape[1] + 1, dtype=torch.float64)),
    normalize: lambda x, *_: (memory.like(x), _channels(x, 2)),
    reduce_grad: lambda _, x, *__: _channels(x, 2),
    input_grad: lambda _, x, *rest: (memory.like(x), memory.like(x) if rest[-1] else x.new_empty(0)),
    backward: lambda _, x, *rest: (
        memory.like(x) if rest[-2] else x.new_empty(0),
        memory.like(x) if rest[-1] else x.new_empty(0),
        _channels(x, 2),
    ),
}
for _operator, _fake in _FAKES.items():
    _operator.register_fake(_fake)
