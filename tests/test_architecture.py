"""The house: imports go one way only, in the order in which the package is read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(batchnorm.__file__).parent
# Top to bottom is the data's way. A module may import from those above it, and within its own folder.
ORDER = [
    "version",
    "errors",
    "logs",
    "files",
    "torch_state",
    "moments",
    "reference",
    "kernels",
    "memory",
    "functional",
    "statistics",
    "layers",
    "interop",
    "surgery",
    "distributed",
    "merging",
    "agreement",
    "population",
    "folding",
    "explain",
    "env",
    "lab",
    "bench",
    "report",
    "cli",
    "__init__",
    "__main__",
]
EXTRAS = ("click", "rich", "numpy", "matplotlib", "sklearn", "gymnasium", "onnx", "scipy", "pandas")


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    """Rooms of this package that a source imports anywhere: inside functions and under TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names if name.split(".")[0] == "batchnorm"]
    return {part[1] if len(part) > 1 and part[1] in ORDER else "__init__" for part in parts}


def forbidden(here: str, source: str) -> set[str]:
    return {there for there in imported_rooms(source) if there != here and ORDER.index(there) >= ORDER.index(here)}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_upward_only(path):
    assert room(path) in ORDER, f"give {room(path)} its place in the order"
    assert not forbidden(room(path), path.read_text())


def test_the_check_can_fail():
    assert forbidden("moments", "def f():\n    from batchnorm.layers import BatchNorm") == {"layers"}
    assert forbidden("layers", "import batchnorm.moments") == set()
    assert forbidden("layers", "import batchnorm as bn") == {"__init__"}


def test_report_knows_only_results():
    """Of the lab and the bench a page needs the results; anything more and a report could not be made from a file."""
    known = {f"batchnorm.lab.{name}" for name in ("experiment", "outcome")}
    known |= {"batchnorm.bench.row", "batchnorm.bench.targets"}
    for path in (ROOT / "report").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                ("batchnorm.lab", "batchnorm.bench")
            ):
                assert node.module in known, f"{path.name} imports {node.module}"


def test_importing_takes_no_extra_and_touches_no_torch():
    program = (
        "import sys, torch; before = dict(vars(torch.nn.functional)), dict(vars(torch.nn)); loaded = set(sys.modules)\n"
        "from batchnorm import *\n"
        "assert before == (dict(vars(torch.nn.functional)), dict(vars(torch.nn)))\n"
        f"print(*sorted(m for m in set(sys.modules) - loaded if m.split('.')[0] in {EXTRAS}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
