"""`bn.testing`: helpers for the tests of other projects."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import InputError
from tests.sick_models import images, lagging, network, trained

pytest_plugins = ["pytester"]


def test_a_healthy_model_passes_and_the_diagnosis_is_returned():
    diagnosis = bn.testing.assert_healthy(trained(), images(), criterion=nn.CrossEntropyLoss())
    assert diagnosis.batches == 8
    assert bn.testing.assert_healthy(trained()).batches == 0


def test_the_message_is_the_table_of_what_fails():
    patient = lagging()
    patient.model[1].momentum = 0.9
    with pytest.raises(AssertionError) as raised:
        bn.testing.assert_healthy(patient.model, **patient.arguments)
    message = str(raised.value)
    assert message.startswith("Sequential: BN201, BN101\nBN201  error    4\n")
    assert "remedy: bn.recalibrate(model, loader)" in message
    assert 'ignore="BN201" accepts it' in message
    assert "pass predict=" not in message


def test_severity_select_and_ignore():
    model = network(momentum=0.9)
    bn.testing.assert_healthy(model, severity="error")
    bn.testing.assert_healthy(model, ignore="BN101")
    bn.testing.assert_healthy(model, select="BN2")
    noted = torch.optim.SGD(network().parameters(), 0.1, weight_decay=0.1)
    model = network()
    noted = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    bn.testing.assert_healthy(model, optimizer=noted)
    with pytest.raises(AssertionError, match="BN802"):
        bn.testing.assert_healthy(model, optimizer=noted, severity="note")
    with pytest.raises(InputError, match="'hint'"):
        bn.testing.assert_healthy(model, severity="hint")


def test_pytest_shows_the_line_of_the_test(pytester):
    pytester.makepyfile(
        """
        import batchnorm as bn
        from torch import nn

        def test_mine():
            model = nn.BatchNorm1d(3, momentum=0.9)
            bn.testing.assert_healthy(model)
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    shown = result.stdout.str()
    assert "E       AssertionError: BatchNorm1d: BN101" in shown
    assert "raise AssertionError" not in shown
