"""`diagnose`: what batch norm does wrong in a model, where, by how much, and what mends it."""

from batchnorm.diagnostics.diagnose import diagnose
from batchnorm.diagnostics.diagnosis import Change, Diagnosis, Fixed
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.monitor import Monitor
from batchnorm.diagnostics.rule import Rule
from batchnorm.diagnostics.rules import FAMILIES, RULES, matching, rule_of

__all__ = [
    "FAMILIES",
    "RULES",
    "Change",
    "Diagnosis",
    "Finding",
    "Fixed",
    "Monitor",
    "Rule",
    "diagnose",
    "matching",
    "rule_of",
]
