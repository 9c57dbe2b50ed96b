"""The results of the lab as a page: of all experiments, or of one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from batchnorm.lab.experiment import Experiment
from batchnorm.lab.result import Damaged, Outcome
from batchnorm.report.curves import drawings
from batchnorm.report.page import document, section, table
from batchnorm.report.rows import comparison, extent

SIGNS = {
    "holds": ("holds", "✓ holds"),
    "holds only when": ("part", "◐ holds only when"),
    "does not hold": ("fails", "✗ does not hold"),
}
Known = tuple[Experiment, Outcome | Damaged | None]


def render(known: Sequence[Known]) -> str:
    """The HTML page of all experiments, measured or not; at least one must have results."""
    begun = [(experiment, outcome) for experiment, outcome in known if isinstance(outcome, Outcome)]
    answers = [verdict.answer for experiment, outcome in begun for verdict in outcome.verdicts(experiment).values()]
    counted = ", ".join(f"{answers.count(answer)} × {answer}" for answer in SIGNS if answer in answers)
    claims, are = sum(len(experiment.claims) for experiment, _ in known), "is" if len(answers) == 1 else "are"
    lead = f"Of {claims} claims {len(answers)} {are} measured to the end" + (f": {counted}." if counted else ".")
    items = "\n".join(_claims(experiment, outcome, overview=True) for experiment, outcome in known)
    body = [section("Every claim", f'<ol class="claims">\n{items}\n</ol>')]
    body += [section(_heading(experiment), *_experiment(experiment, outcome)) for experiment, outcome in begun]
    environments = dict.fromkeys(_environment(outcome) for _, outcome in begun)
    return document("batchnorm lab", "Claims about batch normalization, measured", lead, body, " — ".join(environments))


def render_one(experiment: Experiment, outcome: Outcome) -> str:
    """The HTML page of one complete experiment."""
    verdicts = list(outcome.verdicts(experiment).values())
    claims, figures, numbers, protocol = _experiment(experiment, outcome)
    body = [
        section("What was claimed, and what happened", claims),
        section("In numbers", numbers),
        section("In pictures", figures),
        section("How it was measured", protocol),
    ]
    held = sum(verdict.answer == "holds" for verdict in verdicts)
    lead = f"On this machine {held} of {len(verdicts)} claims hold. {verdicts[0].evidence}"
    return document(f"batchnorm {experiment.name}", experiment.question, lead, body, _environment(outcome))


def _environment(outcome: Outcome) -> str:
    return " · ".join(f"{name} {value}" for name, value in outcome.environment.items() if name != "date")


def _heading(experiment: Experiment) -> str:
    name, question = escape(experiment.name), escape(experiment.question)
    return f'<span class="kicker" id="{_anchor(experiment)}">{name}</span>{question}'


def _anchor(experiment: Experiment) -> str:
    return experiment.name.replace(".", "-")


def _claims(experiment: Experiment, outcome: Outcome | Damaged | None, overview: bool) -> str:
    """An item for each claim: its verdict, then a link to the experiment, or the evidence."""
    verdicts = outcome.verdicts(experiment) if isinstance(outcome, Outcome) else {}
    items, open_, note = list[str](), *_open(experiment, outcome)
    for claim in experiment.claims:
        css, words, statement, evidence = "open", open_, escape(claim), note
        if verdict := verdicts.get(claim):
            (css, words), evidence = SIGNS[verdict.answer], verdict.evidence
        if overview and isinstance(outcome, Outcome):
            statement, evidence = f'<a href="#{_anchor(experiment)}">{statement}</a>', ""
        below = f'<p class="note">{_linked(escape(evidence))}</p>' if evidence else ""
        items.append(f'<li><p class="verdict {css}">{words}</p><div><p>{statement}</p>{below}</div></li>')
    return "\n".join(items)


def _open(experiment: Experiment, outcome: Outcome | Damaged | None) -> tuple[str, str]:
    """The reason why an experiment has no verdicts, as a label and as a sentence."""
    if outcome is None:
        return "not measured", ""
    if isinstance(outcome, Damaged):
        return "run it again", "Its results are damaged."
    if not outcome.fits(experiment):
        return "run it again", "It was measured with other arms or metrics than it has now: run it again."
    return f"{outcome.finished} of {outcome.units} done", "Incomplete: the numbers are of finished measurements only."


def _experiment(experiment: Experiment, outcome: Outcome) -> list[str]:
    """Claims, figures, numbers and protocol; only the claims if the experiment has other arms or metrics now."""
    claims = f'<ol class="claims">\n{_claims(experiment, outcome, overview=False)}\n</ol>'
    if not outcome.fits(experiment):
        return [claims]
    results = outcome.results()
    columns, rows = comparison(experiment, results)
    figures = "\n".join(
        f"<figure>\n{svg}<figcaption><strong>{escape(title)}.</strong> {_linked(escape(caption))}</figcaption>\n</figure>"
        for svg, title, caption in drawings(experiment, results)
    )
    made = {
        "The paper": experiment.paper or "gives no number",
        "Source": experiment.source,
        "Protocol": experiment.protocol,
        "Size": f"{extent(experiment, outcome)}, {outcome.seconds:.0f} s of one core on {outcome.device}, "
        f"{outcome.environment['date']}",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{_linked(escape(text))}</dd>\n" for name, text in made.items())
    return [
        claims,
        f'<div class="figures">\n{figures}\n</div>',
        table(experiment.question, columns, rows),
        f"<dl>\n{listed}<dt>Make it again</dt><dd><code>{escape(outcome.command)}</code></dd>\n</dl>",
    ]


def _linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', text)
