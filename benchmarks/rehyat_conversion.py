"""Does conversion take any softmax attention? The 1.3B shape with random weights, and an attention that is not Wan's.

    python benchmarks/rehyat_conversion.py --out conversion                   # on a GPU, a few minutes
    python benchmarks/rehyat_conversion.py --out conversion --shape tiny      # the same lines on a CPU, in seconds

`--parts` names those of these that shall run, all by default:

another_attention  an attention of torch (`nn.MultiheadAttention`: packed projections with biases, no norms, no rotary
                   positions, heads of 64) over learned places, of tokens of text and of video at once; text is of the
                   first latent frame
network            `longtake train attention_matching` itself, of every layer of a network of that shape, over clips
                   that it makes of random prompts
finetune           `longtake train finetune` itself, of all of such a network, every second layer converted, over clips
                   of noise, with `recompute=true`

Weights of networks are random, so what is shown is that losses fall, and what it takes; not what a trained network's
conversion is worth. Of clips of noise there is next to nothing to learn: of `finetune` seconds and memory count.

conversion.json holds the options, and of each part the stage's settings, the losses on the way (of matching L1 beside
that of the near span alone), errors on held-out input, before and after for the network, seconds of an update or a
step, the peak of GPU memory, and how many parameters learned. Runs write to a temporary folder, which may take 20 GB.
"""

import argparse
import gc
import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.attention.near_span import NearSpan
from longtake.distillation.attention_matching import Asked, match
from longtake.distillation.stages import (
    AttentionMatchingStage,
    FinetuneStage,
    Stage,
    strips,
    train_attention_matching,
    train_finetune,
)
from longtake.distillation.trainer import Run, read_metrics
from longtake.models.features import Conversion, LearnedForm
from longtake.models.text import WordEncoder, WordEncoderConfig
from longtake.models.wan import WanConfig, WanTransformer, converted

SHAPES = {
    "1.3B": ({"dim": 1536, "heads": 12, "ffn_dim": 8960, "layers": 30, "text_dim": 4096}, (16, 60, 104), 512),
    "tiny": ({"dim": 32, "heads": 2, "ffn_dim": 64, "layers": 2, "text_dim": 16}, (16, 4, 6), 8),
}
PARTS = ("another_attention", "network", "finetune")
SHIFT, WORDS = 5.0, 1000
PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="1.3B", choices=list(SHAPES))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--steps", type=int, default=100, help="of network; of another_attention thrice as many")
    parser.add_argument("--seconds", type=float, default=240.0, help="most that each stage trains")
    parser.add_argument("--finetune-steps", type=int, default=6)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    about = {
        "torch": torch.__version__, "device": torch.cuda.get_device_name() if PLACE.type == "cuda" else "cpu",
        "options": {name: value for name, value in vars(options).items() if name != "out"},
    }  # fmt: skip
    found: dict[str, Any] = {"about": about}
    measured = {
        "another_attention": lambda: another_attention(3 * options.steps, small=options.shape == "tiny"),
        "network": lambda: network(options.shape, options.steps, options.seconds),
        "finetune": lambda: finetune(options.shape, options.finetune_steps, options.seconds),
    }
    for name in options.parts:
        gc.collect()  # what the part before it left in cycles
        if PLACE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = perf_counter()
        found[name] = measured[name]()
        found[name]["seconds"] = round(perf_counter() - began, 1)
        peak = torch.cuda.max_memory_allocated() / 1e9 if PLACE.type == "cuda" else None
        found[name]["peak_gb"] = peak and round(peak, 2)
        (options.out / "conversion.json").write_text(json.dumps(found, indent=1) + "\n")


class RandomWorld:
    """Prompts of random words, clips of noise, and nothing shown."""

    def __init__(self, latent_size: tuple[int, int, int], words: int):
        self.latent_size, self._words = latent_size, words

    def prompts(self, count: int, seed: int, frames: int, looks_away: bool = True) -> SimpleNamespace:
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, WORDS, (count, 1, self._words), generator=draw).to(PLACE)
        return SimpleNamespace(tokens_BPL=tokens, prompt_BF=torch.zeros(count, frames, dtype=torch.long, device=PLACE))

    def clips(
        self, size: int, seed: int, frames: int, memory_share: float = 0.0, looks_soon: bool = False
    ) -> "RandomClips":
        return RandomClips(self, seed, frames)

    def held_out(self, count: int) -> Tensor:
        return self.prompts(count, 1 << 40, 1).tokens_BPL[:, 0]

    def show(self, name: str, latents_BFCHW: Tensor) -> None: ...


class RandomClips:
    """Noise in the place of latents, drawn anew each time."""

    def __init__(self, world: RandomWorld, seed: int, frames: int):
        self.frames, self._world, self._next = frames, world, seed

    def renew(self) -> None: ...

    def draw(self, count: int, frames: int) -> SimpleNamespace:
        self._next += 1
        channels, *size = self._world.latent_size
        said = self._world.prompts(count, self._next, frames)
        latents = torch.randn(count, frames, channels, *size, device=PLACE)
        return SimpleNamespace(
            **vars(said), latents_BFCHW=latents, focus_BFHW=torch.zeros(count, frames, *size, device=PLACE)
        )

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


