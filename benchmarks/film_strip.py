"""The pictures of the README, the same prompts, moments and seeds whatever the model.

python benchmarks/film_strip.py prompts docs/images/prompts.jpg   # twelve prompts, four moments of each
python benchmarks/film_strip.py take docs/images/take.jpg         # one stream, redirected five times
python benchmarks/film_strip.py recall docs/images/recall.jpg     # three moments given, five made

Of `hybrid_forcing`, as `longtake generate` streams, unless another recipe is named.
"""

import argparse
from itertools import count, islice
from pathlib import Path

import numpy as np
from PIL import Image

import longtake
from longtake.evaluation import recall
from longtake.evaluation.sources import rendered, stacked
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

RECALLED, RECALL_GAP = 6, 4  # streams; seconds out of sight
RECALL_MOMENTS = (0.5, 5.0, 9.4, 11.5, 13.5, 15.5, 17.5, 19.5)  # seconds; the first three are given


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


def sheet_of_recall(engine: Engine) -> np.ndarray:
    """Each row goes on from a given clip, whose camera has come, shown what is there and turned away."""
    chosen, lead = recall.openings(RECALLED, [0]), recall.LEAD
    scenes = recall.turning(stacked([one.scene for one in chosen]), RECALL_GAP)
    turned = round((lead + recall.TURNED_SECONDS) * engine.frame_rate)
    given = rendered(
        scenes, next(n for n in map(engine.pictures_in, count(1)) if n >= turned), -lead * engine.frame_rate
    )
    captions, seeds = [one.caption for one in chosen], [one.seed for one in chosen]
    pictures = [given.numpy()]
    with engine.stream_batch(captions, seeds=seeds, pictures=given) as streams:
        for block in streams:
            pictures.append(block.cpu().numpy())
            if sum(piece.shape[1] for piece in pictures) > RECALL_MOMENTS[-1] * engine.frame_rate:
                break
    moments = [int(second * engine.frame_rate) for second in RECALL_MOMENTS]
    return contact_sheet(np.concatenate(pictures, axis=1)[:, moments].reshape(-1, *given.shape[2:]), len(moments))


def main() -> None:
    sheets = {"prompts": sheet_of_prompts, "take": strip_of_a_take, "recall": sheet_of_recall}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sheet", choices=sheets)
    parser.add_argument("path", type=Path, help="the picture to write")
    parser.add_argument("--model", default="toy")
    parser.add_argument("--recipe", default="hybrid_forcing")
    arguments = parser.parse_args()
    sheet = sheets[arguments.sheet](longtake.load(arguments.model, recipe=arguments.recipe))
    Image.fromarray(sheet).save(arguments.path, quality=90)


if __name__ == "__main__":
    main()
