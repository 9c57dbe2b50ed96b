"""torch-audit on our gallery, if it is installed: docs/diagnose.md states how many of the sick models it and `diagnose` find."""

import re

import pytest

from tests.sick_models import GALLERY
from tests.test_docs import ROOT

pytest.importorskip("torch_audit", reason="a peer: pip install torch-audit==0.3.0")
from tests.torch_audit_peer import measured


def test_the_counts_are_those_of_the_documentation():
    text = (ROOT / "docs" / "diagnose.md").read_text()
    for tool, (found, flagged) in measured().items():
        row = re.search(rf"^\| `?{tool}\b.*", text, re.MULTILINE)
        assert row is not None, tool
        assert f"{len(found)} of {len(GALLERY)} | {len(flagged)} of {len(GALLERY)} |" in row[0]
