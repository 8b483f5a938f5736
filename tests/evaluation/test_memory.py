"""The memory analysis as a whole: over a tiny network, through the command line, and as a picture."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import tiny

from longtake.attention.rope import Grid, RotaryAxes
from longtake.cli import main
from longtake.evaluation import memory, memory_plot
from longtake.evaluation.growth import changed_block, error_growth
from longtake.evaluation.memory import evaluate_memory, far_rules
from longtake.evaluation.retention import Block, Recorded, Setting, retention, states
from longtake.generation.stream import Engine, to_uint8
from longtake.memory.far import Decay, Delta, FarShape, FarState, Keep, MassCap
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.memory.view import Tokens
from longtake.memory.window import WindowShape
from longtake.recipes import reward_forcing

HOURS = 0.02  # 96 blocks of 12 pictures
SMALL = {"hours": HOURS, "prompts": 2, "blocks": 3}


def reading_engine() -> Engine:
    """One with a far state that is read."""
    network = tiny.network(reads_far=True).float().requires_grad_(False)
    for block in network.layers:
        torch.nn.init.normal_(block.self_attn.linear_proj.weight)
    engine = tiny.engine()
    return replace(engine, network=network, recipe=replace(engine.recipe, far=FarShape(rule=Decay(half_life=9))))


def table(engine: Engine | None = None, **options: Any) -> dict[str, Any]:
    (result,) = evaluate_memory(["any"], lambda name: engine or tiny.engine(), **(SMALL | options))
    assert json.loads(json.dumps(result, allow_nan=False)) == result | {"error_growth": listed(result["error_growth"])}
    return result


def listed(growth: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: pairs are lists."""
    intervals = {
        name: growth[name] | {"interval_95": [list(pair) for pair in growth[name]["interval_95"]]}
        for name in ("latents", "pictures")
    }
    return growth | intervals


def test_a_student_that_reads_nothing_far_is_followed_by_every_rule():
    result = table(rules=["keep", "decay=9", "cap=12", "delta"])
    assert (result["recipe"], result["hours"], result["levels"], result["block_seconds"]) == ("any", HOURS, 4, 0.75)
    assert result["marks"] == [1, 2, 5, 10, 20, 50, 94]
    assert result["at_seconds"][-1] == 3600 * HOURS
    assert len(result["layers"]) == 3
    for layer in result["layers"]:
        assert layer["share_of_output"] is None
        assert list(layer["states"]) == ["keep", "decay=9", "cap=12", "delta"]
        for state in layer["states"].values():
            assert all(1 <= rank <= 12 for rank in state["effective_rank"])
            assert len(state["effective_rank"]) == len(state["news"]) == len(state["read_back_newest"]) == 7
            assert len(state["read_back"]) == len(state["recalled"]) == len(result["ages"])
            assert state["saturation"][0] == 0
    means = result["mean_of_layers"]
    assert means["keep"]["saturation"][-1] > means["decay=9"]["saturation"][-1]
    first = [layer["states"]["keep"]["effective_rank"][0] for layer in result["layers"]]
    assert means["keep"]["effective_rank"][0] == pytest.approx(sum(first) / 3, rel=1e-3)


def test_errors_are_followed_with_their_intervals():
    growth = table(blocks=4, perturb=0.2)["error_growth"]
    assert growth["perturb"] == 0.2 and growth["changed_block"] == 2
    assert growth["latents"]["mean"][0] == pytest.approx(0.2)
    for found in (growth["latents"], growth["pictures"]):
        assert len(found["mean"]) == len(found["interval_95"]) == 5
        assert all(low <= mean <= high for mean, (low, high) in zip(found["mean"], found["interval_95"], strict=True))


def test_a_far_state_that_is_read_has_a_share_once_there_is_something_far():
    result = table(reading_engine())  # three blocks are as many as the window holds
    assert list(result["mean_of_layers"]) == ["own"]
    assert [layer["share_of_output"] for layer in result["layers"]] == [None] * 3
    shares = table(reading_engine(), blocks=5)["layers"][1]["share_of_output"]
    assert shares[:3] == [None] * 3 and all(share > 0 for share in shares[3:])


