"""The stage `attention_matching`: teacher + prompts -> teacher with converted layers, whose features alone learn."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake import parallel
from longtake.distillation import attention_matching
from longtake.distillation.attention_matching import Asked, AskingView, Match
from longtake.distillation.stages import strips
from longtake.distillation.stages.guided_clips import start_of
from longtake.distillation.stages.learners import compile_for
from longtake.distillation.stages.settings import AttentionMatchingStage
from longtake.distillation.stages.world import World, embed
from longtake.distillation.trainer import Learner, Run, train
from longtake.flow import even_levels
from longtake.generation.clip import sample_clip
from longtake.memory.far import FarShape
from longtake.models.features import Conversion
from longtake.models.text import WordEncoder
from longtake.models.wan import PromptKeys, WanTransformer, converted


def train_attention_matching(
    text: WordEncoder, network: WanTransformer, world: World, shift: float, stage: AttentionMatchingStage, run: Run
) -> tuple[WanTransformer, dict[str, Any]]:
    """The network with its easiest layers converted, and what was spent and measured.

    Heads that sums do not serve on held-out prompts are left local. `matching` tells of every taught layer which these
    are, and the errors that remain there, its heads' too, see `attention_matching.Match`; `before`: beside the near
    span's, when the stage began.
    """
    layers = stage.layers or tuple(range(network.config.layers))
    conversion = Conversion(
        layers=layers, current=stage.current, overlap=stage.overlap, degree=stage.degree,
        exact=stage.exact, turns_with_frames=stage.turns_with_frames,
    )  # fmt: skip
    far_frames = conversion.far_frames(network.config.extent)
    if not far_frames:  # before any clip is made, which may take minutes
        raise attention_matching.nothing_far(conversion.span)
    tokens = network.grid(torch.empty(1, 1, *world.latent_size))
    far_tokens = far_frames * tokens.rows * tokens.columns
    network = converted(network, conversion, far_tokens=far_tokens).requires_grad_(False)
    parallel.share_parameters(network)
    learners = {layer: _map_learner(form, stage) for layer, form in network.features.items()}
    compile_for(run, network)
    samples = _Samples(text, network, world, shift, stage, run)

    def turn(step: int) -> dict[str, Tensor]:
        sample = samples.of(step // stage.updates)
        told: dict[str, Tensor] = {}

        def teach(layer: int, asked: Asked) -> None:
            if layer not in learners:
                return
            with torch.enable_grad():
                found = attention_matching.match(
                    network.features[layer], asked, conversion.span, both_ways=stage.both_ways
                )
                loss = found.beside_near_N.mean()
                told[f"norm_{layer}"] = learners[layer].step(loss)
            told[f"layer_{layer}"] = loss.detach()

        moment = int(torch.randint(stage.sampling_steps, ()))
        with torch.no_grad(), run.autocast():
            _ask(network, sample, moment, conversion, teach)
        return {"loss": torch.stack([told[f"layer_{layer}"] for layer in layers]).mean(), **told}

    with torch.no_grad(), run.autocast(), torch.compiler.set_stance("force_eager"):
        held_out = samples.held_out()
        before = _matching_errors(network, held_out, conversion, stage.both_ways)
    look = strips.clip_strips(text, network, list(learners.values()), world, shift, stage, run)
    kept = {f"layer_{layer}": learner for layer, learner in learners.items()}
    spent: dict[str, Any] = {**train(kept, turn, stage.budget(warmup=20), run, look=look, log_every=stage.log_every)}
    for learner in learners.values():
        learner.swap_average()
    network.requires_grad_(False)
    with torch.no_grad(), run.autocast(), torch.compiler.set_stance("force_eager"):
        taught = _matching_errors(network, held_out, conversion, stage.both_ways)
        useless = 1 if stage.exact else math.inf  # of near spans alone, if there are any
        local = {
            layer: [h for h, x in enumerate(one["heads_beside_near"]) if x >= useless] for layer, one in taught.items()
        }
        for layer, heads in local.items():
            network.features[layer].leave_local(heads)
        found = _matching_errors(network, held_out, conversion, stage.both_ways) if any(local.values()) else taught
    chosen = attention_matching.easiest(
        {layer: one["beside_answer"] for layer, one in found.items()}, stage.converted_share
    )
    told = {
        str(layer): {**one, "before": before[layer]["beside_near"], "local_heads": local[layer]}
        for layer, one in found.items()
    }
    spent |= {"converted": list(chosen), "matching": told}
    return converted(network, replace(conversion, layers=chosen)), spent


def _map_learner(form: torch.nn.Module, stage: AttentionMatchingStage) -> Learner:
    """Features of one layer, that learn for themselves."""
    form.requires_grad_(True)
    adam = torch.optim.AdamW(form.parameters(), lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.0)
    return Learner(form, [adam], average=stage.average)


class _Sample(NamedTuple):
    """Clips that the teacher made: latents [K, B, F, C, H, W] at each of its K levels, and what they were to show."""

    states: Tensor
    levels: tuple[float, ...]
    prompts: PromptKeys
    prompt_BF: Tensor


class _Samples:
    """The teacher's own samples, by number. They follow from the seed, so a run that goes on makes them again."""

    def __init__(
        self, text: WordEncoder, network: WanTransformer, world: World, shift: float, stage: AttentionMatchingStage,
        run: Run,
    ):  # fmt: skip
        self._text, self._network, self._world, self._stage, self._run = text, network, world, stage, run
        self._levels = tuple(even_levels(stage.sampling_steps, shift))
        self._latest: tuple[int, _Sample] | None = None

    def of(self, number: int) -> _Sample:
        """The batch of that number, of prompts that nobody rendered; the latest is remembered."""
        if self._latest is None or self._latest[0] != number:
            batch, seed = self._stage.batch, self._stage.seed
            frames = self._network.config.extent
            said = self._world.prompts(batch, seed * 1_000_000 + number, frames)
            own = seed * 1_000_000_000 + number * batch * parallel.processes() + self._run.rank * batch
            made = self._made(said.tokens_BPL, said.prompt_BF[:, :frames], range(own, own + batch))
            self._latest = number, made
        return self._latest[1]

    def held_out(self) -> _Sample:
        """Of prompts that training never shows, the same in every process."""
        tokens_BL = self._world.held_out(strips.LOOKED_AT)
        one = torch.zeros(len(tokens_BL), self._network.config.extent, dtype=torch.long, device=tokens_BL.device)
        return self._made(tokens_BL[:, None], one, range(len(tokens_BL)))

    @torch.no_grad()
    def _made(self, tokens_BPL: Tensor, prompt_BF: Tensor, seeds: range) -> _Sample:
        network, text = self._network, self._text
        states: list[Tensor] = []
        with self._run.autocast():
            start = start_of(text, network, embed(text, tokens_BPL), seeds, self._world)
            sample_clip(
                network, *start, self._levels, self._stage.guidance, prompt_BF,
                on_step=lambda step, latents: states.append(latents), view=network.exact_view(start.noise_BFCHW),
            )  # fmt: skip
        return _Sample(torch.stack(states), self._levels, start.said, prompt_BF)


