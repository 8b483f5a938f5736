"""Softmax over all keys by torch's fused kernels. Truth: `reference.dense`."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def dense(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, mask_TS: Tensor | None = None) -> Tensor:
    """Softmax attention over all keys, or over those where the boolean mask is true; returns [B, T, N, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTND, k_BSND, v_BSND))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask_TS).transpose(1, 2)
