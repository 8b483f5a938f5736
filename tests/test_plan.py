"""Predicted memory, against what real streams hold and what their tensors come to."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import longtake
from longtake import plan as planning
from longtake.attention.dense import dense
from longtake.cli import main
from longtake.generation.recipe import Recipe
from longtake.generation.stream import Engine
from longtake.memory.fixed_view import FixedViews
from longtake.memory.stream_memory import StreamMemory
from longtake.models.light_codec import LightCodec
from longtake.models.wan import WanTransformer
from longtake.plan import GIB, META, Alive, in_words, plan, streamed, umt5_parameters, vram, ways_to_fit
from longtake.recipes import causvid, hybrid_forcing, longlive, memflow, rehyat, rolling_forcing, self_forcing_sink
from tests import tiny
from tests.scripts import BENCHMARKS, benchmark

SIZE = (48, 32)
TEXT_ROWS = 5
RECIPES = [self_forcing_sink(), hybrid_forcing(), rolling_forcing().with_levels(3), longlive(), memflow(), rehyat()]
by_name = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def on_meta(engine: Engine) -> tuple[WanTransformer, LightCodec]:
    """The same network and codec without numbers."""
    with META:
        network, codec = WanTransformer(engine.network.config), LightCodec(engine.codec.config)
    return network.requires_grad_(False), codec.requires_grad_(False)


def predicted(recipe: Recipe) -> planning.Working:
    with planning.Fused():
        return streamed(*on_meta(tiny.engine(recipe)), TEXT_ROWS, replace(recipe, near=dense), SIZE)


@by_name
def test_keys_and_far_states_are_those_of_a_real_stream(recipe: Recipe) -> None:
    engine = tiny.engine(recipe)
    kept = predicted(recipe).kept
    with engine.stream("any", seed=1) as stream:
        memory: StreamMemory = stream._batch._memory
        most = 0
        for _ in range(14):
            next(stream)
            most = max(most, memory.nbytes())
    assert kept["keys and values"] + kept["far state"] == most
    assert bool(kept["far state"]) == (recipe.name in ("hybrid_forcing", "rehyat"))
    assert kept["codec state"] == stream_state_bytes(engine)


def stream_state_bytes(engine: Engine) -> int:
    _, state = engine.codec.decode(torch.zeros(1, 6, *engine.latent_size))
    return state.nbytes


@by_name
def test_peaks_are_those_of_real_tensors(recipe: Recipe) -> None:
    """The same count over a stream that really runs, with the CPU's own fused attention."""
    engine = tiny.engine(recipe)
    real = streamed(engine.network, engine.codec, TEXT_ROWS, replace(recipe, near=dense), SIZE)
    assert predicted(recipe).peaks == pytest.approx(real.peaks, rel=0.03)


@pytest.mark.parametrize("name", ["hybrid_forcing", "rolling_forcing"])
def test_fixed_views_and_records_are_counted_as_they_are_kept(name: str) -> None:
    recipe = RECIPES[1] if name == "hybrid_forcing" else RECIPES[2]
    engine = tiny.engine(recipe)
    with planning.Fused():
        kept = streamed(*on_meta(engine), TEXT_ROWS, replace(recipe, near=dense), SIZE, compile=True).kept
        plain = streamed(*on_meta(engine), TEXT_ROWS, replace(recipe, near=dense), SIZE).kept
    views, answers = FixedViews(engine.network.memory_view), []
    engine.network.memory_view = views
    commit = engine.network.keys_to_commit
    engine.network.keys_to_commit = lambda *given: answers.append(commit(*given)) or answers[-1]
    with engine.stream("any", seed=1) as stream:
        for _ in range(engine.blocks_until_full):
            next(stream)
        prompt = sum(x.nbytes for layer in stream._batch._prompt_keys.layers for x in layer)
    given = sum(x.nbytes for layer in answers[-1] for x in layer)
    assert kept["fixed views"] == views.nbytes > plain["fixed views"] == 0
    assert kept["recorded passes"] > 2 * prompt + given > plain["recorded passes"] == 0
    assert {name: kept[name] for name in kept if name not in ("fixed views", "recorded passes")} == {
        name: plain[name] for name in plain if name not in ("fixed views", "recorded passes")
    }


