"""The results of the lab as a page: of all experiments, or of one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from batchnorm.lab.experiment import KINDS, Experiment
from batchnorm.lab.result import Damaged, Outcome
from batchnorm.report.curves import drawings
from batchnorm.report.page import Section, document, figures, table
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
    sections = [Section("summary", "Every claim", [_summary(known)])]
    sections += [
        Section(_anchor(experiment), experiment.question, _experiment(experiment, outcome), experiment.name)
        for experiment, outcome in begun
    ]
    environments = dict.fromkeys(_environment(outcome) for _, outcome in begun)
    return document(
        "batchnorm lab", "Claims about batch normalization, measured", lead, sections, " — ".join(environments)
    )


def render_one(experiment: Experiment, outcome: Outcome) -> str:
    """The HTML page of one complete experiment."""
    verdicts = list(outcome.verdicts(experiment).values())
    claims, figures, numbers, protocol = _experiment(experiment, outcome)
    sections = [
        Section("claims", "What was claimed, and what happened", [claims]),
        Section("figures", "In pictures", [figures]),
        Section("numbers", "In numbers", [numbers]),
        Section("protocol", "How it was measured", [protocol]),
    ]
    held = sum(verdict.answer == "holds" for verdict in verdicts)
    lead = f"On this machine {held} of {len(verdicts)} claims hold ({extent(experiment, outcome)})."
    return document(f"batchnorm {experiment.name}", experiment.question, lead, sections, _environment(outcome))


def _environment(outcome: Outcome) -> str:
    return " · ".join(f"{name} {value}" for name, value in outcome.environment.items() if name != "date")


def _anchor(experiment: Experiment) -> str:
    return experiment.name.replace(".", "-")


def _summary(known: Sequence[Known]) -> str:
    """A table of all claims, in groups: the verdict, the claim, and the experiment, with a link to its section if it has results."""
    groups = list[str]()
    for kind, title in KINDS.items():
        rows = [row for experiment, outcome in known if experiment.kind == kind for row in _rows(experiment, outcome)]
        if rows:
            head = f'<tr><th scope="rowgroup" colspan="3">{title}</th></tr>'
            groups.append("\n".join(["<tbody>", head, *rows, "</tbody>"]))
    head = "".join(f'<th scope="col">{label}</th>' for label in ("verdict", "claim", "experiment"))
    body = "\n".join(groups)
    return f'<table class="summary">\n<caption>Every claim</caption>\n<thead><tr>{head}</tr></thead>\n{body}\n</table>'


def _rows(experiment: Experiment, outcome: Outcome | Damaged | None) -> Iterator[str]:
    has_section = isinstance(outcome, Outcome)
    name = f'<a href="#{_anchor(experiment)}">{experiment.name}</a>' if has_section else experiment.name
    for css, words, claim, evidence in _judged(experiment, outcome):
        note = f'<p class="note">{evidence}</p>' if evidence and not has_section else ""
        yield f'<tr><td class="verdict {css}">{words}</td><td>{escape(claim)}{note}</td><td>{name}</td></tr>'


def _judged(experiment: Experiment, outcome: Outcome | Damaged | None) -> Iterator[tuple[str, str, str, str]]:
    """For each claim the class and words of its verdict, the claim, and the evidence, or a note why there is no verdict."""
    verdicts = outcome.verdicts(experiment) if isinstance(outcome, Outcome) else {}
    words, note = _open(experiment, outcome)
    for claim in experiment.claims:
        if verdict := verdicts.get(claim):
            yield *SIGNS[verdict.answer], claim, verdict.evidence
        else:
            yield "open", words, claim, note


def _claims(experiment: Experiment, outcome: Outcome) -> str:
    """A list of the claims: the verdict of each, and the evidence."""
    items = list[str]()
    for css, words, claim, evidence in _judged(experiment, outcome):
        below = f'<p class="note">{_linked(escape(evidence))}</p>'
        items.append(f'<li><p class="verdict {css}">{words}</p><div><p>{escape(claim)}</p>{below}</div></li>')
    return "\n".join(['<ol class="claims">', *items, "</ol>"])


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
    claims = _claims(experiment, outcome)
    if not outcome.fits(experiment):
        return [claims]
    results = outcome.results()
    columns, rows = comparison(experiment, results)
    drawn = ((plot, title, _linked(escape(caption))) for plot, title, caption in drawings(experiment, results))
    made = {
        "The paper": experiment.paper or "gives no number",
        "Source": experiment.source,
        "Protocol": experiment.protocol,
        **({"Changed after the first results": experiment.revised} if experiment.revised else {}),
        "Size": f"{extent(experiment, outcome)}, {outcome.seconds:.0f} s of one core on {outcome.device}, "
        f"{outcome.environment['date']}",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{_linked(escape(text))}</dd>\n" for name, text in made.items())
    return [
        claims,
        figures(drawn, f"{_anchor(experiment)}-"),
        table(experiment.question, columns, rows),
        f"<dl>\n{listed}<dt>Make it again</dt><dd><code>{escape(outcome.command)}</code></dd>\n</dl>",
    ]


def _linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', text)
