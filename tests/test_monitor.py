"""`Monitor`: finds faults while a model trains, warns once, and leaves no trace."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.diagnostics import Monitor
from batchnorm.errors import ArgumentError, InputError
from tests.sick_models import images, network


def train(model, items, optimizer=None, forward=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.01)
    model.train()
    for x, y in items:
        optimizer.zero_grad()
        F.cross_entropy((model if forward is None else forward)(x), y).backward()
        optimizer.step()
    return optimizer


def hooks(model) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def codes(monitor) -> list[str]:
    return [each.code for each in monitor.findings]


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        assert isinstance(value, float)
        self.scalars.setdefault(tag, []).append((step, value))


class TestCounting:
    def test_it_looks_every_so_many_steps(self):
        model, writer = network(), Writer()
        with Monitor(model, every=3, writer=writer) as monitor:
            train(model, images(10))
        assert (monitor.steps, monitor.looks) == (10, 3)
        assert [step for step, _ in writer.scalars["batchnorm/drift_max"]] == [3, 6, 9]
        assert {"batchnorm/1/drift", "batchnorm/4/log_ratio_of_deviations", "batchnorm/1/dead_channels"} <= set(
            writer.scalars
        )

    def test_between_looks_there_is_no_hook_at_the_model(self):
        model = network()
        before = hooks(model)
        counted = []
        with Monitor(model, every=4) as monitor:
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            for _ in range(8):
                train(model, images(1), optimizer)
                counted.append(hooks(model) == before)
        assert counted == [True, True, False, True, True, True, False, True]
        assert monitor.looks == 2

    def test_other_optimizers_do_not_count(self):
        model, other = network(), network()
        first, second = (torch.optim.SGD(model[place].parameters(), 0.01) for place in (0, 8))
        with Monitor(model, optimizer=second) as of_one, Monitor(model) as of_all:
            train(other, images(2))
            train(model, images(2), first)
            train(model, images(3), second)
        assert (of_one.steps, of_all.steps) == (3, 5)

    def test_steps_can_be_counted_by_hand(self):
        model = network()
        with Monitor(model, every=2, automatic=False) as monitor:
            train(model, images(3))
            assert monitor.steps == 0
            for item in images(4):
                train(model, [item])
                monitor.step()
        assert monitor.looks == 2

    @pytest.mark.parametrize("arguments", [{"every": 0}, {"select": "BN9"}])
    def test_bad_values(self, arguments):
        with pytest.raises(InputError):
            Monitor(network(), **arguments)

    @pytest.mark.parametrize("arguments", [{"model": 3}, {"model": network(), "writer": 3}])
    def test_bad_arguments(self, arguments):
        with pytest.raises(ArgumentError):
            Monitor(**arguments)


class TestFindings:
    def test_a_healthy_training_has_none(self):
        model = network()
        with Monitor(model, every=2) as monitor:
            train(model, images(40))
        assert codes(monitor) == []
        assert monitor.looks == 20

    def test_statistics_that_lag_are_reported_once_after_three_looks(self):
        model = network(momentum=1e-4)
        items = [(x + 4, y) for x, y in images(40)]
        monitor, message = (
            Monitor(model, every=2, select="BN201"),
            r"BN201 at step 34: 1, 4: running statistics are .* nats",
        )
        with pytest.warns(UserWarning, match=message) as told, monitor:
            train(model, items)
        assert len(told) == 1
        (finding,) = monitor.findings
        assert finding.evidence["step"] == 40
        assert finding.evidence["drift"] > 0.1

    def test_one_strange_batch_is_no_finding(self):
        model = network()
        items = images(12)
        items[5] = (items[5][0] * 5 + 20, items[5][1])
        with Monitor(model, every=2, ignore="BN504") as monitor:
            train(model, items)
        assert codes(monitor) == []

    def test_nan_in_the_input_is_reported_at_once(self):
        model, items = network(), images(4)
        items[1][0][3, 1, 2, 2] = float("nan")
        with pytest.warns(UserWarning, match="BN504 at step 2: 1:"), Monitor(model, every=2, select="BN504"):
            train(model, items)

    def test_rules_without_data_are_asked(self):
        model = network(momentum=0.9)
        with pytest.warns(UserWarning, match=r"BN101 at step 1: 1, 4: momentum is 0\.9"), Monitor(model, every=1):
            train(model, images(2))

    def test_accumulated_gradients_are_no_different_places(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)

        def accumulate():
            for _ in range(8):
                for x, y in images(8, 16):
                    F.cross_entropy(model(x), y).backward()
                optimizer.step()

        with pytest.warns(UserWarning, match="BN407 at step 2: .*: 8 updates"), Monitor(model, every=2) as monitor:
            accumulate()
        assert codes(monitor) == ["BN407"]

    def test_checkpointing_is_found_and_not_recorded_twice(self):
        model = network()
        with pytest.warns(UserWarning, match="BN705 at step 2: 1, 4"), Monitor(model, every=2) as monitor:
            train(
                model,
                images(8),
                forward=lambda x: model[6:](checkpoint(model[:6], x, use_reentrant=False)),
            )
        assert codes(monitor) == ["BN705"]

    def test_layers_that_train_wakes(self):
        model = network()
        model[1].eval()
        with pytest.warns(UserWarning, match="BN304 at step 1: 1: handed over"), Monitor(model, every=1):
            train(model, images(2))

    def test_a_validation_within_a_look_is_not_recorded(self):
        model = network()
        with Monitor(model, every=1, select="BN2,BN5,BN7") as monitor:
            for _ in range(5):
                model.eval()
                with torch.no_grad():
                    model(images(1)[0][0] * float("nan"))
                train(model, images(1))
        assert codes(monitor) == []

    def test_notes_are_kept_and_not_told(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, weight_decay=0.1)
        with Monitor(model, every=2, optimizer=optimizer) as monitor:
            train(model, images(4), optimizer)
        assert codes(monitor) == ["BN802"]


class TestNoTrace:
    @pytest.mark.parametrize("norm", ["torch", "ours"])
    def test_a_training_is_the_same_bit_for_bit(self, norm):
        model = network()
        if norm == "ours":
            model = bn.convert(model)
        other = copy.deepcopy(model)
        with Monitor(model, every=2):
            torch.manual_seed(0)
            train(model, images(7))
            after = torch.get_rng_state()
        torch.manual_seed(0)
        train(other, images(7))
        assert torch.equal(after, torch.get_rng_state())
        for name, value in other.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
        assert hooks(model) == hooks(other)

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    def test_after_an_exception_in_a_look(self, error):
        model = network()
        before = hooks(model)

        def items():
            yield from images(1)
            raise error

        monitor = Monitor(model, every=2)
        with pytest.raises(error), monitor:
            train(model, items())
        assert hooks(model) == before
        train(model, images(3))
        assert monitor.steps == 1

    def test_it_can_be_started_again(self):
        model = network()
        monitor = Monitor(model, every=2).start()
        train(model, images(2))
        monitor.close()
        train(model, images(2))
        with monitor:
            train(model, images(2))
        assert (monitor.steps, monitor.looks) == (4, 2)


class Whole(nn.Module):
    """A Sequential that is compiled in place is not compiled."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers(x)