def drawn(shape: str) -> tuple[WordEncoder, WanTransformer, Any]:
    """Text encoder and network of random weights, and their world."""
    sizes, latent_size, words = SHAPES[shape]
    strips.LOOKED_AT = 1
    torch.manual_seed(0)
    with PLACE:
        made = WanTransformer(WanConfig(**sizes))
        text = WordEncoder(WordEncoderConfig(words=WORDS, length=words, dim=made.config.text_dim, layers=1))
    return text.requires_grad_(False), made.requires_grad_(False), RandomWorld(latent_size, words)


def tokens_of(network: WanTransformer, world: RandomWorld) -> int:
    """Of a latent frame."""
    grid = network.grid(torch.empty(1, 1, *world.latent_size))
    return grid.rows * grid.columns


def told(network: WanTransformer, world: RandomWorld, stage: Stage, out: Path) -> dict[str, Any]:
    """What ran, and the rows of its metrics, one a step. The first step's seconds stand apart: it compiles."""
    rows = read_metrics(out)
    later = [round(after["seconds"] - before["seconds"], 2) for before, after in pairwise(rows)]
    return {
        "settings": asdict(stage), "parameters": sum(p.numel() for p in network.parameters()),
        "tokens": network.config.extent * tokens_of(network, world), "losses": [row["loss"] for row in rows],
        "first_step_seconds": rows[0]["seconds"], "step_seconds": later,
        "metrics": rows,
    }  # fmt: skip


def network(shape: str, steps: int, seconds: float) -> dict[str, Any]:
    text, made, world = drawn(shape)
    stage = AttentionMatchingStage(
        steps=steps, seconds=seconds, batch=1, updates=6, sampling_steps=4, converted_share=0.5, log_every=1
    )
    with TemporaryDirectory() as out:
        taught, spent = train_attention_matching(text, made, world, SHIFT, stage, Run(Path(out), PLACE))
        found = told(made, world, stage, Path(out))
    learned = sum(p.numel() for form in taught.features.values() for p in form.parameters())
    means = {
        name: sum(one[key] for one in spent["matching"].values()) / len(spent["matching"])
        for name, key in (("held_out_before", "before"), ("held_out_after", "beside_near"))
    }
    return {**found, "learned_of_converted": learned, **means, **spent}


def finetune(shape: str, steps: int, seconds: float) -> dict[str, Any]:
    text, made, world = drawn(shape)
    conversion = Conversion(layers=tuple(range(1, made.config.layers, 2)))
    far_tokens = conversion.far_frames(made.config.extent) * tokens_of(made, world)
    with PLACE:
        made = converted(made, conversion, far_tokens=far_tokens).requires_grad_(False)
    stage = FinetuneStage(steps=steps, seconds=seconds, batch=1, sampling_steps=1, recompute=True, log_every=1)
    with TemporaryDirectory() as out:
        spent = train_finetune(text, made, world, SHIFT, stage, Run(Path(out), PLACE))
        found = told(made, world, stage, Path(out))
    return {**found, "converted": list(conversion.layers), **spent}


def another_attention(steps: int, *, small: bool) -> dict[str, Any]:
    """Tokens are places, a scene that all of a clip share, and noise."""
    torch.manual_seed(0)
    frames, each, words, width, heads = (6, 4, 3, 32, 2) if small else (21, 256, 77, 512, 8)
    frame_T = torch.cat([torch.zeros(words, dtype=torch.long), torch.arange(frames).repeat_interleave(each)])
    attention = nn.MultiheadAttention(width, heads, batch_first=True).to(PLACE).requires_grad_(False)
    places = torch.randn(len(frame_T), width, device=PLACE)
    form = LearnedForm(heads, width // heads, far_tokens=(frames - 4) * each).to(PLACE)
    adam = torch.optim.AdamW(form.parameters(), lr=3e-3, weight_decay=0.0)
    draw = torch.Generator(PLACE).manual_seed(1)

    def asked() -> Asked:
        scene = torch.randn(2, 1, width, generator=draw, device=PLACE)
        x = scene / 2 + places + 0.5 * torch.randn(2, len(frame_T), width, generator=draw, device=PLACE)
        packed = functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in packed.chunk(3, dim=-1))
        return Asked(2 * q, k, v, frame_T)

    span, losses = NearSpan(current=3, overlap=1), []
    began = perf_counter()
    for step in range(steps):
        adam.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        loss = match(form, asked(), span).beside_near_N.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(form.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses).tolist()
    update_seconds = (perf_counter() - began) / steps
    with torch.no_grad():
        held_out = match(form, asked(), span)
    return {
        "tokens": len(frame_T), "losses": losses, "update_seconds": update_seconds,
        "heads_beside_near": held_out.beside_near_N.tolist(), "heads_beside_answer": held_out.beside_answer_N.tolist(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
