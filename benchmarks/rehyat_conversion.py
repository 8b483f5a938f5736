"""Does conversion take any softmax attention? The 1.3B shape with random weights, and an attention that is not Wan's.

    python benchmarks/rehyat_conversion.py --out conversion                   # on a GPU, a few minutes
    python benchmarks/rehyat_conversion.py --out conversion --shape tiny      # the same lines on a CPU, in seconds

1. `longtake train attention_matching` itself, of every layer of a network of that shape, over clips that it makes of
   random prompts. Its weights are random, so what is shown is that losses fall, and what it takes; not what a trained
   network's conversion is worth.
2. An attention of torch (`nn.MultiheadAttention`: packed projections with biases, no norms, no rotary positions, heads
   of 64) over learned places, of tokens of text and of video at once; text is of the first latent frame.

conversion.json holds of both the losses on the way (L1 beside that of the near span alone), errors on held-out input,
seconds of an update, the peak of GPU memory, and how many parameters learned.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.attention.near_span import NearSpan
from longtake.distillation.attention_matching import Asked, match
from longtake.distillation.stages import AttentionMatchingStage, strips, train_attention_matching
from longtake.distillation.trainer import Run, read_metrics
from longtake.models.features import LearnedForm
from longtake.models.text import WordEncoder, WordEncoderConfig
from longtake.models.wan import WanConfig, WanTransformer

SHAPES = {
    "1.3B": ({"dim": 1536, "heads": 12, "ffn_dim": 8960, "layers": 30, "text_dim": 4096}, (16, 60, 104), 512),
    "tiny": ({"dim": 32, "heads": 2, "ffn_dim": 64, "layers": 2, "text_dim": 16}, (16, 4, 6), 8),
}
SHIFT, WORDS = 5.0, 1000
PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="1.3B", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=240.0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    about = {
        "torch": torch.__version__, "device": torch.cuda.get_device_name() if PLACE.type == "cuda" else "cpu",
        "shape": options.shape,
    }  # fmt: skip
    found: dict[str, Any] = {"about": about}
    for name, made in (
        ("another_attention", lambda: another_attention(3 * options.steps, small=options.shape == "tiny")),
        ("network", lambda: network(options.shape, options.steps, options.seconds, options.out)),
    ):
        if PLACE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = perf_counter()
        found[name] = made()
        found[name]["seconds"] = round(perf_counter() - began, 1)
        peak = torch.cuda.max_memory_allocated() / 1e9 if PLACE.type == "cuda" else None
        found[name]["peak_gb"] = peak and round(peak, 2)
        (options.out / "conversion.json").write_text(json.dumps(found, indent=1) + "\n")


class RandomWorld:
    """Prompts of random words, and nothing rendered."""

    def __init__(self, latent_size: tuple[int, int, int], words: int):
        self.latent_size, self._words = latent_size, words

    def prompts(self, count: int, seed: int, frames: int) -> SimpleNamespace:
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, WORDS, (count, 1, self._words), generator=draw).to(PLACE)
        return SimpleNamespace(tokens_BPL=tokens, prompt_BF=torch.zeros(count, frames, dtype=torch.long, device=PLACE))

    def held_out(self, count: int) -> Tensor:
        return self.prompts(count, 1 << 40, 1).tokens_BPL[:, 0]

    def show(self, name: str, latents_BFCHW: Tensor) -> None: ...


def network(shape: str, steps: int, seconds: float, out: Path) -> dict[str, Any]:
    sizes, latent_size, words = SHAPES[shape]
    torch.manual_seed(0)
    config = WanConfig(**sizes)
    made = WanTransformer(config).to(PLACE).requires_grad_(False)
    encoder = WordEncoderConfig(words=WORDS, length=words, dim=config.text_dim, layers=1)
    text = WordEncoder(encoder).to(PLACE).requires_grad_(False)
    stage = AttentionMatchingStage(
        steps=steps, seconds=seconds, batch=1, updates=25, sampling_steps=4, converted_share=0.5
    )  # fmt: skip
    strips.LOOKED_AT = 1
    world: Any = RandomWorld(latent_size, words)
    run = Run(out, PLACE)
    converted, spent = train_attention_matching(text, made, world, SHIFT, stage, run)
    learned = sum(p.numel() for form in converted.features.values() for p in form.parameters())
    return {
        "parameters": sum(p.numel() for p in made.parameters()), "learned_of_converted": learned,
        "tokens": config.extent * latent_size[1] * latent_size[2] // config.patch**2,
        "metrics": read_metrics(out), **spent,
    }  # fmt: skip


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
