"""Checks of arguments, with their error messages."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import kernels
from batchnorm.errors import ArgumentError, DTypeError, InputError, ShapeError
from batchnorm.kernels import Activation, Epilogue, Groups, eager
from batchnorm.moments import SEVERAL
from batchnorm.torch_state import differentiated_by_torch, is_fake, is_tracing


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
    check_widths(channel_values, input.shape[1] if input.dim() > 1 else 0, input)


def check_widths(channel_values: dict[str, Tensor | None], channels: int, input: Tensor | None = None) -> None:
    """Refuse parameters and buffers of another number of channels than the input's.

    Raises:
        ShapeError: saying what came.
    """
    for name, values in channel_values.items():
        if values is not None and (values.dim() != 1 or values.shape[0] != channels):
            seen = "" if input is None else f", seen as (N, C, *S) = {tuple(input.shape)}"
            raise ShapeError(
                f"{name} should contain {channels} elements not {values.numel()}: one for each channel of the input{seen}, "
                f"but it has shape {tuple(values.shape)}"
            )


def check_momentum(momentum: Any) -> None:
    """Refuse what is no weight of a batch.

    Raises:
        ArgumentError: saying what came.
    """
    if not isinstance(momentum, (Real, Tensor)):
        raise ArgumentError(f"momentum must be a number, the weight of the new batch, but got {momentum!r}")


def check_eps(eps: float) -> None:
    """Refuse, in training, what does not keep the variance of constant values from 0.

    Raises:
        InputError: saying what came.
    """
    if eps <= 0.0:
        raise InputError(f"batch_norm eps must be positive during training, but got {eps}; the default is 1e-5")


def is_single_value(input: Tensor) -> bool:
    """Whether each channel of the input (N, C, *S) has one value, which has no variance."""
    return input.dim() > 1 and input.shape[1] > 0 and input.numel() == input.shape[1]


def groups_of(input: Tensor, size: int | None) -> Groups | None:
    """`size` samples of the input (N, C, *S) to a group; None where all are one.

    The samples left over are a group too, unless they are one value per channel: that joins the group before it.
    """
    if size is None or input.dim() < 2 or input.numel() == 0:
        return None
    if size < 1:
        raise InputError(f"group_size must be at least 1, the samples in a group, but got {size}")
    samples = input.shape[0]
    number, left = samples // size, samples % size  # divmod is refused by compiled code where the size is dynamic
    number += left > 0 and not is_single_value(input[samples - left :])
    return Groups(number, size) if number > 1 else None


def check_several_values(input: Tensor) -> None:
    """Refuse to learn statistics from one value per channel: its variance is 0 and its output would be the bias.

    Raises:
        InputError: saying what to do about it.
    """
    if is_single_value(input):
        raise InputError(
            f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}: a single value has "
            "no variance. Use a larger batch (drop_last=True in the DataLoader), call .eval() on the layer, or give it "
            'on_single="running"'
        )


def is_like(residual: Tensor, x: Tensor) -> bool:
    """Whether a residual can be added in the memory of y: a plain tensor of x's dtype, shape and device."""
    alike = type(residual) is Tensor and residual.dtype is x.dtype and residual.device == x.device
    return alike and residual.shape == x.shape


def check_residual(residual: Tensor, input: Tensor) -> None:
    """Refuse a residual that cannot be added to the normalized input.

    Raises:
        ArgumentError, DTypeError, ShapeError: saying what came.
    """
    if not isinstance(residual, Tensor):
        raise ArgumentError(f"residual must be a tensor of the input's shape, but got {type(residual).__name__}")
    if residual.shape != input.shape:
        raise ShapeError(
            f"residual must have the input's shape {tuple(input.shape)}, but has {tuple(residual.shape)}; "
            "expand it, or add it outside the layer"
        )
    if residual.is_complex() != input.is_complex() or not (residual.is_floating_point() or residual.is_complex()):
        raise DTypeError(
            f"residual must be {'complex' if input.is_complex() else 'floating'} as the input is, but got {residual.dtype}"
        )


def mask_of(lengths: Tensor | None, mask: Tensor | None, input: Tensor) -> Tensor | None:
    """The mask that says what `lengths` says, and what `mask` says too; bool, to broadcast to (N, *S).

    Raises:
        ArgumentError, DTypeError, ShapeError: saying what came.
    """
    if lengths is None:
        return mask
    if not isinstance(lengths, Tensor):
        raise ArgumentError(
            f"lengths must be a tensor of N integers, but got {type(lengths).__name__}; use torch.tensor"
        )
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise DTypeError(
            f"lengths must be integers, so many positions of each sample count, but got {lengths.dtype}; round shares of the "
            "longest to positions first"
        )
    if input.dim() < 3 or lengths.shape != input.shape[:1]:
        raise ShapeError(
            f"lengths must be (N,), the positions that count along the last axis of the input (N, C, ..., L) = {tuple(input.shape)}, "
            f"but has shape {tuple(lengths.shape)}"
        )
    along = (-1, *[1] * (input.dim() - 2))  # (N, 1, ..., 1) beside (L,)
    valid = torch.arange(input.shape[-1], device=lengths.device) < lengths.view(along)
    if mask is None:
        return valid
    return mask_along_channels(mask, input).squeeze(1) & valid


