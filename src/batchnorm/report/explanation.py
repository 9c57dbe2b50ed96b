"""`batchnorm explain --html`: every step of one mini-batch as a page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from batchnorm.explain import Explanation, Step
from batchnorm.language import tr
from batchnorm.report.page import Section, document, table

_WIDTH, _MARGIN, _LINE = 640, 60, 56


def render(explanations: Mapping[str, Explanation]) -> str:
    """A page of explanations by title; an empty title is left out."""
    first = next(iter(explanations.values()))
    body = [section for number, each in enumerate(explanations.items(), 1) for section in _sections(number, *each)]
    lead = tr(
        "Normalizing subtracts the mean µ and divides by the standard deviation √(σ² + ε); γ and β then scale and shift the result. In the "
        "backward every x has a gradient, since it moves the mean and the variance."
    )
    return document("batchnorm explain", first.title, lead, body, tr("Computed in float64, every sum rounded once."))


def _sections(number: int, title: str, it: Explanation) -> list[Section]:
    prefix = f"{title}: " if title else ""
    picture = Section(f"values-{number}", prefix + tr("the values before and after"), [_lines(it)])
    steps = (
        Section(f"step-{number}-{place}", prefix + step.title, _step(step)) for place, step in enumerate(it.steps(), 1)
    )
    return [picture, *steps]


def _step(step: Step) -> list[str]:
    formulas = [(name, [formula, f"{value:.6g}", remark]) for name, formula, value, remark in step.formulas]
    found = [table(tr("Formulas and their values"), [tr("formula"), tr("value"), ""], formulas)]
    if step.note:
        found.append(f"<p>{escape(step.note.strip())}</p>")
    if step.columns:
        (_, index), *columns = step.columns
        rows = [(f"{i:g}", [f"{numbers[place]:.6g}" for _, numbers in columns]) for place, i in enumerate(index)]
        found.append(table(tr("For each value"), [heading for heading, _ in columns], rows))
    return found


def _lines(it: Explanation) -> str:
    """x, x̂ and y as dots on a line each, all on one scale."""
    rows = (("x", it.values), ("x̂", it.normalized), ("y", it.output))
    low, high = min(min(numbers) for _, numbers in rows), max(max(numbers) for _, numbers in rows)
    scale = (_WIDTH - 2 * _MARGIN) / ((high - low) or 1)
    said = "; ".join(
        tr("{name} from {low:.4g} to {high:.4g}", name=name, low=min(numbers), high=max(numbers))
        for name, numbers in rows
    )
    drawn = [f'<svg viewBox="0 0 {_WIDTH} {3 * _LINE}" width="100%" role="img" aria-label="{said}">']
    for place, (name, numbers) in enumerate(rows):
        y = place * _LINE + 22
        drawn.append(f'<text x="8" y="{y + 5}" fill="currentColor">{name}</text>')
        drawn.append(f'<path d="M{_MARGIN} {y}H{_WIDTH - _MARGIN}" stroke="currentColor" opacity="0.3"/>')
        drawn += [
            f'<circle cx="{_MARGIN + (number - low) * scale:.1f}" cy="{y}" r="6" fill="var(--batch-norm)" fill-opacity="0.6">'
            f"<title>{tr('{name} of value {index}: {number:.6g}', name=name, index=index, number=number)}</title></circle>"
            for index, number in enumerate(numbers, 1)
        ]
        drawn += [
            f'<text x="{_MARGIN + (number - low) * scale:.1f}" y="{y + 26}" text-anchor="middle" fill="currentColor" font-size="12">'
            f"{number:.4g}</text>"
            for number in sorted({min(numbers), max(numbers)})
        ]
    return "\n".join([*drawn, "</svg>"])
