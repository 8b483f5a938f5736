"""The kernels equal the definition: compiled where there is a GPU, interpreted elsewhere."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it comes with longtake[dev] on Linux)")

from tests.attention.test_attention import assert_alike, value_and_grads
from tests.attention.test_block_sparse import Case, case
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from longtake.attention import block_sparse, reference
from longtake.attention import block_sparse_triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made(*sizes: int, **more: int) -> Case:
    it = case(*sizes, **more)
    return it._replace(q=it.q.to(DEVICE), k=it.k.to(DEVICE), v=it.v.to(DEVICE))


# Queries, keys, blocks of both; heads and their size. Blocks of 64 and of other sizes, whole and short last ones, one
# block alone, heads that are no power of two.
SHAPES = pytest.mark.parametrize(
    "it",
    [
        made(128, 256, 64, 64, batch=1, heads=1, head_dim=128),
        made(70, 200, 64, 64, head_dim=64),
        made(33, 100, 16, 8, batch=1, heads=3, head_dim=20),
        made(40, 61, 8, 32, head_dim=16),
        made(30, 50, 12, 7, batch=1, head_dim=16),
        made(18, 37, 4, 4, heads=3, head_dim=32),
        made(1, 1, 16, 16, head_dim=16),
    ],
    ids=lambda it: f"{it.q.shape[1]}x{it.k.shape[1]}x{it.q.shape[-1]}",
)


@SHAPES
@pytest.mark.parametrize("share", [0.01, 0.4, 1.0])
def test_reading_the_chosen_equals_its_definition_with_gradients(it: Case, share: float) -> None:
    chosen = it.chosen(share)
    assert_alike(
        lambda q, k, v: kernels.attend_blocks(q, k, v, chosen, **it.blocks),
        lambda q, k, v: reference.attend_blocks(q, k, v, chosen, **it.blocks),
        [*it[:3]],
    )


@pytest.mark.parametrize("it", [made(70, 200, 64, 64, head_dim=64), made(33, 100, 16, 16, batch=1, head_dim=72)])
def test_gpus_that_copy_no_tiles_by_themselves_answer_alike(it: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: how numbers come changes none of them."""
    chosen = it.chosen(0.4)

    def answers() -> list[Tensor]:
        return value_and_grads(lambda *qkv: kernels.attend_blocks(*qkv, chosen, **it.blocks), [*it[:3]])

    copied = answers()
    monkeypatch.setattr(kernels, "_tiles", lambda x, block: x)
    for got, want in zip(answers(), copied, strict=True):
        torch.testing.assert_close(got, want, atol=0, rtol=0)


def test_tiles_are_copied_where_they_are_whole_and_aligned_and_wide() -> None:
    x = torch.zeros(1, 64, 2, 136, dtype=torch.float16, device=DEVICE)
    hopper = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    assert isinstance(kernels._tiles(x, 16), TensorDescriptor) == hopper
    assert kernels._tiles(x, 12) is x
    for other in (x[..., :132].contiguous(), x.flatten()[1:273].view(1, 1, 2, 136), x[..., :120].contiguous()):
        assert kernels._tiles(other, 16) is other


@pytest.mark.parametrize("keys", [4680, 9360, 14040])  # of the first, the second and later blocks at 480p
def test_a_published_window_equals_its_definition_with_gradients(keys: int) -> None:
    it = made(72, keys, 64, 64, batch=1, heads=1, head_dim=16)
    chosen = it.chosen(0.2)
    assert_alike(
        lambda q, k, v: kernels.attend_blocks(q, k, v, chosen, **it.blocks),
        lambda q, k, v: reference.attend_blocks(q, k, v, chosen, **it.blocks),
        [*it[:3]],
    )


