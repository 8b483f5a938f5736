"""Does every form of attention that is present on a device answer as its definition does?

A kernel that is wrong gives noise rather than an error, so each is run on drawn numbers and compared with
`attention.reference` in float64.

Shapes: B batch, T queries, S keys, N heads, D per head.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from longtake.attention import linear, reference
from longtake.attention.backends import BACKENDS, FORCED, Choice, choose, distance, one_line, tolerance
from longtake.attention.block_sparse import block_sparse
from longtake.attention.linear import Features
from longtake.attention.near_span import Shift, joined
from longtake.evaluation.verify import Check

QUERIES, FAR, NEAR = 90, 130, 190  # tokens, no multiple of any block
HEADS, HEAD_DIM = 4, 64
WINDOW = 4680, 14040  # queries and keys of a block in front of nine latent frames at 832x480
SHARE, BLOCK = 0.3, 16  # of key blocks; tokens of one

_REFUSALS = ("No available kernel", "No viable backend")  # of torch on a GPU and on a CPU

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def attention_checks(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """One check for each form of attention that this device has in this precision; dense ones come by backend.

    Numbers are distances from the definition, as shares of its size.
    """
    q, k, v = _drawn(device, dtype)
    for name, backend in BACKENDS.items():
        if backend.missing(device) is None and _takes(backend.attend, q, k, v):
            yield _compared(f"dense, {name}", backend.attend, reference.dense, q, k, v)
    kernels = "Triton kernels" if device.type == "cuda" and find_spec("triton") else "plain torch"
    yield _compared(f"block-sparse, {kernels}", _sparse, _sparse_by_definition, q, k, v)
    yield _compared("linear", _linear, _linear_by_definition, q, k, v)
    yield _compared("near and far under one bar", _one_bar, _one_bar_by_definition, q, k, v)


@torch.no_grad()
def attention_choice(device: torch.device) -> Choice | None:
    """The backend that is taken for the window of a 1.3B network on a GPU, or the one that is named.

    None where torch chooses. ValueError for a name that cannot be taken.
    """
    if device.type != "cuda" and FORCED not in os.environ:
        return None
    queries, keys = WINDOW if device.type == "cuda" else (QUERIES, NEAR)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, length, 12, 128, device=device, dtype=dtype) for length in (queries, keys, keys))
    return choose(q, k, v)


def _drawn(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, the same numbers on every device."""
    made = torch.Generator().manual_seed(0)
    lengths = (QUERIES, FAR + NEAR, FAR + NEAR)
    q, k, v = (torch.randn(2, length, HEADS, HEAD_DIM, generator=made) for length in lengths)
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def _compared(name: str, fast: Attention, slow: Attention, q: Tensor, k: Tensor, v: Tensor) -> Check:
    truth = slow(q.double(), k.double(), v.double())
    number, about = math.nan, "distance from the definition, as a share of its size"
    try:
        number = distance(fast(q, k, v), truth)
    except Exception as error:  # drivers and compilers raise anything, and the other forms are still to be checked
        about = f"broke off: {one_line(error)}"
    return Check(name=name, number=number, most=tolerance(q.dtype), about=about)


def _takes(attend: Attention, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch takes this kernel for these tensors; why it does not, it says in warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            attend(q, k, v)
        except RuntimeError as error:
            return not any(refusal in str(error) for refusal in _REFUSALS)
        except Exception:  # anything else is for the check to tell
            return True
    return True


def _sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return block_sparse(q, k, v, share=SHARE, block_q=BLOCK, block_k=BLOCK)


def _sparse_by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    chosen = reference.best_blocks(reference.block_scores(q, k, block_q=BLOCK, block_k=BLOCK), SHARE)
    return reference.attend_blocks(q, k, v, chosen, block_q=BLOCK, block_k=BLOCK)


def _features(x: Tensor) -> Features:
    """Above 0, as far keys under one bar must be, and small enough to weigh about as much as what is near."""
    features = torch.sigmoid(x.to(torch.promote_types(x.dtype, torch.float32))) / HEAD_DIM
    return Features(features, features)


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear.read(linear.sums_of(_features(k), v), _features(q))


def _linear_by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.linear(*_features(q), *_features(k), v)


def _one_bar(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    far = linear.weigh(linear.sums_of(_features(k[:, :FAR]), v[:, :FAR]), _features(q))
    return joined(q, k[:, FAR:], v[:, FAR:], far, Shift.LOG_MASS)


def _one_bar_by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights_BNTS = torch.einsum("btnr,bsnr->bnts", _features(q).above, _features(k).above)
    far_TS = (torch.arange(FAR + NEAR, device=q.device) < FAR).expand(QUERIES, -1)
    return reference.one_bar(q, k, v, weights_BNTS, ~far_TS, far_TS, lambda scores: scores.logsumexp(-1, keepdim=True))
