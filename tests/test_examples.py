"""The examples run, stay short, and print what they are there to show."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
SHOWN = {
    "accelerate_recipe.py": r"accuracy 0\.9\d, running variance that of all data: True",
    "average_weights.py": r"50 steps: recalibrated 0\.(\d)\d, tracked 0\.\1\d, the model's 1\.",
    "federated.py": r"merged statistics: accuracy 0\.[56]\d\n.*their own: +accuracy 0\.[78]",
    "lightning_callback.py": r"accuracy 0\.9\d, running variance that of all data: True",
    "padded_sequences.py": r"padding masked out:  mean \+0\.00, deviation 1\.00",
    "several_sizes.py": r"as one batch:   accuracy 0\.[89]",
    "switch.py": r"batchnorm\.layers: accuracy 1\.0",
    "test_time.py": r"mixed: as trained 0\.1\d statistics 0\.9\d tent with guard 0\.9\d\n"
    r".*one class: as trained 0\.9\d statistics 0\.[012]\d tent with guard 0\.9\d",
    "train_ddp.py": r"2 processes: accuracy 0\.9\d\d; all replicas agree",
}
LAUNCHED = {  # in processes of their own: by a launcher, or because a framework changes the process it runs in
    "accelerate_recipe.py": ("accelerate", ()),
    "lightning_callback.py": ("lightning", ()),
    "train_ddp.py": ("numpy", ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")),
}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.name == "several_sizes.py" else ()) for path in EXAMPLES],
    ids=lambda path: path.name,
)
def test_examples(path, capsys):
    assert len(path.read_text().splitlines()) < 60
    if path.name in LAUNCHED:
        package, launcher = LAUNCHED[path.name]
        pytest.importorskip(package, reason=f"{package} is not installed", exc_type=ModuleNotFoundError)
        printed = launch(*launcher, str(path))
    else:
        runpy.run_path(str(path), run_name="__main__")
        printed = capsys.readouterr().out
    assert re.search(SHOWN[path.name], printed.replace("-0.00", "+0.00")), printed


def launch(*arguments):
    source = str(Path(batchnorm.__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
