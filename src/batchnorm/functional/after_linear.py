"""A linear layer and a batch norm with constant statistics as one node of autograd's graph, which does not save what is between them.

    z = W ∗ x + b                        a convolution, a transposed one, or a matrix product
    y = activation(s · (z - mean) + beta + residual)        s = gamma · rstd

Torch saves x for the gradient of W, and z for the gradient of gamma. But y is linear in W with the constant s, so

    dx = (s · W) ∗ᵀ g                    dV = gradient of a layer with the weight s · W
    dW = s · dV                          db = s · Σg
    dgamma = rstd · (⟨dV, W⟩ + (b - mean) · Σg)             dbeta = Σg

where ⟨dV, W⟩ = Σg · (z - b), channel by channel, is a sum over the small weight. So only x and W are needed, which the layer saves
anyway (You et al. 2023, "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv:2305.11624, "Tune mode"). That paper computes
the forward by the weight s · W too. Here z has been computed when the batch norm is called, and y is computed from it, so outputs are
those of separate layers to the last bit. The node takes the place of both in the graph, and z is freed.

What it costs in accuracy: dgamma is a difference of two terms that are large if the mean is large beside the deviation. With a mean of
100 deviations, two of float32's seven decimal digits are lost. In half precision dV is rounded before it is summed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import kernels, memory
from batchnorm.functional.autograd import before_activation, counted, exporting
from batchnorm.functional.checks import check_input, epilogue_of, in_kernel_layout
from batchnorm.kernels import Activation, Epilogue, Kernel
from batchnorm.torch_state import differentiated_by_torch, recorded_linear, saved_tensors_hooks


class _Call(NamedTuple):
    """The arguments of `_NormalizeLinear` that need no gradient: z, its statistics, and how to compute y from them."""

    kernel: Kernel
    z: Tensor
    mean: Tensor
    variance: Tensor
    eps: float
    mask: Tensor | None
    activation: Activation | None
    options: tuple[Any, ...] | None


class _NormalizeLinear(torch.autograd.Function):
    """y of x, the linear layer's weight and bias, gamma, beta and the residual."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor | None,
        residual: Tensor | None,
        call: _Call,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        epilogue = Epilogue(gamma, beta, residual, call.mask, call.activation)
        y, mean, rstd = call.kernel.infer(call.z, call.mean, call.variance, call.eps, epilogue)
        ctx.activation, ctx.options = call.activation, call.options
        output = None if call.activation is None else y
        ctx.dtypes = tuple(None if value is None else value.dtype for value in (bias, beta, residual))
        ctx.save_for_backward(x, weight, bias, gamma, mean, rstd, output, call.mask)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        if dy is None:
            return (None,) * 7
        device = dy.device.type
        if not torch.is_autocast_enabled(device):
            return _gradients(ctx, dy)
        with torch.autocast(device, enabled=False):  # it would round the products of weights
            return _gradients(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs, by torch's operators, so they can be differentiated again."""
    x, weight, bias, gamma, mean, rstd, output, mask = ctx.saved_tensors
    wants_dx, wants_dweight, wants_dbias, wants_dgamma, wants_dbeta, wants_dresidual, _ = ctx.needs_input_grad
    g = counted(before_activation(dy, ctx.activation, output), mask)
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = gamma * rstd
    along = _along(scale.to(wide), weight, ctx.options)
    wants_dscaled = wants_dweight or wants_dgamma
    dx, dscaled = _linear_backward(g, x, (weight * along).to(weight.dtype), ctx.options, wants_dx, wants_dscaled)
    dweight = dbias = dgamma = dbeta = None
    sum_grad = g.sum([0, *range(2, g.dim())], dtype=mean.dtype)
    if wants_dgamma:
        assert dscaled is not None
        offset = -mean if bias is None else bias - mean
        products = _by_channel(dscaled.to(wide), weight.to(wide), ctx.options)
        dgamma = (rstd * (products + offset * sum_grad)).to(gamma.dtype)
    if wants_dweight:
        assert dscaled is not None
        # in place: next to the weights of a late layer activations are small
        dweight = dscaled * along if torch.is_grad_enabled() else dscaled.mul_(along)
    if wants_dbias:
        dbias = (scale * sum_grad).to(ctx.dtypes[0])
    if wants_dbeta:
        dbeta = sum_grad.to(ctx.dtypes[1])
    dresidual = g if wants_dresidual else None
    if wants_dresidual and output is not None:
        wide = torch.promote_types(g.dtype, ctx.dtypes[2])
        if wide != g.dtype:  # to which g is rounded
            dresidual = counted(before_activation(dy.to(wide), ctx.activation, output.to(wide)), mask)
    return dx, dweight, dbias, dgamma, dbeta, dresidual, None


def normalize_linear(
    z: Tensor,
    statistics: tuple[Tensor, Tensor],
    affine: tuple[Tensor | None, Tensor | None],
    eps: float,
    *,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor | str | None:
    """`normalize_with` of the output z of a linear layer, which is not saved for the backward.

    Takes its arguments: z is (N, C, *S), `statistics` are mean and variance, `affine` are weight and bias, (C,) each.

    Returns:
        The output; or the reason why z must be saved; or None if nothing need be saved, or others decide it: a compiler, an exporter,
        `torch.func`, hooks of saved tensors such as those of checkpoints, and `save_memory`.
    """
    (mean, variance), (weight, bias) = statistics, affine
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or weight is None or not weight.requires_grad:
        return None
    if exporting() or differentiated_by_torch() or memory.saving() or saved_tensors_hooks() is not None:
        return None
    check_input(z, {"running_mean": mean, "running_var": variance, "weight": weight, "bias": bias})
    epilogue = epilogue_of(z, weight, bias, activation, residual, mask)
    if activation is not None and not activation.derivative_from_output:
        return f"the gradient of {activation} needs it"
    found = recorded_linear(z)
    if isinstance(found, str):
        return found
    x = in_kernel_layout(z)
    kernel = kernels.select(x, epilogue)
    fused = epilogue if kernel.fuses else epilogue.affine()
    call = _Call(kernel, x, mean.detach(), variance.detach(), eps, fused.mask, fused.activation, found.options)
    output = _NormalizeLinear.apply(
        found.input, found.weight, found.bias, fused.weight, fused.bias, fused.residual, call
    )
    return output if fused is epilogue else epilogue.after(output)


def _linear_backward(
    g: Tensor, x: Tensor, weight: Tensor, options: tuple[Any, ...] | None, wants_dx: bool, wants_dweight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the weight of a linear layer."""
    if options is None:
        return g @ weight.t() if wants_dx else None, x.t() @ g if wants_dweight else None
    dx, dweight, _ = torch.ops.aten.convolution_backward.default(
        g, x, weight, None, *options, [wants_dx, wants_dweight, False]
    )
    return dx, dweight


def _along(scale: Tensor, weight: Tensor, options: tuple[Any, ...] | None) -> Tensor:
    """A value of each output channel, (C,), to multiply the weight with."""
    if options is None:  # (inputs, outputs)
        return scale
    transposed, groups = options[3], options[5]
    if transposed:  # (inputs, outputs / groups, *kernel)
        scale = scale.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).flatten(0, 1)
    return scale.reshape(*scale.shape, *(1,) * (weight.dim() - scale.dim()))


def _by_channel(one: Tensor, other: Tensor, options: tuple[Any, ...] | None) -> Tensor:
    """The inner product of two weights over the values of each output channel, (C,)."""
    if options is None:  # (inputs, outputs)
        return (one * other).sum(0)
    transposed, groups = options[3], options[5]
    if transposed:  # (inputs, outputs / groups, *kernel)
        products = one * other
        return products.reshape(groups, -1, one.shape[1], math.prod(one.shape[2:])).sum([1, 3]).reshape(-1)
    # (outputs, inputs / groups, *kernel), without a copy of the products
    C = one.shape[0]
    return torch.bmm(one.reshape(C, 1, -1), other.reshape(C, -1, 1)).reshape(-1)
