"""The rules by which experiments judge their claims: all seeds of an arm against all seeds of another.

If two arms did not differ, three seeds of one would all be better than three of the other in one of twenty cases. Means decide nothing,
since one seed can make them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from batchnorm.lab.experiment import Judge, Metric, Results, Verdict
from batchnorm.language import tr


def beats(
    metric: Metric, values: Sequence[float], others: Sequence[float], by: float = 0.0, times: float = 1.0
) -> bool:
    """
    Whether each of `values` is better than each of `others`: by at least `by` and `times`, or if `by` is negative, worse by at most -`by`.

    Higher is better unless the metric says "lower". NaN is never better.
    """

    def better(value: float, other: float) -> bool:
        low, high = (value, other) if metric.better == "lower" else (other, value)
        return times * low + by <= high and (by < 0 or low < high)

    return all(better(value, other) for value in values for other in others)


def verdict(holds: bool, evidence: str) -> Verdict:
    """The answer to a claim that holds or does not."""
    return Verdict("holds" if holds else "does not hold", evidence)


@dataclass(frozen=True)
class Rules:
    """Judges for the arms and metrics of an experiment, by name."""

    arms: Mapping[str, str]
    metrics: Mapping[str, Metric]

    def beats(self, results: Results, metric: str, arm: str, other: str, by: float = 0.0, times: float = 1.0) -> bool:
        """Whether every seed of `arm` is better than every seed of `other`, as the function `beats` says."""
        return beats(self.metrics[metric], results.values(arm, metric), results.values(other, metric), by, times)

    def told(self, results: Results, metric: str, *arms: str) -> str:
        """The values of every seed as a sentence."""
        form = self.metrics[metric]
        listed = (
            tr("{values} ({arm})", values=", ".join(map(form, results.values(arm, metric))), arm=tr(self.arms[arm]))
            for arm in arms
        )
        return tr("For each seed, {metric}: {listed}.", metric=tr(form.label), listed="; ".join(listed))

    def better(self, metric: str, arm: str, *others: str, by: float = 0.0, times: float = 1.0) -> Judge:
        """A judge of the claim that every seed of `arm` is better than every seed of each other arm, by at least `by` and `times`."""

        def judge(results: Results) -> Verdict:
            holds = all(self.beats(results, metric, arm, other, by, times) for other in others)
            return verdict(holds, self.told(results, metric, arm, *others))

        return judge

    def as_good(self, metric: str, arm: str, *others: str, within: float) -> Judge:
        """A judge of the claim that no seed of `arm` is worse than any seed of each other arm by more than `within`, which is positive."""

        def judge(results: Results) -> Verdict:
            found = self.better(metric, arm, *others, by=-within)(results)
            near = tr("Up to {within} worse is as good.", within=self.metrics[metric](within))
            return Verdict(found.answer, f"{found.evidence} {near}")

        return judge

    def every(self, metric: str, **conditions: Callable[[float], bool]) -> Judge:
        """A judge of the claim that every seed of each named arm meets the arm's condition."""

        def judge(results: Results) -> Verdict:
            holds = all(
                condition(value) for arm, condition in conditions.items() for value in results.values(arm, metric)
            )
            return verdict(holds, self.told(results, metric, *conditions))

        return judge
