"""What steps.json tells, beside the scores: python told.py > told.json, in this folder."""

import json
from collections import Counter
from pathlib import Path

from longtake.evaluation.sources import held_out_captions
from longtake.toy.captions import parse

RESULTS = Path(__file__).parents[1]
FILES = {
    "teacher": RESULTS / "2026-11-22-rehyat-two-thousand" / "toy_teacher.json",
    "flow7": RESULTS / "2026-11-22-rehyat-two-thousand" / "toy_flow7.json",
    "g7": RESULTS / "2026-11-22-rehyat-guided" / "toy_g7.json",
    "g7b": RESULTS / "2026-11-22-rehyat-guided" / "toy_g7b.json",
    "e11": RESULTS / "2026-11-22-rehyat-eleven" / "toy_e11.json",
}
KINDS = ("still", "pans left", "pans right", "looks away")

cameras = {
    name: json.loads(file.read_text())[0]["counts"]["5"]["at"]["camera"]["verdicts"] for name, file in FILES.items()
}
lost, gained = (
    {
        name: {v for v, (a, b) in enumerate(zip(cameras["teacher"], verdicts, strict=True)) if (a, b) == pair}
        for name, verdicts in cameras.items()
    }
    for pair in (("1", "0"), ("0", "1"))
)
right = {video for video, verdict in enumerate(cameras["teacher"]) if verdict == "1"}
pairs = [("g7", "flow7"), ("g7", "g7b"), ("g7", "e11"), ("flow7", "e11")]
overlaps = [
    {
        "of": [one, other],
        "lost": [len(lost[one]), len(lost[other])],
        "by both": len(lost[one] & lost[other]),
        "expected of as many drawn at random": round(len(lost[one]) * len(lost[other]) / len(right), 1),
    }
    for one, other in pairs
]

steps = json.loads((Path(__file__).parent / "steps.json").read_text())
sets = {name: set(videos) for name, videos in steps["sets"].items()}
assert sets["lost"] == lost["g7"] | lost["flow7"] and sets["gained"] == gained["g7"] | gained["flow7"]
assert all(cameras[name][video] == "1" for name in ("teacher", "g7", "flow7") for video in sets["kept"])
said = [parse(text).get("camera", "") for text in held_out_captions(500)] * 4
said_of = {v: KINDS.index(said[v]) for videos in sets.values() for v in videos}
parts = {**sets, "lost by g7": lost["g7"], "lost by flow7 alone": lost["flow7"] - lost["g7"]}
answers = {plan: {video: int(found[str(video)][0]) for video in said_of} for plan, found in steps["plans"].items()}
plans = {
    plan: {name: sum(found[v] == said_of[v] for v in videos) for name, videos in parts.items()}
    for plan, found in answers.items()
}
asked = {name: Counter(said[v] for v in videos) for name, videos in parts.items()}
by_kind = {plan: Counter(said[v] for v in sets["lost"] if found[v] == said_of[v]) for plan, found in answers.items()}
wrong = {
    plan: Counter(
        f"{said[v]}, read: {[*KINDS, 'not told'][found[v]]}" for v in sorted(sets["lost"]) if found[v] != said_of[v]
    )
    for plan, found in answers.items()
}
drifts = Counter(
    abs(steps["plans"]["C"][str(v)][1])
    for v in sets["lost"]
    if said[v].startswith("pans") and answers["C"][v] == KINDS.index("still")
)
as_before = {
    name: sum((answers["T"][v] == said_of[v]) == (cameras["teacher"][v] == "1") for v in videos)
    for name, videos in sets.items()
}
told = {
    "lost by two": overlaps,
    "videos": {name: len(videos) for name, videos in parts.items()},
    "asked": asked,
    "right": plans,
    "right of lost, by kind": by_kind,
    "of lost, wrong": wrong,
    "drift of lost pans that C has still": drifts,
    "T as scored before": as_before,
    "e11 of the lost right": sum(cameras["e11"][v] == "1" for v in sets["lost"]),
    "levels of steps 0, 2, 5, 10, 20": [round(steps["levels"][k], 3) for k in (0, 2, 5, 10, 20)],
}
print(json.dumps(told, indent=1))
