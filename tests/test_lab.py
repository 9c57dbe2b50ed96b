"""The lab: data, the training loop's measurements, the runner that never trains twice, and the direction of the effect."""

import dataclasses
import gzip
import math
import os
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm.layers
from batchnorm.errors import InputError, MissingExtraError, StateError
from batchnorm.files import check_writable, to_json, write
from batchnorm.lab import extras, runner
from batchnorm.lab.data import Dataset, Examples, idx, load
from batchnorm.lab.data.digits import FILE as DIGITS
from batchnorm.lab.experiment import Measured, Results, Setting
from batchnorm.lab.experiments import demo
from batchnorm.lab.networks import tutorial_network
from batchnorm.lab.train import (
    Schedule,
    accuracy,
    activation_input,
    batches,
    euclidean_norm,
    gradient_norms,
    look_inside,
    train,
)
from batchnorm.lab.unit import Finished, Unit
from tests.idx_files import header, write_idx_files


@pytest.fixture(scope="module")
def digits():
    return load()


class TestDigits:
    def test_they_are_scikit_learns_split_as_the_docstring_says(self):
        datasets = pytest.importorskip("sklearn.datasets")
        from sklearn.model_selection import train_test_split

        pixels, classes = datasets.load_digits(return_X_y=True)
        learn, test = train_test_split(range(1797), test_size=360, stratify=classes, random_state=0)
        train, validation = train_test_split(learn, test_size=240, stratify=classes[learn], random_state=0)
        with np.load(DIGITS) as stored:
            assert (stored["pixels"] == pixels).all()
            assert (stored["classes"] == classes).all()
            for part, index in {"train": train, "validation": validation, "test": test}.items():
                assert stored[part].tolist() == index

    def test_three_parts_share_no_image_and_every_class(self, digits):
        parts = (digits.train, digits.validation, digits.test)
        assert list(map(len, parts)) == [1197, 240, 360]
        everything = torch.cat([part.images for part in parts]).flatten(1)
        assert len(torch.unique(everything, dim=0)) == 1797
        for part in parts:
            shares = torch.bincount(part.labels, minlength=10) / len(part)
            assert shares.min() > 0.09
            assert shares.max() < 0.11

    def test_standardized_with_the_training_images_only(self, digits):
        assert digits.train.images.shape == (1197, 1, 28, 28)
        assert float(digits.train.images.mean()) == pytest.approx(0, abs=1e-5)
        assert float(digits.train.images.std()) == pytest.approx(1, abs=1e-5)
        assert float(digits.test.images.mean()) != pytest.approx(0, abs=1e-5)

    def test_the_same_on_every_call(self, digits):
        assert torch.equal(load().test.images, digits.test.images)

    def test_on_a_device(self, digits):
        moved = digits.to("meta")
        for part in (moved.train, moved.validation, moved.test):
            assert part.images.device == part.labels.device == torch.device("meta")
        assert [len(part) for part in (moved.train, moved.validation, moved.test)] == [1197, 240, 360]


