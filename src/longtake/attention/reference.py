"""The definition of every attention here, in plain torch. Shapes: B batch, T queries, S keys, N heads, D per head."""

from collections.abc import Callable

import torch
from torch import Tensor


def dense(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, mask_TS: Tensor | None = None) -> Tensor:
    """Softmax attention over all keys, or over those where the boolean mask is true; returns [B, T, N, D]."""
    scores = torch.einsum("btnd,bsnd->bnts", q_BTND, k_BSND) * q_BTND.shape[-1] ** -0.5
    if mask_TS is not None:
        scores = scores.masked_fill(~mask_TS, float("-inf"))
    return torch.einsum("bnts,bsnd->btnd", scores.softmax(dim=-1), v_BSND)


def block_scores(q_BTND: Tensor, k_BSND: Tensor, *, block_q: int, block_k: int, centre_heads: bool = False) -> Tensor:
    """Product of the mean query and the mean key of every pair of blocks, [B, N, I, J] in float32.

    The last block is what is left. `centre_heads` first takes from each key its mean over the heads.
    """
    q, k = q_BTND.float(), k_BSND.float()
    if centre_heads:
        k = k - k.mean(dim=2, keepdim=True)
    q_means = torch.stack([block.mean(dim=1) for block in q.split(block_q, dim=1)], dim=2)
    k_means = torch.stack([block.mean(dim=1) for block in k.split(block_k, dim=1)], dim=2)
    return torch.einsum("bnid,bnjd->bnij", q_means, k_means)


def kept_blocks(share: float, blocks: int) -> int:
    """How many of these blocks a share keeps: the whole number below, and never none."""
    return max(1, int(share * blocks))


def best_blocks(scores_BNIJ: Tensor, share: float) -> Tensor:
    """Numbers of the best share of key blocks, rising, at least one; the earlier of equals. Returns [B, N, I, K]."""
    best = scores_BNIJ.argsort(dim=-1, descending=True, stable=True)
    return best[..., : kept_blocks(share, scores_BNIJ.shape[-1])].sort(dim=-1).values


def attend_blocks(
    q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, chosen_BNIK: Tensor, *, block_q: int, block_k: int
) -> Tensor:
    """Softmax attention over the tokens of the key blocks chosen for each query block and head."""
    blocks = -(-k_BSND.shape[1] // block_k)
    nothing_BNIJ = chosen_BNIK.new_zeros(*chosen_BNIK.shape[:3], blocks, dtype=torch.bool)
    chosen_BNIJ = nothing_BNIJ.scatter(-1, chosen_BNIK.long(), True)
    block_of_T, block_of_S = (
        torch.arange(x.shape[1], device=x.device) // size for x, size in ((q_BTND, block_q), (k_BSND, block_k))
    )
    return dense(q_BTND, k_BSND, v_BSND, chosen_BNIJ[:, :, block_of_T][..., block_of_S])


def rotate(x_BTND: Tensor, angles_TA: Tensor) -> Tensor:
    """Turn pairs of each head vector by its token's angles [T, D/2], as complex numbers (RoFormer, 2104.09864)."""
    pairs = torch.view_as_complex(x_BTND.double().unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angles_TA), angles_TA).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2).to(x_BTND.dtype)


def linear(
    q_BTNR: Tensor, q_below_BTNR: Tensor, k_BSNR: Tensor, k_below_BSNR: Tensor, v_BSND: Tensor, eps: float = 1e-6
) -> Tensor:
    """Linear attention over all keys: the mean of weighted values over the mean of weights, [B, T, N, D].

    Weights are products of features R, which may differ above and below the bar (Hybrid Forcing, 2604.10103).
    """
    above_BNTS = torch.einsum("btnr,bsnr->bnts", q_BTNR, k_BSNR)
    below_BNTS = torch.einsum("btnr,bsnr->bnts", q_below_BTNR, k_below_BSNR)
    values_BTND = torch.einsum("bnts,bsnd->btnd", above_BNTS, v_BSND) / v_BSND.shape[1]
    return values_BTND / (below_BNTS.mean(dim=-1).transpose(1, 2) + eps).unsqueeze(-1)


def one_bar(
    q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, weights_BNTS: Tensor, near_TS: Tensor, far_TS: Tensor,
    shift: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Softmax attention over near keys and given weights of far ones, under one denominator; returns [B, T, N, D].

    (sum over near of exp(s - c) v + sum over far of w v) / (sum over near of exp(s - c) + sum over far of w)
    (ReHyAt, 2601.04342, after secondary readings). shift: the c of rows of near scores
    [B, N, T, S] (-inf where not near), kept on the last dimension. Each query needs something near.
    """
    scores_BNTS = torch.einsum("btnd,bsnd->bnts", q_BTND, k_BSND) * q_BTND.shape[-1] ** -0.5
    scores_BNTS = scores_BNTS.masked_fill(~near_TS, float("-inf"))
    weights_BNTS = (scores_BNTS - shift(scores_BNTS)).exp() + weights_BNTS * far_TS
    return torch.einsum("bnts,bsnd->btnd", weights_BNTS / weights_BNTS.sum(dim=-1, keepdim=True), v_BSND)


def far_alone(v_BSND: Tensor, weights_BNTS: Tensor, far_TS: Tensor) -> Tensor:
    """The mean of far values by given weights, [B, T, N, D]: `one_bar` of queries with nothing near."""
    weights_BNTS = weights_BNTS * far_TS
    return torch.einsum("bnts,bsnd->btnd", weights_BNTS / weights_BNTS.sum(dim=-1, keepdim=True), v_BSND)


def near_and_far(frames: int, tokens: int, current: int, overlap: int) -> tuple[Tensor, Tensor]:
    """Which tokens are near and which far to which, [T, T] each: the sets S and causal L of ReHyAt (2601.04342).

    Chunks of `current` latent frames see themselves and `overlap` frames before them as near, all earlier ones as far.
    """
    frame_T = torch.arange(frames).repeat_interleave(tokens)
    begin_T = frame_T // current * current
    far_TT = frame_T < (begin_T - overlap).unsqueeze(1)
    return (frame_T < (begin_T + current).unsqueeze(1)) & ~far_TT, far_TT
