"""The C++ operators, called with what Python's checks would not let through."""

import subprocess
import sys

import pytest
import torch

from batchnorm.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the C++ kernels")

OPERATORS = torch.ops.batchnorm
X = torch.randn(5, 3, 7)
C = torch.ones(3, dtype=torch.float64)


def buffers(channels):
    return torch.zeros(channels), torch.ones(channels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPERATORS.moments(torch.ones(3), *(None,) * 3), r"x must be \(N, C, \*S\)"),
        (
            lambda: OPERATORS.moments(X, torch.ones(5, 1, 6, dtype=torch.bool), None, None),
            r"mask must be \(N, 1, \*S\)",
        ),
        (lambda: OPERATORS.moments(X, torch.ones(5, 1, 7), None, None), "mask must be bool"),
        (lambda: OPERATORS.moments(X.to(torch.complex64), *(None,) * 3), "take float32, float64, bfloat16 and float16"),
        (lambda: OPERATORS.moments(X, None, torch.ones(2), None), "one floating number"),
        (lambda: OPERATORS.moments(X, None, None, torch.ones(5, 1, 7)), "sample weights must be float64, without gaps"),
        (lambda: OPERATORS.moments(X, None, None, C.expand(5, 7, 3).mT.mT), "sample weights must be float64"),
        (lambda: OPERATORS.moments(X, None, None, C), r"sample weights must be \(N, 1, \*S\)"),
        (
            lambda: OPERATORS.moments(X, torch.ones(5, 1, 7, dtype=torch.bool), None, X[:, :1].double().contiguous()),
            "without a mask",
        ),
        (
            lambda: OPERATORS.input_grad(X, X, *(C,) * 4, C, *(None,) * 4, 0, 0.0, False, False),
            r"sample weights must be \(N, 1, \*S\)",
        ),
        (lambda: OPERATORS.normalize(X, C[:2], C, *(None,) * 4, 0, 0.0), r"must be \(C,\)"),
        (lambda: OPERATORS.normalize(X, C, C, *(None,) * 4, len(cpu._library.activations), 0.0), "no such activation"),
        (lambda: OPERATORS.normalize(X, C, C, None, None, X[:1], None, 0, 0.0), "must be as x"),
        (lambda: OPERATORS.reduce_grad(X[:4], X, C, C, *(None,) * 4, 0, 0.0, False), "must be as x"),
        (lambda: OPERATORS.forward_groups(X, 9, 1, 1e-5, *(None,) * 4, 0, 0.0), "groups must divide"),
        (
            lambda: OPERATORS.training_step_backward(
                X, X, torch.ones(3, 3, dtype=torch.float64), *(None,) * 3, 0, 0.0, *(False, False, True)
            ),
            "statistics of a step",
        ),
        (
            lambda: OPERATORS.update_running(*buffers(2), None, None, C, C, None, 35.0, 0.1, True, True),
            r"running statistics must be \(C,\)",
        ),
        (
            lambda: OPERATORS.update_running(*buffers(3), torch.zeros(()), None, C, C, None, 35.0, 0.1, True, True),
            "a counter must be one int64",
        ),
    ],
)
def test_wrong_arguments_raise(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()


def test_a_tensor_whose_storage_was_freed_raises():
    x = torch.randn(5, 3, 7)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="storage must not be smaller"):
        OPERATORS.moments(x, None, None, None)


@pytest.mark.parametrize("name", cpu.OPERATORS)
def test_an_operator_that_raises_keeps_no_argument(name):
    operator = getattr(OPERATORS, name).default
    kinds = [str(argument.type) for argument in operator._schema.arguments]
    for freed in [position for position, kind in enumerate(kinds) if "Tensor" in kind]:
        arguments = [
            torch.zeros(5, 3) if "Tensor" in kind else {"int": 1, "float": 0.5, "bool": True}[kind] for kind in kinds
        ]
        arguments[freed].untyped_storage().resize_(0)
        with pytest.raises((ValueError, RuntimeError)):
            operator(*arguments)
        assert all(argument._use_count() == 1 for argument in arguments if isinstance(argument, torch.Tensor)), freed


def test_hostile_arguments_raise_or_run():
    # In a process of its own: a write out of bounds may end it.
    done = subprocess.run([sys.executable, "-m", "tests.hostile", "1500"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1500 hostile calls" in done.stdout
    ran = int(done.stdout.split(":")[1].split()[0])
    assert 300 < ran < 1400  # some of each kind, or the arguments are not hostile
