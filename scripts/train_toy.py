"""Train the embedded model's parts, one stage a call; under torchrun several processes share a stage.

    python scripts/train_toy.py codec --out DIR
    python scripts/train_toy.py teacher --codec DIR --out DIR
    python scripts/train_toy.py teacher_forcing --codec DIR --weights teacher.safetensors --out DIR
    python scripts/train_toy.py dmd --codec DIR --teacher teacher.safetensors --weights student.safetensors --out DIR

Every stage writes weights, its configuration (record.json), curves (metrics.jsonl) and pictures (*.png) into --out.
"""

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake import flow, parallel, recipes
from longtake.distillation import dmd
from longtake.distillation.optim import muon_and_adam
from longtake.distillation.pretrain import Clips, codec_loss, flow_loss, teacher_forcing_loss
from longtake.distillation.rollout import FreshNoise, rollout
from longtake.distillation.trainer import Budget, Learner, train
from longtake.generation.clip import sample_clip
from longtake.generation.recipe import Recipe
from longtake.generation.stream import to_uint8
from longtake.media.pictures import contact_sheet, save_png
from longtake.models.light_codec import LightCodec, LightCodecConfig
from longtake.models.text import WordEncoder, WordEncoderConfig
from longtake.models.wan import WanConfig, WanTransformer
from longtake.toy import captions, world
from longtake.toy.clips import ClipPool
from longtake.toy.scenes import CLIP_PICTURES, HEIGHT, WIDTH, sample_scenes

SHIFT = 3.0  # of the toy's levels: its latents are small
GUIDANCE = 3.0
TEACHER_STEPS = 32
RENEW_EVERY = 6  # steps between new clips, which cost time to paint and encode
PICTURED_BLOCKS = 20  # 15 seconds
NETWORK_ENDS = ("patch_embedding", "text_embedding", "time_", "head")  # matrices that are not hidden: AdamW's


@dataclass(frozen=True, kw_only=True)
class CodecStage:
    """The codec from nothing: clips of `pictures`, one process."""

    steps: int = 100_000
    seconds: float = 285.0
    seed: int = 42
    batch: int = 16
    pictures: int = 17
    lr: float = 1.5e-3
    kl_weight: float = 1.5e-3
    decoder_widths: tuple[int, ...] = (160, 96, 48)
    decoder_blocks: tuple[int, ...] = (3, 3, 1)
    encoder_widths: tuple[int, ...] = (48, 96, 160)
    encoder_blocks: tuple[int, ...] = (2, 2, 2)


@dataclass(frozen=True, kw_only=True)
class TeacherStage:
    """The bidirectional teacher and its text encoder from nothing, by flow matching."""

    steps: int = 100_000
    seconds: float = 480.0
    seed: int = 42
    batch: int = 32
    lr: float = 2e-3
    average: float = 0.999
    subject_weight: float = 5.0
    no_prompt_share: float = 0.1
    pool: int = 2048
    network: WanConfig = field(
        default_factory=lambda: WanConfig(dim=256, heads=4, ffn_dim=1024, layers=10, text_dim=192, extent=21)
    )


@dataclass(frozen=True, kw_only=True)
class TeacherForcingStage:
    """The causal student from the teacher, by flow matching in front of the clean past."""

    steps: int = 100_000
    seconds: float = 80.0
    seed: int = 43
    batch: int = 24
    frames: int = 33
    lr: float = 1e-3
    average: float = 0.995
    subject_weight: float = 5.0
    pool: int = 1024


@dataclass(frozen=True, kw_only=True)
class DmdStage:
    """Distribution matching on the student's own rollouts, under every recipe of `recipes` in turn."""

    steps: int = 100_000
    seconds: float = 330.0
    seed: int = 44
    batch: int = 32
    lr: float = 1e-4
    critic_lr: float = 2e-4
    critic_turns: int = 3
    average: float = 0.98
    most_blocks: int = 11
    recipes: tuple[str, ...] = ("self_forcing_sink", "self_forcing_sink", "self_forcing")
    pool: int = 1024


STAGES = {"codec": CodecStage, "teacher": TeacherStage, "teacher_forcing": TeacherForcingStage, "dmd": DmdStage}
Stage = CodecStage | TeacherStage | TeacherForcingStage | DmdStage


