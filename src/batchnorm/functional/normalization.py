"""Batch normalization as functions: torch's `batch_norm`, and its steps `normalize`, `normalize_with` and `moments`.

Each call takes the first of these that applies:

1. A `torch.func` transform or forward-mode AD is active: plain torch operations, which torch differentiates to any order.
2. `torch.export` or `torch.jit.trace` runs: torch's own operator if it computes the same, so that tools recognize a batch norm.
3. A gradient is needed: one `autograd.Function` over the kernels. It saves x, mean and rstd for backward. With a residual it also saves
   what determines the activation's derivative: y if that is enough, because the next layer saves y anyway, otherwise the residual.
   If the backward is itself differentiated, it runs as plain torch operations.
4. No gradient is needed: the kernel alone.

For complex input, real and imaginary components are normalized separately (the "naive" normalization of Trabelsi et al. 2018, "Deep Complex
Networks", section 3.5). Parameters and buffers are then complex too, one component for each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchnorm import kernels, memory
from batchnorm.errors import DTypeError, InputError, StateError
from batchnorm.functional import exported, fast_path, in_graph, joint, native, reduction
from batchnorm.functional.autograd import Call, Normalize, distinct, exporting, needs_grad
from batchnorm.functional.checks import (
    check_eps,
    check_input,
    check_residual,
    check_several_values,
    check_sum_of_weights,
    check_weights,
    epilogue_of,
    groups_of,
    in_kernel_layout,
    mask_of,
)
from batchnorm.functional.components import (
    channels_as_components,
    components_as_channels,
    components_of_buffer,
    components_of_parameter,
    vector_as_complex,
)
from batchnorm.functional.joint import Joint
from batchnorm.functional.reduction import Reducer
from batchnorm.functional.running import update_running_statistics
from batchnorm.kernels import Activation, Groups, Renormalization, eager
from batchnorm.kernels.contract import values_per_channel
from batchnorm.moments import Moments
from batchnorm.torch_state import differentiated_by_torch


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | nn.Module | Activation | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reducer: Reducer | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm` with its signature and effects, and more in the same pass.

    Args:
        input: (N, C, *S), floating or complex, any strides.
        running_mean: (C,), used in inference and updated in training; None in training updates nothing.
        running_var: (C,), likewise; updated with the unbiased variance, as in torch.
        weight: gamma, (C,).
        bias: beta, (C,).
        training: normalize with the statistics of `input` rather than with the running ones.
        momentum: the weight of the new value in the running statistics. A 0-d tensor will do.
        eps: added to the variance, in units of input squared; positive in training.
        activation: applied last: a name of `kernels.activation.NAMES`, or torch's module of it.
        residual: added before the activation; input's shape.
        mask: bool, (N, *S) or broadcastable to it; True counts. Where False, the output is 0 and no gradient flows.
        lengths: (N,), integers: so many positions of the last axis count, as a mask would say; beside a mask both have to.
        weights: (N,) or broadcastable to (N, *S), floating or integers, at least 0: how often each sample, or position, counts in the
            statistics of a training batch, and so in their gradients. No output is multiplied by them. Differentiable.
        reducer: merges the statistics of several replicas in training, such as `distributed.Replicas`. Of one value per channel
            here the others may have more, so it is no error then.

    Returns:
        activation(weight · (input - mean) / sqrt(variance + eps) + bias + residual), of input's shape and dtype.

    Raises:
        InputError: on one value per channel in training, on eps out of range, on running statistics missing in inference; on weights
            that are negative or not finite, or sum to at most 1.5 where there are running statistics to update. On a device other than
            the CPU the output is NaN instead, or nothing is updated.
        ShapeError: on sizes that do not fit together.
        DTypeError: on an integer or boolean input.
    """
    whole_batch = mask is None and lengths is None and weights is None and reducer is None
    if whole_batch and (not training or type(momentum) is float):
        running, affine = (running_mean, running_var), (weight, bias)
        output = _on_fast_path(input, running, affine, momentum if training else None, eps, activation, residual)
        if output is not None:
            return output
    if (running_mean is None) != (running_var is None):
        raise InputError("running_mean and running_var must either both be None or neither be None; pass both or none")
    check_input(input, {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias})
    mask = mask_of(lengths, mask, input)
    if training:
        if reducer is None:
            check_several_values(input)
            if exporting() and not exported.to_onnx() and isinstance(momentum, (int, float)):
                check_eps(eps)
                epilogue = epilogue_of(input, weight, bias, activation, residual, mask, weights)
                if exported.beyond_torch(input, running_mean, running_var, epilogue) is None:
                    return exported.by_torch(input, running_mean, running_var, eps, epilogue, True, momentum)
        output, moments = normalize(
            input,
            weight,
            bias,
            eps,
            activation=activation,
            residual=residual,
            mask=mask,
            weights=weights,
            reducer=reducer,
        )
        if running_mean is not None and running_var is not None:
            if weights is not None and reducer is None:
                check_sum_of_weights(moments.count)
            update_running_statistics(running_mean, running_var, moments, momentum)
        return output
    if weights is not None:
        check_weights(weights, input)
    if running_mean is None or running_var is None:
        raise StateError(
            "running_mean must be defined in evaluation mode, and so must running_var, but got None; "
            "pass the running statistics, or training=True to use those of the batch"
        )
    return normalize_with(
        input, running_mean, running_var, weight, bias, eps, activation=activation, residual=residual, mask=mask
    )


