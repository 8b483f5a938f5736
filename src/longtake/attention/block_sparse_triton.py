# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""Kernels of block-sparse attention, forward and backward. Truth: `reference`.

Tensors are contiguous, [B, tokens, N, D]; a program has one block of one head of one clip, and its second number counts
heads, then clips. Tiles are powers of two, the blocks inside them any size: what a tile has beyond its block, its
sequence or its head weighs nothing and is not written. Sums are float32; logarithms have base 2, as the hardware does.

From Hopper on a GPU copies a tile by itself, as a descriptor tells (TMA). Blocks that loops go over come so where they
can, and so do the queries of `_forward`; own blocks of other programs do not, for it would take more registers.

I query blocks, J key blocks, K of them kept; other letters as in `reference`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from longtake.attention.reference import kept_blocks

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-(2**31))  # of whole numbers of 32 bits
ALIGNED = 16  # bytes: what a GPU copies by itself begins at multiples of them
LEAST_ROW = 256  # bytes of a token of a head: with fewer, Triton 3.6 has been seen to answer wrong on an H200


class Launch(NamedTuple):
    """How a kernel is laid on the machine; its numbers are the same for every choice."""

    num_warps: int
    num_stages: int


class Launches(NamedTuple):
    forward: Launch = Launch(4, 3)
    grad_q: Launch = Launch(4, 2)
    grad_kv: Launch = Launch(4, 2)


DEFAULT_LAUNCHES = Launches()


def attend_blocks(
    q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, chosen_BNIK: Tensor, *, block_q: int, block_k: int,
    launches: Launches = DEFAULT_LAUNCHES,
) -> Tensor:  # fmt: skip
    """Softmax attention over the tokens of the chosen key blocks, differentiable; returns [B, T, N, D]."""
    return _Attend.apply(q_BTND, k_BSND, v_BSND, chosen_BNIK, block_q, block_k, launches)


def block_means(x_BTND: Tensor, size: int) -> Tensor:
    """Mean of each block over its own tokens, [B, N, I, D] in float32."""
    x = x_BTND.contiguous()
    clips, tokens, heads, head_dim = x.shape
    means = x.new_empty(clips, heads, triton.cdiv(tokens, size), head_dim, dtype=torch.float32)
    _block_means[means.shape[2], clips * heads](
        x, means, tokens, heads, head_dim, size, _tile(size), _tile(head_dim), num_warps=2
    )
    return means


def best_blocks(scores_BNIJ: Tensor, share: float) -> Tensor:
    """Numbers of the best share of key blocks, rising, at least one; the earlier of equals. Returns [B, N, I, K]."""
    scores = scores_BNIJ.contiguous()
    blocks = scores.shape[-1]
    kept = kept_blocks(share, blocks)
    best = scores.new_empty(*scores.shape[:-1], kept, dtype=torch.int32)
    _best_blocks[(scores.numel() // blocks,)](scores, best, blocks, kept, max(_tile(blocks), 32), num_warps=1)
    return best


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block_q: int, block_k: int, launches: Launches
    ) -> Tensor:
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"queries, keys and values of one type, got {q.dtype}, {k.dtype} and {v.dtype}")
        q, k, v, chosen = q.contiguous(), k.contiguous(), v.contiguous(), chosen.to(torch.int32).contiguous()
        clips, heads, blocks, kept = chosen.shape
        out = torch.empty_like(q)
        log_sums = q.new_empty(clips, heads, q.shape[1], dtype=torch.float32)
        _forward[blocks, clips * heads](
            _tiles(q, block_q), _tiles(k, block_k), _tiles(v, block_k), chosen, out, log_sums, kept,
            *_sizes(q, k, block_q, block_k), **_launch(launches.forward, q),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, chosen, out, log_sums)
        ctx.options = block_q, block_k, launches
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, chosen, out, log_sums = ctx.saved_tensors
        block_q, block_k, launches = ctx.options
        grad_out = grad_out.contiguous()
        clips, heads, blocks, kept = chosen.shape
        key_blocks = triton.cdiv(k.shape[1], block_k)
        sizes = _sizes(q, k, block_q, block_k)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        deltas = torch.empty_like(log_sums)
        _deltas[blocks, clips * heads](out, grad_out, deltas, *sizes, num_warps=4)
        askers, counts = _askers(chosen, key_blocks)
        order = _longest_first(counts)

        def of_queries() -> None:
            _grad_q[blocks, clips * heads](
                q, _tiles(k, block_k), _tiles(v, block_k), chosen, log_sums, grad_out, deltas, grad_q, kept, *sizes,
                **_launch(launches.grad_q, q),
            )  # fmt: skip

        def of_keys() -> None:
            _grad_kv[key_blocks, clips * heads](
                _tiles(q, block_q), k, v, askers, counts, order, log_sums, _tiles(grad_out, block_q), deltas, grad_k,
                grad_v, blocks, *sizes, **_launch(launches.grad_kv, q),
            )  # fmt: skip

        _at_once(q, of_queries, of_keys)
        return grad_q, grad_k, grad_v, None, None, None, None


