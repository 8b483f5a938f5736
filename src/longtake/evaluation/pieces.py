"""Attention and decoding by themselves, at the shapes that streams have them in.

Shapes: B batch, T queries, S keys, N heads, D per head, F latent frames, C channels, H W height and width.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake.attention import reference
from longtake.attention.backends import BACKENDS, distance, one_line, tolerance, verdict
from longtake.attention.block_sparse import attend_blocks, best_blocks, block_scores, block_sparse, share_of_window
from longtake.evaluation.parts import META, Counting
from longtake.evaluation.rates import seconds
from longtake.generation.recipe import Recipe
from longtake.generation.stream import on_host, to_uint8
from longtake.memory.window import WindowShape
from longtake.models.codec import Codec
from longtake.models.standins import Fused, without_numbers
from longtake.models.wan import WanConfig

CHECKED = 64  # queries whose answers are compared with the definition
LEAST = 0.1  # seconds that a row is timed


class Window(NamedTuple):
    """What is attended to in one go: tokens that ask, and that are asked."""

    queries: int
    keys: int


def windows(recipe: Recipe, config: WanConfig, latent_size: tuple[int, int], text_rows: int) -> list[Window]:
    """What a pass of a recipe attends to when its window is full: itself with what is remembered, and the prompt.

    latent_size: height and width of latents.
    """
    tokens = (latent_size[0] // config.patch) * (latent_size[1] // config.patch)
    asking = recipe.block * recipe.in_flight
    remembered = recipe.policy.seen(WindowShape(sink=recipe.sink, past=recipe.past))
    queries = asking * tokens
    return [Window(queries, (remembered + asking) * tokens), Window(queries, text_rows)]


@torch.no_grad()
def bench_attention(
    recipes: Sequence[Recipe],
    config: WanConfig,
    latent_size: tuple[int, int],
    text_rows: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Rows ready for JSON: each window of these recipes by each dense backend, and block-sparse as recipes have it.

    tflops: of what is computed, so of the chosen blocks alone. distance: from the definition in float64, as a share of
    its size, of the first queries. A backend that does not run says why.
    """
    found = dict.fromkeys(one for recipe in recipes for one in windows(recipe, config, latent_size, text_rows))
    rows: list[dict[str, Any]] = []
    for window in found:
        say(f"attention of {window.queries} x {window.keys}")
        rows += _dense_rows(window, config, device, dtype)
    for recipe in recipes:
        if isinstance(recipe.near, partial) and recipe.near.func is block_sparse:
            window = windows(recipe, config, latent_size, text_rows)[0]
            say(f"{recipe.name}: block-sparse attention of {window.queries} x {window.keys}")
            rows += _sparse_rows(window, config, device, dtype, recipe.near)
    return rows


def _dense_rows(
    window: Window, config: WanConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:  # fmt: skip
    q, k, v = _drawn(window, config, device, dtype)
    heads = zip(*(x.double().split(1, dim=2) for x in (q[:, :CHECKED], k, v)), strict=True)
    truth = torch.cat([reference.dense(*head) for head in heads], dim=2)
    for name, backend in BACKENDS.items():
        row = {**window._asdict(), "form": "dense", "backend": name}
        if refused := verdict(name, device, dtype, q.shape[3]):
            yield row | {"refused": refused}
            continue
        try:
            off = distance(backend.attend(q, k, v)[:, :CHECKED], truth)
            took = seconds(partial(backend.attend, q, k, v), device, least=LEAST)
        except Exception as error:  # no room for all scores, most often, but kernels raise anything
            yield row | {"refused": one_line(error)}
            continue
        yield row | _timed(took, 4 * q.numel() * k.shape[1]) | {"distance": off, "right": off <= tolerance(dtype)}


def _sparse_rows(
    window: Window, config: WanConfig, device: torch.device, dtype: torch.dtype, near: "partial[Tensor]"
) -> Iterator[dict[str, Any]]:
    """near: `block_sparse` with all that it can be told."""
    q, k, v = _drawn(window, config, device, dtype)
    given = near.keywords
    share, block_k = given["share"], given["block_k"]
    sizes = {"block_q": given["block_q"], "block_k": block_k}
    shown = share_of_window(share, given.get("full_window", 0.0) * q.shape[1], k.shape[1])
    chosen = best_blocks(block_scores(q, k, **sizes, centre_heads=given.get("centre_heads", False)), shown)
    keys = min(chosen.shape[-1] * block_k, k.shape[1])
    forms: dict[str, Callable[[], Tensor]] = {
        "chosen blocks": partial(attend_blocks, q, k, v, chosen, **sizes),
        "choice and chosen blocks": partial(near, q, k, v),
    }
    for name, call in forms.items():
        row = {**window._asdict(), "form": "block-sparse", "share": share, "block": block_k, "backend": name}
        yield row | _timed(seconds(call, device, least=LEAST), 4 * q.numel() * keys)


def _drawn(window: Window, config: WanConfig, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    sizes = [(1, count, config.heads, config.dim // config.heads) for count in (window.queries, *[window.keys] * 2)]
    return [torch.randn(size, device=device, dtype=dtype) for size in sizes]


def _timed(took: float, operations: float) -> dict[str, float]:
    return {"ms": 1000 * took, "tflops": operations / took / 1e12}


@torch.no_grad()
def bench_codec(
    codec: Codec, latents_BFCHW: Tensor, say: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Rows ready for JSON: decoding a block of a stream that is under way, so many latent frames at once, and handing
    its pictures over.
    """
    frames, own, device = latents_BFCHW.shape[1], codec.span, latents_BFCHW.device
    pictures, state = codec.decode(latents_BFCHW)
    work = _decoding(codec, latents_BFCHW)
    rows: list[dict[str, Any]] = []
    try:
        for span in (span for span in range(1, frames + 1) if frames % span == 0):
            say(f"{type(codec).__name__}, {span} of {frames} latent frames at once")
            codec.span = span
            took = seconds(partial(codec.decode, latents_BFCHW, state), device, least=LEAST)
            rows.append({"step": "decode", "at_once": span} | _timed(took, work))
    finally:
        codec.span = own
    pictures, _ = codec.decode(latents_BFCHW, state)
    shown = to_uint8(pictures)
    handed: dict[str, Callable[[], object]] = {
        "to bytes": partial(to_uint8, pictures), "copy to host": partial(on_host, shown[0])
    }  # fmt: skip
    rows += [{"step": name, "ms": 1000 * seconds(call, device, least=LEAST)} for name, call in handed.items()]
    return [row | {"pictures": shown.shape[1], "pictures_a_second": 1000 * shown.shape[1] / row["ms"]} for row in rows]


def _decoding(codec: Codec, latents_BFCHW: Tensor) -> float:
    """Operations of decoding these latents in a stream that is under way."""
    twin, latents = without_numbers(codec), torch.empty_like(latents_BFCHW, device=META)
    counting = Counting()
    with Fused(counting.attended):
        _, state = twin.decode(latents)
        before = counting.so_far().operations
        with counting:
            twin.decode(latents, state)
    return counting.so_far().operations - before
