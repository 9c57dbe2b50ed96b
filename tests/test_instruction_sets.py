"""The builds of the kernel library that this processor could run, but would not choose, against the one it does."""

import os
import subprocess
import sys

import pytest
import torch

from batchnorm.kernels import Epilogue, Normalized, cpu
from batchnorm.kernels.activation import Activation

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the C++ kernels")

SHAPES = ((9, 13, 7, 7), (4, 20, 17, 17), (33, 5), (3, 2, 4001))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def results():
    """y, M2, dx, dresidual and the sums of some calls, in float64."""
    numbers = torch.Generator().manual_seed(0)
    found = []
    for shape in SHAPES:
        x, dy, residual = (torch.randn(shape, generator=numbers, dtype=torch.float64) for _ in range(3))
        for dtype in DTYPES:
            for interleaved in (False, True):
                planar = ((3 * x + 2).to(dtype), dy.to(dtype), residual.to(dtype))
                a, b, c = (t.movedim(1, -1).contiguous().movedim(-1, 1) if interleaved else t for t in planar)
                epilogue = Epilogue(residual=c, activation=Activation("silu"))
                y, batch, rstd, *_ = cpu.forward(a, 1e-5, epilogue)
                grads = cpu.backward(b, a, Normalized(batch.mean, rstd, batch.count), epilogue)
                found += [(str(dtype), value.double()) for value in (y, batch.m2, *grads) if value is not None]
    return found


@pytest.mark.parametrize("name", ["baseline", "AVX2", "AVX-512"])
def test_lesser_builds_agree(name, tmp_path):
    script = (
        "import sys, torch; from tests.test_instruction_sets import cpu, results; "
        "torch.save((cpu.instruction_set(), results()), sys.argv[1])"
    )
    environment = {**os.environ, "BATCHNORM_INSTRUCTION_SET": name}
    subprocess.run([sys.executable, "-c", script, tmp_path / "results"], env=environment, check=True)
    taken, theirs = torch.load(tmp_path / "results")
    if taken != name:
        pytest.skip(f"the processor has no {name}")
    ours = results()
    assert len(ours) == len(theirs) == len(SHAPES) * len(DTYPES) * 2 * 6
    for (dtype, a), (_, b) in zip(ours, theirs, strict=True):
        precision = torch.finfo(getattr(torch, dtype.removeprefix("torch."))).eps
        torch.testing.assert_close(a, b, rtol=0, atol=8 * precision * max(1.0, a.abs().max().item()))
