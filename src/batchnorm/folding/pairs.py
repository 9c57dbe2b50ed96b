"""Layers that quantization-aware training folds: one module for a linear layer and the batch norm after it, which both keep learning.

Quantization has to see the weights that inference uses, which are those of the folded layer (Jacob et al. 2018, arXiv:1712.05877, section
3.2; Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2). With scale = weight / sqrt(running_var + eps) of the batch norm, one factor for
each output channel, and Q for fake quantization,

    y = Q(scale · W) ∗ x · running deviation / batch deviation + shift by the batch's statistics        the papers
      = batch_norm((Q(scale · W) / scale) ∗ x + b)                                                      here

are the same: a batch norm cancels a factor of its input. The second form needs one convolution and no batch norm but the layer itself, so
whatever the layer does with its statistics stays true: sources, masks, replicas, freezing. Dividing the weights rather than the output
also allows scale = 0, a channel in which the weights do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from batchnorm.errors import ArgumentError, StateError
from batchnorm.folding.norms import Affine, scale_of
from batchnorm.folding.weights import along_outputs
from batchnorm.logs import logger
from batchnorm.surgery.walker import slots_of

FakeQuantizer = Callable[[Tensor], Tensor]


class FoldedPair(nn.Module):
    """A convolution or linear layer and the batch norm after it, trained with the weights that inference folds.

    Without a fake quantizer it computes `batch_norm(linear(input))`, bit by bit. With one, the weights are those that the folded layer
    will have, quantized, and scaled back.

    Args:
        linear: a convolution, transposed convolution or linear layer, of any rank, with C output channels.
        batch_norm: torch's or ours, of C channels, with running statistics. The module calls it and does nothing else with the output.
        weight_fake_quant: takes the folded weights, in `linear.weight`'s shape, and returns quantized ones in this shape: a module of
            `torch.ao.quantization` or torchao, or any function that lets gradients pass. None for none.

    Attributes:
        linear, batch_norm: the two layers; their parameters are what an optimizer trains.
        weight_fake_quant: may be set at any time.

    Shape:
        input as `linear` takes it; output as `batch_norm` returns it. Further arguments (residual, mask ...) go to `batch_norm`.
    """

    linear: Any
    batch_norm: Any
    weight_fake_quant: FakeQuantizer | None

    def __init__(
        self, linear: nn.Module, batch_norm: nn.Module, weight_fake_quant: FakeQuantizer | None = None
    ) -> None:
        super().__init__()
        self.linear, self.batch_norm = linear, batch_norm
        self.weight_fake_quant = weight_fake_quant
        self._placed = False  # whether an `InPair` fills the place of the other layer

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Convolve with quantized weights, and normalize."""
        if isinstance(input, fx.Proxy):  # one call in a graph: what rewrites graphs must not pass by the fake quantizer
            path = input.tracer.path_of_module(self)  # pyright: ignore[reportAttributeAccessIssue]
            return input.tracer.create_proxy("call_module", path, (input, *args), kwargs)  # pyright: ignore
        if self.weight_fake_quant is None:
            return self.batch_norm(self.linear(input), *args, **kwargs)
        weights = {"weight": self.quantized_weight()}
        return self.batch_norm(functional_call(self.linear, weights, (input,)), *args, **kwargs)

    def folded_weight(self) -> Tensor:
        """The weights of the folded layer, quantized: Q(scale · W), of `linear.weight`'s shape, in the wider dtype of both layers."""
        return self._quantized(self._scale())

    def quantized_weight(self) -> Tensor:
        """The weights before the batch norm: Q(scale · W) / scale, of `linear.weight`'s shape and dtype; W where scale is 0."""
        scale, weight = self._scale(), self.linear.weight
        divisor = torch.where(scale == 0, 1, scale)
        return torch.where(scale == 0, weight, self._quantized(scale) / divisor).to(weight.dtype)

    def _scale(self) -> Tensor:
        return along_outputs(scale_of(self.batch_norm), self.linear)

    def _quantized(self, scale: Tensor) -> Tensor:
        folded = self.linear.weight * scale
        return folded if self.weight_fake_quant is None else self.weight_fake_quant(folded)


