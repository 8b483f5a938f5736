"""Which part of a memory keeps a camera still that should look away: what is near, what is far, or neither?

    python benchmarks/silenced.py away.txt --json silenced.json
    python benchmarks/silenced.py away.txt --captions 2 --late 24 --blocks 4 --json silenced.json     # tiny

Streams captions and keeps the memory of an early and of a late moment. Then it goes on from either window with either
far state, with none, and with more levels, under noise that no stream had before, and counts those that look away in
what follows. Streams that are turning at a moment are counted like the others: of an early and a late window together
with one far state, it is the difference that tells.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake import recipes
from longtake.evaluation.sources import captions_in
from longtake.generation.blockwise import blockwise
from longtake.generation.noise import SeededNoise
from longtake.generation.stream import Engine, to_uint8
from longtake.memory.stream_memory import StreamMemory
from longtake.models.codec import CodecState
from longtake.toy.scenery import read_camera
from longtake.toy.scenes import CAMERAS, RATE

OTHER_NOISE = 1_000_000  # added to seeds from the moment on


class Moment(NamedTuple):
    memory: dict[str, Any]
    codec: CodecState | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt_file", type=Path)
    parser.add_argument("--captions", type=int, default=1000, help="how many of the file's, at most")
    parser.add_argument("--model", default="toy")
    parser.add_argument("--recipe", default="hybrid_forcing")
    parser.add_argument("--early", type=int, default=16, help="blocks until the early moment")
    parser.add_argument("--late", type=int, default=80, help="blocks until the late one")
    parser.add_argument("--blocks", type=int, default=20, help="to go on for, from either")
    parser.add_argument("--levels", type=int, default=8, help="of the streams that go on with more of them")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    prompts = captions_in(args.prompt_file)[: args.captions]
    engine = recipes.load(args.model, recipe=args.recipe)
    early, late = moments(engine, prompts, (args.early, args.late))
    finer = replace(engine, recipe=engine.recipe.with_levels(args.levels))
    none = {**late.memory, "far": dict.fromkeys(late.memory["far"])}
    cells = {
        "early window, early far": (engine, early),
        "early window, late far": (engine, Moment({**early.memory, "far": late.memory["far"]}, early.codec)),
        "late window, late far": (engine, late),
        "late window, early far": (engine, Moment({**late.memory, "far": early.memory["far"]}, late.codec)),
        "late window, no far": (engine, Moment(none, late.codec)),
        f"early window, early far, {args.levels} levels": (finer, early),
        f"late window, late far, {args.levels} levels": (finer, late),
    }
    rows = []
    for name, (by, moment) in cells.items():
        away = looks_away(torch.cat(list(gone_on(by, prompts, moment, args.blocks)), 1))
        rows.append({"from": name, "streams": len(prompts), "look_away": sum(away), "which": away})
        print(rows[-1]["from"], rows[-1]["look_away"], "of", len(prompts), flush=True)
    args.json.write_text(
        json.dumps([{**vars(args), "prompt_file": str(args.prompt_file), "json": None}, *rows], indent=1)
    )


@torch.no_grad()
def moments(engine: Engine, prompts: Sequence[str], at: Sequence[int]) -> list[Moment]:
    """What streams of these prompts, with seeds 0, 1, ..., remember after so many blocks, rising."""
    shape = engine.recipe.memory(engine.network)
    memory, codec, found = StreamMemory(shape, engine.network.config.layers, ring=False), None, []
    for latents in _blocks(engine, prompts, memory, 0, at[-1]):
        _, codec = engine.codec.decode(latents, codec)
        if memory.blocks in at:
            found.append(Moment(memory.state(), codec))
    return found


@torch.no_grad()
def gone_on(engine: Engine, prompts: Sequence[str], moment: Moment, blocks: int) -> Iterator[Tensor]:
    """Pictures, uint8 [B, T, H, W, 3], of the blocks that follow a moment."""
    memory = StreamMemory.of_state(engine.recipe.memory(engine.network), moment.memory, ring=False)
    codec = moment.codec
    for latents in _blocks(engine, prompts, memory, OTHER_NOISE, memory.blocks + blocks):
        frames, codec = engine.codec.decode(latents, codec)
        yield to_uint8(frames)


def _blocks(engine: Engine, prompts: Sequence[str], memory: StreamMemory, seed: int, end: int) -> Iterator[Tensor]:
    keys = engine.prompt_keys(*prompts)
    seeds = range(seed, seed + len(prompts))
    noise = SeededNoise(seeds, (engine.recipe.block, *engine.latent_size), engine.device, engine.dtype)
    levels = engine.recipe.levels(engine.shift)
    return blockwise(engine.network, memory, lambda block: keys, noise, levels, end=end)


def looks_away(pictures_BTHWC: Tensor) -> list[int]:
    """Whether each looks away within the pictures, read five seconds at a time, which overlap by half."""
    size, away = 5 * RATE, CAMERAS.index("looks away")
    firsts = range(0, max(1, pictures_BTHWC.shape[1] - size // 2), size // 2)
    read = [read_camera(pictures_BTHWC[:, i : i + size : 2].float() / 255, RATE / 2).kind == away for i in firsts]
    return torch.stack(read).any(0).long().tolist()


if __name__ == "__main__":
    main()