@dataclass(frozen=True)
class Run:
    """Where a stage runs and writes."""

    rank: int
    processes: int
    device: torch.device
    out: Path
    codec: Path | None
    teacher: Path | None
    start: Path | None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @cached_property
    def _compiled(self) -> world.Painter:
        return torch.compile(world.paint, dynamic=False)  # one kernel instead of hundreds, once per shape

    def painter(self) -> world.Painter:
        return self._compiled if self.device.type == "cuda" else world.paint

    def autocast(self) -> torch.autocast:
        # Without autocast's cache: weights cast during no_grad passes would be reused, cut from the graph.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False)


def main() -> None:
    arguments = _arguments()
    rank, processes, device = parallel.join()
    stage = _stage(arguments.stage, arguments.set)
    torch.manual_seed(stage.seed + rank)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if (arguments.out / "metrics.jsonl").exists():
        raise SystemExit(f"{arguments.out} holds another run: choose an empty folder")
    if arguments.stage == "codec" and processes > 1:
        raise SystemExit("the codec trains in one process")
    arguments.out.mkdir(parents=True, exist_ok=True)
    run = Run(rank, processes, device, arguments.out, arguments.codec, arguments.teacher, arguments.weights)
    began = time.time()
    spent = _TRAINERS[arguments.stage](stage, run)
    if run.first:
        _write_record(run, arguments.stage, stage, spent, began)
    parallel.leave()


def train_codec(stage: CodecStage, run: Run) -> dict[str, float]:
    config = LightCodecConfig(
        **{f.name: getattr(stage, f.name) for f in fields(LightCodecConfig) if hasattr(stage, f.name)}
    )
    codec = LightCodec(config).to(run.device)
    learner = Learner(
        codec, muon_and_adam(codec, stage.lr, adamw_only=("encoder.enter", "decoder.leave")), average=0.999
    )
    there_and_back = torch.compile(codec) if run.device.type == "cuda" else codec
    latent_shape = (stage.batch, 1 + (stage.pictures - 1) // codec.temporal_factor, *_latent_size(codec))
    dice = torch.Generator().manual_seed(stage.seed)

    def clips() -> world.Rendering:
        seed = int(torch.randint(1 << 60, (), generator=dice))
        scenes = sample_scenes(stage.batch, seed, device=run.device)
        first = torch.randint(CLIP_PICTURES, (stage.batch,), generator=dice).to(run.device)
        return world.render(scenes, stage.pictures, first, run.painter())

    def turn(step: int) -> dict[str, Tensor]:
        rendered = clips()
        with run.autocast():
            made = there_and_back(rendered.frames_BFCHW, torch.randn(latent_shape, device=run.device))
            parts = codec_loss(made, rendered.frames_BFCHW, rendered.mask_BFHW, stage.kl_weight)
        return {**{name: x.detach() for name, x in parts.items()}, "norm": learner.step(parts["loss"])}

    spent = train([learner], turn, _budget(stage), run.out / "metrics.jsonl", run.device, every=100)
    learner.swap_average()
    codec.eval().requires_grad_(False)
    moments = []
    with torch.no_grad(), run.autocast():
        for _ in range(40):
            moments.append(codec.encode_moments(clips().frames_BFCHW)[0].float().transpose(1, 2).flatten(2))
    latents = torch.cat(moments).transpose(0, 1).flatten(1)
    codec.set_latent_statistics(latents.mean(1), latents.std(1))
    recipes.save_codec(run.out, codec, int8=True)
    return spent | _codec_report(_codec(run.out, run.device), run)


@torch.no_grad()
def _codec_report(codec: LightCodec, run: Run) -> dict[str, float]:
    """PSNR of what was saved, over everything and over the subject, with noise of 0, 0.2 and 0.5 in the latents."""
    report = {}
    rendered = world.render(sample_scenes(16, 7, device=run.device, held_out=True), 33)
    latents, _ = codec.encode(rendered.frames_BFCHW)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7)).to(latents)
    mask = rendered.mask_BFHW.unsqueeze(2)
    for sigma in (0.0, 0.2, 0.5):
        decoded = codec.decode(latents + sigma * noise)[0].clamp(-1, 1)
        error = (decoded - rendered.frames_BFCHW).square() / 4
        report[f"psnr_noise_{sigma}"] = -10 * error.mean().log10().item()
        report[f"psnr_subject_noise_{sigma}"] = -10 * ((error * mask).sum() / (3 * mask.sum())).log10().item()
        both = torch.cat([rendered.frames_BFCHW[:12, 9:10], decoded[:12, 9:10], decoded[:12, 20:21]], dim=1)
        save_png(run.out / f"noise_{sigma}.png", contact_sheet(to_uint8(both).flatten(0, 1).cpu().numpy(), 6))
    return report


