"""Which tests take the longest, from what `pytest --durations=0` printed.

    python3 scripts/durations.py build/durations.txt tests/durations.json

`make durations` calls it.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path


def main(printed: str, target: str) -> None:
    seconds = defaultdict[str, float](float)
    for line in Path(printed).read_text().splitlines():
        if found := re.match(r"([0-9.]+)s (?:call|setup|teardown) +(.*\S)", line):
            seconds[found[2]] += float(found[1])
    rows = {
        name: round(duration) for name, duration in sorted(seconds.items(), key=lambda row: -row[1]) if duration >= 1
    }
    Path(target).write_text(json.dumps(rows, indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
