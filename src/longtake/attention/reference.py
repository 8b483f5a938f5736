"""The definition of every attention here, in plain torch. Shapes: B batch, T queries, S keys, N heads, D per head."""

import torch
from torch import Tensor


def dense(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, mask_TS: Tensor | None = None) -> Tensor:
    """Softmax attention over all keys, or over those where the boolean mask is true; returns [B, T, N, D]."""
    scores = torch.einsum("btnd,bsnd->bnts", q_BTND, k_BSND) * q_BTND.shape[-1] ** -0.5
    if mask_TS is not None:
        scores = scores.masked_fill(~mask_TS, float("-inf"))
    return torch.einsum("bnts,bsnd->btnd", scores.softmax(dim=-1), v_BSND)


def rotate(x_BTND: Tensor, angles_TA: Tensor) -> Tensor:
    """Turn pairs of each head vector by its token's angles [T, D/2], as complex numbers (RoFormer, 2104.09864)."""
    pairs = torch.view_as_complex(x_BTND.double().unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angles_TA), angles_TA).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2).to(x_BTND.dtype)
