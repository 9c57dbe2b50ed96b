"""Benchmark rows as a page: targets and results, a plot for each comparison, and all numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from batchnorm.bench.row import UNITS, Row, memory, threads
from batchnorm.bench.targets import LARGE, Summary, summarize
from batchnorm.report.page import Section, document, figures, table
from batchnorm.report.plots import BATCH_NORM, INK, MUTED, PLAIN, PLAIN_NUMBER, Answers, Plot, Series, belongs, plot

MARKERS = {  # color, marker, filled
    "ours": (BATCH_NORM, "o", "full"),
    "eager": (PLAIN, "s", "full"),
    "compile": (MUTED, "^", "none"),
    "onednn": (MUTED, "D", "none"),
    "ghost": (BATCH_NORM, "v", "none"),
    "renorm": (BATCH_NORM, "P", "none"),
    "mask": (BATCH_NORM, "X", "none"),
}
HOW_TO_READ = (
    "<p class='note'>Time as a multiple of the byte limit: left is faster, and 1 is the speed of a copy. Marks are medians, bars reach "
    "from the 20th to the 80th percentile.</p>"
)
HOW_IT_GROWS = (
    "<p class='note'>Time per value by the number of values, both logarithmic. On the left the calls cost more than the bytes. "
    "Where the copy bends upward, a larger level of memory begins; nothing else may bend more.</p>"
)
SPAN = 1000  # from the smallest to the largest tensor of a group whose growth is drawn
Key = tuple[str, str, str, str, str, int, int]


def render(rows: Sequence[Row], command: str) -> str:
    """The HTML page of rows that were measured together."""
    calls = [row for row in rows if row.ratio_to_limit is not None]
    steps = [row for row in rows if row.ratio_to_limit is None]
    summaries = summarize(calls)
    body = list[Section]()
    if summaries:
        body.append(Section("targets", "What was promised, and what came out", _summaries(summaries)))
    if steps:
        body.append(Section("steps", "Training steps", [_steps(steps)]))
    if calls:
        groups = _grouped(calls)
        growing = {key: group for key, group in groups.items() if _grows(group)}
        if growing:
            plots = [(_growth(f"s{index}", *each), _title(each[0]), "") for index, each in enumerate(growing.items())]
            body.append(Section("growth", "How cost grows", [HOW_IT_GROWS, figures(plots, "growth-")]))
        body.append(Section("figures", "Against the limit", [HOW_TO_READ, _figures(groups)]))
        body.append(Section("numbers", "Every number", [_numbers(key, group) for key, group in groups.items()]))
    body.append(Section("protocol", "How it was measured", [_protocol(rows, command)]))
    judged = [summary.verdict for summary in summaries if summary.verdict]
    noisy = judged.count("too noisy")
    unclear = f" Another {noisy} scattered too much for a verdict: measure again on a quiet machine." if noisy else ""
    lead = "Everything compared ran in turns, in the same rounds."
    if judged:
        lead = (
            f"{judged.count('held')} of {len(judged)} targets held.{unclear} A ratio of 1 is the speed at which this machine copies the "
            f"bytes that must move. {lead}"
        )
    suites = ", ".join(dict.fromkeys(row.suite for row in rows))
    return document(f"batchnorm bench · {suites}", "How far from the speed of memory?", lead, body, _machine(rows))


def _grouped(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        key = (row.suite, row.case, row.layout, row.dtype, row.outputs, row.threads, row.ranks)
        groups.setdefault(key, []).append(row)
    return groups


def _title(key: Key) -> str:
    suite, case, layout, dtype, outputs, number, ranks = key
    processes = f", {ranks} processes" if ranks > 1 else ""
    return f"{suite}, {case}, {layout}, {dtype}, {memory(outputs)}, {threads(number)}{processes}"


def _summaries(summaries: Sequence[Summary]) -> list[str]:
    """One table for each suite, dtype, kind of outputs and number of threads."""
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        group = summary.group
        title = f"{group.suite}, {group.dtype}, {memory(group.outputs)}, {threads(group.threads)}"
        groups.setdefault(title, []).append(summary)
    note = (
        f"<p class='note'>Geometric means over the shapes above {LARGE // 2**20} MB (for layers: all), each weighted by how many "
        "layers of the network have it; targets in brackets.</p>"
    )
    return [note, *(f"<p>{escape(title)}</p>\n{_summary(title, members)}" for title, members in groups.items())]


def _summary(title: str, summaries: Sequence[Summary]) -> str:
    others = list(dict.fromkeys(name for summary in summaries for name in summary.faster))

    def cells(summary: Summary) -> list[str]:
        target = summary.target
        bound = f" (≤\u00a0{target.limit:g})" if target and target.limit else ""
        factors = []
        for name in others:
            wanted = getattr(target, name, None) if target else None
            factor = summary.faster.get(name)
            factors.append("–" if factor is None else f"{factor:.2f}×" + (f" (≥\u00a0{wanted:.3g})" if wanted else ""))
        verdict = {"held": "✓ held", "missed": "✗ missed", "too noisy": "? too noisy", "": ""}[summary.verdict]
        limit = summary.ratio_to_limit.get("ours")
        return ["–" if limit is None else f"{limit:.2f}{bound}", *factors, verdict]

    columns = ["ours / limit", *(f"ours vs {name}" for name in others), "verdict"]
    named = ((summary.group, cells(summary)) for summary in summaries)
    rows = [(f"{group.direction}, {group.layout}, {group.epilogue}", found) for group, found in named]
    return table(title, columns, rows)


def _steps(rows: Sequence[Row]) -> str:
    columns = ["p20", "p50", "p80", "vs eager", "saved for backward", "peak"]
    lines = [
        (
            f"{row.suite} {row.shape} {row.layout}, {threads(row.threads)}: {row.provider}",
            [
                *(f"{value:.0f} {row.unit}" for value in (row.p20, row.p50, row.p80)),
                f"{row.ratio_to_eager:.2f}×",
                *("–" if held is None else f"{held / 1e6:.0f} MB" for held in (row.saved_bytes, row.peak_bytes)),
            ],
        )
        for row in rows
    ]
    return table("Training steps", columns, lines)


def _figures(groups: dict[Key, list[Row]]) -> str:
    drawn = ((_ratios(f"g{index}", key, group), _title(key), "") for index, (key, group) in enumerate(groups.items()))
    return figures(drawn, "")


def _ratios(name: str, key: Key, rows: Sequence[Row]) -> Plot:
    """A plot with a line for each shape and a mark for each provider."""
    shapes = {shape: -index for index, shape in enumerate(dict.fromkeys((row.shape, row.epilogue) for row in rows))}
    names = {place: " ".join(shape) for shape, place in shapes.items()}
    measured = {
        provider: [
            (shapes[row.shape, row.epilogue], *(time / row.limit for time in (row.p20, row.p50, row.p80)))
            for row in rows
            if row.provider == provider and row.limit
        ]
        for provider in MARKERS
    }
    series = [
        Series(provider, provider, MARKERS[provider][0], [_told(*each) for each in found])
        for provider, found in measured.items()
        if found
    ]

    def draw(figure: Figure) -> Axes:
        axes = figure.subplots()
        axes.axvline(1, color=INK, linewidth=0.9)
        for line in series:
            color, marker, fill = MARKERS[line.arm]
            heights, low, middle, high = zip(*measured[line.arm], strict=True)
            belongs(axes.hlines(heights, low, high, color=color, linewidth=1.2), line.arm)
            (marks,) = axes.plot(middle, heights, marker, color=color, fillstyle=fill, markersize=5, label=line.label)  # pyright: ignore[reportArgumentType]
            belongs(marks, line.arm)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(PLAIN_NUMBER)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(list(names), list(names.values()), fontsize=9)
        axes.set(xlabel="time / byte limit", ylim=(0.6 - len(shapes), 0.6))
        figure.legend(loc="outside upper right", ncols=4)
        return axes

    described = "; ".join(
        f"{row.shape} {row.epilogue}, {row.provider} {row.ratio_to_limit}" for row in rows if row.provider in MARKERS
    )
    description = f"Ratios to the byte limit. {_title(key)}: {described}"
    answers = Answers(_title(key), "y", series, rows=names)
    return plot(name, description, draw, (5.6, 1.2 + 0.24 * len(shapes)), answers)


def _grows(rows: Sequence[Row]) -> bool:
    sizes = [row.tensor_bytes for row in rows]
    return max(sizes) >= SPAN * min(sizes)


def _growth(name: str, key: Key, rows: Sequence[Row]) -> Plot:
    """A plot of nanoseconds per value, with a line for each provider."""
    styles = {"copy": (INK, "", "none"), **MARKERS}
    lines = dict[str, list[tuple[float, ...]]]()
    for row in sorted(rows, key=lambda row: row.tensor_bytes):
        values, nanoseconds = math.prod(map(int, row.shape.split("x"))), 1e9 / UNITS[row.unit]
        p50, p20, p80 = (time * nanoseconds / values for time in (row.p50, row.p20, row.p80))
        lines.setdefault(row.provider, []).append((float(values), p50, p20, p80))
    lines = {provider: points for provider, points in lines.items() if provider in styles}
    series = [Series(provider, provider, styles[provider][0], points) for provider, points in lines.items()]

    def draw(figure: Figure) -> Axes:
        axes = figure.subplots()
        for line in series:
            color, marker, fill = styles[line.arm]
            places, middle, low, high = zip(*lines[line.arm], strict=True)
            belongs(axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0), line.arm)
            (drawn,) = axes.plot(
                places, middle, marker=marker, color=color, fillstyle=fill, markersize=5, label=line.label
            )  # pyright: ignore[reportArgumentType]
            belongs(drawn, line.arm)
        axes.set(xscale="log", yscale="log", xlabel="values", ylabel="ns per value")
        axes.yaxis.set_major_formatter(PLAIN_NUMBER)
        figure.legend(loc="outside upper right", ncols=4)
        return axes

    described = "; ".join(
        f"{provider}: " + ", ".join(f"{point[1]:.3g} at {point[0]:.2g}" for point in points)
        for provider, points in lines.items()
    )
    description = f"Nanoseconds per value. {_title(key)}: {described}"
    return plot(name, description, draw, (5.6, 3.4), Answers(_title(key), "x", series))


def _told(height: int, low: float, middle: float, high: float) -> tuple[float, int, str]:
    return middle, height, f"{middle:.3g} ({low:.3g} to {high:.3g})"


def _numbers(key: Key, rows: Sequence[Row]) -> str:
    columns = ["p20", "p50", "p80", "/ limit", "vs eager", "error", "peak"]
    lines = [
        (
            f"{row.shape} {row.epilogue}, {row.provider}",
            [
                *(f"{value:.4g} {row.unit}" for value in (row.p20, row.p50, row.p80)),
                f"{row.ratio_to_limit:.2f}",
                f"{row.ratio_to_eager:.2f}×",
                "–" if row.max_error is None else f"{row.max_error:.0e}",
                "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.4g} MB",
            ],
        )
        for row in rows
    ]
    return f"<details><summary>{escape(_title(key))}</summary>\n{table(_title(key), columns, lines)}\n</details>"


def _protocol(rows: Sequence[Row], command: str) -> str:
    rounds = [row.rounds for row in rows]
    entries = {
        "Byte limit": "the bytes that must be read and written, at the speed of a copy of the input in the same rounds",
        "Order": "in each round every provider once, in a random order; medians, 20th and 80th percentile",
        "Rounds": f"{min(rounds, default=0)} to {max(rounds, default=0)}",
        "Error": "largest difference from float64, of the output or of the input's gradient, on four channels",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>\n" for name, text in entries.items())
    return f"<dl>\n{listed}<dt>Make it again</dt><dd><code>{escape(command)}</code></dd>\n</dl>"


def _machine(rows: Sequence[Row]) -> str:
    if not rows:
        return "nothing was measured"
    row = rows[-1]
    return (
        f"{row.cpu}, {row.cores} cores, {row.isa} · {row.system} · batchnorm {row.batchnorm} · torch {row.torch} · "
        f"python {row.python} · {row.date}"
    )
