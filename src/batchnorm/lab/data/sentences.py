"""Sentences of a small artificial language and their translations, with other words, another order, and agreement."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

NOUNS, VERBS, ADJECTIVES = 40, 20, 20
END = 0  # ends a translation, is the first input of the decoder, and pads shorter ones
SOURCE_WORDS = 1 + NOUNS + VERBS + ADJECTIVES + 1  # and one for "not", the last
TARGET_WORDS = 1 + NOUNS + 2 * VERBS + 2 * ADJECTIVES + 1  # verbs and adjectives have two endings


@dataclass(frozen=True)
class Pairs:
    """Source sentences (N, S) with their lengths (N,), and translations (N, T), padded with at least one `END`."""

    source: Tensor
    lengths: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Tensor) -> Pairs:
        return Pairs(self.source[rows], self.lengths[rows], self.target[rows])


@dataclass(frozen=True)
class Split:
    """Three splits without common sentences."""

    train: Pairs
    validation: Pairs
    test: Pairs


def sentence(rng: random.Random) -> tuple[list[int], list[int]]:
    """
    A sentence and its translation.

    A sentence is "phrase [NOT] verb phrase"; a phrase has up to two adjectives and a noun. In the translation, the verb is last, followed
    by NOT; adjectives follow their noun in reverse order. Adjectives agree in gender with their noun, the verb with its subject.
    """

    def phrase() -> tuple[list[int], list[int], int]:
        noun = rng.randrange(NOUNS)
        gender = noun % 2
        adjectives = [rng.randrange(ADJECTIVES) for _ in range(rng.randint(0, 2))]
        said = [1 + NOUNS + VERBS + one for one in adjectives] + [1 + noun]
        translated = [1 + noun] + [1 + NOUNS + 2 * VERBS + 2 * one + gender for one in reversed(adjectives)]
        return said, translated, gender

    (subject, its_translation, gender), (other, its_other, _) = phrase(), phrase()
    verb, negated = rng.randrange(VERBS), rng.random() < 0.3
    said = [*subject, *([SOURCE_WORDS - 1] if negated else []), 1 + NOUNS + verb, *other]
    translated = [*its_translation, *its_other, 1 + NOUNS + 2 * verb + gender, *([TARGET_WORDS - 1] if negated else [])]
    return said, translated


def load(train: int = 6000, held_out: int = 500) -> Split:
    """Generate sentences for training, validation and test, in the given numbers; the same on every call."""
    rng, known = random.Random(0), {}
    while len(known) < train + 2 * held_out:
        said, translated = sentence(rng)
        known[tuple(said)] = translated
    pairs = list(known.items())

    def padded(rows: list[list[int]], length: int) -> Tensor:
        return torch.tensor([row + [END] * (length - len(row)) for row in rows])

    longest = max(len(said) for said, _ in pairs)
    everything = Pairs(
        padded([list(said) for said, _ in pairs], longest),
        torch.tensor([len(said) for said, _ in pairs]),
        padded([translated for _, translated in pairs], longest + 1),  # at least one END
    )
    order = torch.arange(len(pairs)).split([train, held_out, held_out])
    return Split(*(everything[rows] for rows in order))
