"""Creates `speech.npz`: `python -m batchnorm.lab.data.speech_recipe FILE`, which needs Debian's `espeak-ng` on the PATH.

Ten words in seven accents of English, by thirteen voices, at many speeds and pitches. The file stores features in `LEVELS` levels.
"""

from __future__ import annotations

import io
import random
import subprocess
import sys
from pathlib import Path

import torch

from batchnorm.lab.data import speech

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
VOICES = ("", *(f"+m{number}" for number in range(1, 8)), *(f"+f{number}" for number in range(1, 6)))
COUNT = 700


def say(word: str, voice: str, speed: int, pitch: int) -> tuple[torch.Tensor, int]:
    """Synthesize a word with espeak-ng: samples in -1..1, and the sample rate."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    # espeak-ng streams, so its header has no length; read to the end.
    content = subprocess.run(command, capture_output=True, check=True).stdout
    return speech.samples(io.BytesIO(content), word)


def main() -> None:
    """Synthesize the words, and write their features to the file."""
    import numpy

    rng = random.Random(0)
    spoken = []
    for number in range(COUNT):
        word, voice = WORDS[number % len(WORDS)], rng.choice(ACCENTS) + rng.choice(VOICES)
        sound, rate = say(word, voice, rng.randint(110, 240), rng.randint(10, 90))
        spoken.append((speech.features(sound, rate), word, voice))
    values = torch.cat([features for features, _, _ in spoken])
    low, high = values.amin(0), values.amax(0)
    steps = []
    for features, _, _ in spoken:
        levels = ((features - low) / (high - low) * speech.LEVELS).round().to(torch.uint8)
        steps.append(torch.cat([levels[:1], levels.diff(dim=0)]))  # differences compress better
    numpy.savez_compressed(
        Path(sys.argv[1]),
        steps=torch.cat(steps).numpy(),
        lengths=torch.tensor([len(features) for features, _, _ in spoken], dtype=torch.int16).numpy(),
        texts=[word for _, word, _ in spoken],
        voices=[voice for _, _, voice in spoken],
        low=low.numpy(),
        high=high.numpy(),
    )


if __name__ == "__main__":
    main()
