"""Spoken words and their letters: synthesized ones (`speech_recipe`), or a folder of WAV files with a table of transcripts."""

from __future__ import annotations

import csv
import math
import random
import wave
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.lab import extras

FILE = Path(__file__).with_name("speech.npz")
TABLE = "transcripts.csv"
ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"  # the letter at position i has the number i + 1; 0 is CTC's blank
BANDS = 40
WINDOW, HOP = 0.025, 0.0125  # length of a frame, and distance between frames, in seconds
LOWEST, HIGHEST = 60.0, 7600.0  # range of the bands, in hertz
LEVELS = 40  # quantization levels of the stored features, for each band between its extremes
FLOOR = 1e-5  # power below which a frame is silent
# Synthesized voices that are not used for training.
HELD_OUT = {"validation": ("m5", "f3"), "test": ("m3", "m7", "f2", "f5")}


@dataclass(frozen=True)
class Utterance:
    """Logarithmic mel features (frames, 40) of a recording, its text, and its voice."""

    features: Tensor
    text: str
    voice: str

    @property
    def letters(self) -> Tensor:
        """The numbers of the letters, (letters,) int64."""
        return torch.tensor([ALPHABET.index(letter) + 1 for letter in self.text])


@dataclass(frozen=True)
class Speech:
    """Three splits with different voices; the statistics of `train` standardize the features."""

    name: str
    train: list[Utterance]
    validation: list[Utterance]
    test: list[Utterance]


def load(directory: str | Path | None = None) -> Speech:
    """
    Load the synthesized words, or WAV files in `directory` with its `transcripts.csv` (columns file, text, optionally voice).

    In a folder, a tenth of the voices, at least one, is for validation, and a fifth, at least one, for test. Without the column voice,
    every file counts as a different voice.

    Raises:
        InputError: a file cannot be read or has a wrong format, or there are fewer than three voices.
        MissingExtraError: numpy is not installed.
    """
    if directory is not None:
        return _split("WAV files", *_read_folder(Path(directory)))
    extras.require()
    import numpy

    with numpy.load(FILE) as stored:
        steps, low, high, lengths = (torch.from_numpy(stored[name]) for name in ("steps", "low", "high", "lengths"))
        texts, voices = stored["texts"].tolist(), stored["voices"].tolist()
    levels = [one.cumsum(0).to(torch.uint8) for one in steps.split(lengths.tolist())]  # differences, modulo 256
    utterances = [
        Utterance(low + level * (high - low) / LEVELS, text, voice)
        for level, text, voice in zip(levels, texts, voices, strict=True)
    ]

    held_out = {voice: split for split, held in HELD_OUT.items() for voice in held}
    splits = [held_out.get(one.voice.rpartition("+")[2], "train") for one in utterances]
    return _split("synthesized words", utterances, splits)


def features(sound: Tensor, rate: int) -> Tensor:
    """
    Log-mel features (frames, 40) of samples (n,) in -1..1: 40 bands from 60 to 7600 Hz, equally wide in mel, every 12.5 ms.

    Silence at the start and end is removed. Source of the scale: O'Shaughnessy 1987, mel = 2595 log10(1 + f / 700).

    Raises:
        InputError: fewer than 16000 samples per second, or shorter than a frame.
    """
    size, hop = round(WINDOW * rate), round(HOP * rate)
    if rate < 16_000 or len(sound) < size:
        raise InputError(
            f"a recording must have at least 16000 samples per second and last at least {WINDOW * 1000:g} ms; this one has "
            f"{rate} samples per second, {len(sound)} in total: use another"
        )
    frames = sound.unfold(0, size, hop) * torch.hann_window(size)  # (frames, size)
    width = 2 ** math.ceil(math.log2(size))
    power = torch.fft.rfft(frames, width).abs().square() / size  # (frames, width / 2 + 1)
    loud = (power.sum(1) > FLOOR).nonzero()
    if len(loud):
        power = power[loud[0, 0] : loud[-1, 0] + 1]
    frequency = torch.linspace(0, rate / 2, width // 2 + 1)

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    edges = 700 * (10 ** (torch.linspace(mel(LOWEST), mel(HIGHEST), BANDS + 2) / 2595) - 1)
    rising = (frequency[:, None] - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[None, 2:] - frequency[:, None]) / (edges[2:] - edges[1:-1])
    return (power @ torch.minimum(rising, falling).clamp(min=0) + FLOOR).log()  # bands are triangles


def samples(file: Path | IO[bytes], name: str) -> tuple[Tensor, int]:
    """
    The first channel of a WAV file of 16-bit samples, (n,) in -1..1, and the sample rate.

    Raises:
        InputError: it cannot be read, or has another format.
    """
    try:
        with wave.open(str(file) if isinstance(file, Path) else file) as content:
            width, channels, rate = content.getsampwidth(), content.getnchannels(), content.getframerate()
            raw = bytearray(content.readframes(content.getnframes()))
    except (OSError, EOFError, ValueError, wave.Error) as error:  # a path with a NUL raises ValueError
        raise InputError(
            f"cannot read {name} as a WAV file: {error or 'it ends too early'}; record or convert it again"
        ) from error
    if width != 2:
        raise InputError(f"WAV files must have samples of 16 bits; {name} has {8 * width}: convert it")
    raw = raw[: len(raw) // (2 * channels) * 2 * channels]
    if not raw:
        return torch.empty(0), rate
    return torch.frombuffer(raw, dtype=torch.int16).reshape(-1, channels)[:, 0] / 32768, rate


def _split(name: str, utterances: Sequence[Utterance], splits: Sequence[str]) -> Speech:
    """The data set with standardized features; `splits` names the split of each utterance."""
    everything = torch.cat([one.features for one, split in zip(utterances, splits, strict=True) if split == "train"])
    mean, deviation = everything.mean(), everything.std()

    def of(wanted: str) -> list[Utterance]:
        return [
            replace(one, features=(one.features - mean) / deviation)
            for one, split in zip(utterances, splits, strict=True)
            if split == wanted
        ]

    return Speech(name, of("train"), of("validation"), of("test"))


def _read_folder(directory: Path) -> tuple[list[Utterance], list[str]]:
    """The utterances of a folder, and the split of each."""
    table = directory / TABLE
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"a folder of recordings must have a {TABLE}; cannot read {table}: {error}") from error
    utterances = []
    for number, row in enumerate(rows, start=2):
        file, text = row.get("file"), " ".join((row.get("text") or "").lower().split())
        if not file or not text or set(text) - set(ALPHABET):
            raise InputError(
                f"each line of {TABLE} must have a file and a text of English letters, blanks and apostrophes; "
                f"line {number} has {file!r} and {text!r}"
            )
        sound, rate = samples(directory / file, file)
        try:
            utterances.append(Utterance(features(sound, rate), text, row.get("voice") or file))
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
    voices = sorted({one.voice for one in utterances})
    if len(voices) < 3:
        raise InputError(f"training, validation and test need at least three voices; {TABLE} has {len(voices)}")
    random.Random(0).shuffle(voices)
    validation = voices[: max(1, len(voices) // 10)]
    test = voices[len(validation) : len(validation) + max(1, len(voices) // 5)]
    split = {**dict.fromkeys(voices, "train"), **dict.fromkeys(validation, "validation"), **dict.fromkeys(test, "test")}
    return utterances, [split[one.voice] for one in utterances]