def _at_once(x: Tensor, first: Callable[[], None], second: Callable[[], None]) -> None:
    """Programs of the second fill what the first's last ones leave idle: those are few, and all as long."""
    if not x.is_cuda:
        first()
        second()
        return
    here, beside = torch.cuda.current_stream(x.device), torch.cuda.Stream(x.device, priority=-1)
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        first()
    second()
    here.wait_stream(beside)


def _askers(chosen_BNIK: Tensor, key_blocks: int) -> tuple[Tensor, Tensor]:
    """The query blocks that chose each key block, rising, [B, N, J, I], and how many they are, [B, N, J]; the rest of a
    row is not written.
    """
    clips, heads, blocks, kept = chosen_BNIK.shape
    askers = chosen_BNIK.new_empty(clips, heads, key_blocks, blocks)
    counts = chosen_BNIK.new_empty(clips, heads, key_blocks)
    tile = max(_tile(blocks), 32)
    many = max(1, 1024 // tile)  # 8 numbers a thread
    _find_askers[triton.cdiv(key_blocks, many), clips * heads](
        chosen_BNIK, askers, counts, blocks, key_blocks, kept, tile, many, 8, num_warps=4
    )
    return askers, counts


def _longest_first(counts_BNJ: Tensor) -> Tensor:
    """Key blocks of each head in the order in which they are begun, those with most askers first: a long one begun last
    would keep all waiting. [B, N, J].
    """
    order = torch.empty_like(counts_BNJ)
    clips, heads, key_blocks = order.shape
    tile = 64
    _rank[triton.cdiv(key_blocks, tile), clips * heads](counts_BNJ, order, key_blocks, tile, num_warps=4)
    return order


def _tiles(x: Tensor, block: int) -> TensorDescriptor | Tensor:
    """What `_rows` reads: a descriptor where the GPU can copy these blocks by itself, else the tensor.

    The interpreter can do all that a GPU can.
    """
    row = x.shape[3] * x.element_size()
    able = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0)
    aligned = x.data_ptr() % ALIGNED == 0 and row % ALIGNED == 0
    if able and aligned and row >= LEAST_ROW and block == _tile(block):
        return TensorDescriptor.from_tensor(x, [1, block, 1, _tile(x.shape[3])])
    return x


def _sizes(q: Tensor, k: Tensor, block_q: int, block_k: int) -> tuple[int, ...]:
    """What every attention kernel takes last."""
    (_, queries, heads, head_dim), keys = q.shape, k.shape[1]
    return queries, keys, heads, head_dim, block_q, block_k, _tile(block_q), _tile(block_k), _tile(head_dim)


def _tile(size: int) -> int:
    """The matrix units' least tile is 16."""
    return max(16, triton.next_power_of_2(size))


def _launch(launch: Launch, x: Tensor) -> dict[str, int]:
    """Wide numbers fill shared memory with one stage."""
    return launch._replace(num_stages=1)._asdict() if x.dtype == torch.float32 else launch._asdict()


@triton.jit
def _at(block, BLOCK: tl.constexpr, TILE: tl.constexpr, tokens):
    """Numbers of a block's tokens, and which of a tile's rows are any."""
    row = tl.arange(0, TILE)
    token = block * BLOCK + row
    return token, (row < BLOCK) & (token < tokens)


