"""Scores of blocks, the chosen ones and what is read from them: by the definition and by the fast functions."""

from types import ModuleType

import torch

from longtake.attention import block_sparse, reference
from tests.parity.fixture import Fixture


def check(fixture: Fixture) -> None:
    for sizes in fixture.config["sets"]:
        for functions in (reference, block_sparse):
            _check_set(fixture, sizes, functions)


def _check_set(fixture: Fixture, sizes: dict, functions: ModuleType) -> None:
    name, share = sizes["name"], sizes["topk_ratio"]
    q, k, v = (fixture.inputs[f"{name}.{letter}"] for letter in "qkv")
    blocks = {"block_q": sizes["block_q"], "block_k": sizes["block_k"]}
    scores = {
        "centre_heads": functions.block_scores(q, k, centre_heads=True, **blocks),
        "centre_sequence": functions.block_scores(q, k - k.mean(dim=1, keepdim=True), **blocks),
    }
    for variant, score in scores.items():
        chosen = functions.best_blocks(score, share)
        fixture.compare(f"{name}.{variant}.score", score)
        fixture.compare(f"{name}.{variant}.selected", torch.zeros_like(score).scatter(-1, chosen, 1).to(torch.uint8))
        fixture.compare(f"{name}.{variant}.out", functions.attend_blocks(q, k, v, chosen, **blocks))
    for variant, centre_heads in (("centre_heads", True), ("centre_sequence", False)):
        read = block_sparse.block_sparse(q, k, v, share=share, centre_heads=centre_heads, **blocks)
        fixture.compare(f"{name}.{variant}.out", read)