def test_a_share_is_the_norm_of_what_is_far_over_that_of_the_window():
    near, far = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.5, 2.0]])
    near_BTND, far_BTND = near.view(2, 1, 1, 2), far.view(2, 1, 1, 2)
    watched = memory._Watched(1)
    read = SimpleNamespace(add_to=lambda answer, own: answer + far_BTND)
    view = memory._WatchedView(None, [None], lambda q, k, v: near_BTND, [read], watched)
    assert torch.equal(view.attend(0, Tokens(*[near_BTND] * 5)), near_BTND + far_BTND)
    torch.testing.assert_close(watched.shares[0], [torch.tensor([1 / 5, 2.5 / 2])])


@torch.no_grad()
def test_pictures_differ_as_those_of_videos_decoded_from_their_first_block(monkeypatch):
    engine, shown = tiny.engine(), []
    decode, first = engine.codec.decode, changed_block(engine)
    monkeypatch.setattr(engine.codec, "decode", lambda latents, state: shown.append(latents) or decode(latents, state))
    found = error_growth(engine, ["one", "two"], [3, 4], blocks=2, size=0.5)
    streams, twins = (
        to_uint8(decode(torch.cat([*shown[:first], *shown[start::2]], 1))[0]) / 255 for start in (first, first + 1)
    )
    pictures = (twins - streams)[:, engine.pictures_in(first) :].unflatten(1, (3, -1))
    expected = pictures.flatten(2).square().mean(2).sqrt()
    torch.testing.assert_close(found.pictures_BK, expected, atol=1e-4, rtol=0)


def test_news_are_asked_for_from_where_the_reading_block_stands():
    """Positions end at 20 here: three frames ask from 18 to 20, and three of the past are between them and the far."""
    where = Setting(
        memory=MemoryShape(window=WindowShape(sink=3, past=3), extent=21),
        block=3,
        grid=Grid(RotaryAxes(split=(4, 2, 2)), rows=2, columns=3),
    )
    *drawn, queries = torch.randn(5, 2, 18, 2, 8, generator=torch.Generator().manual_seed(0))
    old, new = Block(*drawn[:2]), Block(*drawn[2:])
    made = Recorded(shots=[[old]], held_out=[new], queries=[queries])
    found = retention(where, FarShape(), made, blocks=12)
    *_, sums = states(where, FarShape(), [old, new], [0] * 12)
    *_, after = states(where, FarShape(), [old, new], [0] * 11 + [1, 0])
    asked_at = where.grid.rotation(range(18, 21), "cpu")
    before, answer = (FarState(FarShape(), one).read(queries, asked_at).flatten(1) for one in (sums, after))
    torch.testing.assert_close(found.news_LM[:, -1], (answer - before).norm(dim=1) / before.norm(dim=1))


@pytest.mark.parametrize("maps", [False, True])
@torch.no_grad()
def test_recording_changes_no_stream_and_shares_are_of_the_norms(maps: bool):
    """What is recorded of keys is what a far state gets of them."""
    engine = reading_engine()
    engine = replace(engine, network=tiny.with_drawn_maps(engine.network)) if maps else engine
    plan = memory._Plan.of("any", engine, HOURS, {})
    streams = [memory._Stream("one", 3), memory._Stream("two", 4)]
    made = memory._record(plan, streams, 5, lambda line: None)
    plain = StreamMemory(engine.recipe.memory(engine.network), 3, ring=False)
    prompt = engine.prompt_keys("one", "two")
    for _ in islice(memory.latents_of(engine, plain, prompt, [3, 4]), 5):
        pass
    for layer in range(3):
        held = plain.held(layer)
        for row, one in enumerate(made):
            recorded = torch.cat([one.blocks[0].k_LTND[layer], one.blocks[4].k_LTND[layer]])
            absorbed = plain.far(layer).shape.mapped_keys(held.k_BTND)
            assert torch.equal(absorbed, held.k_BTND) != maps
            torch.testing.assert_close(recorded, absorbed[row], atol=1e-5, rtol=1e-5)
    assert made[0].queries_LTND.shape == made[0].blocks[0].k_LTND.shape
    assert not torch.allclose(made[0].shares_LK[:, -1], made[1].shares_LK[:, -1])


