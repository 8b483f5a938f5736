"""Which positions, which shift and which features let sums answer for what is not near?

    python benchmarks/near_span.py --out near_span             # ten minutes on one CPU core
    python benchmarks/near_span.py --out near_span --tiny      # the same lines, in half a minute

The embedded teacher's queries, keys and values of rendered clips (15 latent frames) at random noise levels, three of
its ten layers. Maps of queries and keys are taught, each head by itself, to answer as exact attention to everything up
to the end of the chunk would; nothing else learns. near_span.json holds, of clips that were not taught:

far: L1 from that answer beside the L1 of what is near alone (1: sums are of no use), in chunks that have something far;
mean over heads, the best and the worst of them. from_100: the same maps where the clip begins at latent frame 100, and
not at 0 as it was taught. mass: of what is far in units of what is near, at first and at the end, over queries: median
and 95th percentile. seconds: of teaching.

both_ways: how far exact attention up to the end of a chunk is from exact attention to the whole clip, beside the same
of what is near alone: what frames to come hold of the answers of a teacher that looks both ways.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake.attention import linear, reference
from longtake.attention.dense import dense, massed
from longtake.attention.linear import Features
from longtake.attention.near_span import NearSpan, Shift, parallel
from longtake.attention.rope import Grid, Rotation, rotate
from longtake.flow import add_noise, shift_level
from longtake.memory.view import Tokens
from longtake.models.features import LearnedForm
from longtake.recipes.engines import latent_size
from longtake.recipes.weight_files import TEACHER_FILE, load_network, packaged, toy_codec
from longtake.toy.clips import training_scenes
from longtake.toy.world import render

LAYERS = (0, 4, 9)
CURRENT, OVERLAP = 3, 1
CASES: dict[str, dict[str, Any]] = {
    "all": {"positions": "all"},
    "space": {"positions": "space"},
    "none": {"positions": "none"},
    "after": {"positions": "after"},
    "space, top": {"positions": "space", "shift": "top"},
    "space, a number a head": {"positions": "space", "shift": "number"},
    "space, degree 1": {"positions": "space", "degree": 1},
}


class Recorded(NamedTuple):
    """What the layers of one clip ask and hold, unrotated, the layers side by side as heads: [1, T, L * N, D]."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass
