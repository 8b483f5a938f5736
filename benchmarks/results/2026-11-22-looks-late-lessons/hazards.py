"""How likely does a level camera begin to turn away in the next block, by how many blocks it has been level?

    python hazards.py > hazards.json      # half a minute on a CPU

For clips of the world that look away, those made for memory and those that look away late: {"0": [began, level]}, how
many blocks began level after so many level ones, 13 for as many or more, and in how many of them the camera turned.
The first four blocks of a clip are not counted: in the world's every camera turns within two seconds.
"""

import json
from collections import defaultdict

import torch

from longtake.toy.clips import late_scenes, memory_scenes, training_scenes
from longtake.toy.landscape import PERIOD
from longtake.toy.poses import pose
from longtake.toy.scenes import CAMERAS, RATE, Scenes

BLOCKS, PICTURES, MOST = 20, 12, 13  # a clip of 60 latent frames; pictures of a block; the last bin
CPU = torch.device("cpu")


def count(scenes: Scenes, first: int | torch.Tensor = 0) -> dict[str, object]:
    turned = pose(scenes, 1 + BLOCKS * PICTURES - 4, first).camera_x
    level = torch.minimum(turned, PERIOD - turned) < 1  # less than a pixel
    ends = [(block + 1) * PICTURES - 4 for block in range(BLOCKS)]  # the first block has nine pictures
    since = torch.zeros(len(scenes), dtype=torch.long)
    found: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    late = torch.zeros(len(scenes), dtype=torch.bool)
    for block, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        at = level[:, start]
        begins = at & ~level[:, start + 1 : end + 1].all(1)
        if block >= 4:
            for blocks, began in zip(since[at].tolist(), begins[at].tolist(), strict=True):
                found[min(blocks, MOST)][0] += began
                found[min(blocks, MOST)][1] += 1
            late |= begins & (since >= MOST)
        since = torch.where(at & ~begins, since + 1, 0)
    by_blocks = {str(blocks): found[blocks] for blocks in sorted(found)}
    return {"clips": len(scenes), "clips_with_a_beginning_after_13": int(late.sum()), "by_level_blocks": by_blocks}


def main() -> None:
    world, _ = training_scenes(1500, 5, CPU)
    memory, _, first = memory_scenes(800, 6, CPU, (1 + BLOCKS * PICTURES - 4) / RATE)
    late, _ = late_scenes(1000, 7, CPU)
    of_world = world[(world.camera == CAMERAS.index("looks away")).nonzero()[:, 0]]
    counts = {"world": count(of_world), "memory": count(memory, first), "late": count(late)}
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
