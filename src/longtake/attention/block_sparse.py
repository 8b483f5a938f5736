"""Attention that chooses: each block of queries looks at the blocks of keys that suit its mean best, and at no others.

Blocks are runs of tokens, the last of them as long as what is left. Choosing and attending are apart, so that another
choice can be put in the place of ours. On a GPU the kernels of `block_sparse_triton` run. Truth: `reference`.

I query blocks, J key blocks, K of them kept; other letters as in `reference`.
"""

from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from longtake.attention import reference
from longtake.attention.backends import by_torch
from longtake.attention.dense import dense

SHARED_BY = 30  # queries of a block that a copy of all keys would have to serve to be as fast as a mask, in float32
MASKED_AT_ONCE = 2**20  # numbers of a mask
GATHERED_AT_ONCE = 2**18  # numbers of the keys, and as many of the values: bounds copies


def block_sparse(
    q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, *, share: float, block_q: int = 64, block_k: int = 64,
    full_window: float = 0.0, centre_heads: bool = False,
) -> Tensor:  # fmt: skip
    """Softmax attention over the best share of key blocks for each query block and head; returns [B, T, N, D].

    full_window: the keys that the share counts at least, in lengths of the queries: of fewer, as many blocks are chosen
    as of so many. ValueError for a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of key blocks is above 0 and at most 1, got {share}")
    share = share_of_window(share, full_window * q_BTND.shape[1], k_BSND.shape[1])
    blocks = -(-k_BSND.shape[1] // block_k)
    if reference.kept_blocks(share, blocks) == blocks:
        return dense(q_BTND, k_BSND, v_BSND)
    scores_BNIJ = block_scores(q_BTND, k_BSND, block_q=block_q, block_k=block_k, centre_heads=centre_heads)
    chosen_BNIK = best_blocks(scores_BNIJ, share)
    return attend_blocks(q_BTND, k_BSND, v_BSND, chosen_BNIK, block_q=block_q, block_k=block_k)


def share_of_window(share: float, window: float, keys: int) -> float:
    """Of the keys that are there, the share that makes as many as a share of a window of so many does; at most all."""
    return min(1.0, share * max(1.0, window / keys))


@torch.no_grad()
def block_scores(q_BTND: Tensor, k_BSND: Tensor, *, block_q: int, block_k: int, centre_heads: bool = False) -> Tensor:
    """Product of the mean query and the mean key of every pair of blocks, [B, N, I, J] in float32.

    `centre_heads` takes from each key its mean over the heads, as the code published with Hybrid Forcing does and its
    paper does not. A mean over the tokens would move all scores of a query block alike, and change no choice.
    """
    kernels = _kernels(q_BTND)
    means = kernels.block_means if kernels else _block_means
    with torch.cuda.device_of(q_BTND):  # Triton runs on the current GPU, wherever the tensors are
        q_BNID, k_BNJD = means(q_BTND, block_q), means(k_BSND, block_k)
    if centre_heads:
        k_BNJD = k_BNJD - k_BNJD.mean(dim=1, keepdim=True)
    with torch.autocast(q_BTND.device.type, enabled=False):  # it would round the scores, and change choices
        return q_BNID @ k_BNJD.mT


def best_blocks(scores_BNIJ: Tensor, share: float) -> Tensor:
    """Numbers of the best share of key blocks, rising, at least one; the earlier of equals. Returns [B, N, I, K].

    scores [B, N, I, J] in float32. Truth: `reference.best_blocks`.
    """
    if scores_BNIJ.is_cpu:
        return _best_by_threshold(scores_BNIJ, share)
    kernels = _kernels(scores_BNIJ)
    if kernels is None:
        return reference.best_blocks(scores_BNIJ, share)
    with torch.cuda.device_of(scores_BNIJ):
        return kernels.best_blocks(scores_BNIJ, share)


def _best_by_threshold(scores_BNIJ: Tensor, share: float) -> Tensor:
    """All that are as good as the worst that is kept, which NumPy finds in a quarter of the time of torch's `topk`."""
    scores, blocks = scores_BNIJ.detach().numpy(), scores_BNIJ.shape[-1]
    kept = reference.kept_blocks(share, blocks)
    worst = np.partition(scores, blocks - kept, axis=-1)[..., blocks - kept, None]
    places = np.flatnonzero(~(scores < worst))  # what is no number is best, as in the definition
    if len(places) * blocks != scores.size * kept:  # more than are kept: of equals the earlier are chosen
        return reference.best_blocks(scores_BNIJ, share)
    in_rows = places.reshape(-1, kept) - np.arange(0, scores.size, blocks)[:, None]
    return torch.from_numpy(in_rows).view(*scores.shape[:-1], kept)


