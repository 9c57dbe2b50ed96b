"""What the lab's applications are made of: boxes, letters, distances, generators of data, recordings."""

import itertools
import math
import random
import wave

import numpy
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from batchnorm.errors import InputError
from batchnorm.lab.boxes import Labeled, decode, encode, mean_average_precision, overlaps, strongest
from batchnorm.lab.data import canvases, clicks, roads, sentences, speech, speech_recipe
from batchnorm.lab.experiment import Setting
from batchnorm.lab.experiments import load, recommender
from batchnorm.lab.frechet import frechet_distance
from batchnorm.lab.letters import best_path, edit_distance, error_rate
from batchnorm.lab.normalizations import DynamicTanh, RootMeanSquareNorm
from batchnorm.lab.recognizer import PerStep, Recognizer
from batchnorm.layers import BatchNorm1d


def boxes(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


class TestBoxes:
    def test_overlaps(self):
        found = overlaps(boxes((0, 0, 2, 2)), boxes((0, 0, 2, 2), (1, 1, 3, 3), (0, 0, 1, 4), (5, 5, 6, 6)))
        torch.testing.assert_close(found, torch.tensor([[1, 1 / 7, 2 / 6, 0]]))

    def test_decode_undoes_encode(self):
        anchors, wanted = boxes((0, 0, 10, 10), (4, 8, 14, 28)), boxes((2, 1, 20, 9), (5, 5, 8, 30))
        torch.testing.assert_close(decode(encode(wanted, anchors), anchors), wanted)
        torch.testing.assert_close(
            encode(boxes((5, 0, 15, 20)), anchors[:1]), torch.tensor([[0.5, 0.5, 0, math.log(2)]])
        )

    def test_the_strongest_stay_best_first(self):
        three = boxes((0, 0, 10, 10), (1, 0, 11, 10), (20, 0, 30, 10))
        assert strongest(three, torch.tensor([0.5, 0.9, 0.7])).tolist() == [1, 2]
        assert strongest(three, torch.tensor([0.5, 0.9, 0.7]), limit=0.9).tolist() == [1, 2, 0]
        assert strongest(three[:0], torch.empty(0)).tolist() == []

    def test_mean_average_precision_by_hand(self):
        box, other, nowhere = (0, 0, 10, 10), (20, 20, 30, 30), (40, 40, 50, 50)
        truth = [Labeled(boxes(box, other), torch.tensor([3, 3])), Labeled(boxes(box), torch.tensor([5]))]
        found = [
            Labeled(boxes(box, nowhere, other, box), torch.tensor([3, 3, 3, 3]), torch.tensor([0.9, 0.8, 0.7, 0.6])),
            Labeled(boxes(box, other), torch.tensor([5, 3]), torch.tensor([0.2, 0.1])),
        ]
        # Class 3: hit, miss, hit, the first object again, miss: precision 1 at recall 1/2, 2/3 at 1. Class 5: all right.
        assert mean_average_precision(found, truth) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
        nothing = [Labeled(torch.empty(0, 4), torch.empty(0), torch.empty(0))] * 2
        assert mean_average_precision(nothing, truth) == 0
        with pytest.raises(InputError, match="got 1 and 2 images and 2 classes"):
            mean_average_precision(found[:1], truth)


class TestLetters:
    def test_best_path_merges_repeats_but_not_over_a_blank(self):
        classes = torch.tensor([0, 1, 1, 0, 1, 2, 2, 0, 3])
        assert best_path(nn.functional.one_hot(classes).float(), 8) == [1, 1, 2]

    @pytest.mark.parametrize(
        ("ours", "theirs", "distance"),
        [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("ab", "ba", 2)],
    )
    def test_edit_distance(self, ours, theirs, distance):
        assert edit_distance([*map(ord, ours)], [*map(ord, theirs)]) == distance

    def test_error_rate_pools_letters(self):
        assert error_rate([[1], [1, 2, 3]], [[2], [1, 2, 3]]) == 1 / 4
        with pytest.raises(InputError, match="got 1 and 1, 0 letters"):
            error_rate([[1]], [[]])


class TestFrechetDistance:
    def test_of_a_scaled_and_shifted_copy(self):
        x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        wanted = (x.mean(0) * 2 + shift).square().sum() + 4 * x.T.cov().trace()  # 3x + shift against x
        assert frechet_distance(3 * x + shift, x) == pytest.approx(float(wanted))
        assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)

    def test_is_that_of_the_definition(self):
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(40, 4, generator=generator) @ torch.randn(4, 4, generator=generator) for _ in range(2))
        a, b = (numpy.cov(part.double().numpy().T) for part in (x, y))
        means = (x.double().mean(0) - y.double().mean(0)).square().sum().item()
        assert frechet_distance(x, y) == pytest.approx(means + numpy.trace(a + b - 2 * sqrtm(a @ b).real))

    def test_refuses_what_has_no_covariance(self):
        with pytest.raises(InputError, match=r"are \(1, 3\) and \(5, 3\)"):
            frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))