def test_the_memory_of_records_is_that_of_the_call_that_takes_most() -> None:
    alive = Alive(META, [])
    records = planning.Records(alive)
    view = planning.FixedView.__new__(planning.FixedView)

    def doubled(view: object, x: torch.Tensor) -> torch.Tensor:
        return ((x + 1) + 1)[:1] + 1  # two of its size at once

    with alive:
        small, large = (torch.zeros(n, device=META) for n in (100, 1000))
        for x in (small, large, small):
            records.around("doubled", doubled)(view, x)
    assert records.nbytes == 4 * (100 + 1 + 1000 + 1) + 4 * (2 * 1000 - 1)
    assert alive.now == 4 * (100 + 1000) + records.nbytes


def test_a_second_clip_passes_beside_what_the_first_recorded() -> None:
    """Causvid's next clip fills its memory anew, by plain passes up to a block less than all of it."""

    def clips(past: int, compile: bool) -> planning.Working:
        recipe = causvid(past)
        with planning.Fused():
            return streamed(
                *on_meta(tiny.engine(recipe)), TEXT_ROWS, replace(recipe, near=dense), SIZE, compile=compile
            )

    plain, whole = clips(9, compile=False), clips(12, compile=True)
    recorded = whole.kept["fixed views"] + whole.kept["recorded passes"]
    assert whole.peaks["network pass"] >= plain.peaks["network pass"] + recorded


@pytest.mark.parametrize(
    "file",
    [
        "2026-11-22-every-row/hybrid_none.json",
        "2026-11-22-own-kernels/minute/infinity_rope.json",
    ],
)
def test_peaks_are_near_those_recorded_on_a_gpu(file: str) -> None:
    """Those that a prediction without the view after recorded passes is furthest from; all are in docs/checkpoints.md,
    by benchmarks/planned.py."""
    planned = benchmark("planned")
    how, peak = planned.recorded(BENCHMARKS / "results" / file)
    assert planned.predicted(how) == pytest.approx(peak, rel=planned.WITHIN / 2)


def test_a_light_decoder_takes_less() -> None:
    asked = {"recipe": "causvid:past=3", "size": (32, 32)}
    own, light = (plan("wan2.1-1.3b", **asked, decoder=name)["moments"]["decoding"] for name in (None, "light"))
    assert own["codec"] > light["codec"] and own["codec state"] > light["codec state"]
    with pytest.raises(ValueError, match="has its own"):
        plan("toy", decoder="light")


def test_the_count_sees_what_is_alive_at_once() -> None:
    known = torch.zeros(1000)
    alive = Alive(torch.device("cpu"), [known])
    with alive, alive.moment("two"):
        one = known + 1
        two = one.view(10, 100) * 2
        del one
        two = two[0] + known[:100]
        assert alive.now == 4 * 100
    assert alive.peaks == {"two": 4 * 2000} and two.numel() == 100
    assert alive.largest["two"] == [("[1000] float32", 1, 4000), ("[10, 100] float32", 1, 4000)]


def test_parameters_are_those_of_the_networks() -> None:
    told = plan("toy", size=(32, 32), recipe="self_forcing_sink", dtype="float32")
    engine = planning_engine()
    assert told["moments"]["first prompt"] == {
        "text encoder": planning.nbytes(engine.text.encoder),
        "network": planning.nbytes(engine.network),
        "codec": planning.nbytes(engine.codec),
    }


def planning_engine() -> Engine:
    from longtake.recipes import load

    return load("toy", recipe="self_forcing_sink", device="cpu", dtype=torch.float32)