def train_teacher(stage: TeacherStage, run: Run) -> dict[str, float]:
    codec = _codec(_given(run.codec, "--codec"), run.device)
    text = WordEncoder(WordEncoderConfig(
        words=len(captions.VOCABULARY), length=captions.TEXT_LENGTH, dim=stage.network.text_dim
    )).to(run.device)  # fmt: skip
    network = WanTransformer(stage.network).to(run.device)
    model = torch.nn.ModuleDict({"text": text, "network": network})
    parallel.share_parameters(model)
    ends = ("text.words", "text.places", *(f"network.{name}" for name in NETWORK_ENDS))
    learner = Learner(model, muon_and_adam(model, stage.lr, adamw_only=ends), average=stage.average)
    _compile(network, run)
    pool = _pool(codec, stage.pool, stage.seed, run)

    def turn(step: int) -> dict[str, Tensor]:
        if step % RENEW_EVERY == 0:
            pool.renew()
        drawn = pool.draw(stage.batch, stage.network.extent)
        absent = torch.rand(stage.batch, 1, 1, device=run.device) < stage.no_prompt_share
        with run.autocast():
            text_BPLE = _embed(text, drawn.tokens_BPL.masked_fill(absent, 0))
            clips = Clips(drawn.latents_BFCHW, text_BPLE, drawn.prompt_BF, drawn.subject_BFHW)
            loss = flow_loss(network, clips, SHIFT, stage.subject_weight)
        return {"loss": loss.detach(), "norm": learner.step(loss)}

    spent = train([learner], turn, _budget(stage, warmup=200), run.out / "metrics.jsonl", run.device, every=100)
    learner.swap_average()
    if run.first:
        recipes.save_network(run.out / recipes.TEACHER_FILE, text, network, role="teacher", shift=SHIFT, int8=True)
        _teacher_pictures(text, network, codec, run)
    return spent


def _teacher_pictures(text: WordEncoder, network: WanTransformer, codec: LightCodec, run: Run) -> None:
    tokens = _held_out_tokens(24, run)
    levels = flow.even_levels(TEACHER_STEPS, SHIFT)
    noise = torch.randn(24, network.config.extent, *_latent_size(codec), device=run.device)
    with torch.no_grad(), run.autocast():
        prompts = network.prompt_keys(_embed(text, tokens)[:, :1])
        nothing = network.prompt_keys(text(text.no_prompt(24))[:, None])
        latents = sample_clip(network, noise, prompts, nothing, levels, GUIDANCE)
        _strip(run.out / "samples.png", codec, latents)


def train_teacher_forcing(stage: TeacherForcingStage, run: Run) -> dict[str, float]:
    codec = _codec(_given(run.codec, "--codec"), run.device)
    text, network, _ = recipes.load_network(_given(run.start, "--weights"), run.device)
    network.requires_grad_(True).train()
    learner = Learner(network, muon_and_adam(network, stage.lr, adamw_only=NETWORK_ENDS), average=stage.average)
    _compile(network, run)
    pool = _pool(codec, stage.pool, stage.seed, run)
    shapes = [recipes.recipe_named(name) for name in ("self_forcing_sink", "self_forcing")]

    def turn(step: int) -> dict[str, Tensor]:
        if step % RENEW_EVERY == 0:
            pool.renew()
        recipe = shapes[step % 3 == 2]
        drawn = pool.draw(stage.batch, stage.frames)
        with run.autocast():
            clips = Clips(drawn.latents_BFCHW, _embed(text, drawn.tokens_BPL), drawn.prompt_BF, drawn.subject_BFHW)
            window = recipe.memory(network).window
            loss = teacher_forcing_loss(network, clips, SHIFT, stage.subject_weight, block=recipe.block, window=window)
        return {"loss": loss.detach(), "norm": learner.step(loss)}

    spent = train([learner], turn, _budget(stage, warmup=50), run.out / "metrics.jsonl", run.device)
    learner.swap_average()
    if run.first:
        recipes.save_network(run.out / recipes.NETWORK_FILE, text, network, role="student", shift=SHIFT, int8=False)
    return spent


