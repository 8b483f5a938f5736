"""The pictures of the README, the same prompts, moments and seeds whatever the model.

python benchmarks/film_strip.py prompts docs/images/prompts.jpg   # twelve prompts, four moments of each
python benchmarks/film_strip.py take docs/images/take.jpg         # one stream, redirected five times
"""

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

import longtake
from longtake.generation.stream import Engine
from longtake.media.pictures import contact_sheet

PROMPTS = (
    "a pink cat stands still in the hills by day in clear weather",
    "a yellow duck bounces on the beach by day in fine weather",
    "a red car stands still in the city at night in the rain",
    "a blue fish flies over green hills at dusk in clear weather",
    "an orange star spins in the desert at sunset under a clear sky",
    "a purple heart bounces in the mountains in the snow by day",
    "a white ball walks right in the forest in daylight while rain falls",
    "a green cube stands still on the beach at sunset in clear weather",
    "an orange cat walks left in the mountains at night in the snow",
    "a pink fish flies in the city at night under a clear sky",
    "a white duck walks right in the forest at dusk in clear weather",
    "a blue car bounces in the desert by day in clear weather",
)
BLOCKS, MOMENTS = 8, (8, 32, 56, 80)  # pictures, within the first six seconds

BEGINNING = "a red car bounces over green hills by day in clear weather"
REDIRECTS = {
    7.0: "at sunset a red car bounces over green hills",
    14.0: "at night a red car bounces over green hills while snow falls",
    21.0: "a blue car bounces in the city at night in the snow",
    28.0: "a blue car bounces in the city by day in the rain",
    35.0: "a blue car bounces on the beach by day in clear weather",
}
TAKE_SECONDS, TAKE_PICTURES, TAKE_SEED = 42.0, 12, 7


def sheet_of_prompts(engine: Engine) -> np.ndarray:
    with engine.stream_batch(PROMPTS, seeds=range(len(PROMPTS))) as streams:
        pictures = np.concatenate([block.cpu().numpy() for block in islice(streams, BLOCKS)], axis=1)
    return contact_sheet(pictures[:, MOMENTS].reshape(-1, *pictures.shape[2:]), 2 * len(MOMENTS))


def strip_of_a_take(engine: Engine) -> np.ndarray:
    """Two pictures under each prompt, evenly spaced."""
    waiting, pictures = dict(REDIRECTS), []
    with engine.stream(BEGINNING, seed=TAKE_SEED) as stream:
        for chunk in stream:
            pictures.append(np.asarray(chunk.frames))
            if chunk.start_seconds > TAKE_SECONDS:
                break
            for moment in [moment for moment in waiting if moment <= chunk.start_seconds]:
                stream.redirect(waiting.pop(moment))
    shown = (np.arange(TAKE_PICTURES) + 0.8) * TAKE_SECONDS / TAKE_PICTURES * engine.frame_rate
    return contact_sheet(np.concatenate(pictures)[shown.astype(int)], TAKE_PICTURES // 2)


def main() -> None:
    sheets = {"prompts": sheet_of_prompts, "take": strip_of_a_take}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sheet", choices=sheets)
    parser.add_argument("path", type=Path, help="the picture to write")
    parser.add_argument("--model", default="toy")
    parser.add_argument("--recipe", default="self_forcing_sink")
    arguments = parser.parse_args()
    sheet = sheets[arguments.sheet](longtake.load(arguments.model, recipe=arguments.recipe))
    Image.fromarray(sheet).save(arguments.path, quality=90)


if __name__ == "__main__":
    main()
