"""Says why the tests of this folder do not run here, if they do not."""

import pytest

from tests.gpu.conftest import REASON


def test_the_programs_can_be_tested_here():
    if REASON is not None:
        pytest.skip(REASON)
