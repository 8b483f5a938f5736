"""Clips that only a far state can show rightly, and a small network that learns on them by teacher forcing.

    python -m tests.returning hybrid_forcing:share=1 --steps 300 --blocks 5

Of a clip's blocks the first, a sink, is noise; the second shows a random colour that nothing says; the others are
noise again, more of them than a window holds; the last shows the colour again. Prints, every quarter of the steps, the
squared velocity errors block by block at level 0.9, at which next to nothing of the colour is to be seen: that of the
second block is what is to be had without memory.
"""

import argparse

import torch

from longtake.distillation import pretrain
from longtake.distillation.pretrain import Clips, forced_by_block, teacher_forcing_loss
from longtake.distillation.stages.learners import learner_of
from longtake.flow import add_noise
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.models.wan import WanConfig, WanTransformer
from longtake.recipes import recipe_named

SIZE = (4, 2, 4)  # channels, height, width


def network() -> WanTransformer:
    config = WanConfig(
        dim=32, heads=2, ffn_dim=64, layers=2, text_dim=8, channels=SIZE[0], level_dim=32, extent=15, reads_far=True
    )
    return WanTransformer(config)


def clips(count: int, blocks: int, dice: torch.Generator) -> Clips:
    colour = torch.randn(count, 1, SIZE[0], 1, 1, generator=dice)
    noise = 0.3 * torch.randn(count, 3 * blocks, *SIZE, generator=dice)
    number = torch.arange(3 * blocks) // 3
    shows = ((number == 1) | (number == blocks - 1)).view(1, -1, 1, 1, 1)
    latents = torch.where(shows, colour, noise)
    prompt_BF = torch.zeros(latents.shape[:2], dtype=torch.long)
    return Clips(latents, torch.ones(count, 1, 3, 8), prompt_BF, torch.zeros_like(latents[:, :, 0]))


@torch.no_grad()
def errors(made: WanTransformer, memory: MemoryShape, blocks: int) -> list[float]:
    """The mean squared velocity error of each block of clips that training did not show, at level 0.9."""
    dice = torch.Generator().manual_seed(2)
    latents, text, prompt_BF, _ = vars(clips(256, blocks, dice)).values()
    level_BF = torch.full(latents.shape[:2], 0.9)
    noise = torch.randn(latents.shape, generator=dice)
    noisy, prompts = add_noise(latents, noise, level_BF), made.prompt_keys(text)
    velocity = forced_by_block(made, latents, noisy, level_BF, prompts, prompt_BF, 3, memory)
    return (velocity - (noise - latents)).square().mean((0, 2, 3, 4)).view(blocks, 3).mean(1).tolist()


def learn(
    name: str, *, steps: int, blocks: int, far_lr: float, report: int | None = None, by_block: bool = False
) -> tuple[WanTransformer, MemoryShape]:
    """A network taught by so many steps of 16 clips, and its memory. report: steps between printed lines."""
    torch.manual_seed(0)
    dice, made, recipe = torch.Generator().manual_seed(1), network(), recipe_named(name)
    memory = recipe.memory(made)
    learner = learner_of(made, 5e-3, far_lr, 0.9)
    for step in range(1, steps + 1):
        learner.set_rate(min(1.0, step / 20, 2 - 2 * step / (steps + 1)))
        loss = teacher_forcing_loss(
            made, clips(16, blocks, dice), 3.0, 0.0, block=recipe.block, memory=memory, by_block=by_block
        )
        learner.step(loss)
        if report and step % report == 0:
            shown = " ".join(f"{error:.2f}" for error in errors(made, memory, blocks))
            print(f"{name}, step {step}: {shown}", flush=True)
    return made, memory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--blocks", type=int, default=5, help="five or more")
    parser.add_argument("--far-lr", type=float, default=2e-2)
    parser.add_argument("--cut", action="store_true", help="cut keys from their graph when they are committed")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.cut:
        pretrain.StreamMemory = lambda shape, layers, **more: StreamMemory(shape, layers, ring=False)
    sizes = {"steps": asked.steps, "blocks": asked.blocks, "report": max(1, asked.steps // 4)}
    for named in asked.recipes:
        learn(named, **sizes, far_lr=asked.far_lr, by_block=asked.cut)