def test_the_text_encoder_has_as_many_parameters_as_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = planning.UMT5_XXL
    config = transformers.UMT5Config(
        vocab_size=sizes["words"], d_model=sizes["dim"], d_kv=sizes["inner"] // sizes["heads"], d_ff=sizes["ffn"],
        num_layers=sizes["layers"], num_heads=sizes["heads"], relative_attention_num_buckets=sizes["buckets"],
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with META:
        assert umt5_parameters() == sum(p.numel() for p in transformers.UMT5EncoderModel(config).parameters())


def test_sizes_of_memory() -> None:
    assert [vram(text) for text in ("24G", "1.5GiB", "512 m")] == [24 * GIB, 3 * GIB // 2, 2**29]
    for text in ("", "24", "0G", "-1G", "24T"):
        with pytest.raises(ValueError, match="a number with G or M"):
            vram(text)


def test_what_does_not_fit_is_told_with_ways_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--size", "64x64", "--recipe", "infinity_rope", "--dtype", "float32"]
    assert main([*arguments, "--vram", "1G"]) == 0
    assert "\npeak " in capsys.readouterr().out
    assert main([*arguments, "--vram", "45M", "--json"]) == 2
    said = capsys.readouterr()
    begun, *tried, found = said.err.splitlines()
    assert begun.startswith("longtake: a stream is run") and found.startswith("longtake: this does not fit 45M: it tak")
    assert tried[0] == "longtake: trying --dtype bfloat16"
    told = json.loads(said.out)
    ways = told["ways_to_fit"]
    assert all(peak < told["peak"] for peak in ways.values())
    assert ways["--dtype bfloat16"] < 45 * 2**20 < ways["--size 48x48"]
    assert "--dtype bfloat16" in in_words(told) and ", fits" in in_words(told)


def test_a_smaller_window_and_a_smaller_model_are_ways_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "plan", lambda **asked: {"peak": str(asked)})
    told = {
        "model": "krea-realtime-14b",
        "recipe": "self_forcing:block=3,past=18",
        "size": [832, 480],
        "dtype": "bfloat16",
    }
    told |= {"decoder": None, "compile": False}
    assert list(ways_to_fit(told)) == [
        "--size 624x352", "--size 416x240", "--recipe self_forcing:past=3,block=3", "--model wan2.1-1.3b",
        "--decoder light",
    ]  # fmt: skip


def test_memory_is_near_what_another_implementation_was_measured_at() -> None:
    """Self Forcing's own code on an H200, 832x480, bfloat16, 9 latent frames: 7.5 GiB without text and codec."""
    told = plan("wan2.1-1.3b", recipe="self_forcing")
    parts = told["moments"]["network pass"]
    assert sum(parts.values()) - parts["codec"] - parts["codec state"] == pytest.approx(7.5 * GIB, rel=0.25)
    assert parts["keys and values"] == 2 * 30 * 6 * 1560 * 1536 * 2  # keys and values, layers, frames, tokens, width


@pytest.mark.parametrize("recipe", ["self_forcing_sink", "reward_forcing"])
def test_takes_are_as_large_as_they_are_counted(recipe: str, tmp_path: Path) -> None:
    counted = planning.take_sizes("toy", recipe, dtype="float32")
    engine = longtake.load("toy", recipe=recipe, levels=1, device="cpu", dtype=torch.float32)
    with engine.stream("a red ball bounces over green hills") as stream:
        for _ in range(4):
            next(stream)
        take = longtake.Take.of(stream)
    take.save(tmp_path / "one.take")
    assert take.info()["bytes"] == counted
    assert 0 < (tmp_path / "one.take").stat().st_size - sum(counted.values()) < 20_000, "names and numbers come on top"


def test_sizes_of_takes_are_a_table(capsys) -> None:
    assert main(["take", "sizes", "--model", "toy", "--recipe", "rolling_forcing", "rehyat", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    lines = planning.takes_in_words(counted).splitlines()
    heads, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    rolling, rehyat = (dict(zip(heads, row, strict=True)) for row in rows)
    assert (rolling["recipe"], rehyat["recipe"]) == ("`rolling_forcing`", "`rehyat`")
    assert float(rolling["in flight"]) > 0 and rehyat["in flight"] == "" and float(rehyat["far"]) > 0
    assert [row["MB"] for row in (rolling, rehyat)] == [f"{sum(one['bytes'].values()) / 1e6:,.1f}" for one in counted]
    assert main(["take", "sizes", "--model", "toys"]) == 2
    assert "did you mean toy" in capsys.readouterr().err
