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
    "contrastive_pairs.py": r"100% right, shuffled: (4[5-9]|5[0-5])% right",
    "leave_batch_norm.py": r"tuned image by image: accuracy 0\.[89]",
    "average_weights.py": r"50 steps: recalibrated 0\.(\d)\d, tracked 0\.\1\d, the model's 1\.",
    "federated.py": r"merged statistics: accuracy 0\.[56]\d\n.*their own: +accuracy 0\.[78]",
    "frozen_memory.py": r"eval mode +2\.9 MB saved, loss (\d\.\d+)\nfrozen +1\.5 (.|\n)*learn +1\.5 MB saved, loss \1",
    "lightning_callback.py": r"accuracy 0\.9\d, running variance that of all data: True",
    "meta_learning.py": r"queries' own: accuracy 0\.8\d, class by class 0\.[67]\d\nTaskNorm: accuracy (0\.[89]\d), class by class \1",
    "monitor.py": r"BN101 at step 20: 1: momentum is 0\.99(.|\n)*5 looks in 100 steps: \['BN101'\]",
    "monitor_lightning.py": r"5 looks, findings: \[\]",
    "monitor_transformers.py": r"5 looks, findings: \[\]",
    "padded_sequences.py": r"padding masked out:  mean \+0\.00, deviation 1\.00",
    "private_training.py": r"1, 5 do; call model\.eval[^\n]*\nwith group norm: accuracy 0\.[89]",
    "quantization.py": r"float weights: +accuracy 0\.9\d\n2 bits, 2 pairs: +accuracy 0\.[678]\d\n"
    r"2 bits, trained, folded: accuracy 0\.9\d\n0 batch norms, 4 different",
    "sb3_policy.py": r"acts in inference: True, learns in training: True",
    "several_sizes.py": r"as one batch:   accuracy 0\.[89]",
    "switch.py": r"batchnorm\.layers: accuracy 1\.0",
    "torchrl_policy.py": r"running statistics of 200 updates, none of them of a rollout",
    "test_time.py": r"mixed: as trained 0\.1\d statistics 0\.9\d tent with guard 0\.9\d\n"
    r".*one class: as trained 0\.9\d statistics 0\.[012]\d tent with guard 0\.9\d",
    "weighted_samples.py": r"node counts once: .*at -1\.2\d\n.*graph counts once: .*at \+0\.00",
    "train_ddp.py": r"2 processes: accuracy 0\.9\d\d; all replicas agree",
}
LAUNCHED = {  # in processes of their own: by a launcher, or because a framework changes the process it runs in
    "accelerate_recipe.py": ("accelerate", ()),
    "lightning_callback.py": ("lightning", ()),
    "monitor_lightning.py": ("lightning", ()),
    "monitor_transformers.py": ("transformers", ()),
    "sb3_policy.py": ("stable_baselines3", ()),
    "torchrl_policy.py": ("torchrl", ()),
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


@pytest.mark.parametrize("name", ["monitor_lightning.py", "monitor_transformers.py"])
def test_callbacks_can_be_imported_without_their_frameworks(name):
    names = runpy.run_path(str(EXAMPLES[0].parent / name))
    assert names["BatchNormMonitor"](every=7).every == 7


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