def test_whole_streams_are_held_out():
    engine = tiny.engine()
    plan = memory._Plan.of("any", engine, HOURS, {})
    streams = [memory._Stream(str(seed), seed) for seed in range(6)]
    made = memory._record(plan, streams, 2, lambda line: None)
    recorded = memory._recorded(made, engine.device)
    assert [len(shot) for shot in recorded.shots] == [2] * 4
    assert len(recorded.held_out) == 4 and len(recorded.queries) == 2
    assert torch.equal(recorded.held_out[0].k_LTND, made[3].blocks[0].k_LTND)
    assert torch.equal(recorded.held_out[-1].v_LTND, made[5].blocks[1].v_LTND)


def test_of_blocks_in_flight_only_the_growth_of_an_error_is_measured(tmp_path):
    rolling = tiny.engine(tiny.rolling_recipe())
    result = table(rolling)
    assert result["layers"] == [] and result["mean_of_layers"] == {} and result["at_seconds"] == []
    assert result["error_growth"]["changed_block"] == 2
    assert len(result["error_growth"]["latents"]["mean"]) == SMALL["blocks"] + 1
    assert table().keys() - result.keys() == {"recorded_blocks", "held_out_blocks"}
    with pytest.raises(ValueError, match="recipe any has blocks in flight, which cannot read a far state"):
        table(rolling, rules=["keep"])
    with pytest.raises(ValueError, match="recipe any has rules for its window that go with no far state"):
        table(tiny.engine(reward_forcing()))
    pytest.importorskip("matplotlib")
    memory_plot.draw([result, table()], tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 1000


def test_rules_have_names_and_numbers():
    assert far_rules(["keep", "decay", "decay=", "decay=9", "cap=12", "delta", "delta=30"]) == {
        "keep": Keep(),
        "decay": Decay(half_life=240),
        "decay=": Decay(half_life=240),
        "decay=9": Decay(half_life=9),
        "cap=12": MassCap(frames=12),
        "delta": Delta(),
        "delta=30": Delta(half_life=30),
    }


@pytest.mark.parametrize(
    "name", ["kep", "decay=0", "decay=-1", "decay=soon", "decay=inf", "cap=inf", "cap=nan", "keep=5"]
)
def test_other_rules_are_refused(name):
    with pytest.raises(ValueError, match=f"rule '{name}' of a far state does not work: "):
        far_rules([name])


# the command line


@pytest.fixture
def engine(monkeypatch, tmp_path) -> Engine:
    made = tiny.engine()
    monkeypatch.setattr("longtake.recipes.load", lambda model, **options: made)
    monkeypatch.chdir(tmp_path)
    return made


TINY = ["evaluate", "memory", "--hours", "0.01", "--prompts", "2", "--blocks", "2", "--device", "cpu"]


def test_json_parses_and_a_picture_is_drawn(engine, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main([*TINY, "--rule", "keep", "delta", "--json", "--plot", "memory.png"]) == 0
    captured = capsys.readouterr()
    (result,) = json.loads(captured.out)
    assert result["recipe"] == "self_forcing_sink" and result["hours"] == 0.01
    assert list(result["mean_of_layers"]) == ["keep", "delta"]
    assert "longtake: self_forcing_sink: block 2 of 2 of 2 streams is recorded\n" in captured.err
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["memory.png"]


def test_words_say_what_is_in_the_table(engine, capsys):
    assert main([*TINY, "--recipe", "self_forcing"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("self_forcing, far state own, after 0.01 h: rank ")
    assert lines[1].startswith("self_forcing: a change of 0.05 is ")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--hours", "0.001"], "followed for 3.75 seconds (0.00104 hours) or more, at most 1000 hours, got 0.001"),
        (["--hours", "nan"], "at most 1000 hours, got nan"),
        (["--hours", "1e300"], "at most 1000 hours, got 1e+300"),
        (["--prompts", "1"], "two streams or more"),
        (["--seeds", "0"], "at least one seed"),
        (["--blocks", "0"], "one block or more, got 0"),
        (["--perturb", "-1"], "a size from 0"),
        (["--rule", "hold"], "keep, decay, cap, delta"),
        (["--plot", "memory.txt"], "png files, not memory.txt"),
        (["--plot", "nowhere/memory.png"], "there is no folder nowhere"),
        (["--plot", "folder.png"], "folder.png is a folder"),
    ],
)
def test_bad_input_is_one_clear_line(engine, capsys, arguments, says):
    Path("folder.png").mkdir()
    assert main([*TINY, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert says in captured.err


def test_a_picture_needs_matplotlib_and_says_so_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_plot, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        memory_plot.require(tmp_path / "memory.png")