class TestIdx:
    @pytest.mark.parametrize("zipped", [False, True])
    def test_reads_what_was_written(self, tmp_path, zipped):
        images, labels = write_idx_files(tmp_path, zipped=zipped)
        data = load(tmp_path)
        assert [len(part) for part in (data.train, data.validation, data.test)] == [200, 40, 80]
        assert torch.equal(data.test.labels, labels[240:].long())
        pixels = data.test.images.squeeze(1)
        restored = (pixels - pixels.min()) / (pixels.max() - pixels.min())
        expected = images[240:].float()
        torch.testing.assert_close(restored, (expected - expected.min()) / (expected.max() - expected.min()))
        assert float(data.train.images.std()) == pytest.approx(1, abs=1e-5)

    def test_train_and_validation_share_no_image(self, tmp_path):
        write_idx_files(tmp_path)
        data = load(tmp_path)
        together = torch.cat([data.train.images, data.validation.images]).flatten(1)
        assert len(torch.unique(together, dim=0)) == 240

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("train-images-idx3-ubyte", None, "train-images-idx3-ubyte .*is missing"),
            ("train-images-idx3-ubyte", b"", "16 bytes of IDX header, it has 0"),
            ("train-images-idx3-ubyte", b"<html>not found</html>", "must begin with the IDX number 2051"),
            ("train-images-idx3-ubyte", header(1, 240) + bytes(240), "number 2051, it has 2049"),
            (
                "train-images-idx3-ubyte",
                header(3, 240, 28, 28) + bytes(99),
                "announces 240 x 28 x 28 = 188160 bytes, 99",
            ),
            ("train-images-idx3-ubyte", header(3, 240, 8, 8) + bytes(240 * 64), "28x28.*8x8"),
            ("train-labels-idx1-ubyte", header(1, 9) + bytes(9), "holds 240 and train-labels-idx1-ubyte holds 9"),
            ("train-labels-idx1-ubyte", header(1, 240) + bytes([10] * 240), "labels from 0 to 9.*up to 10"),
        ],
    )
    def test_a_bad_file_is_named(self, tmp_path, name, content, message):
        write_idx_files(tmp_path)
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            load(tmp_path)

    @pytest.mark.parametrize(
        "content", [b"not gzip", gzip.compress(header(1, 500) + bytes(500))[:-12]], ids=["no archive", "cut short"]
    )
    def test_a_bad_archive_is_named(self, tmp_path, content):
        path = tmp_path / "labels.gz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot read .*labels\.gz"):
            idx.read(path, dimensions=1)

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
            load(tmp_path / "nowhere")

    @pytest.mark.parametrize("value", [0, 100])
    def test_images_that_show_nothing(self, tmp_path, value):
        write_idx_files(tmp_path)
        content = header(3, 240, 28, 28) + bytes([value]) * 240 * 28 * 28
        (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(InputError, match=rf"must not be constant; .* 200 in the IDX files is {value / 255:g} of 1"):
            load(tmp_path)

    def test_too_few_images(self, tmp_path):
        write_idx_files(tmp_path, train=240, test=20)
        with pytest.raises(InputError, match=r"at least 64 labels.*holds 20"):
            load(tmp_path)


class TestTraining:
    def test_a_pass_is_a_permutation_without_its_incomplete_batch(self):
        order = batches(10, 3, seed=0)
        passes = [torch.cat([next(order) for _ in range(3)]) for _ in range(2)]
        for once in passes:
            assert len(set(once.tolist())) == 9
        assert passes[0].tolist() != passes[1].tolist()

    def test_the_seed_decides_the_order(self):
        assert torch.equal(next(batches(100, 10, seed=1)), next(batches(100, 10, seed=1)))
        assert not torch.equal(next(batches(100, 10, seed=1)), next(batches(100, 10, seed=2)))

    def test_both_networks_start_from_the_same_weights(self):
        linear = []
        for batch_norm in (False, True):
            torch.manual_seed(3)
            network = tutorial_network(batch_norm)
            linear.append([layer for layer in network if isinstance(layer, nn.Linear)])
        for plain, normalized in zip(*linear, strict=True):
            assert torch.equal(plain.weight, normalized.weight)
            assert torch.equal(plain.bias, normalized.bias)

    def test_the_network_is_the_tutorials(self):
        network = tutorial_network(batch_norm=True)
        assert [layer.in_features for layer in network if isinstance(layer, nn.Linear)] == [784, 512, 256]
        assert sum(type(layer) is batchnorm.layers.BatchNorm1d for layer in network) == 2
        assert network(torch.randn(4, 1, 28, 28)).shape == (4, 10)

    def test_a_step_is_plain_gradient_descent_and_leaves_its_gradient(self, digits):
        network = tutorial_network(batch_norm=False)
        before = network[1].weight.detach().clone()
        step, loss = next(train(network, digits.train, Schedule(0.5, steps=3, batch_size=64, seed=0)))
        assert step == 1
        assert loss == pytest.approx(math.log(10), abs=0.2)
        torch.testing.assert_close(network[1].weight.detach(), before - 0.5 * network[1].weight.grad)
        assert gradient_norms(network)[0] == pytest.approx(
            float(network[1].weight.grad.square().sum().sqrt()), rel=1e-4
        )
        assert len(gradient_norms(network)) == 3

    def test_a_norm_of_numbers_whose_squares_vanish_in_float32(self):
        small = torch.full((3,), 3e-26)
        assert float(small.square().sum()) == 0
        assert euclidean_norm(small, torch.full((1, 1), 3e-26)) == pytest.approx(6e-26, rel=1e-6)
        assert euclidean_norm(torch.full((2,), 3e30), torch.tensor(4e30)) == pytest.approx(34**0.5 * 1e30, rel=1e-6)

    def test_less_than_a_batch_is_refused(self, digits):
        few = digits.train[torch.arange(63)]
        with pytest.raises(InputError, match=r"one batch of 64 images must be left to learn from, but there are 63"):
            next(train(tutorial_network(batch_norm=True), few, Schedule(0.1, steps=1, batch_size=64, seed=0)))

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_steps_are_those_of_torchs_optimizer_to_the_bit(self, digits, momentum):
        ours, theirs = (torch.manual_seed(0) and tutorial_network(batch_norm=True) for _ in "12")
        optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum)
        order = batches(len(digits.train), 64, seed=0)
        for _ in train(ours, digits.train, Schedule(0.1, steps=3, batch_size=64, seed=0, momentum=momentum)):
            batch = digits.train[next(order)]
            optimizer.zero_grad()
            nn.functional.cross_entropy(theirs(batch.images), batch.labels).backward()
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))

    def test_momentum_and_a_cosine(self, digits):
        schedule = Schedule(0.5, steps=4, batch_size=64, seed=0, momentum=0.9, cosine=True)
        assert [schedule.rate(step) for step in (1, 3)] == [0.5, pytest.approx(0.25)]
        assert Schedule(0.5, 4, 64, 0).rate(4) == 0.5
        network = tutorial_network(batch_norm=False)
        before = network[1].weight.detach().clone()
        steps = islice(train(network, digits.train, schedule), 2)
        first, second = (network[1].weight.grad.clone() for _ in steps)
        velocity = 0.9 * first + second
        expected = before - 0.5 * first - schedule.rate(2) * velocity
        torch.testing.assert_close(network[1].weight.detach(), expected)

    def test_what_is_seen_of_a_batch(self, digits):
        sizes = []

        def seen(batch):
            sizes.append(len(batch))
            return batch[torch.arange(5)]

        network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        list(train(network, digits.train, Schedule(0.1, steps=1, batch_size=64, seed=0), seen))
        assert sizes == [64, 5]

    def test_it_ends_at_a_loss_that_is_not_finite(self, digits):
        network = tutorial_network(batch_norm=False)
        losses = [loss for _, loss in train(network, digits.train, Schedule(1e6, steps=50, batch_size=64, seed=0))]
        assert len(losses) < 50
        assert not math.isfinite(losses[-1])
        assert all(math.isfinite(loss) for loss in losses[:-1])

    def test_accuracy_is_of_evaluation_mode(self):
        network = nn.Sequential(nn.Flatten(), nn.Dropout(0.99), nn.Identity())
        labels = torch.arange(10).repeat(150)
        images = nn.functional.one_hot(labels, 10).float()[:, None, :, None]
        assert accuracy(network, Examples(images, labels)) == 1.0
        assert accuracy(network, Examples(images, (labels + 1) % 10)) == 0.0

    def test_looking_at_hidden_inputs_changes_nothing(self, digits):
        network = tutorial_network(batch_norm=True)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        inputs = activation_input(network, digits.validation)
        assert inputs.shape == (240, 256)
        torch.testing.assert_close(inputs.mean(0), torch.zeros(256), atol=1e-5, rtol=0)  # normalized by these images
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    def test_looking_inside_is_inference(self, digits):
        network = tutorial_network(batch_norm=True)
        network(digits.train.images[:64])  # running statistics of its own
        before = {name: value.clone() for name, value in network.state_dict().items()}
        share, received = look_inside(network, digits.validation)
        assert share == accuracy(network, digits.validation)
        assert torch.equal(received, network[:6].eval()(digits.validation.images))
        assert float(received.mean(0).abs().max()) > 0.01  # not normalized by these images
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def trained(arm="plain", rate=0.1, steps=60, data=None):
    return demo._trained(arm, data or load(), Schedule(rate, steps, batch_size=64, seed=0), Setting(seed=0))