FROZEN = {
    "canvases": [[2, 16, 20, 34], [30, 22, 46, 38], [8, 48, 24, 64], [34, 45, 50, 61], [45, 4, 62, 21]],
    "clicks": [[1565, 926, 3, 7, 2, 1], [182, 0, 1, 39, 15, 0]],
    "roads": [-4.5769, -0.0008, 4.7005, 13.9303],
    "sentences": ([62, 25, 50, 76, 73, 17], [25, 83, 17, 105, 111, 59]),
}


class TestGenerators:
    """What a seed gives is frozen: who changes it changes these numbers."""

    def test_canvases(self):
        drawn, again = canvases.load(3, 2), canvases.load(3, 2)
        assert torch.equal(drawn.test.images, again.test.images)
        assert drawn.train.objects[0].boxes.tolist() == FROZEN["canvases"]
        for part in (drawn.train, drawn.validation, drawn.test):
            for one in part.objects:
                assert torch.equal(overlaps(one.boxes, one.boxes), torch.eye(len(one.boxes)))

    def test_clicks(self):
        split = clicks.load(1000, 500)
        assert split.train.categories[:2].tolist() == FROZEN["clicks"]
        assert (len(split.train), len(split.validation), len(split.test)) == (1000, 500, 500)
        # The planted chances say what happened.
        assert recommender.area_under_curve(split.planted, split.test.clicked) > 0.8
        torch.testing.assert_close(split.planted.mean(), split.test.clicked.float().mean(), atol=0.05, rtol=0)

    def test_roads(self):
        drawn = roads.render(4, seed=0)
        assert torch.equal(drawn.images, roads.render(4, seed=0).images)
        torch.testing.assert_close(drawn.angles, torch.tensor(FROZEN["roads"]), atol=1e-4, rtol=0)
        assert not torch.equal(drawn.images, roads.render(4, seed=1).images)

    def test_sentences(self):
        assert sentences.sentence(random.Random(0)) == FROZEN["sentences"]
        split = sentences.load(50, 20)
        parts = [{tuple(row) for row in part.source.tolist()} for part in (split.train, split.validation, split.test)]
        assert [len(part) for part in parts] == [50, 20, 20]
        assert not parts[0] & parts[2]

    def test_speech_parts_have_no_voice_in_common(self):
        data = speech.load()
        voices = [{one.voice.rpartition("+")[2] for one in part} for part in (data.train, data.validation, data.test)]
        assert not voices[0] & voices[1]
        assert not voices[2] & (voices[0] | voices[1])
        assert {one.text for one in data.test} == set(speech_recipe.WORDS)
        values = torch.cat([one.features for one in data.train])
        assert values.shape[1] == 40
        torch.testing.assert_close(
            torch.stack([values.mean(), values.std()]), torch.tensor([0.0, 1.0]), atol=1e-4, rtol=0
        )


def tone(seconds: float, hertz: float = 1000.0, rate: int = 16_000) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate)) / rate)


def write_wav(path, sound: torch.Tensor, rate: int = 16_000, width: int = 2, channels: int = 1) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        kind = {1: torch.uint8, 2: torch.int16}[width]
        file.writeframes((sound * 32767).to(kind).repeat_interleave(channels).numpy().tobytes())


