"""Of windows in which a camera did not look away, in how many of the next does it? `python again.py > again.json`"""

import json
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).parent
BEFORE = HERE.parent / "2026-11-22-looks-later"


def again(file: Path, *seconds: str) -> list[int]:
    """[windows that look away, windows before them that do not], of the videos that both are of."""
    counts = json.loads(file.read_text())[0]["counts"]
    looks = [counts[second]["at"]["camera"]["verdicts"] for second in seconds]
    pairs = [pair for one, other in pairwise(looks) for pair in zip(one, other, strict=True)]
    return [pairs.count(("0", "1")), sum(first == "0" for first, _ in pairs)]


def main() -> None:
    found = {
        "embedded, 30, 40, 50, 60 s": again(BEFORE / "away_by_seconds.json", "30", "40", "50", "60"),
        "embedded, 60 and 300 s": again(BEFORE / "away_300s.json", "60", "300"),
        "late, 60 and 300 s": again(HERE / "away_late.json", "60", "300"),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
