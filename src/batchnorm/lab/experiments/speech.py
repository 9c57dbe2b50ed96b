"""Does batch normalization make a recognizer of letters better, in its convolutions and its recurrent layers?

Recordings differ in length, so statistics must not count padding: `lengths=` says what counts. Sequence-wise they are of all steps
(Laurent et al. 2016; Amodei et al. 2016), per step of one time step over the batch (Cooijmans et al. 2017).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from batchnorm.lab.data import speech
from batchnorm.lab.experiment import Curve, Experiment, Measured, Metric, Results, Setting, Verdict
from batchnorm.lab.letters import best_path, error_rate
from batchnorm.lab.train import batches
from batchnorm.layers import BatchNorm1d, BatchNorm2d

ARMS = {
    "none": "without BN",
    "both": "BN, sequence-wise",
    "convolutions": "BN in the convolutions only",
    "recurrent": "BN in the recurrent layers only",
    "per_step": "BN, per step in the recurrent layers",
}
BATCH, HIDDEN, STEPS = 32, 64, 16
LEARNING_RATE = 0.1
RATIO = 3.0  # how many times fewer letters must be wrong with BN

load = lru_cache(maxsize=1)(speech.load)


class Masked(nn.Module):
    """No normalization, but padding is 0 as after one."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return x * (torch.arange(x.shape[-1]) < lengths[:, None]).view(len(x), *[1] * (x.dim() - 2), -1)


class PerStep(nn.Module):
    """Statistics of each of the first 16 time steps, and of all later ones together; gamma and beta are common (section 3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BatchNorm1d(channels, on_single="running") for _ in range(STEPS + 1))
        for layer in self.layers:
            layer.weight, layer.bias = self.layers[0].weight, self.layers[0].bias

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(N, C, T), of which so many steps count, to the same."""
        pieces = [*x[..., :STEPS].split(1, -1), *([x[..., STEPS:]] if x.shape[-1] > STEPS else [])]
        left = (lengths - step for step in range(STEPS + 1))
        return torch.cat(
            [
                layer(part, lengths=count.clamp(0, part.shape[-1]))
                for layer, part, count in zip(self.layers, pieces, left, strict=False)
            ],
            -1,
        )