class InPair(nn.Module):
    """Takes the place of a layer that a `FoldedPair` elsewhere in the model computes; returns its input."""

    def __init__(self, pair: FoldedPair, layer: str) -> None:
        super().__init__()
        # in a tuple, so that it is not a child: parameters have one name, in the pair
        self._pair, self._layer = (pair,), layer

    @property
    def pair(self) -> FoldedPair:
        """The pair that has the layer."""
        return self._pair[0]

    @property
    def layer(self) -> nn.Module:
        """The layer that was in this place."""
        return getattr(self.pair, self._layer)

    def forward(self, input: Tensor) -> Tensor:
        """Return the input."""
        return input

    def extra_repr(self) -> str:
        return self._layer


def unfold(model: nn.Module) -> nn.Module:
    """Undo `fold(train=True)`: put the layers of each pair back into their places, in place, and return the model.

    Parameters and buffers stay the same objects, with the values that training gave them, and get the names they had before. Fake
    quantizers are dropped. A `FoldedPair` that `fold` did not make becomes an `nn.Sequential` of its layers; if it is the model itself,
    this is what the function returns. The logger `batchnorm` says how many pairs were unfolded; as a warning if there were none.

    Args:
        model: changed in place.

    Raises:
        ArgumentError: if model is not a module.
        StateError: if a pair, or what fills the place of its other layer, was taken out of the model; the model does not change.
    """
    model, pairs = taken_apart(model)
    log = logger.info if pairs else logger.warning
    log("unfold: %d pairs are layers of their own again%s", len(pairs), "" if pairs else "; the model has none")
    return model


def taken_apart(model: nn.Module) -> tuple[nn.Module, list[FoldedPair]]:
    """The work of `unfold`: the model, and the pairs that it had.

    Raises:
        ArgumentError, StateError: as `unfold`.
    """
    slots = slots_of(model)
    pairs = {id(slot.module): (slot.path, slot.module) for slot in slots if isinstance(slot.module, FoldedPair)}
    others = {id(slot.module.pair): slot.module for slot in slots if isinstance(slot.module, InPair)}
    for key, (path, pair) in pairs.items():
        if key not in others and pair._placed:
            raise StateError(
                f"both places of a folded pair must be in the model, but only that of {path or 'the model'} is; call unfold with the "
                "model that fold returned"
            )
    if lost := next((other for key, other in others.items() if key not in pairs), None):
        raise StateError(
            f"both places of a folded pair must be in the model, but {lost.pair} is no longer there; put it back before unfold"
        )
    replacements: dict[int, nn.Module] = {id(other): other.layer for other in others.values()}
    for key, (_, pair) in pairs.items():
        if key in others:
            replacements[key] = pair.linear if others[key].layer is pair.batch_norm else pair.batch_norm
        else:
            replacements[key] = nn.Sequential(pair.linear, pair.batch_norm).train(pair.training)
    for slot in slots:
        if slot.parent is not None and id(slot.module) in replacements:
            slot.replace(replacements[id(slot.module)])
    return replacements.get(id(model), model), [pair for _, pair in pairs.values()]


def joined(linear: nn.Module, batch_norm: nn.Module, *, at_batch_norm: bool) -> dict[int, nn.Module]:
    """A pair of two layers of a model, in the place of one of them, and what fills the other place, by the ids of the layers."""
    pair = FoldedPair(linear, batch_norm)
    pair._placed = True
    pair.training = linear.training
    other = InPair(pair, "linear" if at_batch_norm else "batch_norm")
    here, there = (batch_norm, linear) if at_batch_norm else (linear, batch_norm)
    return {id(here): pair, id(there): other.train(there.training)}


def exactly_quantized(pair: FoldedPair) -> Tensor | None:
    """`quantized_weight` in float64, so that folding it restores `folded_weight` exactly; None without a fake quantizer."""
    if pair.weight_fake_quant is None:
        return None
    with torch.no_grad():
        scale = along_outputs(Affine.of(pair.batch_norm).scale, pair.linear)
        divisor = torch.where(scale == 0, 1, scale)
        return torch.where(scale == 0, pair.linear.weight.double(), pair.folded_weight().double() / divisor)


def make_quantizers(factory: Callable[[], FakeQuantizer], count: int) -> list[FakeQuantizer]:
    """So many fake quantizers of a factory.

    Raises:
        ArgumentError: if the factory is not one.
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ArgumentError(
            "weight_fake_quant must be a function that returns a new fake quantizer for each layer, such as "
            f"torch.ao.quantization.default_weight_fake_quant, but got {type(factory).__name__}"
        )
    made = [factory() for _ in range(count)]
    for each in made:
        if not callable(each):
            raise ArgumentError(
                "weight_fake_quant must return a module or another function that takes weights, but it returned a "
                f"{type(each).__name__}"
            )
    return made
