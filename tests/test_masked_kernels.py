"""The C++ sums and maps under a mask: the same bits wherever the counted values lie, and no byte outside of a tensor is touched."""

import ctypes
import mmap
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import Tensor

from batchnorm.kernels import Activation, Epilogue, Normalized, cpu, eager
from batchnorm.kernels.contract import Groups
from tests.budget import assert_same_bits

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

ACTIVATIONS = [None, "relu", "silu"]
# N, C, S and the share of positions that count, in runs of about so many; around vectors, the ways to map, and chunks of 64K values.
PLACES = {
    "tiny": (40, 5, 3, 0.5, 1),
    "short": (9, 67, 49, 0.8, 2),
    "short, whole samples apart": (31, 16, 127, 0.5, 127),
    "joined or not": (8, 6, 511, 0.5, 40),
    "long rows": (3, 2, 2001, 0.9, 300),
    "few of one channel": (5, 1, 3000, 0.01, 1),
    "chunks": (4, 2, 30_001, 0.9, 700),
}


def results(tensors: tuple[Tensor, ...], mask: Tensor, activation: str | None, padding: float = 0.0) -> list[Tensor]:
    """What each verb gives: of counted values, (count, C), or of channels, (C,). The backward finds `padding` in y; mask: (N, S)."""
    x, dy, residual = tensors
    C = x.shape[1]
    affine = torch.float64 if x.dtype is torch.float64 else torch.float32
    weight, bias = torch.linspace(0.5, 2, C, dtype=affine), torch.linspace(-1, 1, C, dtype=affine)
    found = []
    for beside in (residual, None):
        e = Epilogue(weight, bias, beside, mask.unsqueeze(1), None if activation is None else Activation(activation))
        y, batch, rstd, *_ = cpu.forward(x, 1e-3, e)
        found += [batch.mean, batch.m2, rstd, y, cpu.normalize(x, batch.mean, rstd, e)]
        if activation == "relu":
            e = e._replace(residual=None, output=y.masked_fill(~mask.unsqueeze(1), padding))
        found += [
            *cpu.backward(dy, x, Normalized(batch.mean, rstd, batch.count), e),
            *cpu.reduce_grad(dy, x, batch.mean, rstd, e),
        ]
        found += cpu.input_grad(dy, x, batch.mean, rstd, e, None)
    found = [value if value.dim() == 1 else value.movedim(1, -1) for value in found if value is not None]
    assert not any(value[~mask].any() for value in found if value.dim() == 3)
    return [value[mask] if value.dim() == 3 else value for value in found]


