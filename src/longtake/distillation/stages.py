"""The stages from nothing to a streaming student. Each trains modules in place; where clips come from is handed in.

    codec            pictures -> codec
    teacher          clips -> bidirectional teacher and its text encoder, by flow matching
    attention_matching  teacher + prompts -> teacher with converted layers, whose features alone learn
    finetune         converted teacher + clips -> the same, all of it, by flow matching
    teacher_forcing  teacher or student + clips -> causal student, by flow matching in front of the clean past
    ode              teacher + prompts -> causal student, by regression of the teacher's trajectories
    dmd              teacher + student + prompts + clips -> few-step student, by distribution matching on its own
                     rollouts

Every process draws its own noise and prompts; what has to be alike in all (recipe, exit step, length) comes from
shared dice.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longtake import parallel
from longtake.distillation import attention_matching, dmd, ode_init
from longtake.distillation.attention_matching import Asked, AskingView, Match
from longtake.distillation.optim import muon_and_adam
from longtake.distillation.plan import Plan, Script, draw_plan, rolled_out
from longtake.distillation.pretrain import Clips, codec_loss, flow_loss, require_one_pass, teacher_forcing_loss
from longtake.distillation.regularized import regularized_loss, teacher_sample
from longtake.distillation.rollout import FirstNoise, FreshNoise
from longtake.distillation.trainer import Budget, Dice, Learner, Run, Stateful, train
from longtake.flow import even_levels
from longtake.generation.clip import sample_clip
from longtake.generation.noise import SeededNoise
from longtake.generation.recipe import Recipe
from longtake.memory.far import FarShape
from longtake.memory.stream_memory import StreamMemory
from longtake.memory.view import ClipView
from longtake.models.features import Conversion
from longtake.models.light_codec import LightCodec
from longtake.models.text import WordEncoder
from longtake.models.wan import PromptKeys, WanConfig, WanTransformer, converted

RENEW_EVERY = 6  # steps between new clips, which cost time to paint and encode
LOOKED_AT = 12  # clips on a strip of pictures
LOOKED_AT_BLOCKS = 20
NETWORK_ENDS = ("patch_embedding", "text_embedding", "time_", "head")  # matrices that are not hidden: AdamW's


class LatentClips(Protocol):
    """Clips [B, F, C, H, W] with the tokens [B, P, L] of P prompts; see `pretrain.Clips` for the rest."""

    @property
    def latents_BFCHW(self) -> Tensor: ...

    @property
    def tokens_BPL(self) -> Tensor: ...

    @property
    def prompt_BF(self) -> Tensor: ...

    @property
    def focus_BFHW(self) -> Tensor: ...


class ClipSupply(Stateful, Protocol):
    """Clips to draw from, replaced a few at a time."""

    @property
    def frames(self) -> int:
        """Latent frames of a whole clip."""
        ...

    def renew(self) -> None: ...

    def draw(self, count: int, frames: int) -> LatentClips: ...


class Prompts(Protocol):
    """Tokens [B, P, L] of P prompts a clip, and the prompt [B, F] of each frame of a clip that is as long as any."""

    @property
    def tokens_BPL(self) -> Tensor: ...

    @property
    def prompt_BF(self) -> Tensor: ...


class World(Protocol):
    """What stages learn from. Seeds of one process's draws must not be those of another's: the world sees to it."""

    latent_size: tuple[int, int, int]
    """Channels, height and width of a latent frame."""

    def clips(self, size: int, seed: int, frames: int, memory_share: float = 0.0) -> ClipSupply:
        """A supply that holds so many clips, each of so many latent frames or more.

        memory_share: of clips in which what was seen goes out of sight and comes back, see `TeacherForcingStage`.
        """
        ...

    def prompts(self, count: int, seed: int) -> Prompts:
        """Prompts of clips that nobody rendered; the same seed gives the same ones."""
        ...

    def held_out(self, count: int) -> Tensor:
        """Tokens [B, L] of prompts that training never shows."""
        ...

    def show(self, name: str, latents_BFCHW: Tensor) -> None:
        """Write a strip of pictures of these clips."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What all stages have: they end after `steps`, or after `seconds` if that comes first.

    ValueError for numbers that no stage can work with.
    """

    steps: int = 100_000
    seconds: float = 300.0
    seed: int = 42
    batch: int = 16
    lr: float = 1e-3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = "0 or more" if name in _MAY_BE_0 else "above 0"
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and (number < 0 or (number == 0 and least == "above 0")):
                    raise ValueError(f"{name} must be {least}, got {value}")
                if name.endswith("_share") and number > 1:
                    raise ValueError(f"{name} must be at most 1, got {value}")


_MAY_BE_0 = {
    "seed", "kl_weight", "focus_weight", "no_prompt_share", "encoder_blocks", "decoder_blocks", "most_given", "pull",
    "self_forcing_share", "memory_share", "recompute", "real_weight", "last_exits", "layers", "overlap",
    "turns_with_frames", "both_ways", "softmax",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CodecStage(Stage):
    """The codec from nothing, on clips of `pictures`, in one process."""

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
class TeacherStage(Stage):
    """The bidirectional teacher and its text encoder, from nothing or from an earlier one."""

    seconds: float = 480.0
    seed: int = 42
    batch: int = 32
    lr: float = 2e-3
    average: float = 0.999
    shift: float = 3.0
    focus_weight: float = 1.0
    no_prompt_share: float = 0.1
    pool: int = 2048
    guidance: float = 3.0
    sampling_steps: int = 32
    network: WanConfig = field(
        default_factory=lambda: WanConfig(dim=256, heads=4, ffn_dim=1024, layers=10, text_dim=192, extent=21)
    )


@dataclass(frozen=True, kw_only=True)
class AttentionMatchingStage(Stage):
    """Features for layers of the teacher, each taught by itself to answer as its softmax does (`attention_matching`).

    What is asked are the teacher's own samples, of prompts alone: of each, made in `sampling_steps` under `guidance`,
    every layer is taught `updates` times, at steps drawn anew. layers: which are taught; none given: all. Of them,
    `converted_share` are converted in the end: those with the smallest error on held-out prompts.

    current, overlap, degree, turns_with_frames: see `Conversion`. both_ways: whether answers shall be those of the
    whole clip, and not of what came before alone; see `attention_matching.match`. lr: of AdamW, without decay.
    """

    seconds: float = 180.0
    seed: int = 47
    batch: int = 8
    lr: float = 3e-3
    average: float = 0.995
    current: int = 3
    overlap: int = 1
    degree: int = 2
    turns_with_frames: bool = False
    both_ways: bool = False
    layers: tuple[int, ...] = ()
    converted_share: float = 0.5
    updates: int = 32
    sampling_steps: int = 32
    guidance: float = 3.0


@dataclass(frozen=True, kw_only=True)
class FinetuneStage(Stage):
    """The whole converted teacher on clips, by flow matching: mends what layers that learned apart do to each other.

    softmax: the control: the teacher itself, with no layer converted, on the same clips in the same order. far_lr: rate
    of the features. Published: about a thousand steps (2601.04342).
    """

    steps: int = 1000
    seconds: float = 240.0
    seed: int = 48
    batch: int = 32
    lr: float = 1e-4
    far_lr: float = 1e-3
    average: float = 0.995
    focus_weight: float = 1.0
    no_prompt_share: float = 0.1
    pool: int = 1024
    guidance: float = 3.0
    sampling_steps: int = 32
    softmax: bool = False


@dataclass(frozen=True, kw_only=True)
class TeacherForcingStage(Stage):
    """The causal student, from the teacher or from a student, on clips of `frames` latent frames: longer than the
    teacher's, so that the sink comes to lie far behind.

    far_lr: rate of the projections of what is read from far states, see `DmdStage`. memory_share: of clips made for
    memory, which begin out of sight of what they show, and look away from it until neither sink nor recent frames
    show it, under captions that do not say what it was; they take some length (8.5 seconds in the toy world).
    recompute: whether clips are walked block by block, and of each pass only what went in and what came out is kept:
    the rest is computed again for its gradient. The same in more time and a small part of the memory.
    """

    seconds: float = 80.0
    seed: int = 43
    batch: int = 24
    frames: int = 33
    lr: float = 1e-3
    far_lr: float = 5e-3
    average: float = 0.995
    focus_weight: float = 1.0
    pool: int = 1024
    memory_share: float = 0.0
    recompute: bool = False


@dataclass(frozen=True, kw_only=True)
class OdeStage(Stage):
    """The causal student, from the teacher or from a student, on `pairs` trajectories a process, in whole batches."""

    seconds: float = 80.0
    seed: int = 46
    batch: int = 24
    lr: float = 5e-4
    average: float = 0.995
    pairs: int = 1536
    levels: int = 4
    sampling_steps: int = 32
    guidance: float = 3.0


@dataclass(frozen=True, kw_only=True)
class DmdStage(Stage):
    """Distribution matching under every recipe and every number of levels in turn.

    Half of the rollouts go on from 1 to `most_given` blocks of a real clip (at most all but one; 0: none do), out of
    `pool`, to the length of the teacher's clip: a student learns to go on from any moment. The others begin with
    nothing; they are as long as the teacher's clip, or up to `most_blocks` and learn on their last part.

    levels: how many there may be, drawn for each rollout; none given: as many as the recipe has. self_forcing_share: of
    a recipe that rolls, the share of rollouts that go block by block over the same memory, 0 to 1 (published: half,
    arXiv 2509.25161); the others go by windows, see `rollout.windows`. Recipes that do not roll have no use for it.
    far_lr: rate of the projections of what is read from far states. They begin at zero, and Adam moves a weight by
    about its rate a step. pull: weight of the pull to the teacher's own sample from the rollout's noise (published:
    0.05), made in `pull_steps` steps under `pull_guidance`; of rollouts that exit at the first step, begin with nothing
    and are as long as the teacher's clip. last_exits: exit steps are drawn from so many last ones (0: from all, as
    published). real_weight: weight of teacher forcing on whole clips (with its `focus_weight`) beside the matching
    loss, which drops what is rare and sudden, such as a camera that begins to turn. It is at the levels of the steps
    that `last_exits` leaves out, where such things are decided, or at any level where it leaves none out.
    """

    seconds: float = 330.0
    seed: int = 44
    batch: int = 32
    lr: float = 1e-4
    far_lr: float = 1e-3
    critic_lr: float = 2e-4
    critic_turns: int = 3
    average: float = 0.98
    guidance: float = 3.0
    most_blocks: int = 11
    most_given: int = 6
    pool: int = 64
    levels: tuple[int, ...] = ()
    self_forcing_share: float = 0.5
    pull: float = 0.0
    pull_steps: int = 25
    pull_guidance: float = 3.5
    last_exits: int = 0
    real_weight: float = 0.0
    focus_weight: float = 1.0

    def levels_of(self, recipe: Recipe) -> tuple[int, ...]:
        """The numbers of levels that a recipe is trained with."""
        return self.levels or (len(recipe.steps),)


def train_codec(
    codec: LightCodec, pictures: Callable[[Dice], tuple[Tensor, Tensor]], look: Callable[[str], None],
    stage: CodecStage, run: Run,
) -> dict[str, float]:  # fmt: skip
    """pictures: draws frames [B, F, 3, H, W] in -1..1 and the subject's mask [B, F, H, W]. look: shows the codec."""
    learner = Learner(
        codec, muon_and_adam(codec, stage.lr, adamw_only=("encoder.enter", "decoder.leave")), average=0.999
    )
    there_and_back = torch.compile(codec) if run.device.type == "cuda" else codec
    dice = Dice(stage.seed)

    def turn(step: int) -> dict[str, Tensor]:
        frames, mask = pictures(dice)
        shape = (frames.shape[0], 1 + (frames.shape[1] - 1) // codec.temporal_factor, codec.latent_channels)
        size = (frames.shape[3] // codec.spatial_factor, frames.shape[4] // codec.spatial_factor)
        with run.autocast():
            made = there_and_back(frames, torch.randn(*shape, *size, device=run.device))
            parts = codec_loss(made, frames, mask, stage.kl_weight)
        return {**{name: x.detach() for name, x in parts.items()}, "norm": learner.step(parts["loss"])}

    def looked(name: str) -> None:
        with _resting(learner):
            look(name)

    budget = _budget(stage, warmup=100)
    spent = train({"codec": learner}, turn, budget, run, keep={"dice": dice}, look=looked, log_every=100)
    learner.swap_average()
    codec.eval().requires_grad_(False)
    moments = []
    with torch.no_grad(), run.autocast():
        for _ in range(40):
            moments.append(codec.encode_moments(pictures(dice)[0])[0].float().transpose(1, 2).flatten(2))
    latents = torch.cat(moments).transpose(0, 1).flatten(1)
    codec.set_latent_statistics(latents.mean(1), latents.std(1))
    return spent


def train_teacher(
    text: WordEncoder, network: WanTransformer, world: World, stage: TeacherStage, run: Run
) -> dict[str, float]:
    model = torch.nn.ModuleDict({"text": text, "network": network}).requires_grad_(True).train()
    parallel.share_parameters(model)
    ends = ("text.words", "text.places", *(f"network.{name}" for name in NETWORK_ENDS))
    learner = Learner(model, muon_and_adam(model, stage.lr, adamw_only=ends), average=stage.average)
    compile_for(run, network)
    supply = world.clips(stage.pool, stage.seed, network.config.extent)
    turn = _flow_turn(text, network, learner, supply, stage.shift, stage, run)
    look = _clip_strips(text, network, [learner], world, stage.shift, stage, run)
    spent = train(
        {"teacher": learner}, turn, _budget(stage, warmup=200), run, keep={"clips": supply}, look=look, log_every=100
    )
    learner.swap_average()
    return spent


def train_attention_matching(
    text: WordEncoder, network: WanTransformer, world: World, shift: float, stage: AttentionMatchingStage, run: Run
) -> tuple[WanTransformer, dict[str, Any]]:
    """The network with its easiest layers converted, and what was spent and measured.

    Heads that sums do not serve on held-out prompts are left local. `matching` tells of every taught layer which these
    are, and the errors that remain there, its heads' too; see `attention_matching.Match`.
    """
    layers = stage.layers or tuple(range(network.config.layers))
    conversion = Conversion(
        layers=layers, current=stage.current, overlap=stage.overlap, degree=stage.degree,
        turns_with_frames=stage.turns_with_frames,
    )  # fmt: skip
    extent = network.config.extent
    tokens = network.grid(torch.empty(1, 1, *world.latent_size))
    far_tokens = conversion.far_frames(extent) * tokens.rows * tokens.columns
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

    look = _clip_strips(text, network, list(learners.values()), world, shift, stage, run)
    kept = {f"layer_{layer}": learner for layer, learner in learners.items()}
    spent: dict[str, Any] = {**train(kept, turn, _budget(stage, warmup=20), run, look=look, log_every=25)}
    for learner in learners.values():
        learner.swap_average()
    network.requires_grad_(False)
    with torch.no_grad(), run.autocast(), torch.compiler.set_stance("force_eager"):
        sample = samples.held_out()
        taught = _matching_errors(network, sample, conversion, stage.both_ways)
        local = {layer: [h for h, x in enumerate(one["heads_beside_near"]) if x >= 1] for layer, one in taught.items()}
        for layer, heads in local.items():
            network.features[layer].leave_local(heads)
        found = _matching_errors(network, sample, conversion, stage.both_ways)
    chosen = attention_matching.easiest(
        {layer: one["beside_answer"] for layer, one in found.items()}, stage.converted_share
    )
    told = {str(layer): {**one, "local_heads": local[layer]} for layer, one in found.items()}
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
            said = self._world.prompts(batch, seed * 1_000_000 + number)
            own = seed * 1_000_000_000 + number * batch * parallel.processes() + self._run.rank * batch
            frames = self._network.config.extent
            made = self._made(said.tokens_BPL, said.prompt_BF[:, :frames], range(own, own + batch))
            self._latest = number, made
        return self._latest[1]

    def held_out(self) -> _Sample:
        """Of prompts that training never shows, the same in every process."""
        tokens_BL = self._world.held_out(LOOKED_AT)
        one = torch.zeros(len(tokens_BL), self._network.config.extent, dtype=torch.long, device=tokens_BL.device)
        return self._made(tokens_BL[:, None], one, range(len(tokens_BL)))

    @torch.no_grad()
    def _made(self, tokens_BPL: Tensor, prompt_BF: Tensor, seeds: range) -> _Sample:
        network, text, device = self._network, self._text, self._run.device
        states: list[Tensor] = []
        with self._run.autocast():
            noise = SeededNoise(seeds, (network.config.extent, *self._world.latent_size), device, torch.float32)(0, 0)
            said = network.prompt_keys(embed(text, tokens_BPL))
            nothing = network.prompt_keys(embed(text, text.no_prompt(len(tokens_BPL))[:, None]))
            everything = ClipView(network.grid(noise).rotation(range(noise.shape[1]), device))
            sample_clip(
                network, noise, said, nothing, self._levels, self._stage.guidance, prompt_BF,
                on_step=lambda step, latents: states.append(latents), view=everything,
            )  # fmt: skip
        return _Sample(torch.stack(states), self._levels, said, prompt_BF)


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


def train_finetune(
    text: WordEncoder, network: WanTransformer, world: World, shift: float, stage: FinetuneStage, run: Run
) -> dict[str, float]:
    learner = _student(network, stage.lr, stage.far_lr, stage.average)
    compile_for(run, network)
    supply = world.clips(stage.pool, stage.seed, network.config.extent)
    turn = _flow_turn(text, network, learner, supply, shift, stage, run)
    look = _clip_strips(text, network, [learner], world, shift, stage, run)
    spent = train({"network": learner}, turn, _budget(stage, warmup=50), run, keep={"clips": supply}, look=look)
    learner.swap_average()
    return spent


def _flow_turn(
    text: WordEncoder, network: WanTransformer, learner: Learner, supply: ClipSupply, shift: float,
    stage: TeacherStage | FinetuneStage, run: Run,
) -> Callable[[int], dict[str, Tensor]]:  # fmt: skip
    """Flow matching of whole clips, a share of them without their prompt."""

    def loss(latents_BFCHW: Tensor, tokens_BPL: Tensor, prompt_BF: Tensor, focus_BFHW: Tensor) -> Tensor:
        absent = torch.rand(stage.batch, 1, 1, device=run.device) < stage.no_prompt_share
        with run.autocast():
            text_BPLE = embed(text, tokens_BPL.masked_fill(absent, 0))
            clips = Clips(latents_BFCHW, text_BPLE, prompt_BF, focus_BFHW)
            return flow_loss(network, clips, shift, stage.focus_weight)

    teach = learner.taught_by(loss)

    def turn(step: int) -> dict[str, Tensor]:
        value = teach(*_parts(_drawn(supply, step, stage.batch, network.config.extent)))
        return {"loss": value, "norm": learner.step()}

    return turn


def _clip_strips(
    text: WordEncoder, network: WanTransformer, learners: Sequence[Learner], world: World, shift: float,
    stage: "TeacherStage | AttentionMatchingStage | FinetuneStage", run: Run,
) -> Callable[[str], None]:  # fmt: skip
    """Shows whole clips of held-out prompts that the averaged network makes under guidance."""

    def look(name: str) -> None:
        with ExitStack() as resting, run.autocast():
            for learner in learners:
                resting.enter_context(_resting(learner))
            size = (network.config.extent, *world.latent_size)
            noise = SeededNoise(range(LOOKED_AT), size, run.device, torch.float32)
            said = network.prompt_keys(embed(text, world.held_out(LOOKED_AT)[:, None]))
            nothing = network.prompt_keys(embed(text, text.no_prompt(LOOKED_AT)[:, None]))
            levels = even_levels(stage.sampling_steps, shift)
            world.show(name, sample_clip(network, noise(0, 0), said, nothing, levels, stage.guidance))

    return look


def train_teacher_forcing(
    text: WordEncoder, network: WanTransformer, world: World, recipes: Sequence[Recipe], shift: float,
    stage: TeacherForcingStage, run: Run,
) -> dict[str, float]:  # fmt: skip
    for recipe in recipes:
        if stage.frames % recipe.block:
            raise ValueError(f"frames ({stage.frames}) must be whole blocks of {recipe.block}")
        memory = recipe.memory(network)  # refused before work begins
        if not stage.recompute:
            require_one_pass(memory)
    learner = _student(network, stage.lr, stage.far_lr, stage.average)
    compile_for(run, network)
    if stage.recompute:
        parallel.checkpoint_layers([network], ("forward", "keys_to_commit"))
    supply = world.clips(stage.pool, stage.seed, stage.frames, stage.memory_share)

    teach = [
        _forced_lesson(learner, text, network, recipe, shift, stage.focus_weight, run, by_block=stage.recompute)
        for recipe in recipes
    ]

    def turn(step: int) -> dict[str, Tensor]:
        value = teach[step % len(recipes)](*_parts(_drawn(supply, step, stage.batch, stage.frames)))
        return {"loss": value, "norm": learner.step(), **_far_weights(network)}

    look = _student_strips(text, network, learner, world, recipes, shift, run)
    spent = train({"student": learner}, turn, _budget(stage, warmup=50), run, keep={"clips": supply}, look=look)
    learner.swap_average()
    return spent


def _forced_lesson(
    learner: Learner, text: WordEncoder, network: WanTransformer, recipe: Recipe, shift: float, focus_weight: float,
    run: Run, *, weight: float = 1.0, by_block: bool = False, levels: Sequence[float] = (),
) -> Callable[..., Tensor]:  # fmt: skip
    """Teacher forcing under a recipe's memory, of the `_parts` of clips; of its weight for the learner.

    levels: see `teacher_forcing_loss`.
    """
    memory = recipe.memory(network)

    def loss(latents_BFCHW: Tensor, tokens_BPL: Tensor, prompt_BF: Tensor, focus_BFHW: Tensor) -> Tensor:
        with run.autocast():
            clips = Clips(latents_BFCHW, embed(text, tokens_BPL), prompt_BF, focus_BFHW)
            found = teacher_forcing_loss(
                network, clips, shift, focus_weight, block=recipe.block, memory=memory, by_block=by_block, levels=levels
            )  # fmt: skip
        return weight * found

    recorded = not (by_block or memory.far or memory.converted)  # what is far may be solved for on the host
    return learner.taught_by(loss, recorded=recorded)


def _parts(clips: LatentClips) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return clips.latents_BFCHW, clips.tokens_BPL, clips.prompt_BF, clips.focus_BFHW


def train_ode(
    text: WordEncoder, network: WanTransformer, teacher: WanTransformer, world: World, recipes: Sequence[Recipe],
    shift: float, stage: OdeStage, run: Run,
) -> dict[str, float]:  # fmt: skip
    if network.config.conversion or any(recipe.joint for recipe in recipes):
        raise ValueError("ode works under a mask, which converted layers cannot be given: take teacher_forcing")
    learner = _student(network, stage.lr, stage.lr, stage.average)
    compile_for(run, network, teacher)
    states, text_BPLE, prompt_BF = _trajectories(text, teacher, world, shift, stage, run)

    def turn(step: int) -> dict[str, Tensor]:
        recipe = recipes[step % len(recipes)]
        rows = torch.randint(len(states), (stage.batch,), device=run.device)
        with run.autocast():
            prompts = network.prompt_keys(text_BPLE[rows])
            window = recipe.memory(network).window
            loss = ode_init.regression_loss(
                network, states[rows].float(), prompts, prompt_BF[rows], shift=shift, block=recipe.block, window=window
            )
        return {"loss": loss.detach(), "norm": learner.step(loss)}

    shown = [recipe.with_levels(stage.levels) for recipe in recipes]
    look = _student_strips(text, network, learner, world, shown, shift, run)
    spent = train({"student": learner}, turn, _budget(stage, warmup=50), run, look=look)
    learner.swap_average()
    return spent


@torch.no_grad()
def _trajectories(
    text: WordEncoder, teacher: WanTransformer, world: World, shift: float, stage: OdeStage, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """States [pairs, K, F, C, H, W] in bfloat16, text embeddings and the prompt of each frame. They follow from the
    seed, so a run that goes on makes them again."""
    states, texts, numbers = [], [], []
    batches = -(-stage.pairs // stage.batch)
    for number in range(batches):
        said = world.prompts(stage.batch, stage.seed * 1_000_000 + number)
        frames = teacher.config.extent
        first = stage.seed * 1_000_000_000 + (run.rank * batches + number) * stage.batch
        seeds = range(first, first + stage.batch)
        noise = SeededNoise(seeds, (frames, *world.latent_size), run.device, torch.float32)
        with run.autocast():
            text_BPLE = embed(text, said.tokens_BPL)
            nothing = teacher.prompt_keys(embed(text, text.no_prompt(stage.batch)[:, None]))
            states.append(ode_init.trajectories(
                teacher, noise(0, 0), teacher.prompt_keys(text_BPLE), nothing, said.prompt_BF[:, :frames],
                steps=stage.sampling_steps, stops=stage.levels, shift=shift, guidance=stage.guidance,
            ).bfloat16())  # fmt: skip
        texts.append(text_BPLE.float())
        numbers.append(said.prompt_BF[:, :frames])
    return torch.cat(states), torch.cat(texts), torch.cat(numbers)


def train_dmd(
    text: WordEncoder, network: WanTransformer, teacher: WanTransformer, world: World, recipes: Sequence[Recipe],
    shift: float, stage: DmdStage, run: Run,
) -> dict[str, float]:  # fmt: skip
    for recipe in recipes:
        if network.config.extent % recipe.block or stage.most_blocks * recipe.block < network.config.extent:
            raise ValueError(
                f"rollouts of up to {stage.most_blocks} blocks of {recipe.block} latent frames must hold the teacher's "
                f"clip, {network.config.extent} frames, in whole blocks"
            )
        for count in stage.levels_of(recipe):
            recipe.with_levels(count).memory(network)  # refused before work begins
    if stage.pull and stage.last_exits and min(min(stage.levels_of(recipe)) for recipe in recipes) > stage.last_exits:
        raise ValueError(
            "only rollouts that exit at the first step are pulled, and last_exits leaves that out: drop one"
        )
    critic = copy.deepcopy(teacher).requires_grad_(True).train()
    network.requires_grad_(True).train()
    student = Learner(network, [_dmd_adam(network, stage.lr, stage.far_lr)], average=stage.average)
    judge = Learner(critic, [_dmd_adam(critic, stage.critic_lr, stage.critic_lr)], average=None)
    compile_for(run, network, teacher, critic)
    parallel.record_calls([network, teacher, critic], ("forward", "keys_to_commit"))  # most of what rollouts do
    shared = Dice(stage.seed)
    uses_clips = stage.most_given or stage.real_weight
    supply = world.clips(stage.pool, stage.seed, network.config.extent) if uses_clips else None
    with torch.no_grad():
        nothing_BPLE = embed(text, text.no_prompt(stage.batch)[:, None])

    @cache
    def real_lesson(number: int, count: int) -> Callable[..., Tensor]:
        recipe = recipes[number].with_levels(count)
        early = recipe.levels(shift)[: max(0, count - stage.last_exits)] if stage.last_exits else ()
        return _forced_lesson(
            student, text, network, recipe, shift, stage.focus_weight, run,
            weight=stage.real_weight, by_block=not recipe.policy.in_one_pass, levels=early,
        )  # fmt: skip

    def critic_loss_of(sample: Tensor, text_BPLE: Tensor, prompt_BF: Tensor) -> Tensor:
        with run.autocast():
            return dmd.critic_loss(sample, critic, text_BPLE, prompt_BF, shift)

    criticised = judge.taught_by(critic_loss_of)

    def turn(step: int) -> dict[str, Tensor]:
        recipe = recipes[step % len(recipes)]
        plan = draw_plan(
            shared, recipe, network.config.extent,
            levels=stage.levels_of(recipe), most_blocks=stage.most_blocks, most_given=stage.most_given,
            self_forcing_share=stage.self_forcing_share, last_exits=stage.last_exits,
        )  # fmt: skip
        if supply is not None and step % RENEW_EVERY == 0:
            supply.renew()
        taught = {}
        if supply is not None and stage.real_weight:  # first: nothing can be recorded beside a rollout's graph
            whole = supply.draw(stage.batch, supply.frames - supply.frames % recipe.block)
            value = real_lesson(step % len(recipes), plan.levels[0])(*_parts(whole))
            taught = {"real": value / stage.real_weight}
        script = _script(text, world, supply, plan, stage, step)
        text_BPLE, prompt_BF, _ = script
        fresh = FreshNoise((stage.batch, recipe.block, *world.latent_size), run.device)
        pulled = stage.pull > 0 and plan.can_be_pulled
        first = [fresh(block, 0) for block in range(plan.blocks)] if pulled else []
        said = dmd.estimate_by(teacher, text_BPLE, prompt_BF)
        unsaid = dmd.estimate_by(teacher, nothing_BPLE, None)
        with run.autocast():
            noise = FirstNoise(first) if pulled else fresh
            sample = rolled_out(network, script, noise, recipe, plan, shift).float()
            guided = dmd.guided_estimate(said, unsaid, stage.guidance)
            by_critic = dmd.estimate_by(critic, text_BPLE, prompt_BF)
            matching = dmd.matching_loss(sample, guided, by_critic, shift, plan.learned_frames(run.device))
            losses = {"loss": matching, "matching": matching}
            if pulled:
                guided = dmd.guided_estimate(said, unsaid, stage.pull_guidance)
                target = teacher_sample(guided, torch.cat(first, dim=1), even_levels(stage.pull_steps, shift))
                losses = regularized_loss(matching, sample, target, stage.pull)
        norm = student.step(losses.pop("loss"))
        for _ in range(stage.critic_turns):
            critic_loss = criticised(sample.detach(), text_BPLE, prompt_BF)
            judge.step()
        learned = sample.detach()[:, plan.given * plan.block :]
        values = losses | taught | {"critic": critic_loss, "norm": norm, "motion": learned.diff(dim=1).abs().mean()}
        return {name: value.detach() for name, value in values.items()} | _far_weights(network)

    shown = [recipe.with_levels(stage.levels_of(recipe)[0]) for recipe in recipes]
    look = _student_strips(text, network, student, world, shown, shift, run)
    learners = {"student": student, "critic": judge}
    keep = {"shared": shared} | ({"clips": supply} if supply is not None else {})
    spent = train(learners, turn, _budget(stage, warmup=20), run, keep=keep, look=look, log_every=25, rare=("pull",))
    student.swap_average()
    return spent


@torch.no_grad()
def _script(
    text: WordEncoder, world: World, supply: ClipSupply | None, plan: Plan, stage: DmdStage, step: int
) -> Script:
    """Real clips with their prompts, where blocks are given; else prompts alone."""
    said: Prompts
    if supply is not None and plan.given:
        said = clips = supply.draw(stage.batch, plan.judged * plan.block)
        given = clips.latents_BFCHW.split(plan.block, dim=1)[: plan.given]
    else:
        said, given = world.prompts(stage.batch, stage.seed * 1_000_000 + step), ()
    return Script(embed(text, said.tokens_BPL), plan.prompts_of_judged(said.prompt_BF), given)


def _student_strips(
    text: WordEncoder, network: WanTransformer, learner: Learner, world: World, recipes: Sequence[Recipe],
    shift: float, run: Run,
) -> Callable[[str], None]:  # fmt: skip
    """Shows what the averaged student streams under each recipe."""

    def look(name: str) -> None:
        with _resting(learner):
            for recipe in {recipe.name: recipe for recipe in recipes}.values():
                latents = stream_latents(text, network, world, recipe, shift, run)
                world.show(f"{name}_{recipe.file_name}", latents)

    return look


@torch.no_grad()
def stream_latents(
    text: WordEncoder, network: WanTransformer, world: World, recipe: Recipe, shift: float, run: Run
) -> Tensor:
    """Streams of the first held-out prompts, [B, F, C, H, W], their noise by seeds 0, 1, ..."""
    with run.autocast():
        keys = network.prompt_keys(embed(text, world.held_out(LOOKED_AT)[:, None]))
        noise = SeededNoise(range(LOOKED_AT), (recipe.block, *world.latent_size), run.device, torch.float32)
        memory = StreamMemory(recipe.memory(network), network.config.layers, ring=True)
        made = recipe.schedule(network, memory, lambda block: keys, noise, recipe.levels(shift))
        return torch.cat(list(islice(made, LOOKED_AT_BLOCKS)), dim=1).float()


@contextmanager
def _resting(learner: Learner) -> Iterator[None]:
    """The averaged parameters in place, no graphs, and nothing compiled anew for shapes that come up once."""
    learner.swap_average()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
    learner.swap_average()


def embed(text: WordEncoder, tokens_BPL: Tensor) -> Tensor:
    """Text embeddings [B, P, L, E] of P prompts a clip."""
    return text(tokens_BPL.flatten(0, 1)).unflatten(0, tokens_BPL.shape[:2])


def compile_for(run: Run, *networks: WanTransformer) -> None:
    """Compile the layers on a GPU; elsewhere leave them."""
    if run.device.type == "cuda":
        for network in networks:
            parallel.compile_layers(network.blocks, ("before_attention", "after_attention"))


def _student(network: WanTransformer, lr: float, far_lr: float, average: float) -> Learner:
    network.requires_grad_(True).train()
    apart = _far_group(network, far_lr)
    return Learner(network, muon_and_adam(network, lr, adamw_only=NETWORK_ENDS, apart=apart), average=average)


def _drawn(supply: ClipSupply, step: int, count: int, frames: int) -> LatentClips:
    if step % RENEW_EVERY == 0:
        supply.renew()
    return supply.draw(count, frames)


def _dmd_adam(network: WanTransformer, lr: float, far_lr: float) -> torch.optim.Optimizer:
    apart = _far_group(network, far_lr)
    own = {parameter for group in apart for parameter in group["params"]}
    groups = [{"params": [p for p in network.parameters() if p not in own]}, *apart]
    on_gpu = next(network.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=lr, betas=(0.0, 0.99), weight_decay=0.01, fused=on_gpu)


def _far_group(network: WanTransformer, far_lr: float) -> list[dict[str, Any]]:
    """Projections and features of what is far, where there are any: they have a rate of their own and do not decay."""
    readers = [*network.projections, *network.features.values()]
    far = [parameter for reader in readers for parameter in reader.parameters()]
    return [{"params": far, "lr": far_lr, "weight_decay": 0.0}] if far else []


@torch.no_grad()
def _far_weights(network: WanTransformer) -> dict[str, Tensor]:
    """The metric of the projections of what is far: the norm of their weights."""
    weights = [projection.weight for projection in network.projections]
    return {"far_weights": torch.cat(weights).norm()} if weights else {}


def _budget(stage: Stage, warmup: int) -> Budget:
    return Budget(steps=stage.steps, seconds=stage.seconds, warmup=warmup)