def train_dmd(stage: DmdStage, run: Run) -> dict[str, float]:
    codec = _codec(_given(run.codec, "--codec"), run.device)
    text, network, _ = recipes.load_network(_given(run.start, "--weights"), run.device)
    _, teacher, _ = recipes.load_network(_given(run.teacher, "--teacher"), run.device)
    critic = copy.deepcopy(teacher)
    for trained in (network, critic):
        trained.requires_grad_(True).train()
    student = Learner(network, [_dmd_adam(network, stage.lr)], average=stage.average)
    judge = Learner(critic, [_dmd_adam(critic, stage.critic_lr)], average=None)
    for each in (network, teacher, critic):
        _compile(each, run)
    pool = _pool(codec, stage.pool, stage.seed, run)
    shapes = [recipes.recipe_named(name) for name in stage.recipes]
    structure = torch.Generator().manual_seed(stage.seed)  # the same draws in every process
    clip = network.config.extent
    with torch.no_grad():
        nothing_BPLE = _embed(text, text.no_prompt(stage.batch)[:, None])

    def turn(step: int) -> dict[str, Tensor]:
        if step % RENEW_EVERY == 0:
            pool.renew()
        recipe = shapes[step % len(shapes)]
        drawn = pool.draw(stage.batch, clip)
        with torch.no_grad():
            text_BPLE = _embed(text, drawn.tokens_BPL)
        plan = _plan(structure, recipe, clip, stage.most_blocks)
        with run.autocast():
            prompt_BF = _prompt_of_rollout(drawn.prompt_BF, recipe.block)
            keys = network.prompt_keys(text_BPLE)
            by_block = [keys.select(prompt_BF[:, b * recipe.block]) for b in range(clip // recipe.block)]
            early = plan.blocks - len(by_block)
            noise = FreshNoise((stage.batch, recipe.block, *_latent_size(codec)), run.device)
            sample = rollout(
                recipe.schedule, network, recipe.memory(network), lambda block: by_block[max(0, block - early)], noise,
                recipe.levels(SHIFT)[: plan.exit + 1], blocks=plan.blocks, learning=len(by_block),
            ).float()  # fmt: skip
            guided = dmd.guided_estimate(
                dmd.estimate_by(teacher, text_BPLE, prompt_BF), dmd.estimate_by(teacher, nothing_BPLE, None), GUIDANCE
            )
            loss = dmd.matching_loss(sample, guided, dmd.estimate_by(critic, text_BPLE, prompt_BF), SHIFT)
        norm = student.step(loss)
        for _ in range(stage.critic_turns):
            with run.autocast():
                critic_loss = dmd.critic_loss(sample, critic, text_BPLE, prompt_BF, SHIFT)
            judge.step(critic_loss)
        moving = sample.diff(dim=1).abs().mean()
        return {"matching": loss.detach(), "critic": critic_loss.detach(), "norm": norm, "motion": moving}

    spent = train([student, judge], turn, _budget(stage, warmup=20), run.out / "metrics.jsonl", run.device, every=25)
    student.swap_average()
    if run.first:
        recipes.save_network(run.out / recipes.NETWORK_FILE, text, network, role="student", shift=SHIFT, int8=True)
        for recipe in {recipe.name: recipe for recipe in shapes}.values():
            _student_pictures(text, network, codec, recipe, run)
    return spent


@dataclass(frozen=True)
class _Plan:
    """The shape of one rollout, alike in every process: its exit step and its length in blocks."""

    exit: int
    blocks: int


def _plan(structure: torch.Generator, recipe: Recipe, clip: int, most_blocks: int) -> _Plan:
    exit_step = int(torch.randint(len(recipe.steps), (), generator=structure))
    least = clip // recipe.block
    # Half the rollouts are as long as the clip; the others may be longer and learn on their last part only.
    stretched = bool(torch.randint(2, (), generator=structure))
    longer = int(torch.randint(most_blocks - least + 1, (), generator=structure))
    return _Plan(exit_step, least + stretched * longer)


def _prompt_of_rollout(prompt_BF: Tensor, block: int) -> Tensor:
    """Each block under one prompt: that of its first frame."""
    return prompt_BF[:, ::block].repeat_interleave(block, dim=1)


def _dmd_adam(network: WanTransformer, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.0, 0.99), weight_decay=0.01)


@torch.no_grad()
def _student_pictures(text: WordEncoder, network: WanTransformer, codec: LightCodec, recipe: Recipe, run: Run) -> None:
    count = 24
    tokens = _held_out_tokens(count, run)
    with run.autocast():
        keys = network.prompt_keys(_embed(text, tokens)[:, :1])
        noise = FreshNoise((count, recipe.block, *_latent_size(codec)), run.device)
        latents = rollout(
            recipe.schedule,
            network,
            recipe.memory(network),
            lambda block: keys,
            noise,
            recipe.levels(SHIFT),
            blocks=PICTURED_BLOCKS,
            learning=PICTURED_BLOCKS,
        )
        _strip(run.out / f"{recipe.name}.png", codec, latents)


def _strip(path: Path, codec: LightCodec, latents_BFCHW: Tensor) -> None:
    """One row a clip, eight pictures over its length."""
    rows = []
    for latents in latents_BFCHW.split(4):
        pictures = to_uint8(codec.decode(latents.float())[0])
        rows.append(pictures[:, torch.linspace(4, pictures.shape[1] - 1, 8).long()])
    save_png(path, contact_sheet(torch.cat(rows).flatten(0, 1).cpu().numpy(), 8))


def _codec(folder: Path, device: torch.device) -> LightCodec:
    return recipes.load_codec([folder / recipes.CODEC_FILE, folder / recipes.ENCODER_FILE], device)


def _pool(codec: LightCodec, size: int, seed: int, run: Run) -> ClipPool:
    return ClipPool(codec, size, seed * 1000 + run.rank, run.device, run.painter())


def _latent_size(codec: LightCodec) -> tuple[int, int, int]:
    return codec.latent_channels, HEIGHT // codec.spatial_factor, WIDTH // codec.spatial_factor


def _held_out_tokens(count: int, run: Run) -> Tensor:
    scenes = sample_scenes(count, 11, held_out=True, changes=0.0)
    return captions.caption_tokens(scenes, 11).to(run.device)


def _embed(text: WordEncoder, tokens_BPL: Tensor) -> Tensor:
    return text(tokens_BPL.flatten(0, 1)).unflatten(0, tokens_BPL.shape[:2])


def _compile(network: WanTransformer, run: Run) -> None:
    if run.device.type == "cuda":
        parallel.compile_layers(network.blocks, ("before_attention", "after_attention"))


def _budget(stage: Stage, warmup: int = 100) -> Budget:
    return Budget(steps=stage.steps, seconds=stage.seconds, warmup=warmup)


def _given(path: Path | None, flag: str) -> Path:
    if path is None:
        raise SystemExit(f"this stage needs {flag}")
    return path


def _write_record(run: Run, name: str, stage: Stage, spent: dict[str, float], began: float) -> None:
    record: dict[str, Any] = {
        "stage": name,
        "config": asdict(stage),
        "spent": spent,
        "wall_seconds": round(time.time() - began, 1),
        "date": time.strftime("%Y-%m-%d"),
        "processes": run.processes,
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
    }
    (run.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record), flush=True)


def _stage(name: str, settings: list[str]) -> Stage:
    stage = STAGES[name]()
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in {f.name for f in fields(stage)}:
            raise SystemExit(f"{name} has no setting {key!r}; it has {', '.join(f.name for f in fields(stage))}")
        stage = replace(stage, **{key: _changed(getattr(stage, key), json.loads(value))})
    return stage


def _changed(old: Any, new: Any) -> Any:
    """A JSON value in the type of the setting it replaces; of a configuration it names the fields that change."""
    return replace(old, **new) if isinstance(old, WanConfig) else type(old)(new)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    for name, what in (("out", "folder for results"), ("codec", "folder of a trained codec"),
                       ("teacher", "the teacher's weights"), ("weights", "weights to start from")):  # fmt: skip
        parser.add_argument(f"--{name}", type=Path, required=name == "out", help=what)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="change a setting of the stage")
    return parser.parse_args()


_TRAINERS: dict[str, Callable[[Any, Run], dict[str, float]]] = {
    "codec": train_codec,
    "teacher": train_teacher,
    "teacher_forcing": train_teacher_forcing,
    "dmd": train_dmd,
}

if __name__ == "__main__":
    main()