def _on_fast_path(
    input: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    affine: tuple[Tensor | None, Tensor | None],
    momentum: float | Tensor | None,
    eps: float,
    activation: str | nn.Module | Activation | None,
    residual: Tensor | None,
) -> Tensor | None:
    """The output, computed by one operator or by torch's, or None if the call takes the general path. `momentum` None is inference."""
    mean, variance = running
    weight, bias = affine
    if not (isinstance(mean, Tensor) and isinstance(variance, Tensor) and isinstance(eps, float)):
        return None
    if not (isinstance(weight, Tensor | None) and isinstance(bias, Tensor | None)) or input.is_nested:
        return None
    if torch.compiler.is_compiling():
        parsed = kernels.parse(activation)
        if momentum is None:
            return in_graph.infer(input, weight, bias, (mean, variance), eps, residual, parsed)
        update = (momentum, True, False, eps)
        return in_graph.train(input, weight, bias, (mean, variance, None, None), update, residual, parsed)
    steps = fast_path.steps_for(input, mean)
    if steps is None:
        parsed = kernels.parse(activation)
        if momentum is None:
            return native.infer(input, weight, bias, eps, parsed, (mean, variance), residual)
        update = (momentum, True, False)
        return native.train(input, weight, bias, eps, parsed, (mean, variance, None, None), update, residual)
    if momentum is None:
        step, arguments = steps.inference, (mean, variance, eps)
    else:
        step, arguments = steps.training, (mean, variance, None, None, momentum, True, False, eps)
    return fast_path.call(step, input, weight, bias, residual, kernels.parse(activation), arguments)


