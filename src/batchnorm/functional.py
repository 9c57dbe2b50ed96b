"""Batch normalization as functions: torch's `batch_norm` and its parts, over the kernels' verbs.

Which way a call goes, in this order (the checks together cost less than a microsecond):

1. a `torch.func` transform or forward-mode AD is active: the verbs in plain torch, differentiated by torch itself, to any order;
2. `torch.export` and `torch.jit.trace`: torch's own operator where it says the same, so that exporters see a batch norm;
3. a gradient is needed: one `autograd.Function` over the verbs, which keeps x, mean and rstd for its backward, and beside a residual
   what the activation's derivative is read off: y, which the next layer keeps anyway, or the residual.
   Its backward, when it is itself to be differentiated, goes through plain torch again;
4. nothing needs a gradient: the kernel alone.

The statistics of complex input are those of its real and imaginary parts apart (the "naive" normalization of Trabelsi et al. 2018,
"Deep Complex Networks", section 3.5); parameters and buffers are then complex too, one part each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue] (a C module)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import functional as F

from batchnorm import kernels
from batchnorm.errors import ArgumentError, DTypeError, InputError, ShapeError, StateError
from batchnorm.kernels import Activation, Epilogue, cpu, eager
from batchnorm.moments import Moments


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
) -> Tensor:
    """`torch.nn.functional.batch_norm` with its signature and effects, and more in the same pass.

    Args:
        input: (N, C, *S), floating or complex, any strides.
        running_mean: (C,), used in inference, moved in training; None in training moves nothing.
        running_var: (C,), likewise; moved by the unbiased variance, as in torch.
        weight: gamma, (C,).
        bias: beta, (C,).
        training: normalize with the statistics of `input` rather than with the running ones.
        momentum: the weight of the new value in the running statistics. A 0-d tensor will do.
        eps: added to the variance, in units of input squared; positive in training.
        activation: applied last: a name of `kernels.activation.NAMES`, or torch's module of it.
        residual: added before the activation; input's shape.
        mask: bool, (N, *S) or broadcastable to it; True counts. Where False, the output is 0 and no gradient flows.

    Returns:
        activation(weight · (input - mean) / sqrt(variance + eps) + bias + residual), of input's shape and dtype.

    Raises:
        InputError: on one value per channel in training, on eps out of range, on running statistics missing in inference.
        ShapeError: on sizes that do not fit together.
        DTypeError: on an integer or boolean input.
    """
    if (running_mean is None) != (running_var is None):
        raise InputError("running_mean and running_var must either both be None or neither be None; pass both or none")
    check_input(input, {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias})
    if training:
        check_several_values(input)
        output, moments = normalize(input, weight, bias, eps, activation=activation, residual=residual, mask=mask)
        if running_mean is not None and running_var is not None:
            move_running_statistics(running_mean, running_var, moments, momentum)
        return output
    if running_mean is None or running_var is None:
        raise StateError(
            "running_mean must be defined in evaluation mode, and so must running_var, but got None; "
            "pass the running statistics, or training=True to use those of the batch"
        )
    return normalize_with(
        input, running_mean, running_var, weight, bias, eps, activation=activation, residual=residual, mask=mask
    )


def normalize(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | nn.Module | Activation | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """Normalize with the statistics of `input` itself, and return them; touches no buffer.

    Takes the arguments of `batch_norm`. The moments are detached: the gradient of the output flows through the statistics, but
    a loss of the moments themselves needs `Moments` of its own.

    Raises:
        InputError, ShapeError, DTypeError: as `batch_norm`.
    """
    check_input(input, {"weight": weight, "bias": bias})
    if eps <= 0.0:
        raise InputError(f"eps must be positive during training, but got {eps}; the default is 1e-5")
    if input.is_complex():
        output, moments = normalize(
            _parts_as_channels(input),
            _parts_of_parameter(weight),
            _parts_of_parameter(bias),
            eps,
            activation=activation,
            residual=None if residual is None else _parts_as_channels(residual),
            mask=mask,
        )
        return _channels_as_parts(output), Moments(
            moments.count, _vector_as_complex(moments.mean), _vector_as_complex(moments.m2)
        )
    if input.dim() < 2:  # numel 0: `check_input` lets nothing else through
        return input.clone(), Moments(0, input.new_zeros(0), input.new_zeros(0))
    epilogue = _epilogue(input, weight, bias, activation, residual, mask)
    if _differentiated_by_torch() or _exporting():
        output, moments, _ = eager.forward(input, eps, epilogue)
        return output, moments.detach()
    if _needs_grad(input, epilogue):
        output, *moments = _Normalize.apply(input, None, None, eps, *epilogue[:5])
        return output, Moments(*moments)
    return kernels.select(input, epilogue).forward(input, eps, epilogue)[:2]


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
) -> Tensor:
    """Normalize with given statistics, which are constants: no gradient flows into `mean` and `variance`, each (C,).

    Takes the other arguments of `batch_norm`; eps may be 0 here.

    Raises:
        InputError, ShapeError, DTypeError: as `batch_norm`.
    """
    check_input(input, {"running_mean": mean, "running_var": variance, "weight": weight, "bias": bias})
    if eps < 0.0:
        raise InputError(f"eps must be positive, or 0 with given statistics, but got {eps}; the default is 1e-5")
    if input.is_complex():
        output = normalize_with(
            _parts_as_channels(input),
            _parts_of_buffer(mean),
            _parts_of_buffer(variance),
            _parts_of_parameter(weight),
            _parts_of_parameter(bias),
            eps,
            activation=activation,
            residual=None if residual is None else _parts_as_channels(residual),
            mask=mask,
        )
        return _channels_as_parts(output)
    if input.dim() < 2:  # numel 0: `check_input` lets nothing else through
        return input.clone()
    epilogue = _epilogue(input, weight, bias, activation, residual, mask)
    if _exporting() and _torch_says_the_same(input, mean, variance, epilogue):
        return _by_torch(input, mean, variance, eps, epilogue)
    wide = eager.wide_dtype(input)
    mean, rstd = mean.detach().to(wide), (variance.detach().to(wide) + eps).rsqrt()
    if _differentiated_by_torch() or _exporting():
        return eager.normalize(input, mean, rstd, epilogue)
    if _needs_grad(input, epilogue):
        return _Normalize.apply(input, mean, rstd, eps, *epilogue[:5])[0]
    return kernels.select(input, epilogue).normalize(input, mean, rstd, epilogue)


@torch.no_grad()
def move_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    moments: Moments,
    momentum: float | Tensor = 0.1,
    *,
    unbiased: bool = True,
    skip_nonfinite: bool = False,
) -> Tensor | None:
    """One step of the moving averages, in place: running = (1 - momentum) · running + momentum · batch.

    Computed in the moments' dtype and rounded once. Where a mask leaves fewer than two values, or the batch is empty, nothing
    moves: there is no variance to learn from. No host synchronization.

    Args:
        running_mean: (C,), any floating dtype.
        running_var: (C,), any floating dtype.
        moments: of the batch.
        momentum: the weight of the batch; a number or a 0-d tensor.
        unbiased: follow the unbiased variance (torch, and the paper's section 3.1) or the biased one (Keras, Flax).
        skip_nonfinite: let a batch pass by whose statistics are not finite in the buffers' dtype, whole or not at all.

    Returns:
        0-d bool, whether the statistics were finite; None if that was not asked for.

    Raises:
        StateError: under `torch.vmap`, if the batch statistics differ from slice to slice and the buffers do not.
    """
    count = moments.count
    if isinstance(count, int) and count == 0:
        return None
    if not isinstance(momentum, (int, float, Tensor)):
        raise ArgumentError(f"momentum must be a number, the weight of the new batch, but got {momentum!r}")
    if running_mean.is_complex() or moments.mean.is_complex():
        running_mean, running_var = _parts_of_buffer(running_mean), _parts_of_buffer(running_var)
        moments = Moments(count, _parts_of_buffer(moments.mean), _parts_of_buffer(moments.m2))
    if isinstance(momentum, float) and cpu.moves(running_mean, running_var, moments) and not _differentiated_by_torch():
        finite = cpu.update_running(running_mean, running_var, moments, momentum, unbiased, skip_nonfinite)
        return finite if skip_nonfinite else None
    steps = [
        (running, (1 - momentum) * running.to(value.dtype) + momentum * value)
        for running, value in ((running_mean, moments.mean), (running_var, moments.variance(unbiased=unbiased)))
    ]
    finite = None
    moves = None if isinstance(count, int) else count > 1
    if skip_nonfinite:
        finite = torch.stack([step.to(running.dtype).isfinite().all() for running, step in steps]).all()
        moves = finite if moves is None else moves & finite
    for running, step in steps:
        write(running, step if moves is None else torch.where(moves, step, running.to(step.dtype)))
    return finite


def write(buffer: Tensor, value: Tensor) -> None:
    """`buffer.copy_(value)`, also from inside `torch.func.grad`, which refuses to write to a tensor it did not get as an argument.

    A buffer holds values, never gradients: what is written is what lies below the gradient levels.

    Raises:
        StateError: under `torch.vmap`, if the value differs from slice to slice and the buffer does not.
    """
    if forward_ad._current_level >= 0:
        value = forward_ad.unpack_dual(value).primal
    if not torch._C._are_functorch_transforms_active():
        buffer.copy_(value)
        return
    target, source = _below_gradient_levels(buffer), _below_gradient_levels(value)
    if not (functorch.is_batchedtensor(target) or functorch.is_batchedtensor(source)):
        with temporarily_clear_interpreter_stack():
            target.copy_(source)
        return
    try:
        buffer.copy_(value)
    except RuntimeError as error:
        raise StateError(
            "under vmap each slice has statistics of its own, but the running statistics are shared by all slices; map over "
            "the buffers too (torch.func.stack_module_state and functional_call), use track_running_stats=False, or "
            "call batchnorm.functional.normalize, which returns the moments"
        ) from error


def check_input(input: Tensor, channel_values: dict[str, Tensor | None]) -> None:
    """Refuse an input that has no channels to normalize, or parameters and buffers of another number of channels.

    Raises:
        ArgumentError, DTypeError, ShapeError: saying what came.
    """
    if not isinstance(input, Tensor):
        raise ArgumentError(f"input must be a tensor, but got {type(input).__name__}; convert it with torch.as_tensor")
    if not (input.is_floating_point() or input.is_complex()) or input.element_size() < 2:
        raise DTypeError(
            f'"batch_norm" not implemented for {input.dtype}: input must be floating or complex, at least 16 bits wide; '
            "convert it, for example with input.float()"
        )
    if input.dim() < 2 and input.numel() > 0:
        raise ShapeError(
            f"input must have a batch axis and a channel axis, (N, C, *S), but got shape {tuple(input.shape)}; "
            "add the missing axis with unsqueeze"
        )
    channels = input.shape[1] if input.dim() > 1 else 0
    for name, values in channel_values.items():
        if values is not None and (values.dim() != 1 or values.shape[0] != channels):
            raise ShapeError(
                f"{name} should contain {channels} elements, one for each channel of the input {tuple(input.shape)}, "
                f"but has shape {tuple(values.shape)}; the channel axis is axis 1"
            )


def check_several_values(input: Tensor) -> None:
    """Refuse to learn statistics from one value per channel: its variance is 0 and its output would be the bias.

    Raises:
        InputError: saying what to do about it.
    """
    if input.dim() > 1 and input.shape[1] > 0 and input.numel() == input.shape[1]:
        raise InputError(
            f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}: a single value has "
            "no variance. Use a larger batch (drop_last=True in the DataLoader), call .eval() on the layer, or give it "
            'on_single="running"'
        )


class _Normalize(torch.autograd.Function):
    """The one autograd node: `mean` and `rstd` given are constants; None means the batch's own."""

    @staticmethod
    def forward(  # the epilogue's fields come one by one: autograd only sees tensors that are arguments themselves
        ctx: Any,
        x: Tensor,
        mean: Tensor | None,
        rstd: Tensor | None,
        eps: float,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        activation: Activation | None,
    ) -> tuple[Tensor, int | Tensor | None, Tensor | None, Tensor | None]:
        epilogue = Epilogue(weight, bias, residual, mask, activation)
        kernel = kernels.select(x, epilogue)
        ctx.set_materialize_grads(False)
        ctx.kernel, ctx.eps, ctx.activation, ctx.constant_statistics = kernel, eps, activation, mean is not None
        if mean is not None and rstd is not None:
            ctx.count = None
            y = kernel.normalize(x, mean, rstd, epilogue)
            ctx.save_for_backward(x, mean, rstd, weight, bias, *_kept_of_residual(epilogue, y), mask, None)
            return y, None, None, None
        y, moments, rstd = kernel.forward(x, eps, epilogue)
        masked_count = moments.count if isinstance(moments.count, Tensor) else None
        ctx.count = None if masked_count is not None else moments.count
        ctx.save_for_backward(x, moments.mean, rstd, weight, bias, *_kept_of_residual(epilogue, y), mask, masked_count)
        ctx.mark_non_differentiable(*(value for value in moments if isinstance(value, Tensor)))
        return y, moments.count, moments.mean, moments.m2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]  # the moments are not differentiable
        if dy is None:
            return (None,) * 9
        x, mean, rstd, weight, bias, residual, output, mask, masked_count = ctx.saved_tensors
        epilogue = Epilogue(weight, bias, residual, mask, ctx.activation, output)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            given = (mean, rstd) if ctx.constant_statistics else None
            dx, dweight, dbias, dresidual = _differentiable_backward(dy, x, given, ctx.eps, epilogue)
        else:
            count = ctx.count if masked_count is None else masked_count
            if _differentiated_by_torch():  # vmap over dy: a batch of gradients at once
                kernel = eager
            else:
                kernel, dy = ctx.kernel, _in_layout_of(x, dy)
            dx, dresidual, sum_grad, sum_grad_xhat = kernel.backward(
                dy, x, mean, rstd, epilogue, count, needs_input_grad=ctx.needs_input_grad[0]
            )
            dweight = None if weight is None else sum_grad_xhat.to(weight.dtype)
            dbias = None if bias is None else sum_grad.to(bias.dtype)
        if ctx.activation is None and ctx.needs_input_grad[6]:
            dresidual = dy if mask is None else torch.where(mask, dy, 0)
        return dx, None, None, None, dweight, dbias, dresidual, None, None


