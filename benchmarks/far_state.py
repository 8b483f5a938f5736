"""What do rules of forgetting and numbers of features make of a far state?

    python benchmarks/far_state.py --out far_state                     # minutes to an hour on two CPU cores
    python benchmarks/far_state.py --out far_state --hours 0.05 --layers 0 9    # the same lines, in a minute or two

The embedded student's keys, recorded and followed as `longtake evaluate memory` does (docs/memory.md defines the
numbers), for every rule and width, and experiments about what limits the answers. Nothing is trained: no network has
learned to read any of these states. Writes sweep.json, limits.json and recalled.png.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake import recipes
from longtake.attention import reference
from longtake.attention.linear import WIDTHS, LinearForm
from longtake.attention.rope import Rotation, rotate
from longtake.evaluation import memory
from longtake.evaluation.retention import Block, Recorded, Setting, course_of, cut_together, retention
from longtake.evaluation.sources import batches, clip_seed, held_out_captions
from longtake.memory.far import Decay, Delta, FarShape, FarState, Keep, MassCap, Rule
from longtake.memory.window import Keys

STUDENT = "self_forcing_sink"
RULES: dict[str, Rule] = {  # 240 latent frames are a minute, 12 are four blocks
    "keep": Keep(),
    "decay=240": Decay(half_life=240),
    "cap=240": MassCap(frames=240),
    "cap=12": MassCap(frames=12),
    "delta": Delta(),
    "delta=240": Delta(half_life=240),
    "delta, stiffness .1": Delta(stiffness=0.1),
}
FEW = {"keep": Keep(), "cap=12": MassCap(frames=12), "delta": Delta()}  # of which limits are sought
AGES = (0, 10, 50, 200)  # blocks
STREAM = 200  # blocks that a state has absorbed where limits are sought
LARGE = {"layers": 30, "heads": 12, "head": 128}  # the shape of the 1.3B model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=10.0)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 4, 9])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--features", type=float, nargs="+", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--parts", nargs="+", default=["limits", "sweep"], choices=["limits", "sweep"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    setting, recorded = recordings(options.layers)
    print("streams are recorded", flush=True)
    about = {"layers": options.layers, "torch": torch.__version__, "threads": torch.get_num_threads()}
    if "limits" in options.parts:
        write(options.out / "limits.json", {**about, "absorbed_blocks": STREAM, **limits(setting, recorded)})
    if "sweep" in options.parts:
        seconds = memory._block_seconds(student())
        rows = []
        for name, ratio in product(options.rules, options.features):
            rows.append(swept(name, ratio, setting, recorded, options.hours, seconds))
            print(json.dumps(short(rows[-1])), flush=True)
            write(options.out / "sweep.json", {**about, "hours": options.hours, "states": rows})
        draw(rows, options.out / "recalled.png")


def student() -> Any:
    return recipes.load("toy", recipe=STUDENT, device="cpu", dtype=torch.float32)


def recordings(layers: Sequence[int]) -> tuple[Setting, Recorded]:
    """Six streams of twelve blocks, two of them held out, as `longtake evaluate memory` records them; some layers."""
    engine = student()
    plan = memory._Plan.of(STUDENT, engine, 10.0, {})
    streams = [memory._Stream(caption, clip_seed(0, i)) for i, caption in enumerate(held_out_captions(6))]
    made = [
        one for batch in batches(streams, engine.device) for one in memory._record(plan, batch, 12, lambda line: None)
    ]
    whole = memory._recorded(made, engine.device)

    def some(block: Block) -> Block:
        return Block(*(x[list(layers)].float() for x in block))

    recorded = Recorded(
        shots=[[some(block) for block in shot] for shot in whole.shots],
        held_out=[some(block) for block in whole.held_out],
        queries=[q_LTND[list(layers)].float() for q_LTND in whole.queries],
    )
    return plan.setting, recorded


# ---------------------------------------------------------------------------------------------------------------------
# Rules and widths over hours
# ---------------------------------------------------------------------------------------------------------------------


def swept(
    name: str, ratio: float, setting: Setting, recorded: Recorded, hours: float, seconds: float
) -> dict[str, Any]:
    far = FarShape(form=WIDTHS[ratio], rule=RULES[name])
    began = time.perf_counter()
    found = retention(setting, far, recorded, blocks=round(3600 * hours / seconds))
    took = time.perf_counter() - began
    heads, head = recorded.shots[0][0].k_LTND.shape[2:]
    return {
        "rule": name,
        "features": ratio,
        "marks": found.marks,
        "ages_seconds": [age * seconds for age in found.ages],
        "mean": memory._table(found, lambda x: x.mean(0)),
        "layers": memory._of_layers(found, seconds),
        "bytes_toy": state_bytes(far.form, 10, heads, head),
        "bytes_1.3B": state_bytes(far.form, **LARGE),
        **speed(far, setting, recorded),
        "followed_in_seconds": round(took, 1),
    }


def short(row: dict[str, Any]) -> dict[str, Any]:
    """What a line of the table shows."""
    mean, ages = row["mean"], row["ages_seconds"]
    asked = [ages.index(age * ages[1]) for age in AGES if age * ages[1] in ages]  # ages[1]: of one block
    return {
        "rule": row["rule"],
        "features": row["features"],
        "rank": mean["effective_rank"][-1],
        "newest": mean["read_back_newest"][-1],
        "never": mean["read_back_never"],
        "recalled": [mean["recalled"][i] for i in asked],
        "remembered": [layer["remembered_seconds"] for layer in row["layers"]],
        **{key: row[key] for key in ("bytes_toy", "bytes_1.3B", "absorb_ms", "read_ms", "followed_in_seconds")},
    }


def state_bytes(form: LinearForm, layers: int, heads: int, head: int) -> int:
    """Of the state of one stream, by making one."""
    one = torch.zeros(1, 1, heads, head)
    still = Rotation(torch.ones(1, head // 2), torch.zeros(1, head // 2))
    return layers * FarState(FarShape(form=form)).absorb(Keys(one, one, (0,)), still).nbytes()


def speed(far: FarShape, setting: Setting, recorded: Recorded) -> dict[str, float]:
    """Milliseconds of all ten layers of the embedded model: one block absorbed; one pass of a block that reads."""
    block, numbers = recorded.shots[0][0], tuple(range(setting.block))
    k, v = block.k_LTND[:1], block.v_LTND[:1]
    absorbed_at, asked_at = setting.absorbed_at(far, k.device), setting.asked_at(far, k.device)
    state = FarState(far).absorb(Keys(k, v, numbers), absorbed_at)
    return {
        "absorb_ms": round(10 * milliseconds(lambda: state.absorb(Keys(k, v, numbers), absorbed_at)), 3),
        "read_ms": round(10 * milliseconds(lambda: state.read(k, asked_at)), 3),
    }


@torch.no_grad()
def milliseconds(call: Callable[[], object], repeats: int = 60) -> float:
    """The least of so many calls: what else a machine does only ever adds."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return round(1000 * min(times), 4)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = dict(zip(RULES, (f"C{i}" for i in range(len(RULES))), strict=True))
    widths = dict(zip(WIDTHS, (":", "-", "--", "-."), strict=True))
    for row in rows:
        look = {"color": colours[row["rule"]], "linestyle": widths[row["features"]]}
        ages = [max(age, row["ages_seconds"][1] / 2) for age in row["ages_seconds"]]
        kept = [value if value and value > 1e-6 else float("nan") for value in row["mean"]["recalled"]]
        left.plot(ages, kept, label=row["rule"] if row["features"] == 1 else None, **look)
        right.plot(ages, row["mean"]["read_back"], **look)
    left.set(
        title="recalled: worth of having seen a block",
        xlabel="seconds ago",
        xscale="log",
        yscale="log",
        ylim=(1e-4, 1),
        xlim=(None, 1000),
    )
    right.set(
        title="error of reading it back (1: no better than the mean)",
        xlabel="seconds ago",
        xscale="log",
        xlim=(None, 1000),
    )
    for panel in (left, right):
        panel.grid(alpha=0.3)
    left.legend(fontsize=7, title="dotted D/2, solid D, dashed 2D, dash-dot 4D", title_fontsize=7)
    figure.savefig(path, dpi=90)