def attend_blocks(
    q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, chosen_BNIK: Tensor, *, block_q: int, block_k: int
) -> Tensor:
    """Softmax attention over the tokens of the chosen key blocks; returns [B, T, N, D].

    On a CPU a rule says whether they are copied together or all others masked: one machine answers the same each time.
    """
    if kernels := _kernels(q_BTND):
        run = kernels.attend_blocks
    else:
        kept = chosen_BNIK.shape[3] * block_k / k_BSND.shape[1]
        copies = q_BTND.dtype == torch.bfloat16 or kept * SHARED_BY < block_q
        run = attend_gathered if copies else attend_masked
    with torch.cuda.device_of(q_BTND):
        return run(q_BTND, k_BSND, v_BSND, chosen_BNIK, block_q=block_q, block_k=block_k)


def _kernels(x: Tensor) -> ModuleType | None:
    """The module of Triton kernels, where they can run on this tensor."""
    if not x.is_cuda or find_spec("triton") is None:
        return None
    from longtake.attention import block_sparse_triton

    return block_sparse_triton


def _block_means(x_BTND: Tensor, size: int) -> Tensor:
    """Mean of each block over its own tokens, [B, N, I, D] in float32."""
    whole = x_BTND.shape[1] // size
    means = x_BTND[:, : whole * size].unflatten(1, (whole, size)).mean(2, dtype=torch.float32)
    if whole * size < x_BTND.shape[1]:
        means = torch.cat([means, x_BTND[:, whole * size :].mean(1, keepdim=True, dtype=torch.float32)], dim=1)
    return means.transpose(1, 2)


def attend_masked(
    q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, chosen_BNIK: Tensor, *, block_q: int, block_k: int
) -> Tensor:
    """Attention to all keys with all but the chosen masked, some query blocks at a time."""
    (clips, tokens, heads, _), keys = q_BTND.shape, k_BSND.shape[1]
    at_once = max(1, MASKED_AT_ONCE // (clips * heads * block_q * keys))
    if chosen_BNIK.shape[2] > at_once:
        parts = zip(q_BTND.split(at_once * block_q, dim=1), chosen_BNIK.split(at_once, dim=2), strict=True)
        read = [attend_masked(q, k_BSND, v_BSND, chosen, block_q=block_q, block_k=block_k) for q, chosen in parts]
        return torch.cat(read, dim=1)
    nothing_BNIJ = q_BTND.new_full((*chosen_BNIK.shape[:3], -(-keys // block_k)), -torch.inf)
    of_blocks = nothing_BNIJ.scatter_(-1, chosen_BNIK, 0.0)
    of_keys = of_blocks.unsqueeze(4).expand(-1, -1, -1, -1, block_k).flatten(3)[..., :keys]
    mask_BNTS = of_keys.unsqueeze(3).expand(-1, -1, -1, block_q, -1).flatten(2, 3)[:, :, :tokens]
    return by_torch(q_BTND, k_BSND, v_BSND, mask_BNTS)


def attend_gathered(
    q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, chosen_BNIK: Tensor, *, block_q: int, block_k: int
) -> Tensor:
    """Attention of every query block to a copy of its chosen keys, some query blocks at a time."""
    (clips, tokens, heads, head_dim), keys = q_BTND.shape, k_BSND.shape[1]
    q = rearrange(_whole(q_BTND, block_q), "b (i r) n d -> (b n i) 1 r d", r=block_q)
    k, v = (rearrange(_whole(x, block_k), "b (j r) n d -> (b n) j (r d)", r=block_k) for x in (k_BSND, v_BSND))
    chosen = rearrange(chosen_BNIK, "b n i k -> (b n) i k")
    first_of_line = torch.arange(len(k), device=k.device)[:, None, None] * k.shape[1]
    places = (first_of_line + chosen).flatten(0, 1)
    numbers = chosen.flatten(0, 1).unsqueeze(-1) * block_k + torch.arange(block_k, device=k.device)
    is_key = (numbers < keys).flatten(1)[:, None, None] if keys % block_k else None

    def gathered(x: Tensor, some: slice) -> Tensor:
        return x.flatten(0, 1).index_select(0, places[some].flatten()).view(len(places[some]), 1, -1, head_dim)

    attend = _by_products if q.dtype == torch.bfloat16 else scaled_dot_product_attention
    at_once = max(1, GATHERED_AT_ONCE // (places.shape[1] * block_k * head_dim))
    pieces = [slice(start, start + at_once) for start in range(0, len(q), at_once)]
    read = torch.cat(
        [
            attend(q[some], gathered(k, some), gathered(v, some), None if is_key is None else is_key[some])
            for some in pieces
        ]
    )
    return rearrange(read, "(b n i) 1 r d -> b (i r) n d", b=clips, n=heads)[:, :tokens]


def _by_products(q: Tensor, k: Tensor, v: Tensor, is_key: Tensor | None) -> Tensor:
    """Scores are rounded to the type of the tensors. In bfloat16 torch's CPU kernel is no faster than in float32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if is_key is not None:
        scores = scores.masked_fill(~is_key, -torch.inf)
    return scores.softmax(dim=-1) @ v


def _whole(x_BTND: Tensor, size: int) -> Tensor:
    """Zeros after the last token, up to a whole number of blocks."""
    return pad(x_BTND, (0, 0, 0, 0, 0, -x_BTND.shape[1] % size))