def assert_all_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, values in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(f"result {i}", *values)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values (C, counted) where the mask counts, as (N, C, S); NaN elsewhere."""
    x = values.new_full((*mask.shape, values.shape[0]), torch.nan)
    x[mask] = values.T
    return x.movedim(-1, 1).contiguous()


def check_places(name: str, dtype: torch.dtype) -> None:
    N, C, S, share, run = PLACES[name]
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(N * S // run + 1, generator=generator) < share).repeat_interleave(run)[: N * S].view(N, S)
    mask[0, : 7 * S // 8] = False  # the first value that counts lies deep in the tensor
    mask[-1, -1] = True
    count = int(mask.sum())
    samples = [torch.randn(C, count, generator=generator, dtype=torch.float64).mul(2).add(3).to(dtype) for _ in "123"]
    for activation in ACTIVATIONS if name != "chunks" else ["silu"]:
        torch.set_num_threads(4)  # too many for two channels: their chunks are shared out
        found = results(tuple(spread(x, mask) for x in samples), mask, activation, torch.nan)
        torch.set_num_threads(1)
        side_by_side = torch.ones(1, count, dtype=torch.bool)
        assert_all_same_bits(found, results(tuple(x.unsqueeze(0) for x in samples), side_by_side, activation))
        exact = eager.moments(samples[0].double().unsqueeze(0), None)
        torch.testing.assert_close(found[:2], [exact.mean, exact.m2], rtol=1e-6, atol=1e-6)


def at_a_border(values: Tensor, at_end: bool) -> Tensor:
    """A copy whose first or last byte lies beside memory that may not be touched. The pages are never given back."""
    page, size = mmap.PAGESIZE, values.numel() * values.element_size()
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert protect(address, page, 0) == protect(address + page + room, page, 0) == 0
    offset = page + (room - size if at_end else 0)
    placed = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    return placed.view_as(values).copy_(values)


def check_borders(dtype: torch.dtype, at_end: bool) -> None:
    for N, C, S in ((3, 2, 5), (2, 3, 523), (5, 33, 1), (1, 1, 7)):
        check_weights_at_borders([torch.randn(N, C, S).to(dtype) for _ in "123"], at_end)
    for (N, C, S), gaps, activation in product([(3, 2, 5), (9, 3, 21), (2, 3, 523), (1, 1, 7)], (1, 9), ACTIVATIONS):
        mask = (torch.arange(N * S) % (gaps + 1) != 1).view(N, S)
        tensors = [torch.randn(N, C, S).to(dtype) for _ in "123"]
        found = results(tuple(at_a_border(x, at_end) for x in tensors), at_a_border(mask, at_end), activation)
        assert_all_same_bits(found, results(tuple(tensors), mask, activation))


def check_weights_at_borders(tensors: list[Tensor], at_end: bool) -> None:
    N, _, S = tensors[0].shape
    weights = torch.rand(N, 1, S, dtype=torch.float64)
    found = []
    for place in (lambda values: values, lambda values: at_a_border(values, at_end)):
        x, dy, residual = (place(values) for values in tensors)
        e = Epilogue(residual=residual, sample_weights=place(weights), activation=Activation("silu"))
        batch = cpu.weighted_moments(x, e.sample_weights)
        found.append([batch.mean, batch.m2, *cpu.input_grad(dy, x, batch.mean, batch.m2, e, (batch.mean, batch.m2))])
    assert_all_same_bits(*found)


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("name", PLACES)
def test_no_bit_depends_on_where_the_counted_values_lie(name, dtype):
    check_places(name, dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("build", ["own", "AVX2", pytest.param("baseline", marks=pytest.mark.slow)])
def test_each_build_at_the_borders_of_memory(build):
    """In a process of its own, which a touch ends; and there the places again."""
    script = (
        "from tests.test_masked_kernels import *\n"
        f"if {build!r} not in ('own', cpu.instruction_set()): sys.exit(77)  # the processor has none\n"
        "for dtype in cpu.DTYPES: check_borders(dtype, False), check_borders(dtype, True)\n"
        f"for name, dtype in product(list(PLACES)[:-1] if {build!r} != 'own' else [], cpu.DTYPES): check_places(name, dtype)"
    )
    environment = os.environ if build == "own" else {**os.environ, "BATCHNORM_INSTRUCTION_SET": build}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode in (0, 77)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_depends_on_how_it_is_mapped(dtype):
    """Rows, joined planes and outputs around the cache (above 8 MB), by the amount of padding alone."""
    torch.set_num_threads(2)
    samples, found = [torch.randn(160, 150).to(dtype) for _ in "123"], []
    for N, S in ((3, 77), (8, 100), (8, 128), (360 // dtype.itemsize, 177), (9, 3001)):
        mask = torch.zeros(N, S, dtype=torch.bool)
        mask[0, -77:] = mask[1, :70] = mask[2, 5:8] = True
        found.append(results(tuple(spread(x, mask) for x in samples), mask, "silu"))
    for others in found[1:]:
        assert_all_same_bits(others, found[0])


def test_groups_of_which_one_counts_nothing():
    torch.set_num_threads(2)
    x, dy = torch.randn(2, 7, 64, 300)
    mask, silu, groups = torch.rand(7, 1, 300) > 0.3, Activation("silu"), Groups(3, 2)
    mask[2:4] = False
    y, batch, rstd, *_ = cpu.forward(x, 1e-3, Epilogue(mask=mask, activation=silu), groups)
    _, _, *sums = cpu.backward(
        dy, x, Normalized(batch.mean, rstd, None), Epilogue(mask=mask, activation=silu), groups=groups
    )
    for i, cut in enumerate((slice(0, 2), slice(2, 4), slice(4, 7))):
        alone = Epilogue(mask=mask[cut], activation=silu)
        own_y, own, own_rstd, *_ = cpu.forward(x[cut], 1e-3, alone)
        own_sums = cpu.reduce_grad(dy[cut], x[cut], own.mean, own_rstd, alone)
        assert_all_same_bits([y[cut], batch.m2[i], sums[0][i], sums[1][i]], [own_y, own.m2, *own_sums])
