"""`longtake train` on pictures of noise instead of the toy world's, which take long to paint, saving at every step."""

import sys
from functools import partial

import torch

from longtake import cli, training
from longtake.distillation import stages
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
    stages.train = partial(stages.train, save_seconds=0.0)
    stages.LOOKED_AT, stages.LOOKED_AT_BLOCKS, training.FILMED = 2, 2, 1
    return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
