"""The public interface is a contract: names, signatures, documentation."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm as bn

SIGNATURES = {
    bn.BatchNorm: "(num_features, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, device=None, dtype=None, *, "
    "bias=True, activation=None, statistics=None, channel_axis=1, running_variance='unbiased', on_single='error', "
    "on_nonfinite='skip', padded='zero')",
    bn.BatchNorm.forward: "(self, input, residual=None, mask=None, lengths=None, *, activation=None, weights=None)",
    bn.functional.batch_norm: "(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, "
    "eps=1e-05, *, activation=None, residual=None, mask=None, lengths=None, weights=None, reducer=None)",
    bn.functional.normalize: "(input, weight=None, bias=None, eps=1e-05, *, activation=None, residual=None, mask=None, "
    "lengths=None, weights=None, reducer=None, group_size=None, moments=None, renormalization=None)",
    bn.functional.normalize_with: "(input, mean, variance, weight=None, bias=None, eps=1e-05, *, activation=None, "
    "residual=None, mask=None, lengths=None)",
    bn.convert: "(model, *, to=None, channels_per_group=8, standardize_weights=False, statistics=None, fuse=False, "
    "save_memory=False)",
    bn.diagnose: "(model, loader=None, *, criterion=None, objective=None, forward=None, optimizer=None, predict=None, "
    "validate=None, step=None, twin=None, replicas=None, select=None, ignore=None)",
    bn.freeze: "(model, *, affine=True, save_memory=False)",
    bn.fold: "(model, example_input, *, tolerance=0.0001, train=False, weight_fake_quant=None)",
    bn.unfold: "(model)",
    bn.fuse: "(model)",
    bn.save_memory: "()",
    bn.recalibrate: "(model, loader, *, forward=None, method='joint', process_group=None, limit=None)",
    bn.revert: "(model)",
    bn.average_buffers: "(model, process_group=None)",
    bn.merge_statistics: "(state_dicts, counts, *, running_variance='unbiased')",
    bn.local_keys: "(model, *, affine=True)",
    bn.replicas_agree: "(model, process_group=None)",
    bn.joint_values: "(critic, now, later)",
    bn.jointly: "(forward, *batches)",
    bn.shuffled: "(forward, batch, *, process_group=None)",
    bn.track: "(model, copy, *, method='recalibrate', decay=None, batches=16, every=1)",
    bn.synchronize: "(model, process_group=None)",
    bn.training_mode: "(model, mode)",
    bn.unsynchronize: "(model)",
    bn.explain: "(values, gamma=1.0, beta=0.0, eps=1e-05, momentum=0.1, *, grad_output=None)",
    bn.Moments.merge: "(self, other)",
    bn.Moments.variance: "(self, *, unbiased=False)",
}


def bare(function) -> str:
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signatures(function):
    assert bare(function) == SIGNATURES[function]


def test_all_names_exist_are_sorted_and_documented():
    assert bn.__all__ == sorted(bn.__all__)
    for name in bn.__all__:
        assert inspect.getdoc(getattr(bn, name)), name


def run(program: str) -> str:
    """What a program prints in a process of its own, where nothing of ours has been imported yet."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


class TestNamesOnFirstUse:
    def test_importing_loads_no_torch(self):
        assert (
            run("import sys, batchnorm as bn; bn.__all__, dir(bn), bn.__version__; print('torch' in sys.modules)")
            == "False"
        )

    def test_each_name_alone_is_what_its_module_defines(self):
        program = (
            "import sys, importlib, batchnorm as bn\n"
            "for name in bn.__all__:\n"
            "    for loaded in [module for module in sys.modules if module.startswith('batchnorm.')]:\n"
            "        vars(bn).pop(loaded.split('.')[1], None)\n"
            "    vars(bn).pop(name, None)\n"
            "    value = getattr(bn, name)\n"
            "    assert vars(bn)[name] is value, name\n"
            "    print(name, getattr(value, '__module__', None) or getattr(value, '__name__', 'batchnorm.version'))\n"
        )
        homes = dict(line.split() for line in run(program).splitlines())
        assert list(homes) == bn.__all__
        assert {home.split(".")[0] for home in homes.values()} == {"batchnorm"}
        assert homes["BatchNorm2d"] == "batchnorm.layers"
        assert homes["functional"] == "batchnorm.functional"

    def test_a_name_loads_what_it_needs_only(self):
        loaded = run("import sys, batchnorm as bn; bn.BatchNorm2d; print(*sys.modules)").split()
        assert "batchnorm.layers" in loaded
        assert not {"batchnorm.folding", "batchnorm.population", "batchnorm.distributed", "batchnorm.interop"} & {
            *loaded
        }

    def test_a_function_keeps_its_name_beside_the_module_of_that_name(self):
        program = "import batchnorm.explain, batchnorm as bn; from batchnorm.explain import Explanation; print(bn.explain([1, 3]).mean)"
        assert run(program) == "2.0"

    def test_all_names_at_once(self):
        program = (
            "import batchnorm; from batchnorm import *; print(*(n for n in batchnorm.__all__ if n not in globals()))"
        )
        assert run(program) == ""

    def test_dir_lists_them(self):
        assert {*bn.__all__} < {*dir(bn)}
        assert {name for name in dir(bn) if not name.startswith("__")} == {*bn.__all__} - {"__version__"}

    def test_a_wrong_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="module 'batchnorm' has no attribute 'BatchNorm4d'"):
            bn.BatchNorm4d  # noqa: B018
        with pytest.raises(ImportError, match="cannot import name 'BatchNorm4d'"):
            from batchnorm import BatchNorm4d  # noqa: F401

    def test_type_checkers_see_each_name_as_public(self):
        """In a stub a name is public if it is imported as itself."""
        stub = Path(bn.__file__).with_suffix(".pyi")
        for line in ast.parse(stub.read_text()).body:
            assert isinstance(line, ast.ImportFrom)
            assert all(alias.asname == alias.name for alias in line.names)


@pytest.mark.parametrize(
    "function", [f for f in SIGNATURES if f is not bn.BatchNorm.forward], ids=lambda f: f.__qualname__
)
def test_everything_public_is_annotated(function):
    target = function.__init__ if inspect.isclass(function) else function
    signature = inspect.signature(target)
    assert signature.return_annotation is not inspect.Signature.empty
    for name, parameter in signature.parameters.items():
        assert name == "self" or parameter.annotation is not inspect.Parameter.empty, name


def test_a_version_is_known():
    assert bn.__version__.count(".") >= 2


def test_modules_are_attributes_without_an_import_of_their_own():
    done = subprocess.run(
        [sys.executable, "-c", "import batchnorm as bn; print(bn.folding.__name__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "batchnorm.folding\n"
