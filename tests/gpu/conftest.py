"""The tests of the Triton programs: in Triton's interpreter on CPU tensors (`make interpret`), or on a GPU (`make gpu`)."""

import importlib.util
import os
from pathlib import Path

import pytest

DEVICE = "cuda" if os.environ.get("BATCHNORM_TEST_DEVICE") == "cuda" else "cpu"
HERE = Path(__file__).parent


def _reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `make interpret` installs it into a folder of its own"
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "these run in Triton's interpreter, TRITON_INTERPRET=1: `make interpret`"
    return None


REASON = _reason()
collect_ignore_glob = [] if REASON is None else ["test_programs*.py", "test_dispatch*.py"]


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def _on_this_device(monkeypatch):
    """The programs take tensors of this device, and remember nothing of other tests."""
    from batchnorm.kernels.gpu import dispatch, trust

    if DEVICE == "cpu" and REASON is None:
        from tests.gpu import interpreter

        interpreter.repair()
    monkeypatch.setattr(dispatch, "DEVICES", (DEVICE,))
    dispatch.unavailable.cache_clear()
    dispatch._cuts.clear()
    trust.forget()
    yield
    dispatch.unavailable.cache_clear()
    dispatch._cuts.clear()
    trust.forget()