BFLOAT16 = pytest.param(
    torch.bfloat16, 3e-2, marks=pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter multiplies no bfloat16")
)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), BFLOAT16])
@pytest.mark.parametrize(
    "head_dim, block", [(128, 64), (128, 16), (64, 64), (24, 16)]
)  # of heads of 128 tiles are copied
def test_half_precision_is_summed_in_float32(
    dtype: torch.dtype, tolerance: float, head_dim: int, block: int
) -> None:  # fmt: skip
    """Against the definition in float32 of the same rounded numbers. Blocks of 64 take other products of a GPU."""
    it = made(90, 190, block, block, heads=3, head_dim=head_dim)
    rounded, chosen = [x.to(dtype) for x in it[:3]], it.chosen(0.5)
    fast = value_and_grads(lambda *qkv: kernels.attend_blocks(*qkv, chosen, **it.blocks), rounded)
    slow = value_and_grads(
        lambda *qkv: reference.attend_blocks(*qkv, chosen, **it.blocks), [x.float() for x in rounded]
    )
    for got, want in zip(fast, slow, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero_neither_overflow_nor_vanish(sign: int) -> None:
    """Hundreds, where float32 holds four digits behind the point."""
    it = made(20, 50, 16, 16, head_dim=16)
    qkv, chosen = [sign * it.q.abs(), 100 + it.k, it.v], it.chosen(0.5)
    fast = value_and_grads(lambda *qkv: kernels.attend_blocks(*qkv, chosen, **it.blocks), qkv)
    slow = value_and_grads(lambda *qkv: reference.attend_blocks(*qkv, chosen, **it.blocks), [x.double() for x in qkv])
    for got, want in zip(fast, slow, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-3, rtol=1e-3)


def test_views_are_read_as_what_they_show() -> None:
    """Queries, keys and values cut from one tensor, and a gradient that is the same everywhere."""
    packed = made(40, 40, 16, 16, head_dim=48).q
    qkv = packed.unflatten(-1, (3, 16)).unbind(-2)
    blocks = {"block_q": 16, "block_k": 16}
    chosen = reference.best_blocks(reference.block_scores(*qkv[:2], **blocks), 0.7)
    for read in (kernels, reference):
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = read.attend_blocks(*leaves, chosen, **blocks)
        grads = torch.autograd.grad(out.sum(), leaves)
        if read is kernels:
            fast = (out, *grads)
    for got, want in zip(fast, (out, *grads), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@SHAPES
def test_means_of_blocks_equal_their_definition(it: Case) -> None:
    q_means, k_means = (kernels.block_means(x, size) for x, size in zip(it[:2], it.blocks.values(), strict=True))
    torch.testing.assert_close(
        q_means @ k_means.mT, reference.block_scores(it.q, it.k, **it.blocks), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("blocks", [1, 5, 32, 70])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_the_same_blocks_are_best_ties_included(blocks: int, share: float) -> None:
    scores = torch.randint(-3, 4, (2, 2, 3, blocks), generator=torch.Generator().manual_seed(blocks)).float().to(DEVICE)
    best = kernels.best_blocks(scores, share)
    assert best.long().equal(reference.best_blocks(scores, share))


def test_scores_of_any_size_and_sign_are_ranked() -> None:
    scores = torch.randn(1, 1, 50, 220, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    scores *= 10.0 ** torch.arange(-25, 25, device=DEVICE)[:, None]
    scores[..., ::7] = -0.0
    scores[..., 3::7] = 0.0
    scores[:, :, ::2, 5] = float("-inf")
    for share in (0.2, 0.999):
        assert kernels.best_blocks(scores, share).long().equal(reference.best_blocks(scores, share))


@pytest.mark.parametrize("centre_heads", [False, True])
def test_models_reach_the_kernels_by_the_same_call(monkeypatch: pytest.MonkeyPatch, centre_heads: bool) -> None:
    it = made(33, 60, 16, 8, heads=3, head_dim=16)
    monkeypatch.setattr(block_sparse, "_kernels", lambda x: kernels)
    scores = reference.block_scores(it.q, it.k, centre_heads=centre_heads, **it.blocks)
    chosen = reference.best_blocks(scores, 0.3)
    assert_alike(
        lambda *qkv: block_sparse.block_sparse(*qkv, share=0.3, centre_heads=centre_heads, **it.blocks),
        lambda *qkv: reference.attend_blocks(*qkv, chosen, **it.blocks),
        [*it[:3]],
    )


def test_mixed_types_are_refused() -> None:
    it = made(20, 50, 16, 16)
    with pytest.raises(ValueError, match="bfloat16"):
        kernels.attend_blocks(it.q, it.k.bfloat16(), it.v, it.chosen(0.5), **it.blocks)