def _ask(
    network: WanTransformer, sample: _Sample, moment: int, conversion: Conversion, tell: Callable[[int, Asked], None]
) -> None:
    """One pass over clips at one moment of their making, every layer's attention exact; it tells what they ask."""
    noisy = sample.states[moment]
    frames, grid = noisy.shape[1], network.grid(noisy)
    far = FarShape(turns_with_frames=conversion.turns_with_frames)
    frame_T = torch.arange(frames).repeat_interleave(grid.rows * grid.columns)
    rotation, turned = grid.rotation(range(frames), noisy.device), far.rotation(grid, range(frames), noisy.device)
    level_BF = torch.full(noisy.shape[:2], sample.levels[moment], device=noisy.device)
    view = AskingView(rotation, turned, frame_T, tell)
    network(noisy, level_BF, sample.prompts, view, sample.prompt_BF)


def _matching_errors(
    network: WanTransformer, sample: _Sample, conversion: Conversion, both_ways: bool
) -> dict[int, dict[str, Any]]:
    """Of every taught layer, its errors over four moments of a sample's making, from noise to nearly clean."""
    found: dict[int, list[Match]] = {layer: [] for layer in conversion.layers}

    def measure(layer: int, asked: Asked) -> None:
        if layer in found:
            form = network.features[layer]
            found[layer].append(attention_matching.match(form, asked, conversion.span, both_ways=both_ways))

    steps = len(sample.levels)
    for moment in sorted({steps * part // 4 for part in range(4)}):
        _ask(network, sample, moment, conversion, measure)
    means = {layer: Match(*(torch.stack(x).mean(0) for x in zip(*some, strict=True))) for layer, some in found.items()}
    return {
        layer: {
            "beside_near": mean.beside_near_N.mean().item(),
            "beside_answer": mean.beside_answer_N.mean().item(),
            "heads_beside_near": mean.beside_near_N.tolist(),
        }
        for layer, mean in means.items()
    }
