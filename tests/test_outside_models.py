"""`diagnose` on models of strangers: sick ones are found, in the right layer, and healthy ones get neither error nor warning."""

import pytest
import torch

import batchnorm as bn
from tests.outside_models import HEALTHY, SICK


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SICK)
def test_it_is_found_in_the_right_layer(name):
    subject = SICK[name]()
    diagnosis = bn.diagnose(subject.model, subject.loader, **subject.arguments)
    found = [each for each in diagnosis.findings if each.code in subject.codes]
    assert found, str(diagnosis)
    for each in found:
        assert each.layers[0] in subject.layers, str(diagnosis)


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_serious_is_found(name):
    subject = HEALTHY[name]()
    diagnosis = bn.diagnose(subject.model, subject.loader, **subject.arguments)
    assert [each.code for each in diagnosis.findings if each.severity != "note"] == [], str(diagnosis)