def epilogue_of(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | nn.Module | Activation | None,
    residual: Tensor | None,
    mask: Tensor | None,
    weights: Tensor | None = None,
) -> Epilogue:
    if residual is not None:
        check_residual(residual, input)
    if mask is not None:
        mask = mask_along_channels(mask, input)
    if weights is not None:
        weights = _weights_along_channels(weights, mask, input)
    return Epilogue(weight, bias, residual, mask, kernels.parse(activation), None, weights)


def check_weights(weights: Tensor, input: Tensor) -> None:
    """Refuse sample weights of another kind, shape or device than the input (N, C, *S) allows; does not look at their values.

    Raises:
        ArgumentError, DTypeError, ShapeError: saying what came.
    """
    if not isinstance(weights, Tensor):
        raise ArgumentError(
            f"weights must be a tensor, but got {type(weights).__name__}; convert it with torch.as_tensor"
        )
    if weights.dtype == torch.bool or weights.is_complex():
        raise DTypeError(
            f"weights must be floating or integers, how often each sample counts, but got {weights.dtype}; for what counts or not, "
            "use mask="
        )
    wanted = (input.shape[0], *input.shape[2:])
    shape = tuple(weights.shape)
    of_samples = len(shape) == 1 and shape[0] == wanted[0]
    if not of_samples and (
        len(shape) != len(wanted) or any(m != 1 and m != w for m, w in zip(shape, wanted, strict=True))
    ):
        raise ShapeError(
            f"weights must be (N,) or broadcast to (N, *S), the input without its channel axis, {tuple(wanted)}, but have shape {shape}"
        )
    if weights.device != input.device:
        raise ArgumentError(
            f"weights must be on the input's device, {input.device}, but are on {weights.device}; move them with weights.to(input.device)"
        )


def check_sum_of_weights(count: int | Tensor) -> None:
    """Refuse to learn statistics from weights that add up to one sample, unless that would wait for the device.

    Raises:
        InputError: saying what to do about it.
    """
    if not isinstance(count, Tensor) or not _shows_values(count):
        return
    total = float(count)
    if 0 < total <= SEVERAL:
        raise InputError(
            f"weights count samples, so those of a training batch must sum to more than {SEVERAL} over its positions, but they sum to "
            f'{total:g}: one sample has no variance. Scale them, for example to a mean of 1, or give the layer on_single="skip"'
        )


def _weights_along_channels(weights: Tensor, mask: Tensor | None, input: Tensor) -> Tensor:
    """Sample weights as `Epilogue` takes them. Where looking at them would wait for the device, what is no weight becomes NaN."""
    check_weights(weights, input)
    spatial = input.dim() - 2
    along = weights.to(eager.wide_dtype(input))
    along = along.reshape(-1, *[1] * (1 + spatial)) if along.dim() == 1 else along.unsqueeze(1)
    if mask is not None:  # (N, 1, *S)
        along = torch.where(mask, along, 0)
    are_weights = (along >= 0) & (along < torch.inf)
    if not _shows_values(along):
        return torch.where(are_weights, along, torch.nan)
    if not bool(are_weights.all()):
        wrong = along[~are_weights][0].item()
        raise InputError(
            f"weights must be non-negative and finite, but one is {wrong}; to leave a sample out, give it 0"
        )
    return along


def _shows_values(tensor: Tensor) -> bool:
    """Whether code may read values of the tensor without waiting for a device, tracing or transforms."""
    return tensor.is_cpu and not (
        torch.compiler.is_compiling() or is_tracing() or differentiated_by_torch() or is_fake(tensor)
    )


def in_kernel_layout(input: Tensor) -> Tensor:
    """The input, or a contiguous copy: on the CPU a copy costs much less than operators that take any strides."""
    if (
        not input.is_cpu
        or torch.compiler.is_compiling()
        or input.is_contiguous()
        or input.movedim(1, -1).is_contiguous()
    ):
        return input
    return input.contiguous()


def mask_along_channels(mask: Tensor, input: Tensor) -> Tensor:
    """(N, *S), or what broadcasts to it, as (N, 1, *S)."""
    if not isinstance(mask, Tensor):
        raise ArgumentError(f"mask must be a boolean tensor, but got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise DTypeError(f"mask must be boolean, True where a value counts, but got {mask.dtype}; use mask.bool()")
    wanted = (input.shape[0], *input.shape[2:])
    padded = (1,) * (len(wanted) - mask.dim()) + tuple(mask.shape)
    # Not `m not in (1, w)`: compiled code says so of an m that equals a dynamic w.
    if len(padded) != len(wanted) or any(m != 1 and m != w for m, w in zip(padded, wanted, strict=True)):
        raise ShapeError(
            f"mask must broadcast to the input without its channel axis, {tuple(wanted)}, but has shape {tuple(mask.shape)}"
        )
    return mask.reshape(padded).unsqueeze(1)