def normalize(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | nn.Module | Activation | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reducer: Reducer | None = None,
    group_size: int | None = None,
    moments: Moments | None = None,
    renormalization: Renormalization | None = None,
) -> tuple[Tensor, Moments]:
    """Normalize with the statistics of `input` itself, and return them; touches no buffer.

    Takes the arguments of `batch_norm`, and three more. `group_size` samples share statistics; what is left over is a group too, unless
    it is one value per channel, which joins the group before. No replica's samples join them, and the moments returned are those of
    all groups together. `moments` are those of `input`, or of all replicas' inputs, where they are known: the input is then not read
    once more for them. The gradient flows through them all the same. `renormalization` corrects the result toward running statistics, as
    batch renormalization does (Ioffe 2017); not with groups.

    The moments returned are detached: the gradient of the output flows through the statistics, but
    a loss of the moments themselves needs `Moments` of its own.

    Raises:
        InputError, ShapeError, DTypeError: as `batch_norm`; InputError if group_size is less than 1, or comes with moments.
    """
    check_input(input, {"weight": weight, "bias": bias})
    if moments is not None and group_size is not None:
        raise InputError("moments are those of all samples, but got group_size as well; pass one of the two")
    if renormalization is not None:
        _check_renormalization(renormalization, input, group_size)
    mask = mask_of(lengths, mask, input)
    check_eps(eps)
    if input.is_complex():
        output, found = normalize(
            components_as_channels(input),
            components_of_parameter(weight),
            components_of_parameter(bias),
            eps,
            activation=activation,
            residual=None if residual is None else _residual_components(residual, input),
            mask=mask,
            weights=weights,
            reducer=reducer,
            group_size=group_size,
            moments=None if moments is None else _components_of_moments(moments),
        )
        return channels_as_components(output), Moments(
            found.count, vector_as_complex(found.mean), vector_as_complex(found.m2)
        )
    if input.dim() < 2:  # numel 0: `check_input` lets nothing else through
        return input.clone(), Moments(0, input.new_zeros(0), input.new_zeros(0))
    epilogue = epilogue_of(input, weight, bias, activation, residual, mask, weights)
    differentiates_weights = weights is not None and weights.requires_grad and torch.is_grad_enabled()
    groups = groups_of(input, group_size)
    if isinstance(reducer, Joint) and groups is None:
        if differentiated_by_torch() or exporting():
            raise StateError(
                "micro-batches are merged in autograd's graph, which torch.func and exporters do not record; call the model without them"
            )
        if differentiates_weights:
            raise StateError(
                "the weights of micro-batches are constants, but these require a gradient; pass weights.detach() under as_one_batch"
            )
        if torch.is_grad_enabled():  # if this micro-batch needs no gradient, another may
            found = joint.normalize(input, eps, epilogue, reducer, renormalization)
            if found is not None:
                return found
            reducer = reducer.replicas
    if differentiates_weights or differentiated_by_torch() or exporting():  # known moments would be constants to torch
        output, found, *_ = reduction.forward(
            eager, input, eps, epilogue, reducer, groups, renormalization=renormalization
        )
        found = exported.constants(found)
    else:
        x = in_kernel_layout(input)
        kernel = kernels.select(x, epilogue, groups is None and renormalization is None)
        fused = epilogue if kernel.fuses else epilogue.affine()
        if needs_grad(x, fused):
            given = (fused.activation, fused.mask, fused.sample_weights)
            call = Call(kernel, eps, *given, None, moments, renormalization, reducer, groups)
            output, *values = memory.recorded(Normalize.apply, x, *distinct(x, *fused[:3]), call)
            found = Moments(*values)
        else:
            output, found, *_ = reduction.forward(kernel, x, eps, fused, reducer, groups, moments, renormalization)
        if fused is not epilogue:
            output = epilogue.after(output)
    counted_by_device = mask is not None or weights is not None
    return output, found if groups is None else _pooled(found, counted_by_device, groups, input)


