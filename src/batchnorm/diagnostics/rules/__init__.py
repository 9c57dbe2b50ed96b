"""The rules: one file for each family, one row for each rule."""

from __future__ import annotations

from collections.abc import Iterable

from batchnorm.diagnostics.rule import Rule
from batchnorm.diagnostics.rules import (
    batches,
    by_hand,
    configuration,
    copies,
    modes,
    numerics,
    optimization,
    running,
    structure,
)
from batchnorm.errors import InputError

RULES: tuple[Rule, ...] = (
    *configuration.RULES,
    *running.RULES,
    *modes.RULES,
    *batches.RULES,
    *numerics.RULES,
    *copies.RULES,
    *structure.RULES,
    *by_hand.RULES,
    *optimization.RULES,
)
FAMILIES = {
    "1": "configuration",
    "2": "running statistics against data",
    "3": "modes and freezing",
    "4": "batches and data",
    "5": "numerics",
    "6": "copies and replicas",
    "7": "structure",
    "8": "optimization",
}


def matching(codes: str | Iterable[str] | None) -> set[str]:
    """The codes of the rules that begin with one of `codes`, such as "BN2" or "BN201"; commas separate several in a string.

    Raises:
        InputError: no rule begins with one of them.
    """
    given = codes.split(",") if isinstance(codes, str) else list(codes or ())
    found = set[str]()
    for code in (each.strip().upper() for each in given):
        matched = {rule.code for rule in RULES if code and rule.code.startswith(code)}
        if not matched:
            raise InputError(
                f"a code must be that of a rule or begin one, such as BN2 or BN201, but got {code!r}; `batchnorm "
                "diagnose --list` lists all"
            )
        found |= matched
    return found


def chosen(select: str | Iterable[str] | None, ignore: str | Iterable[str] | None) -> tuple[Rule, ...]:
    """The rules of `select`, all if it is None, without those of `ignore`.

    Raises:
        InputError: as `matching`.
    """
    codes = {rule.code for rule in RULES} if select is None else matching(select)
    codes -= matching(ignore)
    return tuple(rule for rule in RULES if rule.code in codes)


def rule_of(code: str) -> Rule:
    """The rule of a code.

    Raises:
        InputError: there is none.
    """
    rule = next((each for each in RULES if each.code == code.strip().upper()), None)
    if rule is None:
        raise InputError(f"{code!r} must be the code of a rule, such as BN201; `batchnorm diagnose --list` lists all")
    return rule