# ---------------------------------------------------------------------------------------------------------------------
# What limits the answers
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def limits(setting: Setting, recorded: Recorded) -> dict[str, Any]:
    """Errors of reading back as `Retention` defines them: of held-out blocks absorbed last, never, and alone."""
    at, asked = setting.absorbed_at(FarShape(), "cpu"), setting.asked_at(FarShape(), "cpu")
    in_space = setting.absorbed_at(FarShape(turns_with_frames=False), "cpu")
    still = Rotation(torch.ones_like(at.cos_TA), torch.zeros_like(at.sin_TA))
    places = {
        "as streamed": (at, at),
        "asked from the next block": (at, asked),
        "frames not rotated": (in_space, in_space),
        "not rotated": (still, still),
    }
    world = World(recorded)
    errors = [
        {"rule": rule, "features": ratio, "places": place, "values": values}
        | world.errors(FarShape(form=WIDTHS[ratio], rule=FEW[rule]), *places[place], centred=values == "centred")
        for rule, ratio, place, values in product(FEW, (1, 2, 4), places, ("plain", "centred"))
    ]
    sharper = [
        {"rule": rule, "map": name, "places": place}
        | world.errors(FarShape(form=LinearForm(made, made, made), rule=FEW[rule]), *places[place], centred=False)
        for rule, (name, made), place in product(FEW, SHARPER.items(), ("as streamed", "not rotated"))
    ]
    return {"errors": errors, "sharper_maps": sharper, "exact_softmax": world.softmax(at, asked)}