class TestDemonstration:
    @pytest.mark.parametrize(
        ("size", "data", "steps"), [("default", None, 240), ("quick", None, 120), ("default", "mnist", 1000), ("quick", "mnist", 120)]
    )  # fmt: skip
    def test_mnist_takes_more_steps(self, size, data, steps):
        assert demo.schedule(0.3, Setting(1, size, data=data)) == Schedule(0.3, steps, batch_size=64, seed=1)

    def test_batch_normalization_is_faster_and_trains_where_the_plain_network_does_not(self):
        measured = {arm: demo.measure(arm, Setting(0, "quick")) for arm in demo.ARMS}
        plain, normalized = (each.values for each in measured.values())
        assert normalized["steps"] < plain["steps"]
        assert normalized["drift"] < plain["drift"]
        assert normalized["rates"] > plain["rates"]
        for each in measured.values():
            assert each.values.keys() == demo.METRICS.keys()
            assert demo.EXPERIMENT.curves.keys() <= each.curves.keys()
            rates = [0.003, 0.1, 3.0]
            assert (
                [rate for rate, _ in each.curves["sweep"]] == [rate for rate, _ in each.curves["validation"]] == rates
            )
            for rate, end in each.curves["validation"]:
                course = each.curves[f"course@{rate:g}"]
                assert course[-1][1] == end
                every = 5 if rate == demo.COMMON else 20
                assert [step for step, _ in course] == [*range(0, course[-1][0], every), course[-1][0]]
            best = max(each.curves["validation"], key=lambda point: point[1])[0]
            assert each.values["best_rate"] == best
            assert each.values["accuracy"] == dict(each.curves["sweep"])[best]
            assert each.values["common_accuracy"] == dict(each.curves["sweep"])[0.1]
            reached = [step for step, share in each.curves["course@0.1"] if share >= 0.95]
            assert each.values["steps"] == min(reached)
            assert max(y for _, y in each.curves["drift"]) == pytest.approx(each.values["drift"])
            assert each.curves["drift"][0] == (0, 0)

    def test_a_network_that_learns_noise_contradicts_what_is_said_of_its_hidden_units(self, digits):
        order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(0))
        noise = dataclasses.replace(digits, train=Examples(digits.train.images, digits.train.labels[order]))
        plain, normalized = (demo._typical(torch.stack(trained(arm, data=noise).received))[0] for arm in demo.ARMS)
        assert normalized > 1.5 * plain  # 2.03 and 1.13; on the real labels 1.67 and 4.78

    def test_the_end_is_measured_however_seldom_the_rest_is(self):
        assert [step for step, _ in trained(rate=0.3, steps=7).course] == [0, 7]

    def test_a_training_that_diverges_is_measured_as_far_as_it_came(self):
        training = trained(rate=1e3, steps=60)
        assert 0 < training.course[-1][0] < 60
        assert training.validation < 0.2

    @pytest.mark.parametrize("end", [math.nan, math.inf])
    def test_a_distribution_that_diverges_moves_without_bounds(self, end):
        received = torch.tensor([1.0, 2.0]).repeat(3, 1)  # (T, mean and standard deviation)
        received[2] = end
        drift, way = demo._typical(received[:, :, None])
        assert drift == math.inf
        assert way[:2] == [0.0, 0.0]

    def test_the_typical_unit_is_the_one_with_the_median_drift(self):
        means = torch.tensor(
            [[0.0, 0.0, 1.0], [9.0, -2.0, 1.5], [9.0, -1.0, 1.0]]
        )  # (T, units), that move by 9, 2 and 0.5
        deviations = torch.tensor([[4.0, 4.0, 4.0], [1.0, 1.0, 1.0], [8.0, 8.0, 8.0]])
        drift, way = demo._typical(torch.stack([means, deviations], dim=1))
        assert drift == 0.5  # 2 of 4, the deviation at the start
        assert way == [0.0, 0.5, 0.25]

    def test_a_training_depends_on_its_arguments_alone(self):
        once, again = (trained("batch_norm", steps=10) for _ in "12")
        assert (once.course, once.test) == (again.course, again.test)
        assert all(map(torch.equal, once.received, again.received))
        assert [step for step, _ in once.course] == [0, 5, 10]


