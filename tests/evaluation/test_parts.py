"""Parts of a block: time adds up, and work is that of torch's own counter, of formulas, and of what was published."""

import math
from dataclasses import replace
from itertools import count, islice

import pytest
import torch
from tests import tiny
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longtake import parallel
from longtake.evaluation.parts import PASS, Counting, Marks, Work, _difference, marked, seconds_by_part, work_by_part
from longtake.generation.recipe import Recipe
from longtake.generation.stream import Engine
from longtake.memory.far import FarState
from longtake.memory.fixed_view import FixedViews
from longtake.models.checkpoints import WAN_1_3B
from longtake.models.fp8 import into_eight_bits
from longtake.models.known_levels import KnownLevels
from longtake.models.standins import RandomText
from longtake.models.wan import WanTransformer
from longtake.models.wan_vae import WanVAE, WanVAEConfig
from longtake.plan import bytes_of_stream
from longtake.recipes import hybrid_forcing, longlive, rehyat, rolling_forcing, self_forcing_sink
from longtake.recipes.wan_engines import reading

PASSES = [f"{PASS} {number}" for number in range(1, 5)]


def test_a_part_has_no_time_of_those_inside_it() -> None:
    now = iter([0.0, 1.0, 3.0, 4.0, 8.0, 10.0])  # outer, inner, inner's end, inner, its end, outer's end
    marks = Marks(lambda: next(now))
    inner = marks.around("inner", lambda: None)
    marks.around("outer", lambda: (inner(), inner()))()
    between = marks.take(lambda begun, ended: [ended - begun])
    assert between == {"outer": [10.0 - 2.0 - 4.0], "inner": [6.0]}
    assert marks.take(lambda begun, ended: [ended - begun]) == {}


def test_passes_are_numbered_anew_for_each_block() -> None:
    ticks = count()
    marks = Marks(lambda: next(ticks))
    run = marks.around(PASS, lambda: None)
    for _ in range(2):
        run(), run()
        assert marks.take(lambda begun, ended: [ended - begun]) == {f"{PASS} 1": [1], f"{PASS} 2": [1]}


def test_calls_that_cannot_be_marked_are_left_out() -> None:
    marks = Marks(lambda: None)
    assert marks.around("part", lambda x: x + 1)(1) == 2
    assert marks.take(lambda begun, ended: [1.0]) == {}


def test_nothing_stays_marked() -> None:
    engine = tiny.engine()
    before = engine.network.forward, FarState.absorb, type(engine.codec).decode
    with pytest.raises(KeyError), marked(engine, Marks(lambda: 0.0)):
        assert engine.network.forward != before[0]
        raise KeyError
    assert (engine.network.forward, FarState.absorb, type(engine.codec).decode) == before
    assert "forward" not in vars(engine.network)
    assert "decode" not in vars(type(engine.codec))  # as it was: from the class above


@pytest.mark.parametrize(
    "recipe, parts",
    [
        (self_forcing_sink(), [*PASSES, "commit", "memory", "decode"]),
        (hybrid_forcing(), [*PASSES, "commit", "memory", "far state", "decode"]),
        (rehyat(), [*PASSES, "commit", "memory", "far state", "decode"]),
        (tiny.rolling_recipe(), [PASSES[0], "commit", "memory", "decode"]),
    ],
    ids=lambda it: it.name if isinstance(it, Recipe) else "",
)
def test_a_recipe_has_the_parts_that_it_is_made_of(recipe: Recipe, parts: list[str]) -> None:
    engine = tiny.engine(recipe)
    full = recipe.memory(engine.network).blocks_until_full(recipe.block)
    with engine.stream("any") as stream:
        for _ in islice(stream, full):
            pass
        seconds = seconds_by_part(engine, stream, 2)
    assert set(seconds) == {*parts, "copy to host", "other"}
    assert all(spent > 0 for name, spent in seconds.items() if name in parts)
    assert set(work_by_part(engine, "any")) == set(parts)


def test_passes_that_are_put_around_a_network_are_told_and_counted_as_its_own() -> None:
    """As for a GPU: what is recorded, and views at fixed addresses, can be neither copied nor without numbers."""
    wan_triton = pytest.importorskip("longtake.models.wan_triton")
    plain, engine = (tiny.engine(hybrid_forcing()) for _ in range(2))
    made = engine.network
    views, record = FixedViews(made.memory_view), parallel.Recorded(made.velocity_at)
    record._records["a graph"] = (_ for _ in ())  # type: ignore[assignment]
    made.memory_view, made.embed_levels, made.velocity_at = views, KnownLevels(made), record
    parallel.record_calls([made], ["keys_at"])
    with engine.stream("any") as stream:
        for _ in islice(stream, 8):
            pass
        seconds = seconds_by_part(engine, stream, 2)
    assert all(seconds[name] > 0 for name in (*PASSES, "commit", "memory", "decode"))
    assert made.velocity_at is record and made.memory_view is views
    wan_triton.fuse_layers(made)
    engine = replace(engine, recipe=replace(engine.recipe, far=wan_triton.FusedFar.of(engine.recipe.far)))
    assert work_by_part(engine, "any") == work_by_part(plain, "any")
    assert bytes_of_stream(engine) == bytes_of_stream(plain)


