"""The state of a layer: running statistics, the buffers of its statistics source, the counter of skipped batches, checkpoints."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from batchnorm.functional import counter_on
from batchnorm.logs import logger
from batchnorm.statistics import Batch, Statistics, buffers_of, parameters_of
from batchnorm.torch_state import static_while_compiling

STATISTICS = ("running_mean", "running_var")
_OF_SOURCES = ("running_mean_", "running_var_", "num_batches_tracked_")  # prefixes of the names of a source's buffers
LEARNED_BY_SOURCES = "statistics_"  # and of its parameters


@static_while_compiling
class LayerState(_BatchNorm):
    """The buffers of a layer, and how they are cast, loaded and reset."""

    statistics: Statistics = Batch()
    keep_wide_statistics: bool = True
    _nonfinite_batches: Tensor | None = None

    @property
    def num_nonfinite_batches(self) -> Tensor | None:
        """The number of skipped batches, 0-d int64; None if the layer has no `num_batches_tracked`.

        This counter is not a buffer, because torch's layers have no such buffer: weight averages that were created before `convert` pair
        the buffers of two models, and tools that load a model from the meta device need a value for each buffer. The count starts at 0
        if `num_batches_tracked` was created, moved or loaded without it.
        """
        beside, counter = self._buffers.get("num_batches_tracked"), self._nonfinite_batches
        if beside is None:
            return None
        if counter is None or counter.device != beside.device:
            counter = self._nonfinite_batches = counter_on(beside.device, counter)
        return counter

    @num_nonfinite_batches.deleter
    def num_nonfinite_batches(self) -> None:
        self.__dict__.pop("_nonfinite_batches", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "num_nonfinite_batches" in self._buffers:  # pickled when it was a buffer
            self._nonfinite_batches = self._buffers.pop("num_nonfinite_batches")
            self._non_persistent_buffers_set.discard("num_nonfinite_batches")

    def reset_running_stats(self) -> None:
        """Reset the running mean to 0, the running variance to 1, and the counters to 0."""
        super().reset_running_stats()
        self._reset_nonfinite_counter()
        for name, own in buffers_of(self.statistics).items():
            buffer = self._buffers.get(name)
            if buffer is not None:
                buffer.copy_(own.start(self._buffers[own.like]))  # pyright: ignore[reportArgumentType] (both exist or neither)

    def _reset_source_parameters(self) -> None:
        with torch.no_grad():
            for name, own in parameters_of(self.statistics).items():
                parameter = self._parameters.get(name)
                if parameter is not None:
                    parameter.copy_(own.start(parameter if own.like is None else getattr(self, own.like)))

    def _prepare_buffers(self) -> None:
        """Create what torch's layer lacks: wide running statistics, the source's buffers, the counter of skipped batches."""
        self._match_buffers_to_source()
        self._widen_statistics({})
        self._reset_nonfinite_counter()

    def _reset_nonfinite_counter(self) -> None:
        beside = self._buffers.get("num_batches_tracked")
        self._nonfinite_batches = None if beside is None else counter_on(beside.device)

    def _match_buffers_to_source(self) -> None:
        """Register the buffers of the statistics source with initial values, and remove those of other sources."""
        wanted = buffers_of(self.statistics)
        for name in [name for name in self._buffers if name.startswith(_OF_SOURCES) and name not in wanted]:
            del self._buffers[name]
        for name, own in wanted.items():
            source, buffer = self._buffers.get(own.like), self._buffers.get(name)
            if source is None or (buffer is not None and _fits(buffer, source)):
                continue
            if isinstance(source, UninitializedBuffer):
                self.register_buffer(name, UninitializedBuffer(device=source.device, dtype=source.dtype))  # pyright: ignore[reportCallIssue]
            else:
                self.register_buffer(name, own.start(source).clone())

    def _match_parameters_to_source(
        self, statistics: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Register the parameters of a source with initial values, and remove those of other sources.

        Device and dtype are for numbers; without them they are those of the layer's first tensor.
        """
        wanted = parameters_of(statistics)
        for name in [name for name in self._parameters if name.startswith(LEARNED_BY_SOURCES) and name not in wanted]:
            del self._parameters[name]
        for name, own in wanted.items():
            source = None if own.like is None else getattr(self, own.like, None)
            before = self._parameters.get(name)
            if own.like is None:
                if before is None:
                    self.register_parameter(name, nn.Parameter(own.start(self._number(device, dtype))))
            elif source is None or (before is not None and _fits(before, source)):
                continue
            elif isinstance(source, UninitializedParameter):
                like: Any = UninitializedParameter(source.requires_grad, device=source.device, dtype=source.dtype)  # pyright: ignore[reportCallIssue]
                self.register_parameter(name, like)
            else:
                trainable = source.requires_grad or not source.is_leaf  # one that is computed, as by pruning
                self.register_parameter(name, nn.Parameter(own.start(source).clone(), trainable))

    def _number(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        """A tensor of the device and dtype for numbers that a source learns; always real."""
        known = (*self._parameters.values(), *(self._buffers.get(name) for name in STATISTICS))
        like = next((value for value in known if value is not None), None)
        if like is not None:
            device, dtype = device or like.device, dtype or like.dtype
        dtype = torch.get_default_dtype() if dtype is None else dtype
        return torch.empty((), device=device, dtype=dtype.to_real())

    def _widen_statistics(self, originals: dict[str, Tensor]) -> None:
        """Convert running statistics of fewer than 32 bits per component to float32, from `originals` if it has them.

        A running mean in bfloat16 stalls: with momentum 0.001 and data of mean 10 it never exceeds 4.
        """
        for name in (*STATISTICS, *buffers_of(self.statistics)):
            buffer = self._buffers.get(name)
            if (
                not self.keep_wide_statistics
                or buffer is None
                or isinstance(buffer, UninitializedBuffer)
                or _is_wide(buffer)
            ):
                continue
            source = originals.get(name, buffer)
            dtype = torch.promote_types(source.dtype, torch.float32)
            self._buffers[name] = source.to(device=buffer.device, dtype=dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        names = (*STATISTICS, *buffers_of(self.statistics))
        originals = {name: buffer for name in names if (buffer := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)
        self._widen_statistics(originals)
        beside = self._buffers.get("num_batches_tracked")
        if beside is not None:
            self._nonfinite_batches = counter_on(beside.device, self._nonfinite_batches)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load torch's checkpoints, and the tutorial's: `gamma`, `beta`, no counter, perhaps no running statistics."""
        if prefix + "gamma" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "gamma")
            if prefix + "beta" in state_dict:
                state_dict[prefix + "bias"] = state_dict.pop(prefix + "beta")
            lacking = [name for name in (*STATISTICS, "num_batches_tracked") if prefix + name not in state_dict]
            for name in lacking:
                if self._buffers.get(name) is not None:
                    state_dict[prefix + name] = self._buffers[name]
            if "running_mean" in lacking:
                logger.warning(
                    "%s: the checkpoint has gamma and beta but no running statistics; the layer keeps its own. "
                    "Run the training data through it in training mode before inference",
                    prefix.rstrip(".") or type(self).__name__,
                )
        self._match_checkpoint_to_source(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._widen_statistics({})
        self._reset_nonfinite_counter()  # checkpoints do not contain it

    def _match_checkpoint_to_source(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Fit a checkpoint of another statistics source: add the buffers that it lacks, with initial values, and drop the others."""
        wanted = buffers_of(self.statistics)
        for name, own in wanted.items():
            source, given = state_dict.get(prefix + own.like), state_dict.get(prefix + name)
            if own.like == "num_batches_tracked" and source is None:  # saved without a counter: use the layer's
                source = self.num_batches_tracked
            other_window = given is not None and own.rows is not None and given.shape[:1] != (own.rows,)
            if source is not None and (given is None or other_window):
                state_dict[prefix + name] = own.start(source).clone()  # with assign=True it becomes the buffer itself
        learned = parameters_of(self.statistics)
        for name, own in learned.items():
            parameter, source = self._parameters.get(name), self._parameters.get(name)
            if own.like is not None:
                source = state_dict.get(prefix + own.like, getattr(self, own.like, None))
            if parameter is not None and source is not None and prefix + name not in state_dict:
                state_dict[prefix + name] = own.start(source).clone()
        prefixes = tuple(prefix + start for start in (*_OF_SOURCES, LEARNED_BY_SOURCES))
        for key in [key for key in state_dict if key.startswith(prefixes)]:
            if key.removeprefix(prefix) not in wanted | learned:
                del state_dict[key]
                logger.info(
                    "%s: not loaded, because it belongs to a statistics source that this layer does not have",
                    key,
                )


def _fits(buffer: Tensor, source: Tensor) -> bool:
    """Whether a source's buffer has the layer's number of channels; if not, it starts with initial values."""
    lazy = isinstance(buffer, UninitializedBuffer) or isinstance(source, UninitializedBuffer)
    return lazy or source.dim() == 0 or buffer.shape[-1:] == source.shape[-1:]


def _is_wide(values: Tensor) -> bool:
    """Whether each number, or each component of a complex one, has at least 32 bits."""
    return values.element_size() >= (8 if values.is_complex() else 4)