@triton.jit
def _pointers(x, token, inside, tokens, heads, HEAD: tl.constexpr, D: tl.constexpr):
    """Where these tokens of this program's head lie, [TILE, D], and which of the places are real."""
    clip, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    dim = tl.arange(0, D)
    origin = x + (clip.to(tl.int64) * tokens * heads + head) * HEAD
    return origin + token[:, None] * (heads * HEAD) + dim[None, :], inside[:, None] & (dim < HEAD)[None, :]


@triton.jit
def _load(x, token, inside, tokens, heads, HEAD: tl.constexpr, D: tl.constexpr):
    pointers, real = _pointers(x, token, inside, tokens, heads, HEAD, D)
    return tl.load(pointers, mask=real, other=0.0)


@triton.jit
def _rows(x, block, BLOCK: tl.constexpr, TILE: tl.constexpr, tokens, heads, HEAD: tl.constexpr, D: tl.constexpr):
    """A block of this program's head, [TILE, D]. Past it: zeros by descriptor, by pointers its last token again."""
    if isinstance(x, tl.tensor_descriptor):
        rows = x.load([tl.program_id(1) // heads, block * BLOCK, tl.program_id(1) % heads, 0]).reshape(TILE, D)
    else:
        token = tl.minimum(block * BLOCK + tl.minimum(tl.arange(0, TILE), BLOCK - 1), tokens - 1)
        rows = _load(x, token, token >= 0, tokens, heads, HEAD, D)
    return rows


@triton.jit
def _store(x, numbers, token, inside, tokens, heads, HEAD: tl.constexpr, D: tl.constexpr):
    pointers, real = _pointers(x, token, inside, tokens, heads, HEAD, D)
    tl.store(pointers, numbers.to(x.dtype.element_ty), mask=real)


@triton.jit
def _product(a, b, added=None):
    """Matrix product with float32 sums; float32 numbers are not shortened to TF32."""
    return tl.dot(a, b, added, input_precision="ieee")


@triton.jit
def _forward(
    q_tiles, k_tiles, v_tiles, chosen_ptr, out_ptr, log_sums_ptr, kept, queries, keys, heads, HEAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One block of queries; the sum of exponentials is kept relative to the highest score so far."""
    block, line = tl.program_id(0), tl.program_id(1)
    scale = LOG2_E / HEAD**0.5
    asking, is_query = _at(block, BLOCK_Q, TILE_Q, queries)
    q = _rows(q_tiles, block, BLOCK_Q, TILE_Q, queries, heads, HEAD, D)
    chosen_ptr += (line.to(tl.int64) * tl.num_programs(0) + block) * kept
    highest = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    read = tl.zeros([TILE_Q, D], tl.float32)
    for i in range(kept):
        answering = tl.load(chosen_ptr + i)
        _, is_key = _at(answering, BLOCK_K, TILE_K, keys)
        k = _rows(k_tiles, answering, BLOCK_K, TILE_K, keys, heads, HEAD, D)
        scores = tl.where(is_key[None, :], _product(q, tl.trans(k)), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrunk = tl.exp2(highest - higher)
        v = _rows(v_tiles, answering, BLOCK_K, TILE_K, keys, heads, HEAD, D)
        total = total * shrunk + tl.sum(weights, 1)
        read = _product(weights.to(v.dtype), v, read * shrunk[:, None])
        highest = higher
    _store(out_ptr, read / total[:, None], asking, is_query, queries, heads, HEAD, D)
    tl.store(log_sums_ptr + line.to(tl.int64) * queries + asking, highest + tl.log2(total), mask=is_query)


@triton.jit
def _deltas(
    out_ptr, grad_ptr, deltas_ptr, queries, keys, heads, HEAD: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One block of queries: each query's gradient along its own output."""
    block, line = tl.program_id(0), tl.program_id(1)
    asking, is_query = _at(block, BLOCK_Q, TILE_Q, queries)
    out = _rows(out_ptr, block, BLOCK_Q, TILE_Q, queries, heads, HEAD, D)
    grad = _rows(grad_ptr, block, BLOCK_Q, TILE_Q, queries, heads, HEAD, D)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(deltas_ptr + line.to(tl.int64) * queries + asking, delta, mask=is_query)


@triton.jit
def _grad_q(
    q_ptr, k_tiles, v_tiles, chosen_ptr, log_sums_ptr, grad_ptr, deltas_ptr, grad_q_ptr, kept, queries, keys, heads,
    HEAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """One block of queries."""
    block, line = tl.program_id(0), tl.program_id(1)
    scale = LOG2_E / HEAD**0.5
    asking, is_query = _at(block, BLOCK_Q, TILE_Q, queries)
    q = _rows(q_ptr, block, BLOCK_Q, TILE_Q, queries, heads, HEAD, D)
    grad = _rows(grad_ptr, block, BLOCK_Q, TILE_Q, queries, heads, HEAD, D)
    of_query = line.to(tl.int64) * queries + asking
    log_sum = tl.load(log_sums_ptr + of_query, mask=is_query, other=float("inf"))
    delta = tl.load(deltas_ptr + of_query, mask=is_query, other=0.0)
    chosen_ptr += (line.to(tl.int64) * tl.num_programs(0) + block) * kept
    grad_q = tl.zeros([TILE_Q, D], tl.float32)
    for i in range(kept):
        answering = tl.load(chosen_ptr + i)
        _, is_key = _at(answering, BLOCK_K, TILE_K, keys)
        k = _rows(k_tiles, answering, BLOCK_K, TILE_K, keys, heads, HEAD, D)
        scores = tl.where(is_key[None, :], _product(q, tl.trans(k)), float("-inf"))
        weights = tl.exp2(scores * scale - log_sum[:, None])
        v = _rows(v_tiles, answering, BLOCK_K, TILE_K, keys, heads, HEAD, D)
        grad_scores = weights * (_product(grad, tl.trans(v)) - delta[:, None])
        grad_q = _product(grad_scores.to(k.dtype), k, grad_q)
    _store(grad_q_ptr, grad_q / HEAD**0.5, asking, is_query, queries, heads, HEAD, D)


@triton.jit
def _grad_kv(
    q_tiles, k_ptr, v_ptr, askers_ptr, counts_ptr, order_ptr, log_sums_ptr, grad_tiles, deltas_ptr, grad_k_ptr,
    grad_v_ptr, blocks, queries, keys, heads, HEAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One block of keys, over the query blocks that chose it; tiles of scores lie on their side, [TILE_K, TILE_Q].

    No score is masked: what is beyond the keys makes rows of its own, which are not written, and queries that are none
    weigh nothing.
    """
    line = tl.program_id(1)
    first = line.to(tl.int64) * tl.num_programs(0)  # of this head's key blocks
    block = tl.load(order_ptr + first + tl.program_id(0))
    scale = LOG2_E / HEAD**0.5
    k = _rows(k_ptr, block, BLOCK_K, TILE_K, keys, heads, HEAD, D)
    v = _rows(v_ptr, block, BLOCK_K, TILE_K, keys, heads, HEAD, D)
    row = first + block
    askers_ptr += row * blocks
    grad_k = tl.zeros([TILE_K, D], tl.float32)
    grad_v = tl.zeros([TILE_K, D], tl.float32)
    for i in range(tl.load(counts_ptr + row)):
        asker = tl.load(askers_ptr + i)
        asking, is_query = _at(asker, BLOCK_Q, TILE_Q, queries)
        of_query = line.to(tl.int64) * queries + asking
        q = _rows(q_tiles, asker, BLOCK_Q, TILE_Q, queries, heads, HEAD, D)
        log_sum = tl.load(log_sums_ptr + of_query, mask=is_query, other=float("inf"))
        weights = tl.exp2(_product(k, tl.trans(q)) * scale - log_sum[None, :])
        grad = _rows(grad_tiles, asker, BLOCK_Q, TILE_Q, queries, heads, HEAD, D)
        delta = tl.load(deltas_ptr + of_query, mask=is_query, other=0.0)
        grad_v = _product(weights.to(grad.dtype), grad, grad_v)
        grad_scores = weights * (_product(v, tl.trans(grad)) - delta[None, :])
        grad_k = _product(grad_scores.to(q.dtype), q, grad_k)
    answering, is_key = _at(block, BLOCK_K, TILE_K, keys)
    _store(grad_k_ptr, grad_k / HEAD**0.5, answering, is_key, keys, heads, HEAD, D)
    _store(grad_v_ptr, grad_v, answering, is_key, keys, heads, HEAD, D)


@triton.jit
def _find_askers(
    chosen_ptr, askers_ptr, counts_ptr, blocks, key_blocks, kept, TILE: tl.constexpr, MANY: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """MANY blocks of keys, for which choices are read once: the query blocks that chose each, in order. AT_ONCE choices
    are on their way together.
    """
    line, asker = tl.program_id(1), tl.arange(0, TILE)
    key_block = tl.program_id(0) * MANY + tl.arange(0, MANY)
    chosen_ptr += (line.to(tl.int64) * blocks + asker) * kept
    end = tl.full([TILE], kept, tl.int32)
    asks = tl.zeros([TILE, MANY], tl.int32)
    for start in range(0, kept, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            chosen = tl.load(chosen_ptr + start + i, mask=(asker < blocks) & (start + i < end), other=-1)
            asks += (chosen[:, None] == key_block[None, :]).to(tl.int32)
    row = line.to(tl.int64) * key_blocks + key_block
    place = row[None, :] * blocks + tl.cumsum(asks, 0) - 1
    real = key_block < key_blocks
    tl.store(askers_ptr + place, tl.broadcast_to(asker[:, None], [TILE, MANY]), mask=(asks > 0) & real[None, :])
    tl.store(counts_ptr + row, tl.sum(asks, 0), mask=real)


@triton.jit
def _rank(counts_ptr, order_ptr, key_blocks, TILE: tl.constexpr):
    """TILE key blocks of a head find their places: before each are those with more askers, or as many and earlier."""
    row = tl.program_id(1).to(tl.int64) * key_blocks
    own = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = own < key_blocks
    count = tl.load(counts_ptr + row + own, mask=real, other=0)[:, None]
    place = tl.zeros([TILE], tl.int32)
    for start in range(0, key_blocks, TILE):
        other = start + tl.arange(0, TILE)
        others = tl.load(counts_ptr + row + other, mask=other < key_blocks, other=-1)[None, :]
        before = (others > count) | ((others == count) & (other[None, :] < own[:, None]))
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(order_ptr + row + place, own, mask=real)


@triton.jit
def _block_means(
    x_ptr, means_ptr, tokens, heads, HEAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr
):
    block, line = tl.program_id(0), tl.program_id(1)
    token, inside = _at(block, BLOCK, TILE, tokens)
    x = _load(x_ptr, token, inside, tokens, heads, HEAD, D).to(tl.float32)
    mean = tl.sum(x, 0) / tl.minimum(BLOCK, tokens - block * BLOCK)
    dim = tl.arange(0, D)
    tl.store(means_ptr + (line * tl.num_programs(0) + block) * HEAD + dim, mean, mask=dim < HEAD)


@triton.jit
def _best_blocks(scores_ptr, best_ptr, blocks, kept, TILE: tl.constexpr):
    """One row of scores: bit by bit the worst of the best is found, and the best are written as they come."""
    row = tl.program_id(0)
    block = tl.arange(0, TILE)
    real = block < blocks
    score = tl.load(scores_ptr + row * blocks + block, mask=real, other=0.0)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # both zeros are equal
    order = tl.where(real, bits ^ ((bits >> 31) & 0x7FFFFFFF), LEAST)  # whole numbers that rise as scores do
    worst = tl.where(tl.sum((order >= 0).to(tl.int32), 0) >= kept, 0, LEAST)
    for i in range(31):
        higher = worst + (1 << (30 - i))
        worst = tl.where(tl.sum((order >= higher).to(tl.int32), 0) >= kept, higher, worst)
    above, equal = order > worst, order == worst
    room = kept - tl.sum(above.to(tl.int32), 0)
    chosen = real & (above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room)))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(best_ptr + row * kept + place, block, mask=chosen)