class Recognizer(nn.Module):
    """Features (N, T, 40) to scores of the letters (N, T / 2, 29): two convolutions, two bidirectional recurrent layers."""

    def __init__(self, arm: str) -> None:
        super().__init__()
        convolutions, recurrent = arm in ("both", "convolutions", "per_step"), arm in ("both", "recurrent", "per_step")

        def between(channels: int) -> nn.Module:
            if arm == "per_step":
                return PerStep(channels)
            return BatchNorm1d(channels) if recurrent else Masked()

        self.convolutions = nn.ModuleList([nn.Conv2d(1, 16, 5, 2, 2), nn.Conv2d(16, 32, 3, (2, 1), 1)])
        self.after = nn.ModuleList(BatchNorm2d(channels) if convolutions else Masked() for channels in (16, 32))
        sizes = (32 * speech.BANDS // 4, 2 * HIDDEN)
        self.before = nn.ModuleList(between(size) for size in (*sizes, 2 * HIDDEN))
        self.recurrent = nn.ModuleList(nn.GRU(size, HIDDEN, batch_first=True, bidirectional=True) for size in sizes)
        self.scores = nn.Linear(2 * HIDDEN, len(speech.ALPHABET) + 1)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Scores, and how many steps of them count, (N,)."""
        x, lengths = x.mT.unsqueeze(1), (lengths + 1) // 2  # (N, 1, 40, T); the first convolution's stride is 2
        for convolution, normalize in zip(self.convolutions, self.after, strict=True):
            x = normalize(convolution(x), lengths=lengths).relu()
        x = x.flatten(1, 2)  # (N, C, T / 2)
        for normalize, layer in zip(self.before, self.recurrent, strict=False):
            packed = pack_padded_sequence(
                normalize(x, lengths=lengths).mT, lengths, batch_first=True, enforce_sorted=False
            )
            x = pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=x.shape[-1])[0].mT
        return self.scores(self.before[-1](x, lengths=lengths).mT), lengths


def batch_of(spoken: list[speech.Utterance]) -> tuple[Tensor, Tensor]:
    """Padded features (N, T, 40), and how many frames of each count."""
    return pad_sequence([one.features for one in spoken], batch_first=True), torch.tensor(
        [len(one.features) for one in spoken]
    )


@torch.no_grad()
def judged(network: nn.Module, part: list[speech.Utterance]) -> float:
    """The share of wrong letters."""
    scores, lengths = network.eval()(*batch_of(part))
    read = [best_path(one, length) for one, length in zip(scores, lengths.tolist(), strict=True)]
    return error_rate(read, [one.letters.tolist() for one in part])


def trained(arm: str, setting: Setting, rate: float) -> Iterator[tuple[int, Recognizer]]:
    """The recognizer after each step, counted from 1."""
    train = load(setting.data).train
    torch.manual_seed(setting.seed)
    network = Recognizer(arm)
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, nesterov=True)
    order = batches(len(train), BATCH, setting.seed)
    for step in range(1, setting.pick(42, 84, 500) + 1):
        spoken = [train[row] for row in next(order)]
        scores, lengths = network.train()(*batch_of(spoken))
        letters = [one.letters for one in spoken]
        counts = torch.tensor([len(one) for one in letters])
        # A text that is longer than its recording has steps is impossible: it counts as 0.
        loss = F.ctc_loss(
            scores.log_softmax(2).transpose(0, 1), torch.cat(letters), lengths, counts, zero_infinity=True
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        yield step, network


def measure(arm: str, setting: Setting) -> Measured:
    """Train, and judge by the voices held out for the test."""
    test, every, curve = load(setting.data).test, setting.pick(21, 21, 100), []
    for step, network in trained(arm, setting, LEARNING_RATE):
        if step % every == 0:
            curve.append((step, judged(network, test)))
    return Measured({"letters": curve[-1][1]}, {"letters": curve})


def judge(results: Results) -> Verdict:
    """Whether with BN three times fewer letters are wrong."""
    wrong = {arm: results.mean(arm, "letters") for arm in results.by_arm}
    evidence = "Letters wrong: " + ", ".join(f"{ARMS[arm]} {value:.1%}" for arm, value in wrong.items()) + "."
    return Verdict("holds" if wrong["none"] >= RATIO * wrong["both"] else "does not hold", evidence)


EXPERIMENT = Experiment(
    name="speech",
    question="Does batch normalization make a recognizer of letters better, in its convolutions and its recurrent layers?",
    claim="With BN, few steps make a recognizer of letters several times more accurate on voices it never heard.",
    source="Amodei et al. 2016 (Deep Speech 2, arXiv:1512.02595), section 3.2: sequence-wise BN",
    paper="words wrong without and with BN: 13.6 % and 14.4 % (1 recurrent layer), 11.6 and 10.6 (3), 10.8 and 9.8 (5), 10.8 and 9.5 (7)",
    arms=ARMS,
    metrics={"letters": Metric("letters wrong", ".1%", "lower")},
    measure=measure,
    judge=judge,
    curves={"letters": Curve("Letters wrong while learning", "steps", "share of letters")},
    protocol=(
        "700 recordings of ten words, synthesized by espeak-ng in seven accents; seven voices train, two validate, four test. 40 bands, "
        "two convolutions, two bidirectional GRU layers of 64, CTC over letters, best path. SGD, Nesterov momentum .9, gradient norm "
        "at most 5, batches of 32; learning rate .1, of .01, .03, .1 and .3 the best of every arm on the validation voices."
    ),
    seconds=85,
    data="WAV files of 16-bit samples, and transcripts.csv with the columns file and text, and voice if known",
)
