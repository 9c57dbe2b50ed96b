"""The verbs by torch's own batch normalization: on GPUs, with cuDNN on CUDA, on a CPU without the C++ library, and in compiled code.

Torch computes in float32 (float64 for float64 input), and so are the channel values here: the mean of a batch is as exact as torch's.
Torch returns the mean and 1 / sqrt(variance + eps), but not the variance, which cannot be computed from these if it is smaller than eps.
So its operator is given running statistics of zeros with momentum 1, in which it leaves the unbiased variance.

Only weight and bias are applied here: torch's operator takes neither a residual nor an activation (`fuses`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels import cpu, eager
from batchnorm.kernels.contract import (
    Backward,
    Epilogue,
    Forward,
    Groups,
    Normalized,
    Running,
    Update,
    values_per_channel,
)
from batchnorm.kernels.eager import (  # never asked for: `refuses`, `takes_update`
    forward_renormalized,
    update_running,
    weighted_moments,
)
from batchnorm.moments import Moments

__all__ = ["forward_renormalized", "update_running", "weighted_moments"]

name = "aten"
fuses = False

_EPS = 1e-5  # of a backward that is given rstd: cuDNN wants a number, and does not use it
# And the CPU in compiled code, where a compiler fuses it with others; in eager mode the C++ library is faster and more exact.
DEVICES = ("cuda", "xpu", "mps", *(() if cpu.unavailable() is None else ("cpu",)))


def status() -> str:
    return "torch's batch normalization" + (", by cuDNN" if torch.backends.cudnn.is_available() else "")


def refuses(x: Tensor, epilogue: Epilogue, plain: bool = True) -> str | None:
    if x.device.type not in DEVICES and not (x.is_cpu and torch.compiler.is_compiling()):
        return f"x is on {x.device.type}" + (", and the code is not compiled" if x.is_cpu else "")
    if not plain:
        return "its statistics are not those of the batch alone"
    if epilogue.mask is not None:
        return "there is a mask"
    if epilogue.sample_weights is not None:
        return "there are sample weights"
    if not x.is_floating_point() or x.element_size() < 2:
        return f"x is {x.dtype}"
    if values_per_channel(x) < 2:
        return "there is one value per channel, or none"
    return epilogue.wider_than(x)


def moments(x: Tensor, mask: Tensor | None) -> Moments:
    assert mask is None, "`refuses` was asked"
    axes = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(x.to(_wide_dtype(x)), axes, correction=0)
    count = values_per_channel(x)
    return Moments(count, mean, variance * count)


def normalize(x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> Tensor:
    weight, bias = _affine(x, epilogue)
    mean, variance = mean.to(weight.dtype), rstd.to(weight.dtype).square().reciprocal()
    return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, 0.0)[0]


def infer(
    x: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = _affine(x, epilogue)
    mean, variance = running_mean.detach().to(weight.dtype, copy=True), running_var.detach().to(weight.dtype)
    y = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
    return y, mean, (variance + eps).rsqrt()


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
    _, sum_grad_xhat, sum_grad = _constant_backward(dy, x, mean, rstd, epilogue, [False, True, True])
    return sum_grad, sum_grad_xhat


def input_grad(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    epilogue: Epilogue,
    mean_grads: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    if mean_grads is None:
        return _constant_backward(dy, x, mean, rstd, epilogue, [True, False, False])[0], None
    return eager.input_grad(dy, x, mean, rstd, epilogue, mean_grads)


def forward(x: Tensor, eps: float, epilogue: Epilogue, groups: Groups | None = None) -> Forward:
    assert groups is None, "`refuses` was asked"
    weight, bias = _affine(x, epilogue)
    count = values_per_channel(x)
    running_mean, running_var = torch.zeros_like(weight), torch.zeros_like(weight)
    y, mean, rstd, reserve = torch.ops.aten._batch_norm_with_update(
        x, weight, bias, running_mean, running_var, 1.0, eps
    )
    return Forward(y, Moments(count, mean, running_var * (count - 1)), rstd, reserve=reserve)


def backward(
    dy: Tensor,
    x: Tensor,
    by: Normalized,
    epilogue: Epilogue,
    needs_input_grad: bool = True,
    groups: Groups | None = None,
) -> Backward:
    assert groups is None, "`refuses` was asked"
    mean, rstd, count, reserve = by
    wanted = [needs_input_grad, True, True]
    if count is None:
        dx, sum_grad_xhat, sum_grad = _constant_backward(dy, x, mean, rstd, epilogue, wanted)
    elif reserve is None:  # mean and rstd may come from another kernel, in another dtype
        weight, _ = _affine(x, epilogue)
        mean, rstd = mean.to(weight.dtype), rstd.to(weight.dtype)
        dx, sum_grad_xhat, sum_grad = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, rstd, True, _EPS, wanted
        )
    else:
        dx, sum_grad_xhat, sum_grad = torch.ops.aten.batch_norm_backward(
            dy, x, _affine(x, epilogue)[0], None, None, mean, rstd, True, _EPS, wanted, reserve
        )
    return Backward(dx if needs_input_grad else None, None, sum_grad, sum_grad_xhat)


def takes_update(running: Running, moments: Moments, update: Update) -> bool:  # noqa: ARG001 (the contract's signature)
    return False


def _constant_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, Σg·x̂ and Σg, where mean and rstd are constants."""
    weight, _ = _affine(x, epilogue)
    mean, variance = mean.to(weight.dtype), rstd.to(weight.dtype).square().reciprocal()
    return torch.ops.aten.native_batch_norm_backward(dy, x, weight, mean, variance, None, None, False, 0.0, wanted)


def _affine(x: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
    """Weight and bias, (C,), in the dtype that torch computes in; half-precision parameters would give half-precision statistics."""
    dtype, shape = _wide_dtype(x), (x.shape[1],)
    weight = x.new_ones(shape, dtype=dtype) if epilogue.weight is None else epilogue.weight.to(dtype)
    bias = x.new_zeros(shape, dtype=dtype) if epilogue.bias is None else epilogue.bias.to(dtype)
    return weight, bias


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32
