"""Batch normalization of one small mini-batch, step by step: Algorithm 1 of the paper, and its backward of section 3.

Ioffe & Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
arXiv:1502.03167. All numbers are Python floats (float64), so this module needs no torch. Each sum is rounded once (`math.fsum`), so results
do not depend on the order in which a processor adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import fsum, isfinite, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from batchnorm.errors import ArgumentError, InputError
from batchnorm.language import text_width, tr, wrapped

if TYPE_CHECKING:
    from torch import Tensor

Row = tuple[float, ...]


class Step(NamedTuple):
    """A step of an explanation.

    Attributes:
        title: what it is.
        formulas: name, formula, value and remark of each.
        columns: a heading and its numbers, one per value of the mini-batch.
        note: what the columns' headings mean.
    """

    title: str
    formulas: tuple[tuple[str, str, float, str], ...]
    columns: tuple[tuple[str, Row], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Explanation:
    """Every intermediate result of batch normalization of one mini-batch; rows have one number per value.

    `str()` and `text()` give a table with the formulas, `to_dict()` data for JSON.

    Attributes:
        values: x, the mini-batch.
        gamma: scale of the output.
        beta: shift of the output.
        eps: added to the variance before the square root.
        momentum: weight of the new value in the running statistics.
        sum: the sum of the values.
        mean: sum / m.
        deviations: x - mean.
        squared_deviations: their squares.
        variance: biased, the mean of the squared deviations.
        std: sqrt(variance + eps).
        normalized: x̂ = deviations / std.
        output: y = gamma · x̂ + beta.
        running_mean: after this one step, from 0.
        running_variance: after this one step, from 1; averages the unbiased variance.
        grad_output: dL/dy, given.
        grad_normalized: dL/dx̂.
        grad_variance: dL/dσ².
        grad_mean: dL/dµ.
        grad_through_normalized: the term of dL/dx through x̂ only.
        grad_through_variance: the term through the variance.
        grad_through_mean: the term through the mean.
        grad_input: dL/dx, the sum of the three.
        grad_gamma: dL/dγ.
        grad_beta: dL/dβ.
    """

    values: Row
    gamma: float
    beta: float
    eps: float
    momentum: float
    sum: float
    mean: float
    deviations: Row
    squared_deviations: Row
    variance: float
    std: float
    normalized: Row
    output: Row
    running_mean: float
    running_variance: float
    grad_output: Row
    grad_normalized: Row
    grad_variance: float
    grad_mean: float
    grad_through_normalized: Row
    grad_through_variance: Row
    grad_through_mean: float
    grad_input: Row
    grad_gamma: float
    grad_beta: float

    def to_dict(self) -> dict[str, Any]:
        """All fields by name: numbers, and lists of numbers."""
        return {name: list(field) if isinstance(field, tuple) else field for name, field in asdict(self).items()}

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None, rows: int | None = None) -> str:
        """The steps as a table.

        Args:
            width: wrap to this many columns of a terminal, at least 40; None does not wrap.
            rows: show this many values at most, at least 4, and an ellipsis for those in the middle; None shows all.
        """
        width = None if width is None else max(width, 40)
        lines = [*_wrapped(self.title, width)]
        for step in self.steps():
            lines += ["", *_wrapped(step.title, width), *_formulas(step.formulas, width)]
            lines += ["", *_wrapped(step.note, width)] if step.note else []
            lines += ["", *_columns(step.columns, width, rows)] if step.columns else []
        return "\n".join(lines)

    @property
    def title(self) -> str:
        """What is normalized, in a line."""
        return tr(
            "Batch normalization of m = {m} values with γ = {gamma:g}, β = {beta:g}, ε = {eps:g}",
            m=len(self.values),
            gamma=self.gamma,
            beta=self.beta,
            eps=self.eps,
        )

    def steps(self) -> list[Step]:
        """The forward, the running statistics and the backward: formulas with their values, and columns with a number per value."""
        m, old = len(self.values), 1 - self.momentum
        index = ("i", tuple(range(1, m + 1)))
        one_hot = self.grad_output == (1.0,) + (0.0,) * (m - 1)
        return [
            Step(
                tr("Forward (Ioffe & Szegedy 2015, Algorithm 1)"),
                (
                    (tr("sum"), "Σ xᵢ", self.sum, ""),
                    (tr("mean"), "µ = Σ xᵢ / m", self.mean, ""),
                    (tr("variance"), "σ² = Σ (xᵢ - µ)² / m", self.variance, tr("biased: divided by m")),
                    (tr("standard deviation"), "√(σ² + ε)", self.std, ""),
                ),
                (
                    index,
                    ("xᵢ", self.values),
                    ("xᵢ - µ", self.deviations),
                    ("(xᵢ - µ)²", self.squared_deviations),
                    ("x̂ᵢ = (xᵢ - µ) / √(σ² + ε)", self.normalized),
                    ("yᵢ = γ x̂ᵢ + β", self.output),
                ),
            ),
            Step(
                tr(
                    "Running statistics after this batch, from mean 0 and variance 1; momentum {momentum:g} weighs the new value",
                    momentum=self.momentum,
                ),
                (
                    (tr("running mean"), f"{old:g} · 0 + {self.momentum:g} · µ", self.running_mean, ""),
                    (
                        tr("running variance"),
                        f"{old:g} · 1 + {self.momentum:g} · σ² · m / (m - 1)",
                        self.running_variance,
                        tr("unbiased: the batch stands for the population"),
                    ),
                ),
            ),
            Step(
                tr("Backward (section 3), for L = y₁: how the first output depends on every xᵢ")
                if one_hot
                else tr("Backward (section 3), for the given dL/dyᵢ"),
                (
                    (tr("variance"), "dL/dσ² = Σ dL/dx̂ᵢ · (xᵢ - µ) · -½ (σ² + ε)^(-3/2)", self.grad_variance, ""),
                    (tr("mean"), "dL/dµ = Σ dL/dx̂ᵢ · -1 / √(σ² + ε) + dL/dσ² · Σ -2 (xᵢ - µ) / m", self.grad_mean, ""),
                    (tr("scale"), "dL/dγ = Σ dL/dyᵢ · x̂ᵢ", self.grad_gamma, ""),
                    (tr("shift"), "dL/dβ = Σ dL/dyᵢ", self.grad_beta, ""),
                ),
                (
                    index,
                    ("dL/dyᵢ", self.grad_output),
                    ("dL/dx̂ᵢ = dL/dyᵢ · γ", self.grad_normalized),
                    ("a", self.grad_through_normalized),
                    ("b", self.grad_through_variance),
                    ("c", (self.grad_through_mean,) * m),
                    ("dL/dxᵢ", self.grad_input),
                ),
                "  dL/dxᵢ = a + b + c,  a = dL/dx̂ᵢ / √(σ² + ε),  b = dL/dσ² · 2 (xᵢ - µ) / m,  c = dL/dµ / m",
            ),
        ]


def explain(
    values: Sequence[float] | Tensor,
    gamma: float = 1.0,
    beta: float = 0.0,
    eps: float = 1e-5,
    momentum: float = 0.1,
    *,
    grad_output: Sequence[float] | Tensor | None = None,
) -> Explanation:
    """Normalize a mini-batch of one channel and return every intermediate result, forward and backward, in float64.

    Args:
        values: (m,), at least two finite numbers.
        gamma: scale of the output.
        beta: shift of the output.
        eps: added to the variance, above 0.
        momentum: weight of the new value in the running statistics, 0 to 1.
        grad_output: (m,), dL/dy; by default 1 for the first output and 0 for the others, so L = y₁.

    Raises:
        ArgumentError: gamma, beta, eps or momentum is not a number.
        InputError: an argument is not as described here, or the numbers are so large that their squares are not finite.
    """
    gamma, beta = _number(gamma, "gamma"), _number(beta, "beta")
    eps, momentum = _number(eps, "eps"), _number(momentum, "momentum")
    if eps <= 0:
        raise InputError(f"eps must be above 0 to keep the division finite, but got {eps:g}; leave it at 1e-5")
    if not 0 <= momentum <= 1:
        raise InputError(
            f"momentum weighs the new value and must be from 0 to 1, but got {momentum:g}; leave it at 0.1"
        )

    x = _row(values, "values")
    m = len(x)
    if m < 2:
        raise InputError(f"values must be at least 2 numbers, since one has no variance, but got {m}; give more")
    dy = (1.0,) + (0.0,) * (m - 1) if grad_output is None else _row(grad_output, "grad_output")
    if len(dy) != m:
        raise InputError(f"grad_output must have one number per value, but got {len(dy)} for {m} values")
    try:
        explanation = _explanation(x, gamma, beta, eps, momentum, dy)
        if not all(map(isfinite, (*explanation.squared_deviations, *explanation.output, *explanation.grad_input))):
            raise OverflowError("a product is not finite")  # `**` and `fsum` raise, `*` and `/` return infinity or NaN
    except (OverflowError, ValueError) as error:
        raise InputError(
            "values, gamma, beta and grad_output must be small enough for finite squares and products in float64, "
            f"but got values up to {max(map(abs, x)):g}; scale them down"
        ) from error
    return explanation


def _explanation(x: Row, gamma: float, beta: float, eps: float, momentum: float, dy: Row) -> Explanation:
    """All steps for values and dL/dy, (m,). Numbers that are too large raise OverflowError or ValueError, or give infinities."""
    m = len(x)
    # Algorithm 1
    total = fsum(x)
    mean = total / m
    deviation = tuple(value - mean for value in x)
    squared = tuple(value * value for value in deviation)
    m2 = fsum(squared)
    variance = m2 / m
    std = sqrt(variance + eps)
    normalized = tuple(value / std for value in deviation)

    # Section 3, in the paper's order
    dnormalized = tuple(grad * gamma for grad in dy)
    dvariance = fsum(grad * value * -0.5 * std**-3 for grad, value in zip(dnormalized, deviation, strict=True))
    dmean = fsum(-grad / std for grad in dnormalized) + dvariance * fsum(-2 * value for value in deviation) / m
    through_normalized = tuple(grad / std for grad in dnormalized)
    through_variance = tuple(dvariance * 2 * value / m for value in deviation)
    through_mean = dmean / m
    return Explanation(
        values=x,
        gamma=gamma,
        beta=beta,
        eps=eps,
        momentum=momentum,
        sum=total,
        mean=mean,
        deviations=deviation,
        squared_deviations=squared,
        variance=variance,
        std=std,
        normalized=normalized,
        output=tuple(gamma * value + beta for value in normalized),
        running_mean=momentum * mean,
        running_variance=(1 - momentum) + momentum * (m2 / (m - 1)),
        grad_output=dy,
        grad_normalized=dnormalized,
        grad_variance=dvariance,
        grad_mean=dmean,
        grad_through_normalized=through_normalized,
        grad_through_variance=through_variance,
        grad_through_mean=through_mean,
        grad_input=tuple(a + b + through_mean for a, b in zip(through_normalized, through_variance, strict=True)),
        grad_gamma=fsum(grad * value for grad, value in zip(dy, normalized, strict=True)),
        grad_beta=fsum(dy),
    )


def _number(value: float, name: str) -> float:
    """The value as a float; accepts NumPy scalars and tensors of one element."""
    try:
        finite = isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        finite = False
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name} must be one real number, but got {value!r}; give one such as 0.5") from error
    if not finite:
        raise InputError(f"{name} must be a finite number, but got {value}; give one such as 0.5")
    return float(value)


def _row(values: Sequence[float] | Tensor, name: str) -> Row:
    """The values of a tensor, an array or a sequence as floats, (m,)."""
    remedy = "give a flat list such as [0.8, 1.2, 0.9, 1.1]"
    listed = getattr(values, "tolist", lambda: values)()  # tensors and arrays have it
    if not isinstance(listed, Sequence) or isinstance(listed, str | bytes):
        raise InputError(f"{name} must be real numbers in one row, but got {values!r}; {remedy}")
    shape = _shape(listed)
    if len(shape) != 1:
        raise InputError(f"{name} must be numbers in one row, but got shape {shape}; {remedy}")
    try:
        finite = all(map(isfinite, listed))
    except OverflowError:  # an integer of more than 308 digits
        finite = False
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be real numbers in one row, but got {values!r}; {remedy}") from error
    if not finite:
        raise InputError(f"{name} must be finite, but got {list(listed)}; leave out NaN and infinity")
    return tuple(map(float, listed))


def _shape(values: Any) -> tuple[int, ...]:
    """The shape of nested sequences, read from their first items; () for a number."""
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        return (len(values), *(_shape(values[0]) if values else ()))
    return tuple(getattr(values, "shape", ()))


def _formulas(lines: Sequence[tuple[str, str, float, str]], width: int | None) -> list[str]:
    """Name, formula, value and remark, aligned; one below the other if that is too wide."""
    names = max(text_width(name) for name, _, _, _ in lines)
    formulas = max(text_width(formula) for _, formula, _, _ in lines)
    values = max(len(f"{value:.6g}") for _, _, value, _ in lines)
    aligned = [
        f"  {_left(name, names)}  {_left(formula, formulas)} = {f'{value:.6g}':<{values}}  {remark}".rstrip()
        for name, formula, value, remark in lines
    ]
    if width is None or max(map(text_width, aligned)) <= width:
        return aligned
    return [
        line
        for name, formula, value, remark in lines
        for text in (f"  {name}  {formula}", f"    = {value:.6g}" + (f"  {remark}" if remark else ""))
        for line in _wrapped(text, width)
    ]


def _columns(columns: Sequence[tuple[str, Sequence[float]]], width: int | None, rows: int | None) -> list[str]:
    """A heading per column, right-aligned over its numbers; columns that are too many for the width continue below, after the first."""
    cells = [[heading, *_shortened([f"{number:.6g}" for number in numbers], rows)] for heading, numbers in columns]
    index, *others = [_aligned(column) for column in cells]
    blocks = [[index]]
    for column in others:
        if (
            width is not None
            and len(blocks[-1]) > 1
            and sum(text_width(c[0]) + 2 for c in (*blocks[-1], column)) > width
        ):
            blocks.append([index])
        blocks[-1].append(column)
    return [
        line
        for number, block in enumerate(blocks)
        for line in [""] * bool(number) + ["  " + "  ".join(row) for row in zip(*block, strict=True)]
    ]


def _shortened(numbers: list[str], rows: int | None) -> list[str]:
    """The first and the last of a column, with an ellipsis between, if there are more than `rows`."""
    if rows is None or len(numbers) <= rows:
        return numbers
    last = max(rows, 4) // 4
    return [*numbers[: max(rows, 4) - last - 1], "…", *numbers[-last:]]


def _aligned(column: list[str]) -> list[str]:
    width = max(map(text_width, column))
    return [" " * (width - text_width(cell)) + cell for cell in column]


def _wrapped(text: str, width: int | None) -> list[str]:
    """The text in lines of a width; further lines are indented by four."""
    return [text] if width is None else wrapped(text, width)


def _left(text: str, width: int) -> str:
    return text + " " * (width - text_width(text))