class TestWrappers:
    @pytest.mark.parametrize("in_place", [False, True])
    def test_compiled_models_are_not_compiled_again(self, in_place):
        compiled = []

        def backend(graph, _inputs):
            compiled.append(graph)
            return graph

        model = Whole(network(momentum=1e-4))
        forward = None
        if in_place:
            model.compile(backend=backend)
        else:
            forward = torch.compile(model, backend=backend)
        items = [(x + 4, y) for x, y in images(36)]
        train(model, items[:1], forward=forward)
        graphs = len(compiled)
        assert graphs == 1
        monitor = Monitor(model if forward is None else forward, every=2, select="BN201")
        with pytest.warns(UserWarning, match="BN201 at step 34"), monitor:
            train(model, items[1:], forward=forward)
        assert monitor.looks == 17
        assert len(compiled) == graphs

    def test_data_parallel_models(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            model = DistributedDataParallel(network(momentum=0.9))
            with pytest.warns(UserWarning, match=r"BN101 at step 2: module\.1"), Monitor(model, every=2) as monitor:
                train(model, images(4))
            assert monitor.looks == 2
        finally:
            dist.destroy_process_group()

    def test_mixed_precision_with_a_scaler_that_skips_a_step(self):
        model = network()
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.01), torch.amp.GradScaler("cpu", init_scale=2.0)
        with Monitor(model, every=2, ignore="BN407") as monitor:
            for number, (x, y) in enumerate(images(12)):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.cross_entropy(model(x), y) * (float("inf") if number == 3 else 1)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        assert (monitor.steps, monitor.looks) == (11, 5)
        assert codes(monitor) == []


def test_many_layers_have_two_scalars():
    model, writer = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(101))), Writer()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Monitor(model, every=1, writer=writer):
            model(torch.randn(8, 3)).sum().backward()
            optimizer.step()
            model(torch.randn(8, 3)).sum().backward()
            optimizer.step()
    assert set(writer.scalars) == {"batchnorm/drift_max", "batchnorm/drift_median"}