class TestRecordings:
    def folder(self, tmp_path, table="file,text,voice\na.wav,Yes,ann\nb.wav,no  no,bob\nc.wav,it's,cy\n"):
        for name in "abc":
            write_wav(tmp_path / f"{name}.wav", tone(0.3))
        (tmp_path / speech.TABLE).write_text(table)
        return tmp_path

    def test_samples_come_back(self, tmp_path):
        write_wav(tmp_path / "stereo.wav", tone(0.1), channels=2)
        sound, rate = speech.samples(tmp_path / "stereo.wav", "stereo.wav")
        assert rate == 16_000
        torch.testing.assert_close(sound, tone(0.1), atol=1e-4, rtol=0)

    @pytest.mark.parametrize(("rate", "hertz"), [(16_000, 500), (16_000, 3000), (44_100, 3000)])
    def test_features_show_where_the_sound_is(self, rate, hertz):
        found = speech.features(tone(0.5, hertz, rate), rate)
        mel = [2595 * math.log10(1 + value / 700) for value in (speech.LOWEST, hertz, speech.HIGHEST)]
        assert found.mean(0).argmax().item() == round((mel[1] - mel[0]) / (mel[2] - mel[0]) * 41) - 1
        assert len(found) == 1 + (round(0.5 * rate) - round(0.025 * rate)) // round(0.0125 * rate)

    def test_silence_around_is_left_out(self):
        silent = torch.zeros(8000)
        assert abs(len(speech.features(torch.cat([silent, tone(0.3), silent]), 16_000)) - 0.3 / 0.0125) <= 2

    def test_a_folder_is_parted_by_voice(self, tmp_path):
        data = speech.load(self.folder(tmp_path))
        assert [len(part) for part in (data.train, data.validation, data.test)] == [1, 1, 1]
        assert {one.text for part in (data.train, data.validation, data.test) for one in part} == {
            "yes",
            "no no",
            "it's",
        }
        assert torch.equal(speech.Utterance(torch.empty(0), "a '", "").letters, torch.tensor([3, 1, 2]))

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ("file,text\na.wav,yes\nb.wav,\n", r"line 3 has 'b\.wav' and ''"),
            ("file,text\na.wav,naïve\n", "line 2 has 'a.wav' and 'naïve'"),
            ("name,text\na.wav,yes\n", "line 2 has None and 'yes'"),
            ("file,text\nd.wav,yes\n", r"cannot read d\.wav as a WAV file: .*No such file"),
            (
                "file,text\ntranscripts.csv,yes\n",
                r"cannot read transcripts\.csv as a WAV file: file does not start with RIFF",
            ),
            ("file,text\na.wav,yes\nb.wav,no\n", "at least three voices.*has 2"),
            ("", "at least three voices.*has 0"),
        ],
    )
    def test_a_bad_table_is_named(self, tmp_path, table, message):
        with pytest.raises(InputError, match=message):
            speech.load(self.folder(tmp_path, table))

    def test_bad_recordings_are_named(self, tmp_path):
        with pytest.raises(InputError, match=r"must have a transcripts\.csv"):
            speech.load(tmp_path)
        folder = self.folder(tmp_path)
        for sound, rate, width, message in (
            (tone(0.3).abs() / 200, 16_000, 1, r"16 bits; b\.wav has 8"),
            (tone(0.3), 8000, 2, r"b\.wav: .*8000 samples per second"),
            (tone(0.01), 16_000, 2, r"b\.wav: .*160 in total"),
            (tone(0), 16_000, 2, r"b\.wav: .*0 in total"),
        ):
            write_wav(folder / "b.wav", sound, rate, width)
            with pytest.raises(InputError, match=message):
                speech.load(folder)
        (folder / "b.wav").write_bytes((folder / "a.wav").read_bytes()[:20])
        with pytest.raises(InputError, match=r"cannot read b\.wav as a WAV file"):
            speech.load(folder)

    def test_an_experiment_takes_the_folder_and_says_what_it_lacks(self, tmp_path):
        setting = Setting(seed=0, size="quick", data=str(self.folder(tmp_path)))
        with pytest.raises(InputError, match="32 recordings to train at least, but there are 1"):
            load("speech").measure("both", setting)

    def test_the_recognizer_does_not_see_padding(self, tmp_path):
        one = speech.load(self.folder(tmp_path)).test[0].features
        network = Recognizer(True, True, False).eval()
        scores, lengths = network(one[None], torch.tensor([len(one)]))
        assert scores.shape == (1, (len(one) + 1) // 2, 29)
        padded, _ = network(nn.functional.pad(one, (0, 0, 0, 9))[None], torch.tensor([len(one)]))
        torch.testing.assert_close(padded[:, : lengths[0]], scores)


def test_per_step_statistics_are_those_of_one_step():
    x = torch.randn(6, 3, 20, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([20, 20, 20, 18, 5, 5])
    x[4:, :, 5:] = math.nan  # padding counts nowhere
    y = PerStep(3)(x, lengths)
    for step, rows in ((0, 6), (4, 6), (5, 4), (15, 4)):
        wanted = BatchNorm1d(3)(x[:rows, :, step])
        torch.testing.assert_close(y[:rows, :, step], wanted)
    assert not y[4:, :, 5:].any()
    torch.testing.assert_close(y[:, :, 16:], BatchNorm1d(3)(x[:, :, 16:], lengths=(lengths - 16).clamp(min=0)))


class TestNormalizations:
    @pytest.mark.parametrize("shape", [(3, 4, 5, 2), (3, 4)])
    def test_formulas_of_the_sources(self, shape):
        x = torch.randn(shape, dtype=torch.float64) * 3 + 1
        for layer in (RootMeanSquareNorm(4).double(), DynamicTanh(4).double()):
            torch.nn.init.uniform_(layer.weight)
            torch.nn.init.uniform_(layer.bias)
            wanted = torch.empty_like(x)
            for n, c in itertools.product(range(3), range(4)):
                root = math.sqrt(sum(value**2 for value in x[n].flatten().tolist()) / x[n].numel() + 1e-5)
                normalized = x[n, c] / root if isinstance(layer, RootMeanSquareNorm) else (x[n, c] * 0.5).tanh()
                wanted[n, c] = normalized * layer.weight[c] + layer.bias[c]
            torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
        assert sum(parameter.numel() for parameter in layer.parameters()) == 9  # one α for the layer
