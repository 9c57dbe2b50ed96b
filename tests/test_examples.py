"""The examples run, stay short, and print what they are there to show."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
SHOWN = {
    "switch.py": "batchnorm.layers: accuracy 1.0",
    "padded_sequences.py": "padding masked out:  mean +0.00, deviation 1.00",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples(path, capsys):
    assert len(path.read_text().splitlines()) < 60
    runpy.run_path(str(path), run_name="__main__")
    assert SHOWN[path.name] in capsys.readouterr().out.replace("-0.00", "+0.00")
