"""Softmax over all keys by torch's fused kernels. Truth: `reference.dense`."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def dense(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, mask_TS: Tensor | None = None) -> Tensor:
    """Softmax attention over all keys, or over those where the boolean mask is true; returns [B, T, N, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTND, k_BSND, v_BSND))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask_TS).transpose(1, 2)


class Massed(NamedTuple):
    """An answer [B, T, N, D], the log-sum-exp of its scores and the largest of them, [B, T, N] each."""

    out: Tensor
    log_mass_BTN: Tensor
    top_BTN: Tensor


def massed(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Massed:
    """Softmax attention that also says how much its scores come to, in float32 at least.

    Plain torch: gradients pass through all three, which those of fused kernels that return a log-sum-exp do not.
    """
    wide = torch.promote_types(q_BTND.dtype, torch.float32)
    with torch.autocast(q_BTND.device.type, enabled=False):
        scores_BTNS = torch.einsum("btnd,bsnd->btns", q_BTND.to(wide), k_BSND.to(wide)) * q_BTND.shape[-1] ** -0.5
        log_mass_BTN = scores_BTNS.logsumexp(dim=-1)
        weights_BTNS = (scores_BTNS - log_mass_BTN.unsqueeze(-1)).exp()
        out_BTND = torch.einsum("btns,bsnd->btnd", weights_BTNS, v_BSND.to(wide))
    return Massed(out_BTND.to(q_BTND.dtype), log_mass_BTN, scores_BTNS.amax(dim=-1))
