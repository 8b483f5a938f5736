"""What each stage can be told: dataclasses of numbers, with what they are by default."""

from dataclasses import dataclass, field, fields

from longtake.distillation.trainer import Budget
from longtake.generation.recipe import Recipe
from longtake.models.wan import WanConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What all stages have: they end after `steps`, or after `seconds` if that comes first.

    log_every: steps from one row of metrics to the next.
    ValueError for numbers that no stage can work with. What is 0 or false by default may be so, and `_MAY_BE_0`.
    """

    steps: int = 100_000
    seconds: float = 300.0
    seed: int = 42
    batch: int = 16
    lr: float = 1e-3
    log_every: int = 50

    def __post_init__(self) -> None:
        for one in fields(self):
            value, may_be_0 = getattr(self, one.name), one.default == 0 or one.name in _MAY_BE_0
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not (number > 0 or (number == 0 and may_be_0)):
                    raise ValueError(f"{one.name} must be {'0 or more' if may_be_0 else 'above 0'}, got {value}")
                if (one.name == "average" or one.name.endswith("_share")) and number > 1:
                    raise ValueError(f"{one.name} must be at most 1, got {value}")

    def budget(self, warmup: int) -> Budget:
        """When it ends; its rates rise over the first `warmup` steps."""
        return Budget(steps=self.steps, seconds=self.seconds, warmup=warmup)


_MAY_BE_0 = {
    "seed", "kl_weight", "focus_weight", "no_prompt_share", "encoder_blocks", "decoder_blocks", "most_given",
    "self_forcing_share", "real_weight", "layers", "overlap", "exact",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CodecStage(Stage):
    """The codec from nothing, on clips of `pictures`, in one process."""

    seconds: float = 285.0
    pictures: int = 17
    lr: float = 1.5e-3
    log_every: int = 100
    kl_weight: float = 1.5e-3
    decoder_widths: tuple[int, ...] = (160, 96, 48)
    decoder_blocks: tuple[int, ...] = (3, 3, 1)
    encoder_widths: tuple[int, ...] = (48, 96, 160)
    encoder_blocks: tuple[int, ...] = (2, 2, 2)


@dataclass(frozen=True, kw_only=True)
class TeacherStage(Stage):
    """The bidirectional teacher and its text encoder, from nothing or from an earlier one."""

    seconds: float = 480.0
    batch: int = 32
    lr: float = 2e-3
    log_every: int = 100
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

    current, overlap, exact, degree, turns_with_frames: see `Conversion`. both_ways: whether answers shall be those of
    the whole clip, and not of what came before alone; see `attention_matching.match`. lr: of AdamW, without decay.
    """

    seconds: float = 180.0
    seed: int = 47
    batch: int = 8
    lr: float = 3e-3
    log_every: int = 25
    average: float = 0.995
    current: int = 3
    overlap: int = 1
    exact: bool = True
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

    softmax: the control: the teacher itself, with no layer converted, on the same clips in the same order. anchored:
    whether what is learned is not to make these clips, but to answer on them as the teacher that it was made of (ours).
    guided: whether that answer is the velocity that sampling follows, of prompt and no prompt under `guidance`, and not
    of either by itself; `no_prompt_share` then has no say. on_the_way: whether it is asked where the network's own
    samplings stand, and not on noised clips: what it does wrong early it then meets later (ours, after DAgger,
    1011.0686); prompts are all it takes, and pool, focus_weight have no say. far_lr: rate of the features. far_only:
    whether nothing else learns. rank: of what is added to each matrix (0: any), see `low_rank`; features learn whole.
    recompute: whether of each layer's pass only what went in is kept, and the rest computed again for its gradient: the
    same in more time and a small part of the memory. Published: about a thousand steps of everything (2601.04342).
    ValueError for the control where it is anchored, for it already answers so, for guided clips, and for samplings
    that are not guided.
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
    anchored: bool = False
    guided: bool = False
    on_the_way: bool = False
    far_only: bool = False
    rank: int = 0
    recompute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_the_way and not self.guided:
            raise ValueError("samplings are guided: set anchored=true guided=true with on_the_way")
        if self.guided and not self.anchored:
            raise ValueError("clips show no guided velocity, only a network answers so: set anchored=true with guided")
        if self.softmax and (self.anchored or self.far_only):
            raise ValueError(
                "softmax has no features, and nothing to learn from itself: leave out anchored and far_only"
            )
        _require_a_matrix(self)


