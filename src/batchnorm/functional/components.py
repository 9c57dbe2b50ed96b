"""Complex tensors as real ones, in which each component is a channel.

Real and imaginary components are normalized separately (the "naive" normalization of Trabelsi et al. 2018, "Deep Complex Networks",
section 3.5). Parameters and buffers are then complex too, one component for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.errors import DTypeError


def components_as_channels(x: Tensor) -> Tensor:
    """(N, C, *S) complex as (N, 2C, *S) real: channel 2c is the real component of channel c, 2c + 1 the imaginary one."""
    return torch.view_as_real(x.resolve_conj()).movedim(-1, 2).flatten(1, 2)


def channels_as_components(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(1, (-1, 2)).movedim(2, -1).contiguous())


def components_of_parameter(values: Tensor | None) -> Tensor | None:
    """(C,) as (2C,): a complex parameter has one value for each component, a real one the same for both."""
    if values is None:
        return None
    return torch.view_as_real(values.resolve_conj()).flatten() if values.is_complex() else values.repeat_interleave(2)


def components_of_buffer(values: Tensor) -> Tensor:
    """(C,) complex as a (2C,) view that writes through."""
    if not values.is_complex():
        raise DTypeError(
            "running statistics must be complex for complex input and real for real input, but a complex tensor met one of "
            f"{values.dtype}; build the layer with the input's dtype"
        )
    return torch.view_as_real(values).view(-1)


def vector_as_complex(values: Tensor) -> Tensor:
    return torch.complex(*values.view(-1, 2).unbind(1))
