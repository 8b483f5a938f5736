"""`longtake train` on pictures of noise instead of the toy world's, which take long to paint, saving at every step."""

import os
import sys

import torch

from longtake import cli, training
from longtake.distillation import stages, trainer
from longtake.distillation.rollout import FreshNoise
from longtake.distillation.stages import dmd, strips
from longtake.toy import clips, world


def render(scenes, pictures, first=0, painter=None) -> world.Rendering:
    """Noise that follows from the scenes, coarse enough to be cheap."""
    dice = torch.Generator().manual_seed(int(scenes.uniforms.double().sum() * 1e6))
    small = torch.rand(len(scenes), pictures, 4, world.HEIGHT // 8, world.WIDTH // 8, generator=dice)
    large = small.repeat_interleave(8, 3).repeat_interleave(8, 4)
    return world.Rendering(large[:, :, :3] * 2 - 1, large[:, :, 3])


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    world.render = clips.render = render
    trainer.train.__kwdefaults__["save_seconds"] = float(os.environ.get("SAVE_SECONDS", "0"))
    strips.LOOKED_AT, strips.LOOKED_AT_BLOCKS, training.FILMED, stages.world.RENEW_EVERY = 2, 2, 1, 2
    if "SEEN" in os.environ:
        _record_what_processes_draw(os.environ["SEEN"])
    return cli.main(["train", *arguments])


def _record_what_processes_draw(folder: str) -> None:
    """Write each process's plans, prompts, clips, noise and final weights to a file of its own."""
    seen: dict[str, list] = {"plans": [], "prompts": [], "clips": [], "noise": [], "weights": []}

    def recorded(name, work):
        def run(*arguments, **more):
            result = work(*arguments, **more)
            seen[name].append(result)
            return result

        return run

    def train_dmd(*arguments):
        spent = stages_train_dmd(*arguments)
        seen["weights"] = [x.clone() for x in arguments[1].state_dict().values()]
        seen["plans"] = [str(plan) for plan in seen["plans"]]
        seen["prompts"] = [said.tokens_BPL for said in seen["prompts"]]
        seen["clips"] = [drawn.latents_BFCHW for drawn in seen["clips"]]
        torch.save(seen, f"{folder}/{os.environ.get('RANK', '0')}.pt")
        return spent

    stages_train_dmd = stages.train_dmd
    stages.train_dmd = train_dmd
    dmd.draw_plan = recorded("plans", dmd.draw_plan)
    training.sample_prompts = recorded("prompts", training.sample_prompts)
    clips.ClipPool.draw = recorded("clips", clips.ClipPool.draw)
    FreshNoise.__call__ = recorded("noise", FreshNoise.__call__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
