"""The house: imports go one way only, in the order in which the package is read."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm
from batchnorm import statistics
from batchnorm.statistics import Applying, SourceBuffer, Statistics
from tests.layer_table import EXEMPT, ROWS

ROOT = Path(batchnorm.__file__).parent
CSRC = Path(__file__).parent.parent / "csrc"
MOST_ARGUMENTS = 8
TORCHS_SIGNATURE = {"BatchNorm.__init__", "batch_norm", "normalize", "normalize_with"}  # and what our layers add to it
EACH_ALLOWS_MORE = {"diagnose"}  # rules
# Top to bottom is the data's way. A module may import from those above it, and within its own folder.
ORDER = [
    "version",
    "errors",
    "logs",
    "files",
    "language",
    "measure",
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
    "paired",
    "privacy",
    "merging",
    "agreement",
    "federated",
    "population",
    "copies",
    "adaptation",
    "folding",
    "explain",
    "env",
    "lab",
    "bench",
    "report",
    "learn",
    "diagnostics",
    "testing",
    "cli",
    "__init__",
    "__main__",
]
EXTRAS = ("click", "rich", "numpy", "matplotlib", "sklearn", "gymnasium", "onnx", "scipy", "pandas", "triton")


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


def imports_between(sources: dict[str, str]) -> dict[str, set[str]]:
    """The modules among `sources`, by name, that each of them imports."""
    found = {name: set[str]() for name in sources}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    found[name] |= {submodule if submodule in sources else node.module} & (sources.keys() - {name})
    return found


def cycle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or none."""
    done = set[str]()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        done.add(name)
        return next((found for there in sorted(imports[name]) if (found := visit(there, [*path, name]))), [])

    return next((found for name in sorted(imports) if (found := visit(name, []))), [])


def module_name(path: Path) -> str:
    return ".".join(("batchnorm", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in ROOT.rglob("*.py")} - {ROOT}), ids=lambda path: path.name
)
def test_no_modules_of_a_room_import_each_other(folder):
    """A module that imports names of its own package imports everything that its `__init__` imports."""
    assert cycle(imports_between({module_name(path): path.read_text() for path in folder.rglob("*.py")})) == []


def test_a_cycle_inside_a_room_is_found():
    room = {
        "batchnorm.room": "from batchnorm.room.upper import f",
        "batchnorm.room.upper": "from batchnorm.room import lower",
        "batchnorm.room.lower": "",
    }
    assert cycle(imports_between(room | {"batchnorm.room.upper": "import math"})) == []
    late = {"batchnorm.room.lower": "def g():\n    from batchnorm.room.upper import f"}
    assert set(cycle(imports_between(room | late))) == {"batchnorm.room.upper", "batchnorm.room.lower"}
    own = {"batchnorm.room.upper": "from batchnorm.room import f"}
    assert set(cycle(imports_between(room | own))) == {"batchnorm.room", "batchnorm.room.upper"}


def many_arguments(source: str) -> set[str]:
    """Functions with more arguments than is readable; a command's arguments are its options, an operator's are those of its schema, and
    a GPU program's are pointers and sizes, one by one.
    """
    found = set[str]()

    def visit(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = f"{inside}{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else inside
            if isinstance(child, ast.FunctionDef):
                given = child.args.posonlyargs + child.args.args + child.args.kwonlyargs
                flat = ("command(", "triton_op(", "triton.jit")
                is_flat = any(word in ast.unparse(decorator) for decorator in child.decorator_list for word in flat)
                count = len(given) - (bool(given) and given[0].arg in ("self", "cls", "ctx"))
                if count > MOST_ARGUMENTS and not is_flat and name not in TORCHS_SIGNATURE | EACH_ALLOWS_MORE:
                    found.add(name)
            visit(child, f"{name}." if isinstance(child, ast.ClassDef) else inside)

    visit(ast.parse(source), "")
    return found


def many_arguments_in_cpp(source: str) -> set[str]:
    """The same of C++ functions; operators have the arguments of their schemas."""
    source, found = re.sub(r"//.*", "", source), set[str]()
    for name, arguments in re.findall(r"\b(\w+)\s*\(([^(){};]*)\)[\w\s]*(?::[^{;]*)?\{", source):
        flat = re.sub(r"<[^<>]*>", "", arguments)
        if name != "OPERATOR" and flat.count(",") >= MOST_ARGUMENTS:
            found.add(name)
    return found


def test_nothing_takes_more_than_eight_arguments():
    assert {(path.name, name) for path in ROOT.rglob("*.py") for name in many_arguments(path.read_text())} == set()
    sources = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cpp")]
    assert {(path.name, name) for path in sources for name in many_arguments_in_cpp(path.read_text())} == set()


def test_functions_of_nine_arguments_are_found():
    python, cpp = ", ".join("abcdefghi"), ", ".join(f"int {name}" for name in "abcdefghi")
    assert many_arguments(f"class A:\n    def f(self, {python}): ...") == {"A.f"}
    assert many_arguments(f"class A:\n    def f(self, {python[:-3]}): ...") == set()
    assert many_arguments(f"@triton.jit\ndef f({python}): ...") == set()
    assert many_arguments_in_cpp(f"template <class T>\nstatic void f({cpp}) const {{ }}") == {"f"}
    assert many_arguments_in_cpp(f"void f({cpp[:-7]}) {{ }}") == set()


def test_every_source_has_a_row_in_the_layer_table():
    classes = [value for value in vars(statistics).values() if inspect.isclass(value)]
    sources = {each.__name__ for each in classes if callable(each) and "__call__" in vars(each)} - {Statistics.__name__}
    assert {"Batch", "Domains", "Renorm"} <= sources
    assert not {Applying.__name__, SourceBuffer.__name__} & sources
    swept = {type(row.ours().statistics).__name__ for row in ROWS}
    assert sources - swept == EXEMPT.keys()


def test_report_knows_only_results():
    """Of the lab and the bench a page needs the results; anything more and a report could not be made from a file."""
    known = {f"batchnorm.lab.{name}" for name in ("experiment", "result", "translated")}
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