def measured(steps=20, accuracy=0.9, drift=2.0, trains=(0.1,)):
    values = {
        "accuracy": accuracy,
        "best_rate": 0.1,
        "common_accuracy": accuracy,
        "steps": steps,
        "rates": 1,
        "drift": drift,
    }
    return Measured(values, {"validation": [(rate, 0.96 if rate in trains else 0.3) for rate in (0.01, 0.1, 1.0)]})


GOOD = {"steps": 10, "accuracy": 0.95, "drift": 0.1, "trains": (0.01, 0.1, 1.0)}


def answers(plain, normalized):
    results = Results({"plain": plain, "batch_norm": normalized})
    verdicts = [judge(results) for judge in demo.EXPERIMENT.claims.values()]
    return [verdict.answer == "holds" for verdict in verdicts], [verdict.evidence for verdict in verdicts]


class TestClaims:
    def test_all_hold(self):
        held, evidence = answers([measured(), measured()], [measured(**GOOD), measured(**GOOD)])
        assert held == [True] * 4
        assert evidence == [
            "Steps per seed: 10, 10 with BN; 20, 20 without.",
            "Every seed ends at 95% or more for the learning rates 0.01, 0.1, 1 with BN; at least one seed for the learning rates "
            "0.1 without.",
            "Test accuracy per seed: 95.0%, 95.0% with BN; 90.0%, 90.0% without.",
            "Largest move of a typical unit's mean over the validation images, in standard deviations at the start: "
            "0.10, 0.10 with BN; 2.00, 2.00 without.",
        ]

    def test_the_opposite_is_said_as_plainly(self):
        assert answers([measured(**GOOD)], [measured()])[0] == [False] * 4
        assert answers([measured()], [measured()])[0] == [False] * 4

    @pytest.mark.parametrize(
        ("change", "index"),
        [({"steps": math.inf}, 0), ({"trains": ()}, 1), ({"trains": (0.1,)}, 1), ({"accuracy": 0.9}, 2), ({"drift": math.inf}, 3)],
        ids=str,
    )  # fmt: skip
    def test_one_seed_against_it_is_enough(self, change, index):
        held, evidence = answers([measured(), measured()], [measured(**GOOD), measured(**GOOD | change)])
        assert [number for number, each in enumerate(held) if not each] == [index]
        if change == {"steps": math.inf}:
            assert evidence[0] == "Steps per seed: 10, never with BN; 20, 20 without."
        if change == {"trains": ()}:
            assert "for none with BN" in evidence[1]

    def test_a_learning_rate_that_one_seed_misses_does_not_count(self):
        ends = [measured(**GOOD | {"trains": trains}) for trains in ((0.01, 0.1), (0.1, 1.0))]
        assert not answers([measured(), measured()], ends)[0][1]

    def test_nor_does_one_at_which_a_seed_trains_without(self):
        plain = [measured(trains=trains) for trains in ((0.01, 0.1), (0.1, 1.0))]
        assert not answers(plain, [measured(**GOOD), measured(**GOOD)])[0][1]

    def test_each_seed_is_compared_with_all_of_the_other_arm(self):
        normalized = [measured(**GOOD | {"steps": 10}), measured(**GOOD | {"steps": 30})]
        assert not answers([measured(steps=20), measured(steps=40)], normalized)[0][0]


