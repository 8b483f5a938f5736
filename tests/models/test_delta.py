"""Students as deltas: what is kept, what is lost, what is refused, and that they stream as what they stand for."""

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import longtake
from longtake import doctor, recipes
from longtake.cli import main
from longtake.explain import explain
from longtake.media.mp4 import read_frames
from longtake.models.delta import save_delta
from longtake.models.names import is_low_rank
from longtake.models.wan import reading_far
from longtake.models.weights import described, load_weights, save_weights
from longtake.plan import plan
from longtake.recipes.devices import CPU
from longtake.recipes.weight_files import CODEC_FILE, NETWORK_FILE, load_network, load_tensors, packaged, save_network

SHAPES = {"network.q.weight": (24, 40), "network.o.weight": (40, 24), "network.q.bias": (24,), "text.words": (9, 8)}
PROMPT = "a red ball bounces over green hills"
Tensors = dict[str, Tensor]


def weights(seed: int) -> Tensors:
    dice = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=dice) for name, shape in SHAPES.items()}


def saved(path: Path, tensors: Tensors, *, int8: bool = False, **about: object) -> Path:
    save_weights(path, tensors, {"network": {}, **about}, int8=int8)
    return path


def read_back(path: Path) -> Tensors:
    return load_tensors(path)[0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / NETWORK_FILE, weights(0))


def tuned_from(base: Path, changes: Tensors, **about: object) -> Path:
    tensors, _ = load_weights(base)
    return saved(base.with_name("tuned.safetensors"), tensors | changes, **about)


# What is kept and what is lost


@settings(max_examples=30)
@given(seed=st.integers(1, 1000), scale=st.floats(1e-3, 1))
def test_at_full_rank_it_is_the_tuned_weights_but_for_int8_rounding_of_their_change(tmp_path_factory, seed, scale):
    folder = tmp_path_factory.mktemp("full")
    base = saved(folder / NETWORK_FILE, weights(0))
    tensors = {name: x + scale * weights(seed)[name] for name, x in weights(0).items()}
    told = save_delta(folder / "delta.safetensors", base, saved(folder / "tuned.safetensors", tensors), rank=24)
    whole = read_back(folder / "delta.safetensors")
    assert (told["low_rank"], told["in_full"]) == (0, len(SHAPES)) and told["error_of_change"] < 0.01
    assert whole.keys() == tensors.keys()
    for name, x in tensors.items():
        change = scale * weights(seed)[name].abs()
        step = change.amax(1, keepdim=True) / 127 if x.ndim > 1 else change / 128  # bfloat16 has 8 bits
        assert ((whole[name] - x).abs() <= step * 0.5001 + 1e-6).all()


@settings(max_examples=30)
@given(seed=st.integers(1, 1000), rank=st.integers(1, 14), scale=st.floats(1e-3, 1))
def test_what_is_lost_is_the_least_that_any_factors_of_the_rank_would_lose(tmp_path_factory, seed, rank, scale):
    """But for the rounding of the factors, which is small beside the change: smaller than an int8 file's weights."""
    folder = tmp_path_factory.mktemp("rank")
    base, name = saved(folder / NETWORK_FILE, weights(0)), "network.q.weight"
    change = scale * weights(seed)[name]
    told = save_delta(
        folder / "delta.safetensors", base, tuned_from(base, {name: weights(0)[name] + change}), rank=rank
    )
    tail = torch.linalg.svdvals(change)[rank:].norm() / change.norm()
    assert tail * 0.999 < told["error_of_change"] < (tail**2 + 0.015**2) ** 0.5
    assert told["worst"] == name and told["rank"] == rank and told["low_rank"] == 1
    missed = (read_back(folder / "delta.safetensors")[name] - weights(0)[name] - change).norm() / change.norm()
    assert told["error_of_change"] == pytest.approx(missed.item(), rel=1e-3)