def normalize_with(
    input: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | nn.Module | Activation | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Normalize with given statistics, which are constants: no gradient flows into `mean` and `variance`, each (C,).

    Takes the other arguments of `batch_norm`; eps may be 0 here.

    Raises:
        InputError, ShapeError, DTypeError: as `batch_norm`.
    """
    check_input(input, {"running_mean": mean, "running_var": variance, "weight": weight, "bias": bias})
    mask = mask_of(lengths, mask, input)
    if eps < 0.0:
        raise InputError(
            f"batch_norm eps must be non-negative, but got {eps}; in training eps must be positive, the default is 1e-5"
        )
    if input.is_complex():
        output = normalize_with(
            components_as_channels(input),
            components_of_buffer(mean),
            components_of_buffer(variance),
            components_of_parameter(weight),
            components_of_parameter(bias),
            eps,
            activation=activation,
            residual=None if residual is None else _residual_components(residual, input),
            mask=mask,
        )
        return channels_as_components(output)
    if input.dim() < 2:  # numel 0: `check_input` lets nothing else through
        return input.clone()
    epilogue = epilogue_of(input, weight, bias, activation, residual, mask)
    if exporting() and exported.beyond_torch(input, mean, variance, epilogue) is None:
        return exported.by_torch(input, mean, variance, eps, epilogue)
    mean, variance = mean.detach(), variance.detach()
    if differentiated_by_torch() or exporting():
        return eager.infer(input, mean, variance, eps, epilogue)[0]
    x = in_kernel_layout(input)
    kernel = kernels.select(x, epilogue)
    fused = epilogue if kernel.fuses else epilogue.affine()
    if needs_grad(x, fused):
        call = Call(kernel, eps, fused.activation, fused.mask, None, (mean, variance))
        output = memory.recorded(Normalize.apply, x, *distinct(x, *fused[:3]), call)[0]
    else:
        output = kernel.infer(x, mean, variance, eps, fused)[0]
    return output if fused is epilogue else epilogue.after(output)


@torch.no_grad()
def moments(
    input: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    weights: Tensor | None = None,
) -> Moments:
    """Count, mean and M2 of each channel of `input` (N, C, *S), or of what a mask lets through; constants, no gradient flows.

    With `weights`, as in `batch_norm`, the count is their sum.

    Raises:
        InputError, ShapeError, DTypeError: as `batch_norm`.
    """
    check_input(input, {})
    mask = mask_of(lengths, mask, input)
    if input.is_complex():
        count, mean, m2 = moments(components_as_channels(input), mask, None, weights)
        return Moments(count, vector_as_complex(mean), vector_as_complex(m2))
    if input.dim() < 2:  # numel 0: `check_input` lets nothing else through
        return Moments(0, input.new_zeros(0), input.new_zeros(0))
    epilogue = epilogue_of(input, None, None, None, None, mask, weights)
    if differentiated_by_torch() or exporting():
        return exported.constants(reduction.moments_of(eager, input, epilogue))
    x = in_kernel_layout(input)
    return reduction.moments_of(kernels.select(x, epilogue, plain=False), x, epilogue)


def _components_of_moments(moments: Moments) -> Moments:
    return Moments(moments.count, components_of_buffer(moments.mean), components_of_buffer(moments.m2))


def _pooled(moments: Moments, counted_by_device: bool, groups: Groups, input: Tensor) -> Moments:
    """Those of all groups; how many values there are is known where no mask or weights decide it."""
    assert isinstance(moments.count, Tensor), f"the counts of {groups.number} groups are a tensor"
    pooled = Moments.pooled(moments.count, moments.mean, moments.m2)
    return pooled if counted_by_device else pooled._replace(count=values_per_channel(input))


def _check_renormalization(renormalization: Renormalization, input: Tensor, group_size: int | None) -> None:
    mean, variance, *bounds = renormalization
    check_input(input, {"running_mean": mean, "running_var": variance})
    for name, bound in zip(("r_max", "d_max"), bounds, strict=True):
        if not isinstance(bound, Tensor) or bound.dim() or not bound.is_floating_point():
            raise InputError(
                f"{name} must be a floating tensor without axes, such as torch.tensor(3.0), but got {bound!r}"
            )
    if group_size is not None:
        raise InputError(
            "renormalization corrects what all samples share, but got group_size as well; pass one of the two"
        )
    if input.is_complex():
        raise DTypeError("renormalization takes real input, but got complex; use Batch() for it")


def _residual_components(residual: Tensor, input: Tensor) -> Tensor:
    check_residual(residual, input)
    return components_as_channels(residual)
