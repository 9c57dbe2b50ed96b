"""The results of the lab as a page of the documentation: Markdown, and a plot for each experiment."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import resources

from batchnorm.lab.experiment import ANSWERS, Experiment
from batchnorm.lab.result import Outcome
from batchnorm.report.curves import drawings
from batchnorm.report.rows import comparison

INTRODUCTION = """# Findings

The results of `batchnorm lab`. Each experiment's protocol is below its numbers; [the lab](lab.md) explains how to run it. Numbers are
means ± standard deviations over seeds. `batchnorm lab findings` writes this page from results; do not edit it.

One arm is better than another only if each of its seeds is better than each seed of the other, by the margin that the claim names.
*Does not hold* means that the numbers do not show it, not that they show the opposite. No claim here is preregistered: claims and
rules were written or changed by people who knew earlier results, and each experiment says what was changed, and why; [a
table](lab.md#what-became-of-the-first-claims) sets the first claims beside those of today. Seeds vary the training, not the test
images; of 360 test images, one is 0.3 percentage points.
"""
FONT = "text { font-family: system-ui, sans-serif; }"


def render(known: Sequence[tuple[Experiment, Outcome]], folder: str) -> tuple[str, dict[str, str]]:
    """The page of the complete experiments, and their plots by file name; the page links to them in `folder`."""
    complete = [(experiment, outcome) for experiment, outcome in known if outcome.verdicts(experiment)]
    overview = [("experiment", "claim", "verdict"), *(row for each in complete for row in _overview(*each))]
    answers = [answer for *_, answer in overview[1:]]
    counted = ", ".join(f"{answers.count(answer)} × *{answer}*" for answer in ANSWERS)
    blocks, svgs = [INTRODUCTION, f"{len(answers)} claims: {counted}.\n", _lines(overview)], dict[str, str]()
    for experiment, outcome in complete:
        name = f"{experiment.name}.svg"
        plot, title, _ = drawings(experiment, outcome.results())[0]
        svgs[name] = _standalone(plot.svg)
        blocks.append(_section(experiment, outcome, f"![{title}]({folder}/{name})"))
    environments = {
        ", ".join(f"{name} {value}" for name, value in outcome.environment.items()) for _, outcome in complete
    }
    blocks.append("Measured with " + "; ".join(sorted(environments)) + ".\n")
    return "\n".join(blocks), svgs


def _overview(experiment: Experiment, outcome: Outcome) -> Iterable[tuple[str, str, str]]:
    anchor = re.sub(r"[^\w-]", "", experiment.name)  # as Markdown derives it from the heading
    for claim, verdict in outcome.verdicts(experiment).items():
        yield f"[{experiment.name}](#{anchor})", claim, verdict.answer


def _section(experiment: Experiment, outcome: Outcome, drawing: str) -> str:
    columns, rows = comparison(experiment, outcome.results())
    seeds = "1 seed" if outcome.seeds == 1 else f"{outcome.seeds} seeds"
    return "\n".join(
        [
            f"## {experiment.name}\n",
            f"{experiment.question}\n",
            *(
                f"Claim: {claim} Verdict: **{verdict.answer}**.\n\n{verdict.evidence}\n"
                for claim, verdict in outcome.verdicts(experiment).items()
            ),
            f"{drawing}\n",
            _lines([("", *columns), *((label, *cells) for label, cells in rows)]),
            f"- The source: {experiment.source}. Its number: {experiment.paper or 'none'}.",
            f"- Protocol: {experiment.protocol}",
            *([f"- Changed after the first results: {experiment.revised}"] if experiment.revised else []),
            f"- Made by `{outcome.command}`: size {outcome.size}, {seeds}, {outcome.seconds:.0f} s of one core.\n",
        ]
    )


def _lines(rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table with the first row as header."""
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    rule = "|" + "---|" * (head.count(" | ") + 1)
    return "\n".join([head, rule, *body, ""])


def _standalone(svg: str) -> str:
    """The plot as a standalone file: with namespace, colors for light and dark, and rounded coordinates."""
    css = resources.files("batchnorm.report").joinpath("page.css").read_text(encoding="utf-8")
    colors = css[: css.index("* {")].strip()
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" \\1>\n<style>{colors}\n{FONT}</style>'
    return re.sub(r"<svg ([^>]*)>", opening, svg, count=1)
