"""A result as a self-contained HTML page without scripts, light and dark, for every screen width."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from importlib import resources
from statistics import fmean

from batchnorm.lab.result import Arm, Claim, Result
from batchnorm.report import plots
from batchnorm.report.rows import summary_rows, sweep_rows

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<header>
<p class="kicker">{kicker}</p>
<h1>{title}</h1>
<p class="lead">{lead}</p>
</header>
<main>
{body}
</main>
<footer>
<p class="note">{footer}</p>
</footer>
</body>
</html>
"""


def render(result: Result) -> str:
    """The HTML page of a complete result."""
    protocol = result.protocol
    body = [
        section("In numbers", _table("Headline numbers", "", result, summary_rows(result))),
        section("What was claimed, and what happened", _claims(result.claims)),
        section("In pictures", _figures(result)),
        section(
            "Every learning rate",
            _table("Test accuracy", "Learning rate", result, sweep_rows(result)),
            f"<p class='note'>Test accuracy, mean ± standard deviation over {_count(protocol['seeds'], 'seed')}.</p>",
        ),
        section("How it was measured", _protocol(result)),
    ]
    environment = " · ".join(f"{name} {value}" for name, value in result.environment.items())
    return document(f"batchnorm demo · {protocol['dataset']}", result.question, verdict(result), body, environment)


def document(kicker: str, title: str, lead: str, body: Iterable[str], footer: str) -> str:
    """A complete page around `body`, sections in HTML; the other arguments are plain text."""
    return PAGE.format(
        kicker=escape(kicker),
        title=escape(title),
        css=resources.files("batchnorm.report").joinpath("page.css").read_text(encoding="utf-8"),
        lead=escape(lead),
        body="\n".join(body),
        footer=escape(footer),
    )


def verdict(result: Result) -> str:
    """The result in two sentences."""
    plain, normalized = result.arms
    target, rates = f"{result.protocol['target']:.0%}", len(result.protocol["learning_rates"])
    held, claims = sum(claim.holds for claim in result.claims), len(result.claims)
    answer = "yes" if held == claims else "no" if not held else "in part"
    return (
        f"On these images {answer}: {held} of {claims} claims held, for every seed. "
        f"With batch normalization the network trains at {len(normalized.trains_at)} of {rates} learning rates, without it at "
        f"{len(plain.trains_at)}; at learning rate {result.protocol['common_learning_rate']:g} it comes to {target} "
        f"{_when(normalized)} with it, {_when(plain)} without."
    )


def _when(arm: Arm) -> str:
    reached = [steps for steps in arm.steps_to_target if steps is not None]
    if len(reached) < len(arm.steps_to_target):
        return f"with {len(reached)} of {_count(len(arm.steps_to_target), 'seed')}"
    return f"after {fmean(reached):.0f} steps"


def section(heading: str, *content: str) -> str:
    """A section with a heading and its HTML content."""
    return "\n".join(["<section>", f"<h2>{heading}</h2>", *content, "</section>"])


def _table(caption: str, corner: str, result: Result, rows: Iterable[tuple[str, list[str]]]) -> str:
    return table(caption, corner, [(arm.name, arm.label) for arm in result.arms], rows)


def table(caption: str, corner: str, columns: Iterable[tuple[str, str]], rows: Iterable[tuple[str, list[str]]]) -> str:
    """An HTML table of plain text; each column has a CSS class and a label."""
    head = "".join(f'<th scope="col" class="{css}">{escape(label)}</th>' for css, label in columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for label, cells in rows
    )
    first = f'<th scope="col">{corner}</th>' if corner else "<td></td>"
    return (
        f'<div class="scroll"><table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{first}{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _claims(claims: Iterable[Claim]) -> str:
    items = "\n".join(
        f'<li><p class="verdict {"holds" if claim.holds else "fails"}">{"✓ held" if claim.holds else "✗ did not hold"}</p>'
        f'<div><p>{escape(claim.claim)}</p><p class="note">{escape(claim.evidence)}</p></div></li>'
        for claim in claims
    )
    return f'<ol class="claims">\n{items}\n</ol>'


def _figures(result: Result) -> str:
    rate, seeds = f"{result.protocol['common_learning_rate']:g}", _count(result.protocol["seeds"], "seed")
    figures = [
        (
            plots.learning_curves(result),
            "How fast it learns.",
            f"Validation accuracy at learning rate {rate}: {seeds} thin, their mean thick.",
        ),
        (
            plots.learning_rate_sweep(result),
            "Which learning rates train.",
            f"Test accuracy after {result.protocol['steps']} steps: mean, and bars from the least to the greatest of {seeds}.",
        ),
        (
            plots.hidden_distribution(result),
            "What a hidden unit receives.",
            "15th, 50th and 85th percentile of the input of the last hidden activation over the validation images, in inference, "
            f"at learning rate {rate}: the unit of the first network whose median moves neither more nor less than most. "
            "With BN it begins with running statistics that have seen no image. How far it moves need not be what "
            "makes training fast or slow (Santurkar et al. 2018, arXiv:1805.11604).",
        ),
        (
            plots.gradient_norms(result),
            "How the gradient spreads over the layers.",
            f"Norm of the gradient of each layer's weights at learning rate {rate}, mean of {seeds}; "
            "dots are the initialization.",
        ),
    ]
    return '<div class="figures">\n' + "\n".join(
        f"<figure>\n{svg}<figcaption><strong>{title}</strong> {_linked(escape(text))}</figcaption>\n</figure>"
        for svg, title, text in figures
    ) + "\n</div>"  # fmt: skip


def _protocol(result: Result) -> str:
    protocol, sizes = result.protocol, result.protocol["sizes"]
    rates = ", ".join(f"{rate:g}" for rate in protocol["learning_rates"])
    entries = {
        "Data": f"{protocol['dataset']}, 28x28, standardized with the training images' mean and deviation: {sizes['train']} train, "
        f"{sizes['validation']} validate, {sizes['test']} test",
        "Networks": f"{protocol['network']}; the one with BN has a BatchNorm1d before each ReLU. "
        "For a seed both start from the same weights and see the same batches",
        "Training": f"{protocol['optimizer']}; {protocol['steps']} steps of {protocol['batch_size']} images; "
        f"{_count(protocol['seeds'], 'seed')}; learning rates {rates}",
        "Choices": f"the learning rate is chosen on validation and reported on test; a learning rate trains if every seed ends with "
        f"{protocol['target']:.0%} on validation; steps are counted on validation, measured every {protocol['measure_every']}; "
        "what a hidden unit receives is measured on the validation images in inference",
        "Source": result.source,
    }
    listed = "".join(f"<dt>{name}</dt><dd>{_linked(escape(text))}</dd>\n" for name, text in entries.items())
    return f"<dl>\n{listed}<dt>Make it again</dt><dd><code>{escape(result.command)}</code></dd>\n</dl>"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', text)