def unit(arm="plain", seed=0):
    return Unit("demo", arm, Setting(seed, "quick"))


def record(unit):
    """A stand-in for a measurement: quick, and it leaves a trace of having run."""
    if unit.setting.seed == 13:
        os._exit(9)
    if unit.setting.seed == 14:
        raise InputError("the data are gone")
    return Finished(unit, measured(), float(os.getpid()))


class TestRunner:
    def test_what_is_stored_is_not_measured_again(self, tmp_path):
        first = list(runner.run(record, [unit(seed=0), unit(seed=1)], tmp_path, workers=1))
        assert {each.unit.setting.seed for each in first} == {0, 1}
        assert all(each.seconds != os.getpid() for each in first)  # in another process
        again = list(runner.run(record, [unit(seed=1), unit(seed=0)], tmp_path, workers=1))
        assert sorted(again, key=lambda each: each.unit.setting.seed) == sorted(
            first, key=lambda each: each.unit.setting.seed
        )

    def test_a_damaged_part_is_no_part(self, tmp_path):
        (tmp_path / unit().file_name).write_text('{"measured": ')
        assert runner.stored(unit(), tmp_path) is None

    def test_a_dead_worker_is_reported_and_the_rest_is_kept(self, tmp_path):
        with pytest.raises(StateError, match=r"seed13.*exit code 9"):
            list(runner.run(record, [unit(seed=0), unit(seed=13)], tmp_path, workers=1))
        assert runner.stored(unit(seed=0), tmp_path) is not None

    def test_an_error_of_ours_comes_back_from_the_worker(self, tmp_path):
        with pytest.raises(InputError, match="the data are gone"):
            list(runner.run(record, [unit(seed=14)], tmp_path, workers=1))


class TestFiles:
    def test_json_has_no_nan(self):
        with pytest.raises(ValueError, match="JSON compliant"):
            to_json({"loss": math.nan})

    def test_a_failed_write_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "result.json"
        write(path, "old")
        with pytest.raises(UnicodeEncodeError):
            write(path, "\ud800")
        assert path.read_text() == "old"
        assert [file.name for file in tmp_path.iterdir()] == ["result.json"]

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"cannot write into .*file"):
            check_writable(tmp_path / "file" / "parts")
        with pytest.raises(InputError, match=r"cannot write .*result\.json"):
            write(tmp_path / "file" / "result.json", "")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda module: None if module == "matplotlib" else object())
    with pytest.raises(MissingExtraError, match=r"matplotlib: pip install 'batchnorm\[lab\]'"):
        load()


def test_a_dataset_is_standardized_with_its_training_part():
    parts = [Examples(torch.randn(50, 1, 2, 2) * 3 + shift, torch.zeros(50, dtype=torch.int64)) for shift in (5, 5, 9)]
    data = Dataset("random", *parts).standardized()
    assert float(data.train.images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(data.test.images.mean()) == pytest.approx(4 / 3, abs=0.3)