def counted_by_torch(engine: Engine) -> float:
    """Operations of a whole block of a real stream, by torch's counter, which sees attention when it is plain."""
    full = engine.blocks_until_full
    with engine.stream("any") as stream, sdpa_kernel(SDPBackend.MATH):
        for _ in islice(stream, full):
            pass
        with FlopCounterMode(display=False) as counter:
            next(stream)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "recipe", [self_forcing_sink(), hybrid_forcing(share=1), longlive(), tiny.rolling_recipe(), rehyat()],
    ids=lambda recipe: recipe.name,
)  # fmt: skip
def test_operations_are_those_that_torch_counts(recipe: Recipe) -> None:
    engine = tiny.engine(recipe)
    assert sum(part.operations for part in work_by_part(engine, "any").values()) == counted_by_torch(engine)


def test_bytes_are_those_of_what_an_operation_reads_and_writes() -> None:
    x = torch.zeros(10, 100)
    with Counting() as counting:
        x.view(100, 10)[:50].t()
        torch.empty(1000)
        assert counting.so_far().bytes == 0, "views and room for numbers move nothing"
        x + 1
        assert counting.so_far() == Work(0, 2 * x.nbytes)
        x.add_(x)
        assert counting.so_far().bytes >= 4 * x.nbytes
    assert _difference(Work(1, 2), Work(4, 8, 2)) == [3, 6, 2]


def meta_engine(recipe: Recipe, layers: int, decoder: WanVAEConfig) -> Engine:
    """Wan's 1.3B network at 832x480 but for the number of its layers, without numbers."""
    meta = torch.device("meta")
    with meta:
        parts: list[nn.Module] = [WanTransformer(reading(replace(WAN_1_3B, layers=layers), recipe)), WanVAE(decoder)]
    network, codec = (part.requires_grad_(False).to(meta).bfloat16() for part in parts)
    return Engine(
        model_name="wan2.1-1.3b", recipe=recipe, text=RandomText(512, 4096, meta), network=network, codec=codec,
        latent_size=(16, 60, 104), frame_rate=16, shift=5.0,
    )  # fmt: skip


E_, FFN, TOKENS, BLOCK = 1536, 8960, 1560, 4680  # of the published network; tokens of a latent frame and of a block
HEAD = 2 * BLOCK * 64 * E_ * 2 + 2 * 3 * (256 * E_ + 7 * E_ * E_)  # patches in and out; the levels of three frames


def layer_linears() -> float:
    """Of a layer: q, k, v, o, those of the prompt's queries and answers, and the feed-forward part."""
    return 2 * BLOCK * (6 * E_ * E_ + 2 * E_ * FFN)


def attention(queries: int, keys: float) -> float:
    return 4 * queries * keys * E_


def test_a_pass_of_the_published_network_is_what_formulas_and_the_baseline_say() -> None:
    """The baseline counts 58.52 TFLOP of linears in 5 passes of 30 layers, and 60.56 of attention to 9 frames."""
    work = work_by_part(meta_engine(self_forcing_sink(), 2, WanVAEConfig(dim=4)), "any")
    layer = layer_linears() + attention(BLOCK, 9 * TOKENS) + attention(BLOCK, 512)
    assert work[PASSES[0]].operations == work[PASSES[3]].operations == 2 * layer + HEAD
    assert 150 * layer_linears() == pytest.approx(58.52e12, rel=1e-3)
    assert 5 * 30 * attention(BLOCK, 9 * TOKENS) == pytest.approx(60.56e12, rel=1e-3)
    commit = layer + HEAD - 2 * BLOCK * 64 * E_ + 2 * BLOCK * 3 * E_ * E_  # the last layer makes no more than its keys
    assert work["commit"].operations == commit


def test_a_sparse_window_counts_as_its_chosen_blocks() -> None:
    """Published: a fifth of 220 blocks of 64 keys; what is far is read and added to beside them."""
    whole, fifth = (
        work_by_part(meta_engine(hybrid_forcing(share=share, tokens=64), 1, WanVAEConfig(dim=4)), "any")
        for share in (1.0, 0.2)
    )
    spared = attention(BLOCK, 9 * TOKENS) - attention(BLOCK, 44 * 64)
    assert whole[PASSES[0]].operations - fifth[PASSES[0]].operations == spared
    assert whole["far state"] == fifth["far state"]


def test_what_is_far_is_read_in_recorded_passes() -> None:
    """Their time has the reading in it, so their work has, and nothing of the whole is lost."""
    apart, recorded = (
        work_by_part(replace(tiny.engine(hybrid_forcing()), fused=fused), "any") for fused in (False, True)
    )
    read = {name: recorded[name].operations - apart[name].operations for name in [*PASSES, "commit"]}
    assert all(more > 0 for more in read.values())
    assert apart["far state"].operations - recorded["far state"].operations == sum(read.values())
    assert recorded["far state"].operations > 0, "what is absorbed stays"


def test_products_of_eight_bits_are_told_from_others() -> None:
    plain, eight = tiny.engine(), tiny.engine()
    into_eight_bits(eight.network)
    of_plain, of_eight = (work_by_part(one, "any") for one in (plain, eight))
    config, tokens = eight.network.config, math.prod(tiny.LATENTS[2:]) // 4 * tiny.BLOCK
    linear = 2 * tokens * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim) * config.layers
    assert [of_eight[name].eight_bit for name in PASSES] == [linear] * len(PASSES)
    assert 0 < of_eight["commit"].eight_bit < linear and of_eight["decode"].eight_bit == 0
    assert {name: work._replace(eight_bit=0) for name, work in of_eight.items()} == of_plain


def test_the_published_decoder_is_what_the_baseline_counts() -> None:
    work = work_by_part(meta_engine(rolling_forcing(), 1, WanVAEConfig()), "any")
    assert work["decode"].operations == pytest.approx(40.65e12, rel=1e-3)
