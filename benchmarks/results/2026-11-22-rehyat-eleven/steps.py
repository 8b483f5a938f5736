"""Which steps of sampling cost a converted teacher its cameras? python steps.py CONVERTED videos.json steps.json

Samples videos, numbered seed by seed as in `evaluate toy`, of 500 captions, with the embedded teacher (T) and a
converted one (C) by turns: T5C is five steps by the teacher and the other 27 by the converted one. Of each plan and
video it tells what camera is read (0 still, 1 pans left, 2 right, 3 looks away, -1 not told), its drift in pixels a
second, its turns. --small: two videos, two steps.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from longtake.evaluation.sources import clip_seed, held_out_captions
from longtake.flow import euler_step, even_levels, guided
from longtake.generation.noise import SeededNoise
from longtake.generation.stream import to_uint8
from longtake.models.text import WordText
from longtake.recipes.devices import fuse_clips
from longtake.recipes.engines import latent_size
from longtake.recipes.weight_files import CODEC_FILE, TEACHER_FILE, file_of, load_codec, load_network
from longtake.toy import captions
from longtake.toy.detect import RATE, STRIDE
from longtake.toy.scenery import read_camera

STEPS, GUIDANCE, PROMPTS, AT_ONCE = 32, 3.0, 500, 96
here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = torch.bfloat16 if here.type == "cuda" else torch.float32
small = "--small" in sys.argv

nets: dict[str, Any] = {}
for name, file in {"T": Path(file_of("toy", TEACHER_FILE)), "C": Path(sys.argv[1])}.items():
    text, net, told = load_network(file, here)
    net.to(dtype)
    if here.type == "cuda":
        fuse_clips(net)
    nets[name] = (net, text)
codec = load_codec([file_of("toy", CODEC_FILE)], here).to(dtype)
levels = even_levels(STEPS, told["shift"])
plans = {"T": "T" * STEPS, "C": "C" * STEPS}
for k in (2, 5, 10, 20):
    plans |= {f"T{k}C": "T" * k + "C" * (STEPS - k), f"C{k}T": "C" * k + "T" * (STEPS - k)}
if small:
    plans = {"T": "TT", "TC": "TC"}
sets = json.loads(Path(sys.argv[2]).read_text())
every, told_of = held_out_captions(PROMPTS), [video for some in sets.values() for video in some][: 2 if small else None]


@torch.no_grad()
def sampled(plan: str) -> dict[int, list[float]]:
    found = {}
    for i in range(0, len(told_of), AT_ONCE):
        some = told_of[i : i + AT_ONCE]
        prompts = [every[video % PROMPTS] for video in some]
        seeds = [clip_seed(video // PROMPTS, video % PROMPTS) for video in some]
        extent = nets["T"][0].config.extent
        x = SeededNoise(seeds, (extent, *latent_size(codec)), here, torch.float32)(0, 0)
        keys, views = {}, {}
        for name in set(plan):
            net, text = nets[name]
            said, nothing = WordText(text, captions.encode).encode(prompts), text(text.no_prompt(len(prompts)))
            keys[name] = [net.prompt_keys(one[:, None].to(dtype)) for one in (said, nothing)]
            views[name] = net.clip_view(x)
        own = levels[: len(plan)]
        for name, level, lower in zip(plan, own, [*own[1:], 0.0], strict=True):
            net, view, (said, nothing) = nets[name][0], views[name], keys[name]
            level_BF, lower_BF = (torch.full(x.shape[:2], value, device=here) for value in (level, lower))
            velocity = guided(net(x, level_BF, said, view, None), net(x, level_BF, nothing, view), GUIDANCE)
            x = euler_step(x, velocity, level_BF, lower_BF)
        pictures = torch.cat([to_uint8(codec.decode(part)[0]) for part in x.to(dtype).split(8)])[:, :80]
        for j in range(0, len(some), 16):
            seen = pictures[j : j + 16, (79 % STRIDE) :: STRIDE].float() / 255
            camera = read_camera(seen, RATE)
            turned = camera.turned.amax(1) - camera.turned.amin(1)
            read = zip(camera.kind.tolist(), camera.drift.tolist(), turned.tolist(), strict=True)
            found |= {video: list(one) for video, one in zip(some[j : j + 16], read, strict=True)}
    return found


out: dict[str, Any] = {"sets": sets, "levels": levels, "plans": {}}
for name, plan in plans.items():
    out["plans"][name] = sampled(plan)
    Path(sys.argv[3]).write_text(json.dumps(out))
