"""The results of the lab as a page: of all experiments, or of one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from batchnorm.lab.experiment import KINDS, WORDS, Answer, Experiment
from batchnorm.lab.result import Damaged, Outcome
from batchnorm.lab.translated import translated
from batchnorm.language import marked, spoken, tr
from batchnorm.report.curves import drawings
from batchnorm.report.page import Section, document, figures, table
from batchnorm.report.rows import comparison, extent

SIGNS = {
    "holds": ("holds", marked("✓ holds")),
    "holds only when": ("part", marked("◐ holds only when")),
    "does not hold": ("fails", marked("✗ does not hold")),
}
Known = tuple[Experiment, Outcome | Damaged | None]


def render(known: Sequence[Known]) -> str:
    """The HTML page of all experiments, measured or not; at least one must have results."""
    known = [(translated(experiment), outcome) for experiment, outcome in known]
    begun = [(experiment, outcome) for experiment, outcome in known if isinstance(outcome, Outcome)]
    answers: list[Answer] = [
        verdict.answer for experiment, outcome in begun for verdict in outcome.verdicts(experiment).values()
    ]
    sections = [Section("summary", tr("Every claim"), [_summary(known)])]
    sections += [
        Section(_anchor(experiment), experiment.question, _experiment(experiment, outcome), experiment.name)
        for experiment, outcome in begun
    ]
    environments = dict.fromkeys(_environment(outcome) for _, outcome in begun)
    return document(
        "batchnorm lab",
        tr("Claims about batch normalization, measured"),
        _lead(sum(len(experiment.claims) for experiment, _ in known), answers),
        sections,
        " — ".join(environments),
    )


def _lead(claims: int, answers: Sequence[Answer]) -> str:
    """How many claims were measured, and how many of each answer there are."""
    separator = ", " if spoken() == "en" else "，"
    counted = separator.join(f"{answers.count(answer)} × {tr(WORDS[answer])}" for answer in SIGNS if answer in answers)
    if not counted:
        return tr("Of {claims} claims none is measured to the end.", claims=claims)
    if len(answers) == 1:
        return tr("Of {claims} claims 1 is measured to the end: {counted}.", claims=claims, counted=counted)
    if len(answers) == claims:
        return tr("All {claims} claims are measured: {counted}.", claims=claims, counted=counted)
    return tr(
        "Of {claims} claims {measured} are measured to the end: {counted}.",
        claims=claims,
        measured=len(answers),
        counted=counted,
    )


def render_one(experiment: Experiment, outcome: Outcome) -> str:
    """The HTML page of one complete experiment."""
    experiment = translated(experiment)
    verdicts = list(outcome.verdicts(experiment).values())
    claims, figures, numbers, protocol = _experiment(experiment, outcome)
    sections = [
        Section("claims", tr("What was claimed, and what happened"), [claims]),
        Section("figures", tr("In pictures"), [figures]),
        Section("numbers", tr("In numbers"), [numbers]),
        Section("protocol", tr("How it was measured"), [protocol]),
    ]
    held = sum(verdict.answer == "holds" for verdict in verdicts)
    lead = tr(
        "On this machine {held} of {claims} claims hold ({extent}).",
        held=held,
        claims=len(verdicts),
        extent=extent(experiment, outcome),
    )
    return document(f"batchnorm {experiment.name}", experiment.question, lead, sections, _environment(outcome))


def _environment(outcome: Outcome) -> str:
    return " · ".join(f"{name} {value}" for name, value in outcome.environment.items() if name != "date")


def _anchor(experiment: Experiment) -> str:
    return experiment.name.replace(".", "-")


def _summary(known: Sequence[Known]) -> str:
    """A table of all claims, in groups: the verdict, the claim, and the experiment, with a link to its section if it has results.

    An experiment that was not measured has one row with its question.
    """
    groups = list[str]()
    for kind, title in KINDS.items():
        rows = [row for experiment, outcome in known if experiment.kind == kind for row in _rows(experiment, outcome)]
        if rows:
            head = f'<tr><th scope="rowgroup" colspan="3">{tr(title)}</th></tr>'
            groups.append("\n".join(["<tbody>", head, *rows, "</tbody>"]))
    head = "".join(f'<th scope="col">{label}</th>' for label in (tr("verdict"), tr("claim"), tr("experiment")))
    body = "\n".join(groups)
    return f'<table class="summary">\n<caption>{tr("Every claim")}</caption>\n<thead><tr>{head}</tr></thead>\n{body}\n</table>'


def _rows(experiment: Experiment, outcome: Outcome | Damaged | None) -> Iterator[str]:
    has_section = isinstance(outcome, Outcome)
    name = f'<a href="#{_anchor(experiment)}">{experiment.name}</a>' if has_section else experiment.name
    judged = _judged(experiment, outcome) if outcome else [("open", tr("not measured"), experiment.question, "")]
    for css, words, claim, evidence in judged:
        note = f'<p class="note">{evidence}</p>' if evidence and not has_section else ""
        yield f'<tr><td class="verdict {css}">{words}</td><td>{escape(claim)}{note}</td><td>{name}</td></tr>'


def _judged(experiment: Experiment, outcome: Outcome | Damaged) -> Iterator[tuple[str, str, str, str]]:
    """For each claim the class and words of its verdict, the claim, and the evidence, or a note why there is no verdict."""
    verdicts = outcome.verdicts(experiment) if isinstance(outcome, Outcome) else {}
    words, note = _open(experiment, outcome)
    for claim in experiment.claims:
        if verdict := verdicts.get(claim):
            css, shown = SIGNS[verdict.answer]
            yield css, tr(shown), claim, verdict.evidence
        else:
            yield "open", words, claim, note


def _claims(experiment: Experiment, outcome: Outcome) -> str:
    """A list of the claims: the verdict of each, and the evidence."""
    items = list[str]()
    for css, words, claim, evidence in _judged(experiment, outcome):
        below = f'<p class="note">{_linked(escape(evidence))}</p>'
        items.append(f'<li><p class="verdict {css}">{words}</p><div><p>{escape(claim)}</p>{below}</div></li>')
    return "\n".join(['<ol class="claims">', *items, "</ol>"])


def _open(experiment: Experiment, outcome: Outcome | Damaged) -> tuple[str, str]:
    """The reason why an experiment has no verdicts, as a label and as a sentence."""
    if isinstance(outcome, Damaged):
        return tr("run it again"), tr("Its results are damaged.")
    if not outcome.fits(experiment):
        return tr("run it again"), tr("It was measured with other arms or metrics than it has now: run it again.")
    return (
        tr("{finished} of {units} done", finished=outcome.finished, units=outcome.units),
        tr("Incomplete: the numbers are of finished measurements only."),
    )


def _experiment(experiment: Experiment, outcome: Outcome) -> list[str]:
    """Claims, figures, numbers and protocol; only the claims if the experiment has other arms or metrics now."""
    claims = _claims(experiment, outcome)
    if not outcome.fits(experiment):
        return [claims]
    results = outcome.results()
    columns, rows = comparison(experiment, results)
    drawn = ((plot, title, _linked(escape(caption))) for plot, title, caption in drawings(experiment, results))
    made = {
        tr("The paper"): experiment.paper or tr("gives no number"),
        tr("Source"): experiment.source,
        tr("Protocol"): experiment.protocol,
        tr("Changed after the first results"): experiment.revised,
    }
    size = tr(
        "{extent}, {seconds:.0f} s of one core on {device}, {date}",
        extent=extent(experiment, outcome),
        seconds=outcome.seconds,
        device=outcome.device,
        date=outcome.environment["date"],
    )
    made[tr("Size")] = size
    listed = "".join(f"<dt>{name}</dt><dd>{_linked(escape(text))}</dd>\n" for name, text in made.items() if text)
    return [
        claims,
        figures(drawn, f"{_anchor(experiment)}-"),
        table(experiment.question, columns, rows),
        f"<dl>\n{listed}<dt>{tr('Make it again')}</dt><dd><code>{escape(outcome.command)}</code></dd>\n</dl>",
    ]


def _linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', text)
