"""Softmax over all keys by the fastest kernels: a GPU tries them for each shape, a CPU goes by a rule, so that one
machine always answers the same. Truth: `reference.dense`."""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.attention.backends import AT_ONCE, FORCED, by_products, by_torch, fastest


def dense(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, mask_TS: Tensor | None = None) -> Tensor:
    """Softmax attention over all keys, or over those where the boolean mask is true; returns [B, T, N, D]."""
    if mask_TS is None and _may_choose(q_BTND, k_BSND, v_BSND):
        if q_BTND.is_cuda or FORCED in os.environ:
            return fastest(q_BTND, k_BSND, v_BSND)(q_BTND, k_BSND, v_BSND)
        if q_BTND.is_cpu and q_BTND.dtype == torch.bfloat16 and k_BSND.shape[1] > AT_ONCE:
            return by_products(q_BTND, k_BSND, v_BSND)  # torch's CPU kernel is no faster there than in float32
    return by_torch(q_BTND, k_BSND, v_BSND, mask_TS)


def _may_choose(*tensors: Tensor) -> bool:
    """Whether another kernel than torch's own choice may answer.

    Not in training, as not all kernels have a gradient, nor in code that is being compiled or only counted, on the meta
    device, which cannot try them.
    """
    if torch.compiler.is_compiling() or any(x.is_meta for x in tensors):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


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
