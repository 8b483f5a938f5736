"""Streams made by several processes together."""

from functools import partial

from longtake import parallel
from longtake.generation.stream import Engine
from longtake.models.split import split_tokens


def split(engine: Engine) -> None:
    """Let all processes make each stream of this engine together from now on; one alone goes on as it was.

    Each has an engine made alike, asks for the same streams and gets the same pictures; network passes and what is
    remembered are shared out (`models.split`). ValueError for what cannot be, and where engines differ.
    """
    if parallel.processes() == 1:
        return
    recipe = engine.recipe
    if recipe.policy.bank or (isinstance(recipe.near, partial) and recipe.near.keywords.get("centre_heads")):
        raise ValueError(f"recipe {recipe.name} chooses by all heads at once, which processes cannot share out")
    made = engine.weights, engine.circumstances
    if any(other != made for other in parallel.gather(made)):
        raise ValueError("processes of one stream differ in weights, precision, device or version: name one precision")
    if engine.fused:
        from longtake.attention.fused_triton import rotate

        split_tokens(engine.network, rotate)
    else:
        split_tokens(engine.network)
