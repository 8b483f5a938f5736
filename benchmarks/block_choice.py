"""Does it matter which key blocks are chosen? Videos of the embedded student under four choices, scored on one list.

    python benchmarks/block_choice.py [--model DIR] [--prompts N] [--seeds K] > block_choice.json

Scores as of `longtake evaluate toy`, so `longtake evaluate compare` compares them in pairs. All choices but the first
keep the same share of key blocks:

all      every block: dense attention
ours     those whose mean key suits the mean query best, as in `hybrid_forcing`
oracle   those with the most weight in dense attention, which has to be computed first
random   drawn anew by every call
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from longtake import recipes
from longtake.attention.block_sparse import attend_blocks, best_blocks, block_scores
from longtake.attention.dense import dense
from longtake.evaluation.toy import evaluate_toy
from longtake.generation.stream import Engine
from longtake.recipes.devices import device_named

RECIPE, TOKENS, SHARE = "hybrid_forcing", 12, 0.2  # the recipe's own

Choice = Callable[[Tensor, Tensor], Tensor]  # queries and keys to the scores of pairs of blocks, [B, N, I, J]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    device = device_named(None)
    engine = recipes.load(options.model, recipe=RECIPE, device=device)
    torch.manual_seed(0)
    ways = {"all": dense, **{name: partial(attend, choice) for name, choice in CHOICES.items()}}

    def engine_of(name: str) -> Engine:
        return replace(engine, recipe=replace(engine.recipe, name=name, near=ways[name]))

    say = partial(print, file=sys.stderr)
    found = evaluate_toy([*ways], engine_of, prompts=options.prompts, seeds=options.seeds, device=device, progress=say)
    print(json.dumps(found))


def attend(choice: Choice, q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    chosen = best_blocks(choice(q_BTND, k_BSND), SHARE)
    return attend_blocks(q_BTND, k_BSND, v_BSND, chosen, block_q=TOKENS, block_k=TOKENS)


def by_weight(q_BTND: Tensor, k_BSND: Tensor) -> Tensor:
    scores_BNTS = torch.einsum("btnd,bsnd->bnts", q_BTND.float(), k_BSND.float()) / q_BTND.shape[-1] ** 0.5
    by_query_block = torch.stack([part.sum(2) for part in scores_BNTS.softmax(-1).split(TOKENS, 2)], 2)
    return torch.stack([part.sum(3) for part in by_query_block.split(TOKENS, 3)], 3)


def at_random(q_BTND: Tensor, k_BSND: Tensor) -> Tensor:
    return torch.rand_like(block_scores(q_BTND, k_BSND, block_q=TOKENS, block_k=TOKENS))


CHOICES: dict[str, Choice] = {
    "ours": partial(block_scores, block_q=TOKENS, block_k=TOKENS),
    "oracle": by_weight,
    "random": at_random,
}

if __name__ == "__main__":
    main()
