"""The results of the lab as one page: all claims with verdicts, then each experiment with plots, numbers and protocol."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from batchnorm.lab.experiment import Experiment, Verdict
from batchnorm.lab.outcome import Damaged, Outcome
from batchnorm.report.curves import drawings
from batchnorm.report.page import document, section, table
from batchnorm.report.rows import comparison

SIGNS = {
    "holds": ("holds", "✓ holds"),
    "holds only when": ("part", "◐ holds only when"),
    "does not hold": ("fails", "✗ does not hold"),
}
Known = tuple[Experiment, Outcome | Damaged | None]


def render(known: Sequence[Known]) -> str:
    """The HTML page of all experiments, measured or not; at least one must have results."""
    begun = [(experiment, outcome) for experiment, outcome in known if isinstance(outcome, Outcome)]
    verdicts = {experiment.name: outcome.verdict(experiment) for experiment, outcome in begun}
    judged = [verdict.answer for verdict in verdicts.values() if verdict is not None]
    counted = ", ".join(f"{judged.count(answer)} × {answer}" for answer in SIGNS if answer in judged)
    are = "is" if len(judged) == 1 else "are"
    lead = f"Of {len(known)} claims {len(judged)} {are} measured to the end" + (f": {counted}." if judged else ".")
    body = [section("Every claim", _claims(known, verdicts))]
    body += [
        section(_heading(experiment), *_experiment(experiment, outcome, verdicts[experiment.name]))
        for experiment, outcome in begun
    ]
    environments = dict.fromkeys(
        " · ".join(f"{name} {value}" for name, value in outcome.environment.items() if name != "date")
        for _, outcome in begun
    )
    return document(
        "batchnorm lab", "What is claimed of batch normalization, measured", lead, body, " — ".join(environments)
    )


def _heading(experiment: Experiment) -> str:
    name, question = escape(experiment.name), escape(experiment.question)
    return f'<span class="kicker" id="{_anchor(experiment)}">{name}</span>{question}'


def _anchor(experiment: Experiment) -> str:
    return experiment.name.replace(".", "-")


def _sign(experiment: Experiment, outcome: Outcome | Damaged | None, verdict: Verdict | None) -> tuple[str, str]:
    """The CSS class and the text of a verdict."""
    if verdict is not None:
        return SIGNS[verdict.answer]
    if outcome is None:
        return "open", "not measured"
    if isinstance(outcome, Damaged) or not outcome.fits(experiment):
        return "open", "run it again"
    return "open", f"{outcome.finished} of {outcome.units} done"


def _claims(known: Sequence[Known], verdicts: dict[str, Verdict | None]) -> str:
    items = []
    for experiment, outcome in known:
        css, words = _sign(experiment, outcome, verdicts.get(experiment.name))
        linked = escape(experiment.claim)
        if isinstance(outcome, Outcome):
            linked = f'<a href="#{_anchor(experiment)}">{linked}</a>'
        if isinstance(outcome, Damaged):
            linked += " <span class='note'>Its results are damaged.</span>"
        items.append(f'<li><p class="verdict {css}">{words}</p><div><p>{linked}</p></div></li>')
    return '<ol class="claims">\n' + "\n".join(items) + "\n</ol>"


def _experiment(experiment: Experiment, outcome: Outcome, verdict: Verdict | None) -> list[str]:
    css, words = _sign(experiment, outcome, verdict)
    if not outcome.fits(experiment):
        evidence = "It was measured with other arms or metrics than it has now: run it again."
    elif verdict is None:
        evidence = "Not complete: what follows is of the finished measurements."
    else:
        evidence = verdict.evidence
    judged = (
        f'<ol class="claims"><li><p class="verdict {css}">{words}</p><div><p>{escape(experiment.claim)}</p>'
        f'<p class="note">{escape(evidence)}</p></div></li></ol>'
    )
    if not outcome.fits(experiment):
        return [judged]
    paper = {"The paper": experiment.paper or "gives no number", "Here": evidence, "Source": experiment.source}
    results = outcome.results()
    columns, rows = comparison(experiment, results)
    figures = "\n".join(
        f"<figure>\n{svg}<figcaption><strong>{escape(title)}.</strong></figcaption>\n</figure>"
        for svg, title in drawings(experiment, results)
    )
    seeds = "1 seed" if outcome.seeds == 1 else f"{outcome.seeds} seeds; mean ± standard deviation"
    if verdict is None:
        seeds = f"{outcome.finished} of {outcome.units} measured; numbers are of the finished ones"
    made = {
        "Protocol": experiment.protocol,
        "Size": f"{outcome.size}, {seeds}, {outcome.seconds:.0f} s of one core on {outcome.device}, {outcome.environment['date']}",
    }
    return [
        judged,
        f'<div class="figures">\n{figures}\n</div>',
        table(experiment.question, "", [("", label) for label in columns], rows),
        _entries(paper | made, outcome.command),
    ]


def _entries(entries: dict[str, str], command: str) -> str:
    listed = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>\n" for name, text in entries.items())
    return f"<dl>\n{listed}<dt>Make it again</dt><dd><code>{escape(command)}</code></dd>\n</dl>"
