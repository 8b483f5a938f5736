"""The film strip of the README: twelve prompts, four moments of each, the same seeds whatever the model.

python benchmarks/film_strip.py docs/images/prompts.jpg
"""

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

import longtake
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the picture to write")
    parser.add_argument("--model", default="toy")
    parser.add_argument("--recipe", default="self_forcing_sink")
    arguments = parser.parse_args()
    engine = longtake.load(arguments.model, recipe=arguments.recipe)
    with engine.stream_batch(PROMPTS, seeds=range(len(PROMPTS))) as streams:
        pictures = np.concatenate([block.cpu().numpy() for block in islice(streams, BLOCKS)], axis=1)
    sheet = contact_sheet(pictures[:, MOMENTS].reshape(-1, *pictures.shape[2:]), 2 * len(MOMENTS))
    Image.fromarray(sheet).save(arguments.path, quality=90)


if __name__ == "__main__":
    main()
