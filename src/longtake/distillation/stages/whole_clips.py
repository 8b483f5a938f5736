"""The stages `teacher` and `finetune`: networks that make whole clips, by flow matching."""

from collections.abc import Callable

import torch
from torch import Tensor

from longtake import parallel
from longtake.distillation.low_rank import merge
from longtake.distillation.optim import muon_and_adam
from longtake.distillation.pretrain import Asking, Clips, flow_loss, on_the_way_loss
from longtake.distillation.stages.learners import NETWORK_ENDS, at_rank, compile_for, learner_of
from longtake.distillation.stages.settings import FinetuneStage, TeacherStage
from longtake.distillation.stages.strips import clip_strips
from longtake.distillation.stages.walks import Walks
from longtake.distillation.stages.world import ClipSupply, World, drawn, embed, parts_of
from longtake.distillation.trainer import Learner, Run, Stateful, train
from longtake.flow import euler_step, even_levels
from longtake.models.text import WordEncoder
from longtake.models.wan import WanTransformer


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
    look = clip_strips(text, network, [learner], world, stage.shift, stage, run)
    spent = train(
        {"teacher": learner},
        turn,
        stage.budget(warmup=200),
        run,
        keep={"clips": supply},
        look=look,
        log_every=stage.log_every,
    )
    learner.swap_average()
    return spent


def train_finetune(
    text: WordEncoder, network: WanTransformer, world: World, shift: float, stage: FinetuneStage, run: Run,
    anchor: WanTransformer | None = None,
) -> dict[str, float]:  # fmt: skip
    """anchor: the teacher, for a stage that is `anchored`."""
    at_rank(network, stage.rank)
    learner = learner_of(network, stage.lr, stage.far_lr, stage.average, far_only=stage.far_only)
    compile_for(run, network, *([anchor] if anchor else []))
    if stage.recompute:
        parallel.checkpoint_layers([network], ("through_layer",))
    kept: dict[str, Stateful]
    if stage.on_the_way:
        assert anchor is not None, "what is on the way is told by the teacher"
        levels = even_levels(stage.sampling_steps, shift)
        walks = Walks(world, levels, stage.batch, network.config.extent, stage.seed, run)
        kept, turn = {"walks": walks}, _walking_turn(text, network, anchor, learner, walks, stage, run)
    else:
        supply = world.clips(stage.pool, stage.seed, network.config.extent)
        kept = {"clips": supply}
        turn = _flow_turn(text, network, learner, supply, shift, stage, run, anchor, recorded=not stage.recompute)
    look = clip_strips(text, network, [learner], world, shift, stage, run)
    spent = train(
        {"network": learner}, turn, stage.budget(warmup=50), run, keep=kept, look=look, log_every=stage.log_every
    )  # fmt: skip
    learner.swap_average()
    merge(network)
    return spent


def _flow_turn(
    text: WordEncoder, network: WanTransformer, learner: Learner, supply: ClipSupply, shift: float,
    stage: TeacherStage | FinetuneStage, run: Run, anchor: WanTransformer | None = None, *, recorded: bool = True,
) -> Callable[[int], dict[str, Tensor]]:  # fmt: skip
    """Flow matching of whole clips, a share of them without their prompt, or all as they are sampled: guided.

    anchor: see `flow_loss`; recorded: see `Learner.taught_by`.
    """
    as_sampled = isinstance(stage, FinetuneStage) and stage.guided

    def loss(latents_BFCHW: Tensor, tokens_BPL: Tensor, prompt_BF: Tensor, focus_BFHW: Tensor) -> Tensor:
        absent = torch.rand(stage.batch, 1, 1, device=run.device) < (0 if as_sampled else stage.no_prompt_share)
        with run.autocast():
            text_BPLE = embed(text, tokens_BPL.masked_fill(absent, 0))
            nothing_BPLE = embed(text, torch.zeros_like(tokens_BPL[:, :1])) if as_sampled else None
            clips = Clips(latents_BFCHW, text_BPLE, prompt_BF, focus_BFHW)
            return flow_loss(network, clips, shift, stage.focus_weight, anchor, nothing_BPLE, stage.guidance)

    teach = learner.taught_by(loss, recorded=recorded)

    def turn(step: int) -> dict[str, Tensor]:
        value = teach(*parts_of(drawn(supply, step, stage.batch, network.config.extent)))
        return {"loss": value, "norm": learner.step()}

    return turn


def _walking_turn(
    text: WordEncoder, network: WanTransformer, anchor: WanTransformer, learner: Learner, walks: Walks,
    stage: FinetuneStage, run: Run,
) -> Callable[[int], dict[str, Tensor]]:  # fmt: skip
    """The teacher's guided velocity, wherever the network's own samplings stand; each lesson takes them a step on."""
    reached_BFCHW = torch.empty_like(walks.steps().noisy_BFCHW)  # a recorded lesson returns nothing but its loss

    def loss(noisy_BFCHW: Tensor, level_BF: Tensor, lower_BF: Tensor, tokens_BPL: Tensor, prompt_BF: Tensor) -> Tensor:
        with run.autocast():
            nothing_BPLE = embed(text, torch.zeros_like(tokens_BPL[:, :1]))
            asked = Asking(noisy_BFCHW, level_BF, embed(text, tokens_BPL), prompt_BF)
            value, velocity = on_the_way_loss(network, anchor, asked, nothing_BPLE, stage.guidance)
        reached_BFCHW.copy_(euler_step(noisy_BFCHW, velocity.float(), level_BF, lower_BF))
        return value

    teach = learner.taught_by(loss, recorded=not stage.recompute)

    def turn(step: int) -> dict[str, Tensor]:
        value = teach(*walks.steps())
        walks.go_on(reached_BFCHW)
        return {"loss": value, "norm": learner.step()}

    return turn
