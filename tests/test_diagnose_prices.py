"""What a cause costs, how it is measured, and what `fix` says about it afterwards."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.diagnostics import measured, progress
from batchnorm.diagnostics.dropout import Dropout
from tests.outside_models import SICK
from tests.sick_models import images, trained


def found(diagnosis, code):
    return next(each for each in diagnosis.findings if each.code == code)


def two_faults() -> tuple[nn.Module, dict]:
    """A network in which one layer is far off, and the other a little."""
    model = trained()
    model[1].running_mean += 6
    model[4].running_var *= 1.3
    return model.eval(), {"loader": images(), "criterion": nn.CrossEntropyLoss()}


class TestPrices:
    def test_the_cause_alone_brings_back_what_recalibrating_all_does(self):
        model, arguments = two_faults()
        finding = found(bn.diagnose(model, **arguments), "BN201")
        assert finding.layers == ("1",)
        numbers = finding.evidence
        with torch.no_grad():
            outputs = [(model(x), y) for x, y in images()]
        hits = torch.cat([y == output.argmax(1) for output, y in outputs]).double()
        losses = [F.cross_entropy(output, y).item() for output, y in outputs]
        assert numbers["accuracy_before"] == pytest.approx(hits.mean().item())
        assert numbers["loss_before"] == pytest.approx(sum(losses) / len(losses))
        assert numbers["accuracy_after"] > 0.95 > 0.6 > numbers["accuracy_before"]
        assert 0 < numbers["accuracy_noise"] < 0.05
        assert numbers["loss_after"] < numbers["loss_before"] / 10
        assert numbers["loss_after_all"] <= numbers["loss_after"]
        points = 100 * (numbers["accuracy_after"] - numbers["accuracy_before"])
        assert f"recalibrating 1 alone brings back {points:.1f} of " in finding.message

    def test_without_a_loss_predictions_are_counted(self):
        model, arguments = two_faults()

        def predict(model, x):
            return model.eval()(x).argmax(1)

        numbers = found(bn.diagnose(model, arguments["loader"], predict=predict), "BN201").evidence
        assert numbers["accuracy_after"] > numbers["accuracy_before"] + 0.3
        assert "loss_before" not in numbers

    def test_without_both_nothing_is_priced(self):
        model, arguments = two_faults()
        assert set(found(bn.diagnose(model, arguments["loader"]), "BN201").evidence) == {
            "drift",
            "log_ratio_of_deviations",
        }

    def test_the_price_of_a_twin_is_its_own(self):
        model = trained()
        twin = copy.deepcopy(model)
        twin[1].running_mean += 6
        diagnosis = bn.diagnose(model, images(), criterion=nn.CrossEntropyLoss(), twin=twin)
        numbers = found(diagnosis, "BN601").evidence
        assert numbers["loss_before"] > 10 * numbers["loss_after"]
        fixed = diagnosis.fix(model)
        assert fixed.changes[0].evidence["loss_before"] == pytest.approx(numbers["loss_before"])
        assert fixed.changes[0].evidence["loss_after"] == pytest.approx(numbers["loss_after"])

    def test_an_effect_within_the_noise_is_said_to_be_noise(self):
        before = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
        after = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
        change = measured.difference(after, before)
        assert change is not None
        assert change.value == pytest.approx(0.25)
        assert change.noise == pytest.approx((after - before).std().item() / 2)
        assert change.is_noise
        alone = measured.difference(after[:1], before[:1])
        assert alone is not None
        assert alone.noise == math.inf
        assert measured.difference(after, before[:2]) is None

    @pytest.mark.parametrize(
        ("output", "target", "hits"),
        [
            (torch.eye(3), torch.tensor([0, 1, 0]), [1, 1, 0]),
            (torch.tensor([2, 1]), torch.tensor([2, 2]), [1, 0]),
            (torch.eye(3), torch.tensor([0, -100, 0]), [1, 0]),
            (torch.eye(2).reshape(1, 2, 2), torch.tensor([[0, 0]]), [0.5]),
            (torch.eye(3), torch.tensor([0.0, 1.0, 0.0]), None),
            (torch.eye(3), torch.tensor([0, 1, 7]), None),
            (torch.rand(3), torch.tensor([0, 1, 0]), None),
            (None, torch.tensor([0]), None),
        ],
    )
    def test_hits(self, output, target, hits):
        right = measured.hits_of(output, (None, target))
        assert (None if right is None else right.tolist()) == hits


class TestFix:
    @pytest.mark.parametrize("with_data", [True, False])
    def test_replicas_get_one_set_of_statistics(self, with_data):
        subject = SICK["federated_average_of_parameters"]()
        replicas = subject.arguments["replicas"]
        arguments = subject.arguments if with_data else {"replicas": replicas}
        before = [copy.deepcopy(each.state_dict()) for each in (subject.model, *replicas)]
        fixed = bn.diagnose(subject.model, subject.loader if with_data else None, **arguments).fix(
            subject.model, "BN611"
        )
        change = next(each for each in fixed.changes if each.code == "BN611")
        assert change.gone
        for replica in replicas:
            for name, value in subject.model.state_dict().items():
                torch.testing.assert_close(replica.state_dict()[name], value)
        if with_data:
            assert change.evidence["accuracy_after"] > change.evidence["accuracy_before"] + 0.3
        fixed.undo()
        for model, state in zip((subject.model, *replicas), before, strict=True):
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    def test_the_pool_has_the_variance_between_replicas(self):
        models = [nn.BatchNorm1d(2) for _ in range(2)]
        models[0].running_mean.fill_(1)
        models[1].running_mean.fill_(3)
        fixed = bn.diagnose(models[0], replicas=models[1:]).fix(models[0])
        assert [each.code for each in fixed.changes] == ["BN611"]
        for model in models:
            assert model.running_mean.tolist() == [2, 2]
            assert model.running_var.tolist() == [2, 2]  # 1 within, 1 between

    def test_hand_written_layers_are_recalibrated(self):
        subject = SICK["hand_written_norm_with_foreign_statistics"]()
        before = copy.deepcopy(subject.model.state_dict())
        fixed = bn.diagnose(subject.model, subject.loader, **subject.arguments).fix(subject.model)
        assert [(each.code, each.gone) for each in fixed.changes] == [("BN201", True)]
        numbers = fixed.changes[0].evidence
        assert numbers["accuracy_after"] > numbers["accuracy_before"] + 0.05
        assert f"accuracy {numbers['accuracy_before']:.1%} -> {numbers['accuracy_after']:.1%}" in str(fixed)
        fixed.undo()
        assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())

    def test_frozen_layers_with_foreign_statistics_are_recalibrated(self):
        subject = SICK["backbone_frozen_with_statistics_of_raw_pixels"]()
        fixed = bn.diagnose(subject.model, subject.loader, **subject.arguments).fix(subject.model, "BN201")
        numbers = fixed.changes[0].evidence
        assert numbers["accuracy_after"] > 0.7 > 0.3 > numbers["accuracy_before"]

    def test_the_batches_of_an_iterator_are_read_once_and_used_again(self):
        model, arguments = two_faults()
        fixed = bn.diagnose(model, iter(arguments["loader"])).fix(model)
        assert [(each.code, each.gone) for each in fixed.changes] == [("BN201", True)]
        assert fixed.diagnosis.batches == len(arguments["loader"])


class TestDropout:
    def test_it_is_seen_in_modules_and_functions(self):
        x = torch.ones(100)
        for call in (nn.Dropout(0.5), lambda x: F.dropout(x, 0.5, True), lambda x: torch.dropout(x, 0.5, True)):
            with Dropout() as seen:
                assert not torch.equal(call(x), x)
            assert seen.active
            with Dropout(off=True) as seen:
                assert torch.equal(call(x), x)
            assert seen.active

    def test_inactive_dropout_does_not_count(self):
        with Dropout() as seen:
            nn.Dropout(0.5).eval()(torch.ones(3)), nn.Dropout(0.0)(torch.ones(3)), F.dropout(torch.ones(3), 0.5, False)
        assert not seen.active


class TestProgress:
    @pytest.fixture
    def clock(self, monkeypatch):
        now = [0.0]

        def time() -> float:
            now[0] += 1
            return now[0]

        monkeypatch.setattr(progress.time, "monotonic", time)
        monkeypatch.setattr(progress, "is_watched", lambda: True)

    def test_it_is_shown_after_two_seconds_and_cleared(self, clock, capsys):
        bn.diagnose(trained(), images(4))
        written = capsys.readouterr().err
        assert "batch 1" not in written
        assert "reading, batch 3" in written
        assert written.endswith("\r\x1b[K")

    def test_nobody_watches(self, capsys):
        bn.diagnose(trained(), images(2))
        assert capsys.readouterr().err == ""

    def test_a_listener_gets_it_instead(self, clock, capsys):
        lines = []
        with progress.listening(lines.append):
            bn.diagnose(trained(), images(2), criterion=nn.CrossEntropyLoss())
        assert lines[:2] == ["reading, batch 1", "reading, batch 2"]
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("item", [lambda x: x, lambda x: [x], lambda x: {"x": x}])
def test_items_without_targets_have_no_accuracy(item):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    batches = [item(torch.randn(16, 4)) for _ in range(3)]
    call = {} if not isinstance(batches[0], dict) else {"forward": lambda model, item: model(item["x"])}
    found = bn.diagnose(model, batches, predict=lambda model, x: model(x), select="BN301", **call)
    assert all("accuracy" not in str(finding) for finding in found.findings)