def sharpened(power: int) -> Callable[[Tensor], Tensor]:
    """Rectified numbers to a power, at their norm (as in 2308.00442)."""

    def features(x: Tensor) -> Tensor:
        rectified = x.relu() + 1e-6
        sharp = rectified**power
        return sharp * rectified.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True)

    return features


def softmax_signs(x: Tensor) -> Tensor:
    """Softmaxes over the numbers of both signs (as in 2402.04347, without its learned layer)."""
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)


SHARPER = {"relu^2": sharpened(2), "relu^4": sharpened(4), "softmax of both signs": softmax_signs}


class World:
    """Recorded blocks in the order of a stream, and what held-out blocks are asked."""

    def __init__(self, recorded: Recorded):
        self.shots = [block for shot in recorded.shots for block in shot]
        self.held_out = recorded.held_out
        self.order = cut_together([len(shot) for shot in recorded.shots], STREAM, seed=0)
        self.mean_L1ND = torch.stack([block.v_LTND.mean(1, keepdim=True) for block in self.shots]).mean(0)

    def errors(self, far: FarShape, keys_at: Rotation, asked_at: Rotation, *, centred: bool) -> dict[str, float]:
        """centred: only what values differ from their mean by is absorbed, and the mean is added to answers."""
        mean = self.mean_L1ND if centred else torch.zeros_like(self.mean_L1ND)
        blocks = [Block(block.k_LTND, block.v_LTND - mean) for block in (*self.shots, *self.held_out)]
        course = course_of(far, blocks, keys_at, 3)
        probes = range(len(self.shots), len(blocks))

        def error(states: Iterator[Any]) -> float:
            answers = (
                far.rule.read(sums, far.form.of_queries(block.k_LTND, asked_at)) + mean
                for sums, block in zip(states, self.held_out, strict=True)
            )
            return self.error(answers)

        first, *others = self.order
        alone = [
            far.rule.absorb(None, far.form.of_keys(block.k_LTND, keys_at), block.v_LTND, 3)
            for block in (blocks[first], *(blocks[probe] for probe in probes))
        ]
        sums = alone[0]
        for number in others:
            sums = course.absorb(sums, number)
        return {
            "alone": error(iter(alone[1:])),
            "newest": error(course.absorb(sums, probe) for probe in probes),
            "never": error(sums for _ in probes),
        }

    def softmax(self, keys_at: Rotation, asked_at: Rotation) -> list[dict[str, Any]]:
        """To compare with, nothing summed: softmax attention to all tokens of the newest blocks and of the probe."""

        def answers(others: int, asked: Rotation, probe_too: bool) -> Iterator[Tensor]:
            old = [self.shots[number] for number in self.order[len(self.order) - others :]]
            for block in self.held_out:
                seen = [*old, block] if probe_too else old
                k = torch.cat([rotate(one.k_LTND, keys_at) for one in seen], 1)
                yield reference.dense(rotate(block.k_LTND, asked), k, torch.cat([one.v_LTND for one in seen], 1))

        return [
            {
                "places": place,
                "other_blocks": others,
                "newest": self.error(answers(others, asked, True)),
                "never": self.error(answers(others, asked, False)) if others else None,
            }
            for others in (0, 3, 40)
            for place, asked in (("as streamed", keys_at), ("asked from the next block", asked_at))
        ]

    def error(self, answers: Iterator[Tensor]) -> float:
        found = [
            (answer - block.v_LTND).flatten(1).norm(dim=1) / (self.mean_L1ND - block.v_LTND).flatten(1).norm(dim=1)
            for answer, block in zip(answers, self.held_out, strict=True)
        ]
        return round(torch.stack(found).mean().item(), 4)


def write(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, allow_nan=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