@dataclass(frozen=True, kw_only=True)
class TeacherForcingStage(Stage):
    """The causal student, from the teacher or from a student, on clips of `frames` latent frames: longer than the
    teacher's, so that the sink comes to lie far behind.

    far_lr: rate of the projections of what is read from far states, see `DmdStage`. far_only: whether nothing but them
    learns, so that the student stays what it was wherever nothing is far. memory_share: of clips made for memory, which
    begin out of sight of what they show, and look away from it until neither sink nor recent frames show it, under
    captions that do not say what it was; they take some length (8.5 seconds in the toy world). looks_soon: to look
    away at any time: in the others cameras that do begin to within ten seconds, and again after no more than 4; and in
    all clips, where such a camera has been level for long, only frames count in which it has begun to turn. recompute:
    whether clips are walked block by block, and of each pass only what went in and what came out is kept: the rest is
    computed again for its gradient. The same in more time and a small part of the memory. first_steps: of the recipe,
    at whose levels blocks are noisy (0: at any level). There it is decided what a block shows, so there memory is
    asked; `DmdStage` has lessons at the same levels. anchor_weight: of a second lesson in each step, on as many clips
    that are not made for memory: to answer as the network did when the stage began and saw all of its window, in
    converted layers too, at the recipe's levels. So a few-step student learns to remember, to see a part of its window,
    or to do with converted layers, and stays what it was. anchor_streams: whether those clips are streamed by the
    network as it was, under the first recipe and by prompts of the world, and not the world's own: in front of its own
    it is asked; with looks_soon by prompts that tell no camera to look away, for that is what the lessons change.
    anchor_frames: latent frames of an anchor's clips, whole blocks (0: `frames`): shorter ones hold it to
    how it begins, and leave open what it does later. real_weight: of the first lesson; 0: there is none, and all that
    is learned is to answer so. rank: of what is added to each matrix (0: any), see `low_rank`.
    far_maps: whether queries and keys of far states get maps of their own (`OwnMaps`), if they have none; they learn as
    the projections do.
    """

    seconds: float = 80.0
    seed: int = 43
    batch: int = 24
    frames: int = 33
    lr: float = 1e-3
    far_lr: float = 5e-3
    far_only: bool = False
    average: float = 0.995
    focus_weight: float = 1.0
    pool: int = 1024
    memory_share: float = 0.0
    looks_soon: bool = False
    recompute: bool = False
    first_steps: int = 0
    real_weight: float = 1.0
    anchor_weight: float = 0.0
    anchor_streams: bool = False
    anchor_frames: int = 0
    rank: int = 0
    far_maps: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.real_weight or self.anchor_weight):
            raise ValueError("without a real_weight or an anchor_weight nothing would be learned: give one")
        _require_weight(self, "anchor_weight", "the clips of an anchor", "anchor_streams", "anchor_frames")
        _require_weight(self, "real_weight", "teacher forcing on real clips", "memory_share", "first_steps")
        _require_a_matrix(self)


def _require_weight(stage: Stage, weight: str, lesson: str, *names: str) -> None:
    """ValueError for settings of a lesson that has no weight."""
    for name in names:
        if getattr(stage, name) and not getattr(stage, weight):
            raise ValueError(f"{name} is for {lesson}: set {weight} above 0, too")


def _require_a_matrix(stage: FinetuneStage | TeacherForcingStage) -> None:
    if stage.far_only and stage.rank:
        raise ValueError("far_only leaves no matrix that a rank could be of: give one of the two")


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
    published). real_weight: weight of teacher forcing on real clips (with its `focus_weight`) beside the matching
    loss, which drops what is rare and sudden, such as a camera that begins to turn. It is at the levels of the steps
    that `last_exits` leaves out, where such things are decided, or at any level where it leaves none out.

    In rollouts keys are cut from their graph, so what is to be remembered is learned from real clips alone.
    real_frames: latent frames of these, whole blocks (0: whole clips, as the world has them to give blocks from).
    real_batch: how many of them a step (0: `batch`), for long ones take much memory. memory_share: of those made for
    memory, see `TeacherForcingStage`. Where they are to be other than the clips that blocks are given from, they come
    from a pool of their own, of the same size and seed. Any of the three is refused without a real_weight.

    rank: of what is added to each of the student's matrices (0: any), see `low_rank`.
    """

    seconds: float = 330.0
    seed: int = 44
    batch: int = 32
    lr: float = 1e-4
    log_every: int = 25
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
    real_frames: int = 0
    real_batch: int = 0
    memory_share: float = 0.0
    focus_weight: float = 1.0
    rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_weight(
            self, "real_weight", "teacher forcing on real clips", "real_frames", "real_batch", "memory_share"
        )

    def levels_of(self, recipe: Recipe) -> tuple[int, ...]:
        """The numbers of levels that a recipe is trained with."""
        return self.levels or (len(recipe.steps),)
