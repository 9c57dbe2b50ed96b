"""Decodes CTC scores into letters, and computes their error rate (Graves et al. 2006)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from batchnorm.errors import InputError


def best_path(scores: Tensor, length: int) -> list[int]:
    """Decode scores (T, classes) by the best class of each of the first `length` steps: repeats count once, 0 is no letter."""
    classes = scores[:length].argmax(1).tolist()
    return [now for before, now in zip([0, *classes], classes, strict=False) if now not in (0, before)]


def edit_distance(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """The number of insertions, deletions and replacements that turn one sequence into the other (Levenshtein 1966)."""
    row = list(range(len(theirs) + 1))
    for i, letter in enumerate(ours, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(theirs, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def error_rate(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The number of edits divided by the number of true letters, over all sequences; above 1 if far too many letters are found.

    Raises:
        InputError: different numbers of sequences, or no letter at all.
    """
    letters = sum(map(len, theirs))
    if len(ours) != len(theirs) or not letters:
        raise InputError(
            f"each result needs a transcript, and not all may be empty; got {len(ours)} and {len(theirs)}, {letters} letters"
        )
    return sum(map(edit_distance, ours, theirs)) / letters
