"""Wrong arguments straight at the operators of the C++ library: each call must work or raise, and touch no memory that is not its own.

python -m tests.hostile 2000        # `make sanitize` runs it on a library built with AddressSanitizer
"""

from __future__ import annotations

import random
import sys
import warnings

import torch

from batchnorm.kernels import cpu

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.bool,
    torch.int64,
    torch.int32,
    torch.complex64,
)
IN_FLOAT64 = ("mean", "rstd", "m2", "mean_grad", "mean_grad_xhat", "save_mean", "save_var")
IN_TORCHS_NODE = ("cudnn_batch_norm", "cudnn_batch_norm_backward")
SHAPES = (
    (),
    (0,),
    (1,),
    (3,),
    (6,),
    (5, 3),
    (5, 3, 7),
    (5, 3, 4, 4),
    (1, 3, 9),
    (5, 1, 7),
    (2, 3),
    (4, 3),
    (0, 3, 4),
    (5, 0),
)


def tensor(chosen: random.Random) -> torch.Tensor:
    """Of a random shape, dtype and layout."""
    shape, dtype = chosen.choice(SHAPES), chosen.choice((*DTYPES[:1] * 6, *DTYPES))
    value = torch.ones(shape).to(dtype)
    kind = chosen.randrange(8)
    if kind == 0 and value.dim():
        return value.repeat_interleave(2, -1)[..., ::2]  # gaps
    if kind == 1 and value.dim():
        return value[:1].expand(shape) if shape[0] else value
    if kind == 2 and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if kind == 3 and chosen.random() < 0.2:
        value.untyped_storage().resize_(value.untyped_storage().nbytes() // 2)  # as if another had freed it
    return value


def fitting(name: str, chosen: random.Random) -> torch.Tensor:
    """What an argument of this name would be in a call that is right: (5, 3, 7), planar, float32."""
    if name in ("x", "dy", "residual", "input", "grad_output"):
        return torch.randn(5, 3, 7)
    if name == "mask":
        return torch.rand(5, 1, 7) < 0.7
    if name == "weights":
        return torch.rand(5, 1, 7, dtype=torch.float64) - 0.2
    if name in ("updates", "nonfinite_batches"):
        return torch.zeros((), dtype=torch.int64)
    if name in ("count", "masked_count", "r_max", "d_max"):
        return torch.tensor(35.0, dtype=torch.float64)
    if name == "statistics":
        return torch.ones(chosen.choice((2, 4)), 3, dtype=torch.float64)
    if name in ("reserve", "reserveSpace"):
        return torch.ones(4, dtype=torch.float64)
    return torch.ones(3, dtype=torch.float64 if name in IN_FLOAT64 else torch.float32)


def call(number: int) -> bool:
    """One operator with arguments of which some are wrong; whether it ran."""
    chosen = random.Random(number)
    torch.manual_seed(number)
    name, aten = chosen.choice((*cpu.OPERATORS, *IN_TORCHS_NODE)), torch.ops.aten
    operator = getattr(aten if name in IN_TORCHS_NODE else torch.ops.batchnorm, name).default
    wrong = chosen.choice((0.0, 0.1, 0.3))
    arguments = []
    for argument in operator._schema.arguments:
        kind = str(argument.type)
        if "Tensor" in kind:
            if "Optional" in kind and chosen.random() < 0.4:
                arguments.append(None)
            else:
                arguments.append(tensor(chosen) if chosen.random() < wrong else fitting(argument.name, chosen))
        elif kind == "int":
            sane = chosen.randrange(1, 6)
            arguments.append(chosen.choice((-1, 0, 7, 8, 2**31, 2**62, -(2**63))) if chosen.random() < wrong else sane)
        elif kind == "bool":
            arguments.append(chosen.random() < 0.5)
        else:
            arguments.append(chosen.choice((0.0, 0.1, 1.0, -1.0, 35.0, float("nan"), float("inf"))))
    try:
        operator(*arguments)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    return True


def main() -> None:
    """So many calls."""
    warnings.simplefilter("ignore")
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    ran = sum(call(number) for number in range(runs))
    print(f"{runs} hostile calls, {cpu.instruction_set()}: {ran} ran, {runs - ran} raised")  # noqa: T201


if __name__ == "__main__":
    main()
