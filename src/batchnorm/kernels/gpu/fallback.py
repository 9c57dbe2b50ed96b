"""The verbs by torch's operators, where a program has failed: `aten`, with residual and activation after it, or `eager`."""

from __future__ import annotations

from torch import Tensor

from batchnorm.kernels import aten, eager
from batchnorm.kernels.contract import Backward, Epilogue, Forward, Groups, Normalized
from batchnorm.moments import Moments


def moments(x: Tensor, mask: Tensor | None) -> Moments:
    return eager.moments(x, mask)


def normalize(x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> Tensor:
    if aten.refuses(x, epilogue) is not None:
        return eager.normalize(x, mean, rstd, epilogue)
    return epilogue.after(aten.normalize(x, mean, rstd, epilogue.affine()))


def infer(
    x: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor]:
    if aten.refuses(x, epilogue) is not None:
        return eager.infer(x, running_mean, running_var, eps, epilogue)
    y, mean, rstd = aten.infer(x, running_mean, running_var, eps, epilogue.affine())
    return epilogue.after(y), mean, rstd


def forward(x: Tensor, eps: float, epilogue: Epilogue, groups: Groups | None = None) -> Forward:
    if aten.refuses(x, epilogue, groups is None) is not None:
        return eager.forward(x, eps, epilogue, groups)
    found = aten.forward(x, eps, epilogue.affine())
    return found._replace(output=epilogue.after(found.output), reserve=None)


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
    return eager.reduce_grad(dy, x, mean, rstd, epilogue)


def input_grad(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    epilogue: Epilogue,
    mean_grads: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    return eager.input_grad(dy, x, mean, rstd, epilogue, mean_grads)


def backward(
    dy: Tensor, x: Tensor, by: Normalized, epilogue: Epilogue, needs_input_grad: bool, groups: Groups | None = None
) -> Backward:
    if aten.refuses(x, epilogue, groups is None) is not None:
        return eager.backward(dy, x, by, epilogue, needs_input_grad, groups)
    affine, activation = epilogue.affine(), epilogue.activation
    if activation is not None:
        z = epilogue.output
        if z is None:
            z = epilogue._replace(activation=None).after(aten.normalize(x, by.mean, by.rstd, affine))
        dy = dy * activation.derivative(z)
    mean, rstd = by.mean.float(), by.rstd.float()  # no plan takes float64
    found = aten.backward(dy, x, by._replace(mean=mean, rstd=rstd), affine, needs_input_grad)
    return found._replace(residual=dy if epilogue.has_residual else None)