class Recording:
    """A clip view that keeps what the layers bring to it."""

    rotation: Rotation
    kept: dict[int, Tokens] = field(default_factory=dict)

    def attend(self, layer: int, own: Tokens) -> Tensor:
        self.kept[layer] = own
        return dense(own.q, own.k, own.v)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clips, held, steps = (2, 1, 3) if options.tiny else (10, 4, options.steps)
    grid, taught, held_out = recordings(clips, held)
    print("clips are recorded", flush=True)
    span = NearSpan(current=CURRENT, overlap=OVERLAP)
    found: dict[str, Any] = {
        "about": {"torch": torch.__version__, "threads": 1, "layers": LAYERS, "clips": clips, "held_out": held,
                  "steps": steps, "seed": options.seed, "current": CURRENT, "overlap": OVERLAP},
        "both_ways": both_ways(grid, span, held_out),
        "cases": {},
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.cases:
        found["cases"][name] = Case(grid, span, seed=options.seed, **CASES[name]).judged(taught, held_out, steps)
        print(name, json.dumps(found["cases"][name]), flush=True)
        (options.out / "near_span.json").write_text(json.dumps(found, indent=1) + "\n")


@torch.no_grad()
def recordings(taught: int, held_out: int) -> tuple[Grid, list[Recorded], list[Recorded]]:
    """Clips to learn from and others, each at a level of its own, evenly spread before the shift."""
    device = torch.device("cpu")
    text, network, description = load_network(packaged(TEACHER_FILE), device)
    codec = toy_codec(device)
    generator = torch.Generator().manual_seed(0)

    def recorded(count: int, seed: int) -> list[Recorded]:
        scenes, tokens_BPL = training_scenes(count, seed, device)
        made = []
        for i in range(count):
            extent = network.config.extent
            pictures = render(scenes[i : i + 1], 1 + (extent - 1) * codec.temporal_factor).frames_BFCHW
            clean_BFCHW = codec.encode(pictures)[0]
            level = shift_level(torch.full((1, extent), (i + 0.5) / count), description["shift"])
            noise = torch.randn(clean_BFCHW.shape, generator=generator)
            noisy = add_noise(clean_BFCHW, noise, level)
            prompts = network.prompt_keys(text(tokens_BPL[i, :1]).unsqueeze(1))
            view = Recording(network.clip_view(noisy).rotation)
            network(noisy, level, prompts, view)
            some = [view.kept[layer] for layer in LAYERS]
            made.append(
                Recorded(*(torch.cat(x, 2) for x in zip(*((o.plain_q, o.plain_k, o.v) for o in some), strict=True)))
            )
        return made

    torch.manual_seed(0)
    return network.grid(torch.zeros(1, 1, *latent_size(codec))), recorded(taught, 1), recorded(held_out, 2)


@dataclass
class Case:
    """One way to make features, and to weigh what is far against what is near."""

    grid: Grid
    span: NearSpan
    seed: int
    positions: str
    shift: str = "log mass"
    degree: int = 2

    def judged(self, taught: list[Recorded], held_out: list[Recorded], steps: int) -> dict[str, Any]:
        torch.manual_seed(self.seed)
        tokens = self.grid.rows * self.grid.columns
        _, length, heads, head = taught[0].q.shape
        far_tokens = length - (self.span.current + self.span.overlap) * tokens
        self.form = LearnedForm(
            heads, head, degree=self.degree, far_tokens=far_tokens, turned_after=self.positions == "after"
        )
        self.unit_N = torch.nn.Parameter(self._unit(taught[0]), requires_grad=self.shift == "number")
        first, near_alone = self._mass(held_out), [self._near(clip) for clip in taught]
        targets = [self._target(clip) for clip in taught]
        began = time.perf_counter()
        weights = [*self.form.parameters(), *([self.unit_N] if self.shift == "number" else [])]
        optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / steps))
        for _ in range(steps):
            i = int(torch.randint(len(taught), ()))
            error = (self._answer(taught[i]) - targets[i]).abs().mean((0, 1, 3))
            loss = (error / (near_alone[i] - targets[i]).abs().mean((0, 1, 3))).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - began
        return {
            "far": self._errors(held_out, 0),
            "from_100": self._errors(held_out, 100),
            "mass": {"first": first, "last": self._mass(held_out)},
            "seconds": round(seconds, 1),
        }

    def _features(self, clip: Recorded, first: int = 0) -> tuple[Features, Features]:
        frames = range(first, first + self._frames(clip))
        rotation = self.grid.rotation([0] * len(frames) if self.positions == "space" else frames, "cpu")
        if self.positions == "none":
            rotation = Rotation(torch.ones_like(rotation.cos_TA), torch.zeros_like(rotation.sin_TA))
        return self.form.of_queries(clip.q, rotation), self.form.of_keys(clip.k, rotation)

    def _answer(self, clip: Recorded, first: int = 0) -> Tensor:
        queries, keys = self._features(clip, first)
        q, k = turned(self.grid, clip)
        shift: Shift | Tensor = {"log mass": Shift.LOG_MASS, "top": Shift.TOP, "number": self.unit_N}[self.shift]
        tokens = self.grid.rows * self.grid.columns
        return parallel(q, k, clip.v, queries, keys, span=self.span, tokens=tokens, shift=shift)

    def _near(self, clip: Recorded) -> Tensor:
        return masked(self.grid, clip, self._masks(clip)[0])

    def _target(self, clip: Recorded) -> Tensor:
        near, far = self._masks(clip)
        return masked(self.grid, clip, near | far)

    def _masks(self, clip: Recorded) -> tuple[Tensor, Tensor]:
        tokens = self.grid.rows * self.grid.columns
        return reference.near_and_far(self._frames(clip), tokens, self.span.current, self.span.overlap)

    def _frames(self, clip: Recorded) -> int:
        return clip.q.shape[1] // (self.grid.rows * self.grid.columns)

    @torch.no_grad()
    def _unit(self, clip: Recorded) -> Tensor:
        """Mean log of what the last chunk's near scores sum to."""
        tokens = self.grid.rows * self.grid.columns
        q, k = turned(self.grid, clip)
        near = slice(-(self.span.current + self.span.overlap) * tokens, None)
        return massed(q[:, -tokens:], k[:, near], clip.v[:, near]).log_mass_BTN.mean((0, 1))

    @torch.no_grad()
    def _errors(self, clips: list[Recorded], first: int) -> dict[str, float]:
        ratios = []
        for clip in clips:
            target = self._target(clip)
            wrong, without = ((x - target).abs().mean((0, 1, 3)) for x in (self._answer(clip, first), self._near(clip)))
            ratios.append(wrong / without)
        by_head = torch.stack(ratios).mean(0)
        return {
            "mean": round(by_head.mean().item(), 4),
            "best": round(by_head.min().item(), 4),
            "worst": round(by_head.max().item(), 4),
            **{
                f"layer {layer}": round(part.mean().item(), 4)
                for layer, part in zip(LAYERS, by_head.chunk(len(LAYERS)), strict=True)
            },
        }

    @torch.no_grad()
    def _mass(self, clips: list[Recorded]) -> dict[str, float]:
        """Of the last chunk's far tokens, over its queries and all heads."""
        masses = []
        for clip in clips:
            queries, keys = self._features(clip)
            far = self._masks(clip)[1][-1]
            sums = linear.sums_of(Features(*(x[:, far] for x in keys)), clip.v[:, far])
            tokens = self.grid.rows * self.grid.columns
            asked = Features(*(x[:, -self.span.current * tokens :] for x in queries))
            masses.append(linear.weigh(sums, asked).below.flatten())
        mass = torch.cat(masses)
        return {"median": round(mass.median().item(), 5), "p95": round(mass.quantile(0.95).item(), 5)}


def turned(grid: Grid, clip: Recorded) -> tuple[Tensor, Tensor]:
    rotation = grid.rotation(range(clip.q.shape[1] // (grid.rows * grid.columns)), "cpu")
    return rotate(clip.q, rotation), rotate(clip.k, rotation)


@torch.no_grad()
def masked(grid: Grid, clip: Recorded, mask: Tensor) -> Tensor:
    return dense(*turned(grid, clip), clip.v, mask)


def both_ways(grid: Grid, span: NearSpan, clips: list[Recorded]) -> dict[str, float]:
    ratios = []
    for clip in clips:
        tokens = grid.rows * grid.columns
        near, far = reference.near_and_far(clip.q.shape[1] // tokens, tokens, span.current, span.overlap)
        whole = masked(grid, clip, torch.ones_like(near))
        wrong, without = ((masked(grid, clip, m) - whole).abs().mean((0, 1, 3)) for m in (near | far, near))
        ratios.append(wrong / without)
    by_head = torch.stack(ratios).mean(0)
    return {
        f"layer {layer}": round(part.mean().item(), 4)
        for layer, part in zip(LAYERS, by_head.chunk(len(LAYERS)), strict=True)
    }


if __name__ == "__main__":
    main()
