"""`diagnose`: every rule finds its fault, in the right layer, and is silent where it is mended; the model stays as it was."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.bench.networks import NETWORKS, Block
from batchnorm.diagnostics import FAMILIES, RULES, matching, rule_of
from batchnorm.diagnostics.drawn import are_drawn_at_random
from batchnorm.diagnostics.fix import MENDS
from batchnorm.errors import ArgumentError, InputError
from batchnorm.lab.networks import tutorial_network
from tests.networks import FrozenBatchNorm2d, settle
from tests.sick_models import (
    GALLERY,
    ByHand,
    images,
    lagging,
    network,
    stale_buffers,
    train,
    trained,
    with_data,
    with_loss,
)


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def codes(diagnosis) -> list[str]:
    return [finding.code for finding in diagnosis.findings]


def serious(diagnosis) -> list[str]:
    return [finding.code for finding in diagnosis.findings if finding.severity != "note"]


class TestRules:
    def test_every_rule_has_a_patient_a_remedy_and_a_family(self):
        assert [rule.code for rule in RULES] == sorted({rule.code for rule in RULES}) == list(GALLERY)
        for rule in RULES:
            assert rule.remedy, rule.code
            assert rule.with_torch, rule.code
            assert rule.why.endswith("."), rule.code
            assert rule.code[2] in FAMILIES
        assert {rule.code for rule in RULES if rule.fixable} == MENDS.keys()

    @pytest.mark.parametrize("code", GALLERY)
    def test_it_finds_the_fault_and_names_the_layers(self, code):
        patient = GALLERY[code].sick()
        diagnosis = bn.diagnose(patient.model, **patient.arguments)
        found = next((each for each in diagnosis.findings if each.code == code), None)
        assert found is not None, str(diagnosis)
        assert set(found.layers) == set(GALLERY[code].layers)
        assert found.evidence
        assert all(layer in dict(patient.model.named_modules()) for layer in found.layers)

    @pytest.mark.parametrize("code", GALLERY)
    def test_nothing_serious_is_found_in_the_healthy_twin(self, code):
        patient = GALLERY[code].healthy()
        diagnosis = bn.diagnose(patient.model, **patient.arguments)
        assert serious(diagnosis) == []
        assert code not in codes(diagnosis)

    def test_the_layer_that_lags_is_named_not_its_successor(self):
        model = trained()
        model[1].running_var *= 9
        found = bn.diagnose(model, images(), select="BN201").findings
        assert [each.layers for each in found] == [("1",)]

    def test_select_and_ignore_take_codes_and_beginnings(self):
        assert matching("BN10") == {"BN101", "BN102", "BN103", "BN104"}
        assert rule_of("bn201").code == "BN201"
        patient = lagging()
        patient.model[1].momentum = 0.9
        assert codes(bn.diagnose(patient.model, **patient.arguments)) == ["BN201", "BN101"]
        assert codes(bn.diagnose(patient.model, **patient.arguments, select="BN1")) == ["BN101"]
        assert codes(bn.diagnose(patient.model, **patient.arguments, ignore=["BN1"])) == ["BN201"]
        with pytest.raises(InputError, match="BN9"):
            bn.diagnose(patient.model, select="BN9")

    def test_what_was_not_asked_is_said(self):
        lines = bn.diagnose(trained()).not_asked
        assert any(line.startswith("pass loader= and predict= to ask BN301") for line in lines)
        asked = {code for line in lines for code in line.rpartition("ask ")[2].split(", ")}
        assert asked == {rule.code for rule in RULES if rule.needs}

    def test_a_target_network_without_buffers_is_found_by_its_own_data(self):
        patient = stale_buffers(copied=False)
        for arguments in (patient.arguments, {**patient.arguments, "loader": images()}):
            found = bn.diagnose(patient.model, **arguments).findings
            assert [(each.code, set(each.layers)) for each in found] == [("BN601", {"1", "4"})]
        patient = stale_buffers(copied=True)
        assert codes(bn.diagnose(patient.model, **patient.arguments)) == []

    def test_half_precision_is_a_note_where_nothing_trains(self):
        assert [each.severity for each in bn.diagnose(trained().half().eval()).findings] == ["note"]

    def test_accumulation_that_updates_once_is_no_fault(self):
        model = bn.convert(trained())
        optimizer = torch.optim.SGD(model.parameters(), 0.01)

        def step(model, item):
            with bn.accumulate(4):
                for part in item[0].split(16):
                    model(part).sum().backward()
            optimizer.step()

        assert codes(bn.diagnose(model, images(), step=step)) == []

    def test_few_updates_are_no_fault_where_somebody_recalibrated(self):
        model = network()
        for x, _ in images(2):
            model(x)
        assert codes(bn.diagnose(model)) == ["BN202"]
        assert codes(bn.diagnose(bn.recalibrate(model, images()), images())) == []


def layered(norm) -> nn.Module:
    """A residual network of two blocks."""
    torch.manual_seed(0)

    def unit() -> list[nn.Module]:
        return [nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8)]

    def body() -> nn.Module:
        return nn.Sequential(*unit(), nn.ReLU(), *unit())

    blocks = [Block(body(), nn.Identity(), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), norm(8), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


HEALTHY = {
    "torch": lambda: layered(nn.BatchNorm2d),
    "ours": lambda: layered(bn.BatchNorm2d),
    "fused": lambda: bn.fuse(layered(nn.BatchNorm2d)),
    "frozen by another library": lambda: layered(FrozenBatchNorm2d),
    "no batch norm": lambda: layered(lambda channels: nn.GroupNorm(2, channels)),
    "dropout behind": lambda: nn.Sequential(network(), nn.Dropout(0.2), nn.Linear(3, 3)),
    "hand-written": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 16), ByHand(16), nn.ReLU(), nn.Linear(16, 3)),
}


@pytest.mark.parametrize("steps", [0, 40], ids=["untrained", "settled"])
@pytest.mark.parametrize("build", HEALTHY.values(), ids=HEALTHY)
def test_no_rule_complains_about_a_healthy_network(build, steps):
    torch.manual_seed(0)
    model, items = build(), images(6)
    train(model, items, steps, lr=0.02)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)

    def predict(model, x):
        model.eval()
        return model(x)

    def step(model, item):
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(item[0]), item[1]).backward()
        optimizer.step()

    diagnosis = bn.diagnose(
        model,
        items,
        criterion=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        predict=predict,
        validate=lambda model: model.eval()(items[0][0]),
        step=step,
        twin=copy.deepcopy(model),
        replicas=[copy.deepcopy(model)],
    )
    assert serious(diagnosis) == [], str(diagnosis)
    assert not diagnosis.not_asked


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "resnet50"])
def test_no_rule_complains_about_a_new_network_of_the_bench(name):
    assert codes(bn.diagnose(NETWORKS[name].build())) == []


@pytest.mark.parametrize("batch_norm", [True, False])
def test_no_rule_complains_about_the_network_of_the_demonstration(batch_norm):
    torch.manual_seed(0)
    items = [(torch.rand(64, 1, 28, 28), torch.randint(10, (64,))) for _ in range(3)]
    model = train(tutorial_network(batch_norm), items, 60, lr=0.01)
    found = bn.diagnose(model, items, criterion=nn.CrossEntropyLoss(), predict=lambda model, x: model.eval()(x))
    assert serious(found) == [], str(found)


def test_dead_channels_of_a_new_network_are_constant_not_small():
    """Networks of transformers draw weights with a deviation of .02: after some layers the variance is 1e-12."""
    model = network()
    with torch.no_grad():
        model[0].weight *= 1e-7
    assert codes(bn.diagnose(model, images(), select="BN702")) == []
    with torch.no_grad():
        model[0].weight[:6] = 0
    model[0].bias = nn.Parameter(torch.full((8,), 3.0))
    assert codes(bn.diagnose(model, images(), select="BN702")) == ["BN702"]


def test_statistics_that_were_loaded_are_no_fault():
    assert codes(bn.diagnose(settle(network()))) == []


def tutorials(channels: int) -> ByHand:
    """The class of the tutorial."""
    return ByHand(channels, registered=False, graph=True, biased=True, positions=True)


class TestTheTutorialsClass:
    """Each defect of the layer by hand in section 5 of the tutorial is a finding with the line to change."""

    def test_on_rows(self):
        model = nn.Sequential(nn.Linear(16, 8), tutorials(8))
        rows = [torch.randn(64, 16) for _ in range(8)]
        for x in rows:
            model(x)
        found = {each.code: each for each in bn.diagnose(model, rows).findings}
        assert {code: each.severity for code, each in found.items()} == {
            "BN711": "error",
            "BN714": "error",
            "BN716": "note",
        }
        assert "register_buffer" in found["BN711"].with_torch
        assert "no_grad" in found["BN714"].with_torch
        assert "m / (m - 1)" in found["BN716"].with_torch
        assert found["BN716"].evidence["too_small_by"] == 1 / 64
        assert [each.code for each in bn.diagnose(model).findings] == ["BN711", "BN714"]
        model[1] = bn.interop.from_tutorial(model[1])
        assert serious(bn.diagnose(model, rows)) == []

    def test_a_graph_is_found_before_the_first_batch(self):
        model = nn.Sequential(nn.Linear(16, 8), tutorials(8))
        assert codes(bn.diagnose(model, select="BN714")) == []
        assert codes(bn.diagnose(model, [torch.randn(64, 16)], select="BN714")) == ["BN714"]
        assert model[1].running_mean.grad_fn is None

    @pytest.mark.parametrize("batches", [0, 3])
    def test_on_images_new_and_with_statistics_of_positions(self, batches):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), tutorials(8))
        items = [torch.randn(16, 3, 10, 10) for _ in range(4)]
        for x in items[:batches]:
            model(x)
        found = {each.code: each for each in bn.diagnose(model, items).findings}
        assert found.keys() == {"BN711", "BN714", "BN715", "BN716"}
        assert found["BN715"].evidence["statistics"] == 8 * 8 * 8
        assert "mean((0, 2, 3)" in found["BN715"].with_torch

    def test_on_a_batch_of_one_it_raises_nothing_and_says_so(self):
        model = nn.Sequential(nn.Linear(16, 8), tutorials(8))
        items = [torch.randn(64, 16), torch.randn(1, 16)]
        (found,) = bn.diagnose(model, items, select="BN401").findings
        assert "silently returns its bias" in found.message
        model[1] = nn.BatchNorm1d(8)
        (found,) = bn.diagnose(model, items, select="BN401").findings
        assert "stops with an error" in found.message

    def test_biased_statistics_of_small_batches_are_a_warning(self):
        model = nn.Sequential(tutorials(4))
        (found,) = bn.diagnose(model, [torch.randn(6, 4) for _ in range(8)], select="BN716").findings
        assert found.severity == "warning"

    def test_layers_that_take_more_than_an_input_are_not_called_alone(self):
        class Conditional(ByHand):
            def forward(self, x, shift):
                return super().forward(x) + shift

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = Conditional(4, registered=False, biased=True)

            def forward(self, x):
                return self.norm(x, 1.0)

        assert codes(bn.diagnose(Model(), [torch.randn(32, 4) for _ in range(3)], select="BN71")) == ["BN711"]

    def test_deviations_channels_last_and_other_names(self):
        class Norm2d(nn.Module):
            def __init__(self, unbiased):
                super().__init__()
                self.scale, self.shift = nn.Parameter(torch.ones(5)), nn.Parameter(torch.zeros(5))
                self.register_buffer("avg_mean", torch.zeros(5))
                self.register_buffer("avg_std", torch.ones(5))
                self.unbiased = unbiased

            def forward(self, x):  # (N, T, C)
                if not self.training:
                    return (x - self.avg_mean) / (self.avg_std + 1e-5) * self.scale + self.shift
                mean, var = x.mean((0, 1)), x.var((0, 1), unbiased=False)
                with torch.no_grad():
                    self.avg_mean.mul_(0.99).add_(mean, alpha=0.01)
                    self.avg_std.mul_(0.99).add_(x.std((0, 1), unbiased=self.unbiased), alpha=0.01)
                return (x - mean) / (var + 1e-5).sqrt() * self.scale + self.shift

        items = [torch.randn(8, 6, 5) for _ in range(4)]
        assert codes(bn.diagnose(nn.Sequential(Norm2d(True)), items, select="BN71")) == []
        assert codes(bn.diagnose(nn.Sequential(Norm2d(False)), items, select="BN71")) == ["BN716"]


@pytest.mark.parametrize("classes", [True, False])
def test_batches_learned_by_heart_tell_no_answer(classes):
    """Their samples were drawn at random, so that a batch has nothing to tell (BN406)."""
    torch.manual_seed(0)
    wide = (nn.Linear(784, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU())
    model = nn.Sequential(*wide, nn.Linear(256, 10 if classes else 1))
    criterion = nn.CrossEntropyLoss() if classes else nn.MSELoss()
    items = [(torch.randn(64, 784) + 1, torch.randint(10, (64,)) if classes else torch.randn(64, 1)) for _ in range(8)]
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in 5 * items:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    assert codes(bn.diagnose(model, items, criterion=criterion, select="BN406")) == []


def test_batches_that_were_not_drawn_at_random():
    torch.manual_seed(0)
    x, y = torch.randn(8, 32, 3, 6, 6), torch.randint(4, (8, 32))
    offset, scale = torch.randn(8, 1, 1, 1, 1), torch.rand(8, 1, 1, 1, 1) + 0.5
    assert are_drawn_at_random(list(x), list(y))
    assert are_drawn_at_random(list(x), list(y * 0 - 1))
    assert not are_drawn_at_random(list(x + offset), list(y))
    assert not are_drawn_at_random(list(x * scale), list(y))
    assert not are_drawn_at_random(list(x), list(y.flatten().sort().values.view(8, 32)))
    alarms = sum(
        not are_drawn_at_random(list(torch.randn(6, 24, 50)), list(torch.randint(2, (6, 24)))) for _ in range(100)
    )
    assert alarms < 10


class Inline(nn.Module):
    def __init__(self, formula):
        super().__init__()
        self.block, self.formula = nn.Linear(4, 4), formula

    def forward(self, x):
        return self.formula(self.block(x))


def normalized(x):
    return (x - x.mean(0)) / (((x - x.mean(0)) ** 2).mean(0) + 1e-5).sqrt()


class TestModelsWithoutBatchNormModules:
    @pytest.mark.parametrize(
        ("formula", "seen"),
        [
            (lambda x: F.batch_norm(x, None, None, training=True), "F.batch_norm is called in the forward of 1"),
            (normalized, "mean and variance over the batch are computed in the forward of 1"),
            (lambda x: (x - x.mean(0)) / torch.sqrt(x.var(0) + 1e-5), "mean and variance over the batch"),
            (lambda x: x - torch.var_mean(x, dim=(0,))[1], "mean and variance over the batch"),
            (lambda x: x - x.mean(1, keepdim=True), "no call of F.batch_norm and no variance over the batch"),
            (lambda x: x / x.std(), "no call of F.batch_norm and no variance over the batch"),
            (lambda x: x - x.mean(0), "no call of F.batch_norm and no variance over the batch"),
        ],
    )
    def test_what_is_in_their_place_is_said(self, formula, seen):
        model = nn.Sequential(nn.Linear(4, 4), Inline(formula), nn.LayerNorm(4))
        items = [torch.randn(8, 4)]
        before = state_of(model)
        diagnosis = bn.diagnose(model, items)
        assert codes(diagnosis) == []
        assert diagnosis.in_place.startswith("no batch norm module was found; 1 LayerNorm; ")
        assert seen in diagnosis.in_place
        assert diagnosis.in_place in str(diagnosis)
        assert diagnosis.in_place == diagnosis.to_data()["in_place"]
        assert same(before, state_of(model))

    def test_no_loader_or_one_that_does_not_fit_is_no_error(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        assert "pass loader=" in str(bn.diagnose(model))
        assert "raised RuntimeError" in str(bn.diagnose(model, [torch.randn(8, 3)]))
        assert "yields nothing" in str(bn.diagnose(model, []))
        diagnosis = bn.diagnose(model, iter([torch.randn(8, 4)]))
        assert "no call of F.batch_norm" in str(diagnosis)
        assert diagnosis.fix(model).changes == ()
        assert bn.diagnose(nn.Sequential(nn.LazyLinear(3)), [torch.randn(8, 4)]).in_place

    def test_a_model_with_modules_has_no_such_line(self):
        assert bn.diagnose(trained(), images()).in_place == ""


class TestTheirOwnRemediesSilenceTheRules:
    def test_domains_of_batches(self):
        norm = bn.BatchNorm1d(8, statistics=bn.statistics.Domains(("a", "b")))
        items = [(torch.randn(64, 8) * (1 + 3 * (n % 2)) + 3 * (n % 2), "ab"[n % 2]) for n in range(60)]

        def forward(model, item):
            with bn.domain(item[1]):
                return model(item[0])

        assert "BN405" in codes(bn.diagnose(nn.BatchNorm1d(8), items))
        for item in items:
            forward(norm, item)
        assert codes(bn.diagnose(norm, items, forward=forward)) == []

    def test_domains_in_one_forward(self):
        class Both(nn.Module):
            def __init__(self, norm):
                super().__init__()
                self.norm = norm

            def forward(self, x):
                with bn.domain("a"):
                    y = self.norm(x)
                with bn.domain("b"):
                    return y - self.norm(4 * x + 3)

        items = [torch.randn(64, 8) for _ in range(60)]
        assert codes(bn.diagnose(Both(nn.BatchNorm1d(8)), items, ignore="BN2")) == ["BN704"]
        model = Both(bn.BatchNorm1d(8, statistics=bn.statistics.Domains(("a", "b"))))
        for x in items:
            model(x)
        assert codes(bn.diagnose(model, items)) == []

    def test_a_domain_that_lags_is_found(self):
        norm = bn.BatchNorm1d(8, statistics=bn.statistics.Domains(("a", "b")))
        items = [(torch.randn(64, 8) + 3 * (n % 2), "ab"[n % 2]) for n in range(60)]

        def forward(model, item):
            with bn.domain(item[1]):
                return model(item[0])

        for item in items:
            forward(norm, item)
        assert codes(bn.diagnose(norm, items, forward=forward)) == []
        norm.running_mean_b += 3
        diagnosis = bn.diagnose(norm, items, forward=forward)
        assert codes(diagnosis) == ["BN201"]
        assert codes(diagnosis.fix(norm).diagnosis) == []

    def test_moving_averages_of_small_batches(self):
        model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8))
        pairs = [torch.randn(2, 16) for _ in range(300)]
        assert codes(bn.diagnose(model, pairs, select="BN402")) == ["BN402"]
        model = bn.convert(model, statistics=bn.statistics.MovingAverage())
        for x in pairs:
            model(x)
        assert codes(bn.diagnose(model, pairs, select="BN402")) == []

    def test_a_layerwise_recalibration_behind_dropout(self):
        patient = GALLERY["BN204"].sick()
        assert codes(bn.diagnose(patient.model, **patient.arguments, select="BN2")) == ["BN204"]
        bn.recalibrate(patient.model, patient.arguments["loader"], method="layerwise")
        assert codes(bn.diagnose(patient.model, **patient.arguments, select="BN2")) == []


def test_synchronized_layers_are_measured_on_the_cpu():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(lagging().model)
    assert [(each.code, each.layers) for each in bn.diagnose(model, images()).findings] == [("BN201", ("4",))]
    assert type(model[4]) is nn.SyncBatchNorm


def state_of(model: nn.Module) -> list:
    named = list(model.named_parameters())
    return [
        {name: value.clone() for name, value in model.state_dict().items()},
        [(name, value.requires_grad, value.grad) for name, value in named],
        [None if value.grad is None else value.grad.clone() for _, value in named],
        [
            (each.training, set(vars(each)), len(each._forward_hooks), len(each._forward_pre_hooks))
            for each in model.modules()
        ],
        torch.get_rng_state(),
        random.getstate(),
        repr(np.random.get_state()),
    ]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(nan=-1234.5), b.nan_to_num(nan=-1234.5))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class TestTheModelIsUntouched:
    @staticmethod
    def harmful(model, optimizer):
        """Arguments whose functions change everything."""

        def step(model, item):
            model.train()
            optimizer.zero_grad(set_to_none=False)
            nn.functional.cross_entropy(model(item[0]), item[1]).backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 2
            random.random(), np.random.rand(), torch.rand(1)

        def predict(model, x):
            model[1].extra = 1
            return model.train()(x)

        return {
            "criterion": nn.CrossEntropyLoss(),
            "optimizer": optimizer,
            "step": step,
            "predict": predict,
            "validate": lambda model: model.train()(images(1)[0][0]),
        }

    @pytest.fixture
    def model(self):
        model = trained()
        nn.functional.cross_entropy(model(images(1)[0][0]), images(1)[0][1]).backward()
        return model

    def test_whatever_the_functions_do(self, model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        optimizer.step()
        before, inner = state_of(model), copy.deepcopy(optimizer.state_dict())
        found = bn.diagnose(model, images(), **self.harmful(model, optimizer))
        assert {"BN301", "BN303"} <= set(codes(found))
        assert same(state_of(model), before)
        assert same(optimizer.state_dict(), inner)

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    def test_a_loader_that_raises(self, model, error):
        def loader():
            yield from images(2)
            raise error

        before = state_of(model)
        with pytest.raises(error):
            bn.diagnose(model, loader())
        assert same(state_of(model), before)

    @pytest.mark.parametrize("name", ["step", "predict", "validate", "criterion", "forward"])
    def test_a_function_that_raises(self, model, name):
        arguments = self.harmful(model, torch.optim.SGD(model.parameters(), 0.1))

        def raising(*arguments):
            if isinstance(arguments[0], nn.Module):
                arguments[0].train()(images(1)[0][0])
            raise OSError("no disk")

        before = state_of(model)
        with pytest.raises(OSError, match="no disk"):
            bn.diagnose(model, images(2), **{**arguments, name: raising})
        assert same(state_of(model), before)

    def test_hand_written_layers_with_plain_attributes(self):
        model = nn.Sequential(nn.Linear(4, 4), ByHand(4, registered=False))
        layer, before = model[1], (model[1].running_mean, model[1].running_mean.clone())
        bn.diagnose(model, [torch.randn(16, 4) + 3 for _ in range(3)])
        assert layer.running_mean is before[0]
        assert torch.equal(layer.running_mean, before[1])

    def test_without_a_loader_the_model_never_runs(self, model):
        model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
        bn.diagnose(model, criterion=nn.CrossEntropyLoss(), predict=lambda model, x: model(x), twin=model)


class TestInputs:
    def test_dicts_keyword_arguments_and_an_uneven_last_batch(self):
        class Keywords(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = trained()

            def forward(self, *, pixels):
                return self.net(pixels)

        items = [{"pixels": x} for x, _ in images()] + [{"pixels": images(1, 50)[0][0]}]
        assert serious(bn.diagnose(Keywords(), items)) == []

    def test_an_iterator_is_read_once(self):
        assert codes(bn.diagnose(lagging().model, iter(images()), criterion=nn.CrossEntropyLoss())) == ["BN201"]

    def test_no_more_batches_are_read_than_needed(self):
        def endless():
            while True:
                yield from images(1)

        assert bn.diagnose(trained(), endless()).batches == 64

    def test_batches_that_training_refuses_are_left_out_of_everything_else(self):
        model, items = GALLERY["BN401"].sick().model, [*images(4), *images(1, 1)]
        found = bn.diagnose(model, items, criterion=nn.CrossEntropyLoss(), predict=lambda model, x: model.eval()(x))
        assert serious(found) == ["BN401"]
        found = bn.diagnose(model, images(3, 1), criterion=nn.CrossEntropyLoss(), twin=copy.deepcopy(model))
        assert codes(found)[0] == "BN401"

    def test_an_empty_loader(self):
        with pytest.raises(InputError, match="at least one batch"):
            bn.diagnose(trained(), [])

    def test_lazy_layers_are_not_run(self):
        bare = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(3))
        bn.diagnose(bare, images(), predict=lambda model, x: model(x))
        assert bare[2].has_uninitialized_params()
        model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
        diagnosis = bn.diagnose(model, images())
        assert codes(diagnosis) == []
        assert any("lazy" in line and "BN201" in line for line in diagnosis.not_asked)
        assert model[1].has_uninitialized_params()

    def test_a_model_on_the_meta_device_is_not_run(self):
        with torch.device("meta"):
            model = network(momentum=0.9)
        diagnosis = bn.diagnose(model, images())
        assert codes(diagnosis) == ["BN101"]
        assert any("meta" in line for line in diagnosis.not_asked)

    def test_shared_layers_are_named_once(self):
        layer = nn.BatchNorm2d(3, momentum=0.9)
        found = bn.diagnose(nn.Sequential(layer, nn.ReLU(), layer)).findings
        assert [each.layers for each in found] == [("0",)]

    def test_the_model_itself_is_named_like_in_named_modules(self):
        found = bn.diagnose(nn.BatchNorm2d(3, momentum=0.9))
        assert found.findings[0].layers == ("",)
        assert "the model" in str(found)

    def test_a_compiled_model_is_measured_inside(self):
        model = torch.compile(lagging().model, backend="eager")
        found = bn.diagnose(model, images(), select="BN201").findings
        assert [each.layers for each in found] == [("_orig_mod.4",)]

    @pytest.mark.parametrize(
        "arguments",
        [{"loader": 3}, {"criterion": 3}, {"optimizer": 3}, {"twin": 3}, {"replicas": [3]}, {"step": "x"}],
        ids=lambda each: next(iter(each)),
    )
    def test_arguments_of_the_wrong_kind(self, arguments):
        with pytest.raises(ArgumentError, match=next(iter(arguments))):
            bn.diagnose(trained(), **arguments)

    def test_a_model_of_the_wrong_kind(self):
        with pytest.raises(ArgumentError, match=r"torch\.nn\.Module"):
            bn.diagnose(3)

    def test_criterion_without_targets(self):
        with pytest.raises(ArgumentError, match="objective="):
            bn.diagnose(trained(), [x for x, _ in images()], criterion=nn.CrossEntropyLoss())


FIXED = [code for code in GALLERY if code in MENDS]


class TestFix:
    @pytest.mark.parametrize("code", FIXED)
    def test_the_rule_is_silent_afterwards_and_undo_restores_every_bit(self, code):
        patient = GALLERY[code].sick()
        arguments = {"loader": images(), **patient.arguments}
        if code == "BN502":  # half convolutions need half input
            arguments["forward"] = lambda model, item: model(item[0].half())
        before = state_of(patient.model)
        diagnosis = bn.diagnose(patient.model, **arguments)
        fixed = diagnosis.fix(patient.model, select=code)
        assert any(line.startswith(code) for line in fixed.done), str(fixed)
        assert fixed.done == diagnosis.plan(patient.model, code) or code == "BN703"
        assert code not in codes(fixed.diagnosis), str(fixed)
        fixed.undo()
        assert same(state_of(patient.model), before)
        assert code in codes(bn.diagnose(patient.model, **arguments))

    def test_recalibrating_brings_the_loss_back(self):
        patient = lagging()
        diagnosis = bn.diagnose(patient.model, **patient.arguments)
        evidence = diagnosis.findings[0].evidence
        assert evidence["loss_before"] > 100 * evidence["loss_after"]
        diagnosis.fix(patient.model)
        with torch.no_grad():
            losses = [nn.functional.cross_entropy(patient.model.eval()(x), y).item() for x, y in images()]
        assert sum(losses) / len(losses) == pytest.approx(evidence["loss_after"], rel=0.1)

    def test_what_needs_a_decision_is_left(self):
        patient = GALLERY["BN402"].sick()
        fixed = bn.diagnose(patient.model, **patient.arguments).fix(patient.model)
        assert any(line.startswith("BN402: it needs a decision") for line in fixed.left)

    def test_without_a_loader_nothing_is_recalibrated(self):
        patient = GALLERY["BN501"].sick()
        fixed = bn.diagnose(patient.model).fix(patient.model)
        assert fixed.done == ()
        assert "loader=" in fixed.left[0]

    def test_a_bias_that_goes_elsewhere_too_stays(self):
        class Branching(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

            def forward(self, x):
                y = self.conv(x)
                return self.norm(y) + y

        patient = with_data(Branching())
        before = state_of(patient.model)
        fixed = bn.diagnose(patient.model, **patient.arguments).fix(patient.model)
        assert any("goes elsewhere" in line for line in fixed.left)
        assert same(state_of(patient.model), before)

    def test_an_exception_leaves_everything_as_it_was(self):
        patient = with_loss(lagging().model)
        patient.model[1].momentum = 0.9
        calls = [0]

        def forward(model, item):
            calls[0] += 1
            if calls[0] > allowed:
                raise OSError("no disk")
            return model(item[0])

        allowed = 10**9
        diagnosis = bn.diagnose(patient.model, images(), forward=forward)
        before, allowed = state_of(patient.model), calls[0] + 3
        with pytest.raises(OSError, match="no disk"):
            diagnosis.fix(patient.model)
        assert same(state_of(patient.model), before)
        assert patient.model[1].momentum == 0.9


class TestFiles:
    @pytest.fixture
    def diagnosis(self):
        inner = lagging().model
        model = nn.ModuleDict({"<script>alert(1)</script>": inner})
        return bn.diagnose(model, images(), forward=lambda _, item: inner(item[0]))

    def test_json_has_every_finding_and_layer(self, diagnosis, tmp_path):
        diagnosis.to_json(tmp_path / "d.json")
        data = json.loads((tmp_path / "d.json").read_text())
        assert data["schema"] == 1
        assert [each["code"] for each in data["findings"]] == codes(diagnosis)
        assert data["findings"][0]["evidence"] == diagnosis.findings[0].evidence
        assert len(data["layers"]) == 2

    def test_sarif_refers_to_its_rules(self, diagnosis, tmp_path):
        diagnosis.to_sarif(tmp_path / "d.sarif")
        data = json.loads((tmp_path / "d.sarif").read_text())
        (run,) = data["runs"]
        rules = run["tool"]["driver"]["rules"]
        assert data["version"] == "2.1.0"
        for result in run["results"]:
            assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
            assert result["level"] in ("error", "warning", "note")
            assert result["message"]["text"]
            assert result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"]

    def test_html_escapes_names(self, diagnosis, tmp_path):
        diagnosis.to_html(tmp_path / "d.html")
        page = (tmp_path / "d.html").read_text()
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;.4" in page
        assert "BN201" in page

    def test_nan_is_written_as_text(self, tmp_path):
        model = trained()
        bn.diagnose(model, twin=GALLERY["BN501"].sick().model, replicas=[GALLERY["BN501"].sick().model]).to_json(
            tmp_path / "d.json"
        )
        data = json.loads((tmp_path / "d.json").read_text())
        assert [each["evidence"]["distance_of_buffers"] for each in data["findings"]] == ["inf", "inf"]


def test_a_large_model_is_diagnosed_in_time():
    model = nn.Sequential(*(nn.BatchNorm1d(20) for _ in range(1000)), nn.Embedding(10**6, 1))
    assert codes(bn.diagnose(model)) == []
