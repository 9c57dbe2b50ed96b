"""A diagnosis as a self-contained page: findings first, then the layers by depth, then a table of all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from batchnorm.diagnostics import thresholds as at
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.formats import ROOT, named, number
from batchnorm.diagnostics.rule import SEVERITIES
from batchnorm.report.chart import Chart, Line, log_chart
from batchnorm.report.page import Section, document, figures
from batchnorm.version import __version__

_MISSING = "–"
_MOST_NAMES = 20  # of layers in a finding
_FLOOR = 1e-6  # nats; what is smaller is rounding
_REACH = 4.5  # of the pictures, in running standard deviations
_TALLEST = 1.6  # peak of the narrowest curve drawn; that of the running distribution is 1
_SHOWN = (0, 2, 4)  # of five quantiles: the channels with the smallest, the median and the largest divergence
_COLUMNS = {
    "drift": "drift, nats",
    "drift_in_inference": "drift in inference",
    "effective_samples": "effective samples",
    "gradient": "gradient",
    "batches": "batches counted",
    "channels": "channels",
    "class": "class",
}

# The density of a normal distribution of mean 0 and deviation 1 with peak 1, from -3.5 to 3.5; the table's pictures use it again and again.
_BELL = (
    "M-3.5 0L"
    + " ".join(f"{x / 4:g} {-math.exp(-((x / 4) ** 2) / 2):.3g}" for x in range(-14, 15)).replace("-0 ", "0 ")
    + "L3.5 0z"
)
_SYMBOLS = (
    '<svg class="symbols" aria-hidden="true" width="0" height="0"><defs>'
    f'<path id="bell" d="{_BELL}" vector-effect="non-scaling-stroke"/></defs></svg>'
)


def to_html(
    findings: Sequence[Finding], layers: Mapping[str, Mapping[str, Any]], not_asked: Sequence[str], summary: str
) -> str:
    """The page, of these findings and layers."""
    sections = [Section("findings", "Findings", [_card(each) for each in findings] or ["<p>Nothing found.</p>"])]
    charts = _charts(layers)
    if charts:
        sections.append(Section("depth", "By depth", [figures(charts, "depth-")]))
    if layers:
        sections.append(Section("layers", "Layers", [*_introduction(layers), _table(findings, layers)]))
    if not_asked:
        lines = "".join(f"<li>{escape(line)}</li>" for line in not_asked)
        sections.append(Section("not-asked", "Not asked", [f"<ul>{lines}</ul>"]))
    lead = summary[:1].upper() + summary[1:] + "."
    scripts = ("page.js", "tables.js")
    return document("batchnorm diagnose", "Diagnosis", lead, sections, f"batchnorm {__version__}", scripts)


def _card(finding: Finding) -> str:
    evidence = "".join(
        f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(number(value))}</dd></div>"
        for name, value in finding.evidence.items()
    )
    message = finding.message[:1].upper() + finding.message[1:]
    remedies = [("With this library", finding.remedy)]
    if finding.with_torch != finding.remedy:
        remedies.append(("With torch alone", finding.with_torch))
    code = "".join(f"<dt>{label}</dt><dd><code>{escape(line)}</code></dd>" for label, line in remedies)
    mended = " <code>fix</code> mends it." if finding.fixable else ""
    return (
        f'<article class="finding" data-severity="{finding.severity}">\n'
        f'<h3><span class="severity">{finding.severity}</span> {escape(finding.code)} '
        f"<span>{escape(named(finding.layers, _MOST_NAMES) or 'the training loop')}</span></h3>\n"
        f"<p>{escape(message)}.{mended}</p>\n"
        f'<dl class="evidence">{evidence}</dl>\n<dl class="remedies">{code}</dl>\n'
        f'<p class="note"><a href="{escape(finding.url)}">{escape(finding.code)} explained</a>, '
        f'<a href="{escape(finding.learn)}">and to touch</a></p>\n</article>'
    )


# ---- by depth ------------------------------------------------------------------------------------------------------------------------


def _charts(layers: Mapping[str, Mapping[str, Any]]) -> list[tuple[Chart, str, str]]:
    """What was measured, over the layers in the order in which the model calls them."""
    called = sorted(
        (name for name, row in layers.items() if row.get("order") is not None), key=lambda name: layers[name]["order"]
    )

    def line(key: str, label: str, color: str, floor: float = 0.0) -> Iterable[Line]:
        points = [
            (place, max(value, floor))
            for place, name in enumerate(called)
            if (value := layers[name].get(key)) is not None and math.isfinite(value) and max(value, floor) > 0
        ]
        if points:
            yield Line(key, label, color, points)

    drawn = (
        (
            "Drift",
            "nats",
            [
                *line("drift", "in training mode", "var(--batch-norm)", _FLOOR),
                *line("drift_in_inference", "in inference mode", "var(--plain)", _FLOOR),
            ],
            (at.DRIFT_ERROR,),
            "The divergence of a layer's input from its running statistics. In training mode a layer has its own drift only. In inference "
            "mode it also has what the layers before it pass on: where only this line is high, look at the layers before. Above the dotted "
            "line it is an error.",
        ),
        (
            "Effective samples",
            "independent values of a channel in a batch",
            [*line("effective_samples", "effective samples", "var(--series-3)")],
            (at.FEW_SAMPLES_ERROR, at.FEW_SAMPLES),
            "How many independent values the statistics of a batch are worth, in the median channel. Below the upper dotted line batch "
            "statistics are noisy, below the lower one too noisy.",
        ),
        (
            "Gradient",
            "norm at the layer's output",
            [*line("gradient", "gradient", "var(--series-4)")],
            (),
            "The norm of the gradient at the output of each layer, of one batch in training mode. A steady rise from right to left is an "
            "explosion, a steady fall a vanishing gradient.",
        ),
    )
    names = [name or ROOT for name in called]
    return [
        (log_chart(title, "layer, in the order of calls", label, names, lines, levels), title, caption)
        for title, label, lines, levels, caption in drawn
        if lines
    ]


# ---- the table -----------------------------------------------------------------------------------------------------------------------


def _introduction(layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not any(row.get("quantiles") for row in layers.values()):
        return ["<p>All batch norms, those with findings first.</p>"]
    return [
        "<p>All batch norms, those with findings first, then by drift. The pictures show how the batches of a channel are "
        "distributed (line) against its running statistics (area), as normal curves in units of the running standard "
        "deviation: for the channels with the smallest, the median and the largest divergence.</p>",
        _SYMBOLS,
    ]


def _table(findings: Sequence[Finding], layers: Mapping[str, Mapping[str, Any]]) -> str:
    """All layers, worst first. Without its script the table is complete; the script sorts, filters, and shows it by pages."""
    codes = dict[str, list[Finding]]()
    for finding in findings:
        for layer in finding.layers:
            codes.setdefault(layer, []).append(finding)

    def worst(name: str) -> tuple[int, float]:
        severity = min((SEVERITIES.index(each.severity) for each in codes.get(name, ())), default=len(SEVERITIES))
        return severity, -(layers[name].get("drift") or 0.0)

    columns = [key for key in _COLUMNS if any(row.get(key) is not None for row in layers.values())]
    pictured = any(row.get("quantiles") for row in layers.values())
    rows = [
        _row(name, codes.get(name, ()), layers[name], columns, pictured=pictured) for name in sorted(layers, key=worst)
    ]
    picture = ['<th scope="col" class="picture">batches and running</th>'] if pictured else []
    plain = [
        f'<th scope="col">{escape(label)}</th>' for label in ("layer", "findings", *(_COLUMNS[key] for key in columns))
    ]
    head = "".join([*plain[:2], *picture, *plain[2:]])
    return (
        '<div class="scroll pages" role="group" tabindex="0" aria-label="All batch norms"><table class="layers">\n'
        f"<caption>All batch norms</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody>\n</table></div>"
    )


def _row(
    name: str, findings: Sequence[Finding], row: Mapping[str, Any], columns: Sequence[str], *, pictured: bool
) -> str:
    severity = min((each.severity for each in findings), key=SEVERITIES.index, default="")
    cells = [_MISSING if row.get(key) is None else escape(_cell(row[key])) for key in columns]
    told = ", ".join(each.code for each in findings)
    picture = f"<td>{_picture(row['quantiles'])}</td>" if pictured and row.get("quantiles") else "<td></td>" * pictured
    return (
        f'<tr{f" data-severity={severity}" if severity else ""}><th scope="row">{escape(name or ROOT)}</th><td>{told}</td>'
        + picture
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
    )


def _cell(value: float | int | str) -> str:
    """A number of three digits, without an exponent where it has at most five places."""
    return f"{value:.0f}" if isinstance(value, float) and 100 <= value < 1e5 else number(value)


def _picture(quantiles: Sequence[Mapping[str, float]]) -> str:
    """The batches of some channels as normal curves over the running distribution; in words in its title."""
    shown = [quantiles[place] for place in _SHOWN] if len(quantiles) == 5 else list(quantiles)
    told, curves = list[str](), list[str]()
    for each in shown:
        scale = each["running_deviation"]
        width = min(max(each["deviation"] / scale, 0.04), 2 * _REACH)
        shift = min(max((each["mean"] - each["running_mean"]) / scale, -_REACH), _REACH)
        curves.append(
            f'<use href="#bell" transform="matrix({width:.3g} 0 0 {min(1 / width, _TALLEST):.3g} {shift:.3g} 0)"/>'
        )
        told.append(
            f"channel {each['channel']}: batches {each['mean']:.3g} ± {each['deviation']:.3g}, "
            f"running {each['running_mean']:.3g} ± {scale:.3g}"
        )
    said = escape("; ".join(told))
    box = f"{-_REACH - 1} {-_TALLEST - 0.1} {2 * _REACH + 2} {_TALLEST + 0.2}"
    return (
        f'<svg role="img" viewBox="{box}" preserveAspectRatio="none"><title>{said}</title>'
        f'<use href="#bell"/>{"".join(curves)}</svg>'
    )
