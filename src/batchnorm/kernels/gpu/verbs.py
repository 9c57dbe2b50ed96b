"""The verbs and the pairs: launched directly, by operators where a compiler traces, by torch's operators where a program has failed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchnorm.kernels.contract import Backward, Epilogue, Forward, Groups, Normalized, values_per_channel
from batchnorm.kernels.correction import Renormalization
from batchnorm.kernels.gpu import fallback, memory, plans
from batchnorm.kernels.gpu.dispatch import attempt, is_traced, launch, operators
from batchnorm.kernels.gpu.plans import Cut
from batchnorm.moments import Moments

if TYPE_CHECKING:
    from batchnorm.kernels.gpu.launches import Given


def moments(x: Tensor, mask: Tensor | None) -> Moments:
    if is_traced(x):
        found = operators().moments(x, mask)
    else:

        def call(cut: Cut) -> Tensor:
            statistics = _statistics(x)
            launch().moments(x, statistics, launch().operands(x, Epilogue(mask=mask), cut))
            return statistics

        found = attempt(x, call, verb=True)
        if found is None:
            return fallback.moments(x, mask)
    return _moments(x, mask, found)


def normalize(x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> Tensor:
    if is_traced(x):
        return operators().normalize(x, mean, rstd, *epilogue[:4], None, *_activation(epilogue))[0]

    def call(cut: Cut) -> Tensor:
        y = memory.like(x)
        launch().normalize(x, y, launch().operands(x, epilogue, cut), mean, rstd)
        return y

    y = attempt(x, call, verb=True)
    return fallback.normalize(x, mean, rstd, epilogue) if y is None else y


def infer(
    x: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor]:
    if is_traced(x):
        y, statistics = operators().normalize(x, running_mean, running_var, *epilogue[:4], eps, *_activation(epilogue))
        return y, statistics[0], statistics[1]

    def call(cut: Cut) -> tuple[Tensor, Tensor]:
        y = memory.like(x)
        return y, launch().normalize(x, y, launch().operands(x, epilogue, cut), running_mean, running_var, eps)

    here = running_mean.device == running_var.device == x.device
    found = attempt(x, call, verb=True) if here else None
    if found is None:
        return fallback.infer(x, running_mean, running_var, eps, epilogue)
    y, statistics = found
    return y, statistics[0], statistics[1]


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
    mean, rstd = mean.contiguous(), rstd.contiguous()
    if is_traced(x):
        arguments = (*_beside(epilogue), *_activation(epilogue), epilogue.output is not None)
        sums = operators().reduce_grad(dy, x, mean, rstd, *arguments)
        return sums[0], sums[1]

    def call(cut: Cut) -> Tensor:
        launches, sums = launch(), memory.empty(x, 2, x.shape[1], dtype=torch.float64)
        given = launches.operands(x, epilogue, cut)
        launches.gradient_sums(memory.laid_out_as(x, dy), x, sums, given, (mean, rstd), launches.Wanted())
        return sums

    found = attempt(x, call, verb=True)
    return fallback.reduce_grad(dy, x, mean, rstd, epilogue) if found is None else (found[0], found[1])


def input_grad(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    epilogue: Epilogue,
    mean_grads: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    mean, rstd = mean.contiguous(), rstd.contiguous()
    wants_dresidual = epilogue.has_residual
    if is_traced(x):
        arguments = (*_beside(epilogue), *_activation(epilogue), epilogue.output is not None, wants_dresidual)
        dx, dresidual = operators().input_grad(dy, x, mean, rstd, *(mean_grads or (None, None)), *arguments)
        return dx, dresidual if wants_dresidual else None

    def call(cut: Cut) -> tuple[Tensor, Tensor | None]:
        launches = launch()
        dx, dresidual = memory.like(x), memory.like(x) if wants_dresidual else None
        means = launches.Means(*(mean_grads or ()))
        wanted = launches.Wanted(dx, dresidual)
        given = launches.operands(x, epilogue, cut)
        launches.input_grad(memory.laid_out_as(x, dy), x, given, (mean, rstd), means, wanted)
        return dx, dresidual

    found = attempt(x, call, verb=True)
    return fallback.input_grad(dy, x, mean, rstd, epilogue, mean_grads) if found is None else found


def forward(x: Tensor, eps: float, epilogue: Epilogue, groups: Groups | None = None) -> Forward:
    if groups is not None:
        return _forward_groups(x, eps, epilogue, groups)
    if is_traced(x):
        found = operators().forward(x, *epilogue[:4], eps, *_activation(epilogue))
    else:

        def call(cut: Cut) -> tuple[Tensor, Tensor]:
            y, statistics = memory.like(x), _statistics(x)
            launch().forward(x, y, statistics, launch().operands(x, epilogue, cut), eps)
            return y, statistics

        found = attempt(x, call)
        if found is None:
            return fallback.forward(x, eps, epilogue)
    y, statistics = found
    return Forward(y, _moments(x, epilogue.mask, statistics), statistics[x.shape[1] : 2 * x.shape[1]])


def forward_renormalized(x: Tensor, eps: float, epilogue: Epilogue, renormalization: Renormalization) -> Forward:
    batch = moments(x, epilogue.mask)
    correction, rstd = renormalization.of(batch, eps), batch.rstd(eps)
    return Forward(normalize(x, batch.mean, rstd, epilogue.corrected(correction)), batch, rstd, correction)


def backward(
    dy: Tensor,
    x: Tensor,
    by: Normalized,
    epilogue: Epilogue,
    needs_input_grad: bool = True,
    groups: Groups | None = None,
) -> Backward:
    if groups is not None:
        return _backward_groups(dy, x, by, epilogue, needs_input_grad, groups)
    mean, rstd, count = by.mean.contiguous(), by.rstd.contiguous(), _count(x, by.count)
    wants_dresidual = epilogue.has_residual
    if is_traced(x):
        divisor = count if isinstance(count, Tensor) else None
        wanted = (epilogue.output is not None, needs_input_grad, wants_dresidual)
        arguments = (*_beside(epilogue), *_activation(epilogue), *wanted)
        dx, dresidual, sums = operators().backward(dy, x, mean, rstd, divisor, count is None, *arguments)
        return Backward(dx if needs_input_grad else None, dresidual if wants_dresidual else None, sums[0], sums[1])

    def call(cut: Cut) -> Backward:
        launches, sums = launch(), memory.empty(x, 2, x.shape[1], dtype=torch.float64)
        dx, dresidual = (memory.like(x) if wanted else None for wanted in (needs_input_grad, wants_dresidual))
        given, wanted = launches.operands(x, epilogue, cut), launches.Wanted(dx, dresidual)
        launches.backward(memory.laid_out_as(x, dy), x, sums, given, (mean, rstd), count, wanted)
        return Backward(dx, dresidual, sums[0], sums[1])

    found = attempt(x, call)
    return fallback.backward(dy, x, by, epilogue, needs_input_grad) if found is None else found


def _statistics(x: Tensor) -> Tensor:
    return memory.empty(x, 3 * x.shape[1] + 1, dtype=torch.float64)


def _moments(x: Tensor, mask: Tensor | None, statistics: Tensor) -> Moments:
    """Of (3C + 1,): mean, rstd, M2 and the count, which is known where no mask decides it."""
    C = x.shape[1]
    count = values_per_channel(x) if mask is None else statistics[3 * C]
    return Moments(count, statistics[:C], statistics[2 * C : 3 * C])


def _activation(epilogue: Epilogue) -> tuple[str, float]:
    activation = epilogue.activation
    return ("identity", 0.0) if activation is None else (activation.name, activation.negative_slope)


def _beside(epilogue: Epilogue) -> tuple[Tensor | None, ...]:
    """Weight, bias, the residual or the output, and the mask."""
    weight, bias, residual, mask, _, output, _ = epilogue
    return weight, bias, residual if output is None else output, mask


def _count(x: Tensor, count: int | Tensor | None) -> int | Tensor | None:
    """The count as `launch.backward` takes it: a number is that of all values."""
    if count is None or isinstance(count, Tensor) or count == values_per_channel(x):
        return count
    return torch.full((), count, dtype=torch.float64, device=x.device)


def _forward_groups(x: Tensor, eps: float, epilogue: Epilogue, groups: Groups) -> Forward:
    """Each group by the plan of all of x; their outputs lie behind each other in one tensor."""
    C = x.shape[1]

    def call(cut: Cut) -> tuple[Tensor, Tensor]:
        y = memory.like(x)
        statistics = memory.empty(x, groups.number, 3 * C + 1, dtype=torch.float64)
        for row, (samples, given) in zip(statistics, _cuts(x, epilogue, groups, cut), strict=True):
            launch().forward(x[samples], y[samples], row, given, eps)
        return y, statistics

    found = attempt(x, call)
    if found is None:
        return fallback.forward(x, eps, epilogue, groups)
    y, statistics = found
    mean, rstd, m2 = (statistics[:, start * C : (start + 1) * C] for start in range(3))
    return Forward(y, Moments(statistics[:, 3 * C], mean, m2), rstd)


def _backward_groups(
    dy: Tensor, x: Tensor, by: Normalized, epilogue: Epilogue, needs_input_grad: bool, groups: Groups
) -> Backward:
    means, rstds, counts = by.mean.contiguous(), by.rstd.contiguous(), by.count
    assert isinstance(counts, Tensor), "of groups the counts are (G,)"

    def call(cut: Cut) -> Backward:
        gradient = memory.laid_out_as(x, dy)
        wanted = (needs_input_grad, epilogue.has_residual)
        dx, dresidual = (memory.like(x) if each else None for each in wanted)
        sums = memory.empty(x, groups.number, 2, x.shape[1], dtype=torch.float64)
        for group, (samples, given) in enumerate(_cuts(x, epilogue, groups, cut)):
            into = launch().Wanted(*(None if each is None else each[samples] for each in (dx, dresidual)))
            statistics = means[group], rstds[group]
            launch().backward(gradient[samples], x[samples], sums[group], given, statistics, counts[group], into)
        return Backward(dx, dresidual, sums[:, 0], sums[:, 1])

    found = attempt(x, call)
    return fallback.backward(dy, x, by, epilogue, needs_input_grad, groups) if found is None else found


def _cuts(x: Tensor, epilogue: Epilogue, groups: Groups, cut: Cut) -> Iterator[tuple[slice, Given]]:
    """The samples of each group, and the operands of its launches."""
    for bounds in groups.bounds(x.shape[0]):
        samples = slice(*bounds)
        shape = plans.shape_of(x[samples])
        assert shape is not None, "samples of a dense tensor are dense"
        beside = (
            None if value is None else value.expand(x.shape[0], *value.shape[1:])[samples]
            for value in (epilogue.residual, epilogue.mask, epilogue.output)
        )
        residual, mask, output = beside
        of_group = epilogue._replace(residual=residual, mask=mask, output=output)
        yield samples, launch().operands(x[samples], of_group, plans.cut_by(cut.plan, shape))