def _kept_of_residual(epilogue: Epilogue, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What the backward needs of the residual, as `Epilogue.residual` and `Epilogue.output`; without an activation nothing."""
    if epilogue.residual is None or epilogue.activation is None:
        return None, None
    return (None, y) if epilogue.activation.derivative_from_output else (epilogue.residual, None)


def _differentiable_backward(
    dy: Tensor, x: Tensor, given: tuple[Tensor, Tensor] | None, eps: float, epilogue: Epilogue
) -> list[Tensor | None]:
    """Gradients of x, weight, bias and residual that can be differentiated again, to any order.

    Each input is taken by a fresh alias: where weight was itself computed from x, the gradient of x must not run through weight.
    An activation whose derivative is read off y is made of straight lines: there the derivative is a constant.
    """
    x = x.view_as(x)
    weight, bias, residual = (None if value is None else value.view_as(value) for value in epilogue[:3])
    inputs = (x, weight, bias, residual)
    activation, output, mask = epilogue.activation, epilogue.output, epilogue.mask
    if activation is not None and output is not None:
        dy = dy * activation.derivative(output.detach())
        activation = None
    epilogue = Epilogue(weight, bias, residual, mask, activation)
    y = eager.forward(x, eps, epilogue)[0] if given is None else eager.normalize(x, *given, epilogue)
    wanted = [value for value in inputs if value is not None and value.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True)) if wanted else iter(())
    dx, dweight, dbias, dresidual = (
        next(grads) if value is not None and value.requires_grad else None for value in inputs
    )
    if output is not None:
        dresidual = dy if mask is None else torch.where(mask, dy, 0)
    return [dx, dweight, dbias, dresidual]


def _in_layout_of(x: Tensor, dy: Tensor) -> Tensor:
    """dy with x's strides: an expanded or permuted gradient would give dx a layout of its own.

    Out of place, since dy may be a batch of gradients (`is_grads_batched`), which cannot be written into one.
    """
    if torch.compiler.is_compiling() or dy.stride() == x.stride():
        return dy
    return torch.zeros_like(x, dtype=dy.dtype) + dy


def _epilogue(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | nn.Module | Activation | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> Epilogue:
    if residual is not None and residual.shape != input.shape:
        raise ShapeError(
            f"residual must have the input's shape {tuple(input.shape)}, but has {tuple(residual.shape)}; "
            "expand it, or add it outside the layer"
        )
    if mask is not None:
        mask = _mask_along_channels(mask, input)
    return Epilogue(weight, bias, residual, mask, kernels.parse(activation))


def _mask_along_channels(mask: Tensor, input: Tensor) -> Tensor:
    """(N, *S), or what broadcasts to it, as (N, 1, *S)."""
    if mask.dtype != torch.bool:
        raise DTypeError(f"mask must be boolean, True where a value counts, but got {mask.dtype}; use mask.bool()")
    wanted = (input.shape[0], *input.shape[2:])
    padded = (1,) * (len(wanted) - mask.dim()) + tuple(mask.shape)
    if len(padded) != len(wanted) or any(m not in (1, w) for m, w in zip(padded, wanted, strict=True)):
        raise ShapeError(
            f"mask must broadcast to the input without its channel axis, {tuple(wanted)}, but has shape {tuple(mask.shape)}"
        )
    return mask.reshape(padded).unsqueeze(1)


def _needs_grad(input: Tensor, epilogue: Epilogue) -> bool:
    return torch.is_grad_enabled() and (
        input.requires_grad or any(value is not None and value.requires_grad for value in epilogue[:3])
    )


def _differentiated_by_torch() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _exporting() -> bool:
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _torch_says_the_same(input: Tensor, mean: Tensor, variance: Tensor, epilogue: Epilogue) -> bool:
    """Whether torch's operator takes these dtypes: all alike, or float32 beside half-precision input."""
    dtypes = {value.dtype for value in (mean, variance, epilogue.weight, epilogue.bias) if value is not None}
    half = input.dtype in (torch.float16, torch.bfloat16)
    return epilogue.mask is None and (dtypes == {input.dtype} or (half and dtypes == {torch.float32}))


def _by_torch(input: Tensor, mean: Tensor, variance: Tensor, eps: float, epilogue: Epilogue) -> Tensor:
    output = F.batch_norm(input, mean, variance, epilogue.weight, epilogue.bias, False, 0.0, eps)
    if epilogue.residual is not None:
        output = output + epilogue.residual
    return output if epilogue.activation is None else epilogue.activation(output)


def _below_gradient_levels(value: Tensor) -> Tensor:
    while functorch.is_gradtrackingtensor(value):
        value = functorch.get_unwrapped(value)
    return value


def _parts_as_channels(x: Tensor) -> Tensor:
    """(N, C, *S) complex as (N, 2C, *S) real: channel 2c is the real part of channel c, 2c + 1 its imaginary part."""
    if not x.is_complex():
        raise DTypeError(f"residual must be complex as the input is, but got {x.dtype}")
    return torch.view_as_real(x).movedim(-1, 2).flatten(1, 2)


def _channels_as_parts(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(1, (-1, 2)).movedim(2, -1).contiguous())


def _parts_of_parameter(values: Tensor | None) -> Tensor | None:
    """(C,) as (2C,): a complex parameter has one value for each part, a real one the same for both."""
    if values is None:
        return None
    return torch.view_as_real(values).flatten() if values.is_complex() else values.repeat_interleave(2)


def _parts_of_buffer(values: Tensor) -> Tensor:
    """(C,) complex as a (2C,) view that writes through."""
    if not values.is_complex():
        raise DTypeError(
            "statistics of complex input must be complex, one part each, and of real input real, but a complex tensor met "
            f"one of {values.dtype}; build the layer with the input's dtype"
        )
    return torch.view_as_real(values).view(-1)


def _vector_as_complex(values: Tensor) -> Tensor:
    return torch.view_as_complex(values.view(-1, 2))