@settings(max_examples=30)
@given(seed=st.integers(1, 1000))
def test_the_error_falls_with_the_rank_and_the_file_grows(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("falls")
    base = saved(folder / NETWORK_FILE, weights(0))
    changes = {name: x + 0.1 * weights(seed)[name] for name, x in weights(0).items() if name.endswith("weight")}
    tuned = tuned_from(base, changes)
    told = [save_delta(folder / f"{rank}.safetensors", base, tuned, rank=rank) for rank in (1, 3, 6, 10, 14)]
    errors, sizes = [one["error"] for one in told], [one["bytes"] for one in told]
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[-1]
    assert sizes == sorted(sizes)


def test_at_any_rank_all_that_changed_is_there_in_full(base):
    name = "network.q.weight"
    delta = base.with_name("delta.safetensors")
    told = save_delta(delta, base, tuned_from(base, {name: weights(1)[name]}), rank=0)
    assert (told["low_rank"], told["in_full"], told["rank"]) == (0, 1, 0) and told["error_of_change"] < 0.01
    assert load_weights(delta)[0].keys() == {name}


def test_what_is_new_or_became_zeros_is_no_division_by_zero(base):
    """As projections that have not learned yet are, and a bias that training drove to 0."""
    delta = base.with_name("delta.safetensors")
    told = save_delta(delta, base, tuned_from(base, {"network.far.weight": torch.zeros(8, 8)}), rank=2)
    assert told["error"] == told["error_of_change"] == told["worst_error"] == 0 and told["in_full"] == 1
    delta.unlink()
    told = save_delta(delta, base, tuned_from(base, {"network.q.bias": torch.zeros(24)}), rank=2)
    assert told["worst"] == "network.q.bias" and told["worst_error"] == 1 and 0 < told["error_of_change"] < 0.01


def test_only_what_changed_is_there_and_what_is_new_is_there_in_full(base):
    changes = {
        "network.q.weight": weights(0)["network.q.weight"] + 0.1 * weights(1)["network.q.weight"],
        "network.q.bias": weights(1)["network.q.bias"],
        "network.far.weight": torch.randn(8, 8),  # new, so in full though a rank of 2 would be smaller
    }
    delta = base.with_name("delta.safetensors")
    told = save_delta(delta, base, tuned_from(base, changes, recipes=["hybrid_forcing"], shift=3.0), rank=2)
    stored, description = load_weights(delta)
    factors = {"network.q.lora_A.weight": (2, 40), "network.q.lora_B.weight": (24, 2)}
    assert {name: tuple(x.shape) for name, x in stored.items() if is_low_rank(name)} == factors
    assert stored.keys() == factors.keys() | {"network.q.bias", "network.far.weight"}
    assert described(delta) == description == {
        "network": {}, "recipes": ["hybrid_forcing"], "shift": 3.0, "delta": {"base": told["base"], "rank": 2},
    }  # fmt: skip
    assert read_back(delta).keys() == SHAPES.keys() | {"network.far.weight"}
    assert torch.equal(read_back(delta)["network.o.weight"], weights(0)["network.o.weight"])


def test_an_int8_file_written_again_has_not_changed(base):
    saved(base, weights(0), int8=True)
    again = saved(base.with_name("again.safetensors"), load_weights(base)[0], int8=True)
    with pytest.raises(ValueError, match="does not differ from"):
        save_delta(base.with_name("delta.safetensors"), base, again, rank=2)


# What is refused


def test_a_delta_is_refused_for_another_base_and_for_one_that_is_not_there(base, tmp_path):
    delta, own = tmp_path / "delta.safetensors", {"network.q.bias": torch.ones(24)}
    belongs = save_delta(delta, base, tuned_from(base, own), rank=2)["base"]
    saved(base, weights(5))
    embedded = packaged(NETWORK_FILE)
    with pytest.raises(ValueError) as refused:
        read_back(delta)
    said = str(refused.value)
    assert said.startswith(f"{delta} is a delta on the weights {belongs}, which are not here: {base} holds ")
    assert f"{embedded} holds {longtake.load('toy', recipe='self_forcing').weights}" in said and "\n" not in said
    base.unlink()
    with pytest.raises(ValueError, match=f"which are not here: {embedded} holds"):
        read_back(delta)


def test_a_delta_whose_tensors_have_no_place_is_refused(base, tmp_path):
    delta = tmp_path / "delta.safetensors"
    change = weights(0)["network.q.weight"] + weights(1)["network.q.weight"]
    save_delta(delta, base, tuned_from(base, {"network.q.weight": change}), rank=2)
    stored, about = load_weights(delta)
    down, up = stored.values()
    for tensors, said in (
        ({"network.p.lora_A.weight": down, "network.p.lora_B.weight": up}, "updates network.p.weight, which"),
        ({"network.q.lora_A.weight": down}, "has only lora_A of network.q.weight"),
        ({"network.o.lora_A.weight": down, "network.o.lora_B.weight": up}, r"does not fit network.o.weight \[40, 24\]"),
        ({"network.q.bias": torch.zeros(3)}, r"\[3\] does not fit network.q.bias \[24\]"),
    ):
        save_weights(delta, tensors, about, int8=True)
        with pytest.raises(ValueError, match=said):
            read_back(delta)


def test_leftovers_and_gaps_of_a_delta_are_named(tmp_path):
    delta = tmp_path / "delta.safetensors"
    save_delta(delta, packaged(NETWORK_FILE), tuned_student(tmp_path / "tuned.safetensors"), rank=2)
    stored, about = load_weights(delta)
    for tensors, said in (
        (stored | {"network.extra": torch.zeros(3)}, r"1 not known \(network.extra\)"),
        ({name: x for name, x in stored.items() if "linear_proj" not in name}, r"20 missing \(network.blocks.0"),
    ):
        save_weights(delta, tensors, about, int8=True)
        with pytest.raises(ValueError, match=rf"delta.safetensors does not fit ModuleDict: {said}"):
            recipes.load(delta, recipe="hybrid_forcing", device="cpu")


def test_what_cannot_be_a_delta_is_refused_and_leaves_nothing(base, tmp_path, capsys):
    tuned, delta = tuned_from(base, {"network.q.bias": torch.ones(24)}), tmp_path / "delta.safetensors"
    save_delta(tmp_path / "other.safetensors", base, tuned, rank=2)
    wider = saved(tmp_path / "wider.safetensors", weights(0) | {"network.q.weight": torch.randn(24, 41)})
    codec, there = packaged(CODEC_FILE), sorted(tmp_path.iterdir())
    for arguments, said in (
        ([base, tuned, "-o", delta, "--rank", -1], "the rank of a delta is 0 (any) or more, got -1"),
        ([base, base, "-o", delta], f"{base} does not differ from {base}"),
        ([base, wider, "-o", delta], "it lacks or reshapes 1 tensors (network.q.weight)"),
        (["toy", tuned, "-o", delta], f"{tuned} is not {packaged(NETWORK_FILE)} tuned"),
        ([base, codec, "-o", delta], f"{codec} does not hold a network"),
        (
            [base, tmp_path / "other.safetensors", "-o", delta],
            "other.safetensors is a delta itself: name whole weights",
        ),
        ([base, tmp_path / "nowhere", "-o", delta], "neither a known name nor a folder that holds student.safetensors"),
        ([base, tuned, "-o", tuned], f"{tuned} must be a new file, NAME.safetensors, in a folder that is there"),
        ([base, tuned, "-o", tmp_path / "delta.pt"], "must be a new file"),
        ([base, tuned, "-o", tmp_path / "no" / "delta.safetensors"], "must be a new file"),
    ):
        assert main(["models", "delta", *map(str, arguments)]) == 2
        complaint = capsys.readouterr().err
        assert said in complaint and complaint.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == there


# The command


def test_the_command_tells_size_and_error(base, tmp_path, capsys):
    tuned_from(base, {"network.q.weight": weights(0)["network.q.weight"] + weights(1)["network.q.weight"]})
    (tmp_path / "run").mkdir()
    shutil.move(tmp_path / "tuned.safetensors", tmp_path / "run" / NETWORK_FILE)
    delta = tmp_path / "delta.safetensors"
    arguments = ["models", "delta", str(tmp_path), str(tmp_path / "run"), "-o", str(delta), "--rank", "3"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == delta.stat().st_size and told["file"] == str(delta)
    assert (told["low_rank"], told["in_full"], told["rank"]) == (1, 0, 3)
    delta.unlink()
    assert main(arguments) == 0
    words = capsys.readouterr().out
    assert f"{told['base']}, 1 matrices at rank 3 and 0 tensors in full" in words
    assert f"{told['error']:.2%} of the weights" in words and "most in network.q.weight" in words


# Students that run


def tuned_student(path: Path) -> Path:
    """The embedded student, changed in every way that training under a far state changes one."""
    text, network, about = load_network(packaged(NETWORK_FILE), CPU)
    network = reading_far(network)
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter += 0.02 * torch.randn_like(parameter) * parameter.abs().mean().clamp_min(0.05)
    save_network(path, text, network, role="student", shift=about["shift"], int8=False, recipes=["hybrid_forcing"])
    return path


@pytest.fixture
def embedded(tmp_path, monkeypatch) -> Path:
    """An installation that has a delta for hybrid_forcing; its path."""
    for name in (NETWORK_FILE, CODEC_FILE):
        (tmp_path / name).symlink_to(packaged(name))
    delta = tmp_path / "student_hybrid_forcing.safetensors"
    save_delta(delta, packaged(NETWORK_FILE), tuned_student(tmp_path / "tuned.safetensors"), rank=8)
    monkeypatch.setattr("longtake.recipes.weight_files.TOY_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(recipes.MODELS, ("toy", "hybrid_forcing"), delta.name)
    return delta


def pictures(model: str | Path) -> tuple[str, np.ndarray]:
    engine = longtake.load(model, recipe="hybrid_forcing", device="cpu", dtype=torch.float32)
    with engine.stream(PROMPT) as stream:
        return engine.weights, np.concatenate([chunk.frames for chunk in islice(stream, 3)])


def test_an_embedded_delta_streams_as_the_merged_weights_do(embedded, tmp_path):
    tensors, description = load_tensors(embedded)
    merged = tmp_path / "merged.safetensors"
    save_weights(merged, tensors, {key: x for key, x in description.items() if key != "delta"}, int8=False)
    told, frames = pictures("toy")
    expected, expected_frames = pictures(merged)
    assert told == expected and np.array_equal(frames, expected_frames)
    assert told != longtake.load("toy", recipe="self_forcing", device="cpu").weights
    assert pictures(embedded)[0] == told, "named as a file"


def test_a_folder_whose_student_is_a_delta_on_the_embedded_one_streams(embedded, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(embedded, folder / NETWORK_FILE)
    shutil.copy(packaged(CODEC_FILE), folder)
    assert pictures(folder)[0] == pictures("toy")[0]


def test_an_entry_for_a_delta_is_all_that_rolling_forcing_needs(embedded, monkeypatch, tmp_path):
    monkeypatch.setitem(recipes.MODELS, ("toy", "rolling_forcing"), embedded.name)
    asked = [PROMPT, "--recipe", "rolling_forcing", "--seconds", "0.5", "--seed", "7"]
    assert main(["generate", *asked, "-o", str(tmp_path / "out.mp4")]) == 0
    assert read_frames(tmp_path / "out.mp4").shape == (8, 112, 192, 3)
    engine = longtake.load("toy", recipe="rolling_forcing:sink=0", device="cpu")
    assert engine.weights == pictures("toy")[0]


def test_what_is_told_of_a_recipe_is_told_of_its_delta(embedded, capsys):
    assert explain("hybrid_forcing", 1)["has_weights"]
    assert (
        plan("toy", recipe="hybrid_forcing:far=none")["moments"] != plan("toy", recipe="self_forcing_sink")["moments"]
    )
    assert main(["models"]) == 0
    assert "--model toy --recipe hybrid_forcing" in capsys.readouterr().out.splitlines()
    found = {one.name: one for one in doctor._weights()}
    assert found[embedded.name].state == "ok" and found[embedded.name].about.startswith("student, 12.2 million numbers")
    (embedded.parent / NETWORK_FILE).unlink()
    shutil.copy(embedded.parent / "tuned.safetensors", embedded.parent / NETWORK_FILE)
    broken = next(one for one in doctor._weights() if one.name == embedded.name)
    assert broken.state == "problem" and "is a delta on the weights" in broken.about
