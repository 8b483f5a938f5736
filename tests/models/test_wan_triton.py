"""A network by the fused kernels answers as its definition does: compiled on a GPU, interpreted elsewhere."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, distributed

pytest.importorskip("triton", reason="triton is not installed (it comes with longtake[dev] on Linux)")

from tests import tiny

from longtake.attention.fused_triton import rotate
from longtake.memory.fixed_view import FixedView, FixedViews
from longtake.memory.stream_memory import StreamMemory
from longtake.models.features import Conversion
from longtake.models.split import split_tokens
from longtake.models.wan import WanTransformer, converted
from longtake.models.wan_triton import FusedFar, add_far, fuse_clips, fuse_layers
from longtake.recipes import hybrid_forcing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fused(made: WanTransformer) -> WanTransformer:
    twin = copy.deepcopy(made)
    fuse_layers(twin)
    return twin


def assert_near(got: Tensor, want: Tensor, share: float) -> None:
    assert got.dtype == want.dtype
    assert (got - want).norm() <= share * want.norm()


@pytest.mark.parametrize("dtype, share, prompts", [(torch.float32, 1e-5, 2), (torch.bfloat16, 2e-2, 1)])
@torch.no_grad()
def test_passes_equal_their_definition(dtype: torch.dtype, share: float, prompts: int) -> None:
    """Two clips with a level, and maybe a prompt, for each frame, before a memory that holds something.

    share: how far the answer may be, beside its own size; of bfloat16, about as far as it is from float32.
    """
    plain = tiny.network().to(DEVICE, dtype)
    old, noisy = torch.randn(2, 2, *tiny.LATENTS, device=DEVICE)
    level, memory = torch.rand(2, tiny.BLOCK, device=DEVICE), tiny.memory(plain)
    prompt_BF = None if prompts == 1 else torch.tensor([[0, 0, 1], [1, 0, 1]], device=DEVICE)
    said = plain.prompt_keys(tiny.text(batch=2, prompts=prompts).to(DEVICE, dtype))
    rest = said, plain.memory_view(memory, old), prompt_BF
    memory.commit(plain.keys_to_commit(old, level, *rest), tiny.BLOCK)
    rest = said, plain.memory_view(memory, noisy), prompt_BF
    quick = fused(plain)
    assert_near(quick(noisy, level, *rest), plain(noisy, level, *rest), share)
    keys = zip(quick.keys_to_commit(noisy, level, *rest), plain.keys_to_commit(noisy, level, *rest), strict=True)
    for ours, theirs in keys:
        assert_near(ours[0], theirs[0], share)
        assert_near(ours[1], theirs[1], share)


@torch.no_grad()
def test_a_pass_that_is_shared_out_equals_its_definition() -> None:
    """By one process; how many share it out is tested in plain torch."""
    plain, noisy = tiny.network().to(DEVICE, torch.float32), torch.randn(2, *tiny.LATENTS, device=DEVICE)
    said = plain.prompt_keys(tiny.text(batch=2).to(DEVICE, torch.float32))
    given = noisy, torch.rand(2, tiny.BLOCK, device=DEVICE), said, plain.clip_view(noisy)
    quick = fused(plain)
    distributed.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo", store=distributed.HashStore(), rank=0, world_size=1
    )
    try:
        split_tokens(quick, rotate)
        made, keys = quick(*given), quick.keys_to_commit(*given)
    finally:
        distributed.destroy_process_group()
    assert_near(made, plain(*given), 1e-5)
    for ours, theirs in zip(keys, plain.keys_to_commit(*given), strict=True):
        assert_near(ours[0], theirs[0], 1e-5)
        assert_near(ours[1], theirs[1], 1e-5)


def test_with_gradients_a_pass_is_that_of_the_definition() -> None:
    plain, noisy = tiny.network().to(DEVICE), torch.ones(1, *tiny.LATENTS, dtype=torch.float64, device=DEVICE)

    def gradients(network: WanTransformer) -> list[Tensor]:
        said = network.prompt_keys(tiny.text().to(DEVICE))
        made = network(noisy, torch.full((1, tiny.BLOCK), 0.5, device=DEVICE), said, network.clip_view(noisy))
        made.square().sum().backward()
        return [x.grad for x in network.parameters() if x.grad is not None]

    ours, theirs = gradients(fused(plain)), gradients(plain)
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("far", ["keep", "decay", "cap", "delta", "none"])
@torch.no_grad()
def test_what_is_far_is_added_as_its_definition_says(far: str, maps: bool) -> None:
    """By a kernel or not, by the rule: "delta" makes and reads its sums in another way; maps come before either."""
    recipe = hybrid_forcing(far=far, frames=4.0 if far in ("decay", "cap") else math.inf)
    quick = replace(recipe, far=recipe.far and FusedFar.of(recipe.far))
    assert isinstance(quick.far, FusedFar) == (far in ("keep", "decay", "cap"))
    made = tiny.network(reads_far=True)
    made = (tiny.with_drawn_maps(made) if maps else made).float().to(DEVICE)
    for projection in made.projections:
        torch.nn.init.normal_(projection.weight)
    plain, fast = (StreamMemory(one.memory(made), made.config.layers, ring=True) for one in (recipe, quick))
    said, level = made.prompt_keys(tiny.text().float().to(DEVICE)), torch.ones(1, tiny.BLOCK, device=DEVICE)
    for block in torch.randn(4, 1, *tiny.LATENTS, device=DEVICE):
        keys = made.keys_to_commit(block, level, said, made.memory_view(plain, block))
        for memory in (plain, fast):
            memory.commit(keys, tiny.BLOCK, made.grid(block))
    view = FixedViews(partial(made.memory_view, rotate=rotate), add_far)(fast, block)
    assert isinstance(view, FixedView) and bool(view._far) == (far != "none")
    assert_near(made(block, level, said, view), made(block, level, said, made.memory_view(plain, block)), 1e-5)


@pytest.mark.parametrize("turns", [False, True])
def test_converted_layers_of_a_whole_clip_equal_their_definition(turns: bool) -> None:
    """Seven frames of two clips, the last chunk short; with gradients they are the definition."""
    conversion = Conversion(layers=(0, 2), current=3, overlap=1, turns_with_frames=turns)
    plain = converted(tiny.network(), conversion).to(DEVICE, torch.float32)
    noisy, level = torch.randn(2, 7, *tiny.LATENTS[1:], device=DEVICE), torch.rand(2, 7, device=DEVICE)
    quick = copy.deepcopy(plain)
    fuse_clips(quick)

    def made(network: WanTransformer) -> Tensor:
        said = network.prompt_keys(tiny.text(batch=2).to(DEVICE, torch.float32))
        return network(noisy, level, said, network.clip_view(noisy))

    with torch.no_grad():
        assert_near(made(quick), made(plain), 1e-5)
    torch.testing.assert_close(made(quick), made(plain), atol=0, rtol=0)
    made(quick).sum().backward()
    assert quick.features[0].keys.hidden_weight.grad is not None
