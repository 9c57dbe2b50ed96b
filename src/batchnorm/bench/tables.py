"""Rows as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from batchnorm.bench.row import Row, memory, threads
from batchnorm.bench.targets import LARGE, TINY, Summary

MISSING = "–"


def case_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One table for each direction, layout, dtype, kind of outputs and number of threads, with a line for each shape.

    For functions it shows ratios to the limit; for layers and replicas, where calls cost more than bytes, times.
    """
    groups: dict[tuple[str, ...], dict[tuple[str, str], dict[str, Row]]] = {}
    for row in rows:
        processes = [f"{row.ranks} processes"] * (row.ranks > 1)
        title = (row.suite, row.case, row.layout, row.dtype, memory(row.outputs), threads(row.threads), *processes)
        groups.setdefault(title, {}).setdefault((row.shape, row.epilogue), {})[row.provider] = row
    for title, shapes in groups.items():
        names = list(dict.fromkeys(name for found in shapes.values() for name in found if name != "copy"))
        layers = title[1].startswith(("layer", "replicas"))
        what = "time" if layers else "/ limit"
        columns = ["shape", "", "", "limit", *(f"{name}\n{what}" for name in names), "ours\nvs eager", "error"]
        table = _table(" · ".join(title), columns)
        for (shape, epilogue), found in shapes.items():
            ours, copy = found.get("ours"), found["copy"]
            table.add_row(
                shape,
                f"x{copy.count}",
                epilogue,
                f"{copy.limit:.3g} {copy.unit}",
                *(_cell(found.get(name), layers) for name in names),
                _faster(ours.ratio_to_eager) if ours else MISSING,
                f"{ours.max_error:.0e}" if ours and ours.max_error is not None else MISSING,
            )
        yield table


def summary_tables(summaries: Sequence[Summary]) -> Iterator[Table]:
    """Geometric means, with targets in brackets; one table for each suite, dtype, kind of outputs and number of threads."""
    groups: dict[tuple[str, bool], list[Summary]] = {}
    for summary in summaries:
        group = summary.group
        title = f"{group.suite} · {group.dtype} · {memory(group.outputs)} · {threads(group.threads)}"
        groups.setdefault((title, group.case.startswith("layer")), []).append(summary)
    for (title, layers), members in groups.items():
        which = "all shapes" if layers else f"shapes above {LARGE // 2**20} MB"
        others = list(dict.fromkeys(name for summary in members for name in summary.faster))
        measures = ["worst\nvs torch", f"below\n{TINY:.2f}", "torch against\nitself"] if layers else ["ours\n/ limit"]
        columns = ["", "", "", *measures, *(f"ours\nvs {name}" for name in others), ""]
        table = _table(f"{title}\ngeometric means over {which}, weighted by layers (targets in brackets)", columns)
        for summary in members:
            group, target = summary.group, summary.target
            where = (group.direction, group.layout, group.epilogue)
            if layers:
                wanted = f" (≥{target.eager:.2f})" if target and target.eager else ""
                itself = MISSING if summary.itself is None else "{:.2f}x, {}".format(*summary.itself)
                counts = [f"{_faster(summary.worst)}{wanted}", f"{summary.below} of {summary.shapes}", itself]
                table.add_row(*where, *counts, *map(_faster, summary.faster.values()), summary.verdict)
                continue
            bound = f" (≤{target.limit:g})" if target and target.limit else ""
            factors = (_with_target(summary.faster.get(name), getattr(target, name, None)) for name in others)
            table.add_row(*where, f"{summary.ratio_to_limit['ours']:.2f}{bound}", *factors, summary.verdict)
        yield table


def model_table(rows: Sequence[Row]) -> Table:
    """Training steps: time, speedup over torch's layers run in the same way, memory saved for the backward, and peak memory of a step."""
    table = _table("Training steps", ["model", "", "p20", "p50", "p80", "vs\ntorch's", "saved for\nbackward", "peak"])
    torchs = {(_setting(row), row.provider): row.p50 for row in rows}
    named: dict[tuple[object, ...], Iterator[str]] = {}
    for row in rows:
        like = "compile" if row.provider.startswith("compile") else "eager"
        gain = torchs[_setting(row), like] / row.p50 if (_setting(row), like) in torchs else None
        times = (f"{value:.4g} {row.unit}" for value in (row.p20, row.p50, row.p80))
        held = (MISSING if held is None else f"{held / 1e6:.0f} MB" for held in (row.saved_bytes, row.peak_bytes))
        name = f"{row.suite} {row.shape}", f"{row.layout}, {memory(row.outputs)}, {threads(row.threads)}"
        lines = named.setdefault(_setting(row), iter(name))  # one a row, beside the first rows of a setting
        table.add_row(next(lines, ""), row.provider, *times, _faster(gain), *held)
    return table


def _setting(row: Row) -> tuple[object, ...]:
    """What training steps that are compared have in common."""
    return row.suite, row.shape, row.layout, row.outputs, row.threads


def _table(title: str, columns: list[str]) -> Table:
    width = max(map(len, title.splitlines()))
    table = Table(
        title=title, title_justify="left", min_width=width, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or not column else "right", no_wrap=True)
    return table


def _cell(row: Row | None, time: bool) -> str:
    if row is None or row.ratio_to_limit is None:
        return MISSING
    return f"{row.p50:.3g} {row.unit}" if time else f"{row.ratio_to_limit:.2f}"


def _faster(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}x"


def _with_target(factor: float | None, wanted: float | None) -> str:
    return _faster(factor) + (f" (≥{wanted:g})" if wanted else "")
