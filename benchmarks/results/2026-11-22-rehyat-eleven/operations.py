"""Operations of a converted part of the 1.3B shape beside a dense one, counted: python operations.py > operations.json

Products alone, a multiplication and an addition each: scores and answers of exact pairs, features of the queries that
have something far and of the keys that become far, sums and their reading, projections. Features of degree 2, as timed.
"""

import json

TOKENS, DIM, HEADS, DEGREE = 1560, 1536, 12, 2
D = DIM // HEADS
PAIR = 4 * TOKENS**2 * DIM  # of one frame's queries with one frame's keys: scores and answers
FEATURES = 2 * HEADS * (D * DEGREE * D + (DEGREE * D) ** 2) * TOKENS  # of one frame's tokens
SUMS = 2 * HEADS * DEGREE * D * D * TOKENS  # of one frame's tokens, into the sums or out of them
PROJECTIONS = 4 * 2 * DIM**2 * TOKENS  # of one frame's tokens: q, k, v, o


def counted(frames: int, current: int, overlap: int) -> dict[str, float]:
    begins = range(0, frames, current)
    chunks = [(begin, min(begin + current, frames)) for begin in begins]
    pairs = sum((end - begin) * (end - max(0, begin - overlap)) for begin, end in chunks)
    far_queries = sum(end - begin for begin, end in chunks if begin > overlap)
    far_keys = max(0, begins[-1] - overlap)
    far = (far_queries + far_keys) * (FEATURES + SUMS)
    dense, ours, projections = frames**2 * PAIR, pairs * PAIR + far, frames * PROJECTIONS
    return {
        "frames": frames,
        "current": current,
        "overlap": overlap,
        "exact pairs of frames": pairs,
        "of": frames**2,
        "dense, TFLOP": round(dense / 1e12, 2),
        "exact, TFLOP": round(pairs * PAIR / 1e12, 2),
        "far, TFLOP": round(far / 1e12, 2),
        "attention, times fewer": round(dense / ours, 2),
        "self-attention, times fewer": round((dense + projections) / (ours + projections), 2),
    }


rows = [counted(frames, *span) for frames in (21, 126) for span in ((3, 1), (7, 1), (9, 1), (11, 3))]
print(json.dumps(rows, indent=1))
