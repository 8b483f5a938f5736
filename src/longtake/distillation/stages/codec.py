"""The stage `codec`: pictures -> codec."""

from collections.abc import Callable

import torch
from torch import Tensor

from longtake.distillation.optim import muon_and_adam
from longtake.distillation.pretrain import codec_loss
from longtake.distillation.stages.learners import resting
from longtake.distillation.stages.settings import CodecStage
from longtake.distillation.trainer import Dice, Learner, Run, train
from longtake.models.light_codec import LightCodec


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
        with resting(learner):
            look(name)

    budget = stage.budget(warmup=100)
    spent = train({"codec": learner}, turn, budget, run, keep={"dice": dice}, look=looked, log_every=stage.log_every)
    learner.swap_average()
    codec.eval().requires_grad_(False)
    moments = []
    with torch.no_grad(), run.autocast():
        for _ in range(40):
            moments.append(codec.encode_moments(pictures(dice)[0])[0].float().transpose(1, 2).flatten(2))
    latents = torch.cat(moments).transpose(0, 1).flatten(1)
    codec.set_latent_statistics(latents.mean(1), latents.std(1))
    return spent
