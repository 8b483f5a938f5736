"""`longtake verify` passes a network that works and fails every spoilt one, by the check that is there for it.

What works is the embedded student, written as a published checkpoint is; the text is a stand-in, as it is for users.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import tiny
from tests.models.layouts import CONFIG, LAYOUTS, network, shards
from tests.models.test_hub import cache, cache_of  # noqa: F401 (a fixture)
from torch import Tensor

from longtake.cli import main
from longtake.cli.verify import _recipe_to_verify
from longtake.evaluation import verify
from longtake.evaluation.verify import (
    Check,
    latent_colour_checks,
    latents_checks,
    motion,
    neighbours_alike,
    weights_are_there,
)
from longtake.models.wan import with_far_maps
from longtake.models.wan_vae import WanVAE, WanVAEConfig
from longtake.recipes.wan_engines import WAN_SHIFT
from longtake.recipes.weight_files import load_network, packaged

BLOCK, PATCH = 3, 2
SHORT = ["--size", "192x112", "--blocks", "2", "--device", "cpu"]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def student() -> Tensors:
    return load_network(packaged("student.safetensors"), torch.device("cpu"))[1].state_dict()


def saved(folder: Path, tensors: Tensors) -> Path:
    made = shards(folder / "wan", tensors)
    (made / "config.json").write_text(json.dumps({"num_heads": 4}))
    return made


def verified(path: Path | str, capsys, *options: str) -> tuple[int, dict]:
    """The exit code and the report."""
    code = main(["verify", str(path), *SHORT, "--json", *options])
    return code, json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def failed(report: dict) -> set[str]:
    return {check["name"] for check in report["checks"] if not check["passed"]}


# whole checkpoints


def test_a_network_that_works_passes_and_leaves_a_report_and_a_sheet(student: Tensors, tmp_path: Path, capsys) -> None:
    code, report = verified(saved(tmp_path, student), capsys, "-o", str(tmp_path / "out"))
    assert (code, failed(report), report["passed"]) == (0, set(), True)
    assert json.loads((tmp_path / "out" / "verify.json").read_text()) == report
    assert (tmp_path / "out" / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["contact_sheet.png", "verify.json"]
    told = report["checkpoint"]
    assert (told["layout"], told["tensors"], told["stored_as"]) == ("original", len(student), ["float32"])
    assert told["parameters"] == sum(tensor.numel() for tensor in student.values())
    assert "stand-in" in report["text"] and str(tmp_path) not in json.dumps(report)


def test_what_begins_at_zero_may_be_zero_and_no_other_matrix() -> None:
    network = with_far_maps(tiny.network(reads_far=True))
    assert weights_are_there(network).passed
    torch.nn.init.zeros_(network.layers[0].self_attn.k.weight)
    assert weights_are_there(network).number == 1


def test_the_same_command_gives_the_same_numbers(student: Tensors, tmp_path: Path, capsys) -> None:
    path = saved(tmp_path, student)
    first, again, other = (verified(path, capsys, "--seed", seed)[1]["checks"] for seed in ("1", "1", "2"))
    assert first == again != other


def shuffled(name: str, tensor: Tensor) -> Tensor:
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0))
    return tensor.flatten()[order].view_as(tensor)


SPOILT: dict[str, tuple[Callable[[str, Tensor], Tensor], set[str]]] = {
    "shuffled": (shuffled, {"finds_noise"}),
    "zeroed": (lambda name, x: torch.zeros_like(x), {"weights", "finds_noise", "not_noise"}),
    "a tenth of the size": (lambda name, x: x / 10, {"not_noise"}),
    "twice the size": (lambda name, x: x * 2, {"finds_noise", "not_saturated"}),
    "ten times the size": (lambda name, x: x * 10, {"finds_noise", "spread", "no_colour_cast", "not_saturated"}),
    "one layer lost": (
        lambda name, x: torch.zeros_like(x) if name.startswith("blocks.4.ffn.2.") else x,
        {"weights"},
    ),
    "no number": (
        lambda name, x: torch.full_like(x, math.nan) if name == "head.head.bias" else x,
        {"weights", "block_step", "finds_noise", "finite", "not_noise", "spread", "not_frozen", "not_saturated"},
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_weights_fail_by_the_checks_that_are_there_for_them(
    how: str, student: Tensors, tmp_path: Path, capsys
) -> None:
    spoil, expected = SPOILT[how]
    path = saved(tmp_path, {name: spoil(name, tensor) for name, tensor in student.items()})
    code, report = verified(path, capsys)
    assert (code, report["passed"]) == (1, False)
    assert expected <= failed(report)
    assert "fits" not in failed(report)


def test_attention_that_is_wrong_shows_in_the_step(student: Tensors, tmp_path: Path, capsys, monkeypatch) -> None:
    usual = verify.dense
    monkeypatch.setattr(verify, "dense", lambda q, k, v: usual(q * 1.1, k, v))
    code, report = verified(saved(tmp_path, student), capsys, "--blocks", "0")
    assert (code, failed(report)) == (1, {"block_step"})


def test_bfloat16_is_allowed_its_roundings(student: Tensors, tmp_path: Path, capsys) -> None:
    code, report = verified(saved(tmp_path, student), capsys, "--blocks", "0", "--dtype", "bfloat16")
    step = next(check for check in report["checks"] if check["name"] == "block_step")
    assert code == 0
    assert 1e-3 < step["number"] < step["most"]


def test_leftovers_and_gaps_are_a_failed_check_with_a_report(student: Tensors, tmp_path: Path, capsys) -> None:
    tensors = {name: x for name, x in student.items() if name != "blocks.1.ffn.2.bias"} | {"extra": torch.ones(1)}
    tensors["blocks.0.norm3.bias"] = torch.ones(7)
    code, report = verified(saved(tmp_path, tensors), capsys, "-o", str(tmp_path / "out"))
    (check,) = report["checks"]
    assert (code, check["name"], check["number"]) == (1, "fits", 3)
    assert check["about"].endswith("blocks.0.norm3.bias, blocks.1.ffn.2.bias, extra")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["verify.json"]


def test_in_words_a_line_a_check(tmp_path: Path, capsys) -> None:
    path = LAYOUTS["generator_ema (Self Forcing)"](tmp_path, network().state_dict())
    assert main(["verify", str(path), "--size", "64x64", "--blocks", "1", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split() for line in lines][:4] == [
        ["passed", "fits"], ["passed", "weights"], ["passed", "block_step"], ["failed", "finds_noise"],
    ]  # fmt: skip
    assert len(lines) == 10


# pictures


def vae(tmp_path: Path, change: Callable[[WanVAE], None] = lambda made: None) -> str:
    torch.manual_seed(1)
    made = WanVAE(WanVAEConfig(dim=4))
    with torch.no_grad():
        change(made)
    torch.save(made.state_dict(), tmp_path / "vae.pth")
    return str(tmp_path / "vae.pth")


def last_layer(made: WanVAE) -> torch.nn.Module:
    return made.get_submodule("decoder.head.2")


def reddish(made: WanVAE) -> None:
    last_layer(made).bias.copy_(torch.tensor([1.0, -1.0, -1.0]))


def glaring(made: WanVAE) -> None:
    last_layer(made).weight.mul_(1000)


@pytest.mark.parametrize(
    "change, expected", [(lambda made: None, set()), (reddish, {"no_colour_cast"}), (glaring, {"not_saturated"})]
)
def test_with_a_codec_pictures_are_looked_at(change, expected, student: Tensors, tmp_path: Path, capsys) -> None:
    codec = vae(tmp_path, change)
    code, report = verified(saved(tmp_path, student), capsys, "--codec", codec, "--blocks", "1")
    assert (code, failed(report) - {"not_frozen"}) == (int(bool(expected)), expected)
    assert report["pictures"] == "decoded by vae.pth"


def test_a_codec_of_another_number_of_channels_is_refused(tmp_path: Path, capsys) -> None:
    path = LAYOUTS["bare"](tmp_path, network().state_dict())
    assert main(["verify", str(path), "--codec", vae(tmp_path), "--size", "64x64"]) == 2
    assert capsys.readouterr().err == "longtake: the codec's latents have 16 channels, and the network's 4\n"


# text, names, and bad input


def test_with_a_text_encoder_the_prompt_is_read(tmp_path: Path, capsys, monkeypatch) -> None:
    umt5 = pytest.importorskip("tests.models.test_umt5")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encoder = tmp_path / "encoder"
    umt5.write_tokenizer(encoder / "google" / "umt5-xxl")
    torch.save(umt5.wan_tensors(), encoder / "models_t5_umt5-xxl-enc-bf16.pth")
    path = LAYOUTS["bare"](tmp_path, network(config=replace(CONFIG, text_dim=umt5.DIM)).state_dict())
    options = ["--text", str(encoder), "--blocks", "0"]
    red, blue = (verified(path, capsys, *options, "--prompt", prompt)[1] for prompt in ("a red ball", "a blue fox"))
    assert (red["text"], blue["text"]) == ("a red ball", "a blue fox")
    assert red["checks"] != blue["checks"]
    other = LAYOUTS["bare"](tmp_path, network().state_dict())
    assert main(["verify", str(other), "--size", "64x64", *options]) == 2
    assert capsys.readouterr().err == "longtake: the text's embeddings are 16 wide, and the network reads 8\n"


def test_a_pulled_checkpoint_is_verified_by_its_name(cache: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    torch.save({"generator_ema": network().state_dict()}, tmp_path / "x.pt")
    cache_of(cache, "self-forcing", {"checkpoints/self_forcing_dmd.pt": (tmp_path / "x.pt").read_bytes()})
    code, report = verified("self-forcing", capsys, "--blocks", "0")
    assert (code, failed(report)) == (1, {"finds_noise"})
    told = report["recipe"], report["shift"], report["checkpoint"]["entry"]
    assert told == ("self_forcing:past=18", 5, "generator_ema")


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("wan2.1-1.3b", [], "is no student of any method, and cannot stream: verify it with --blocks 0"),
        ("self-forcing", ["--recipe", "no_such"], "no recipe 'no_such'"),
        ("absent.safetensors", [], "no checkpoint at absent.safetensors"),
        ("broken.safetensors", [], "is not a whole safetensors file"),
        ("whole.pt", ["--size", "64"], "a size is a width and a height"),
        ("whole.pt", ["--size", "60x64"], "pictures must be multiples of 16 high and wide, not 64 x 60"),
        ("whole.pt", ["--size", "64x64", "--blocks", "-1"], "a clip has 0 blocks or more, got -1"),
        ("whole.pt", ["--size", "64x64", "--recipe", "hybrid_forcing"], "was not trained to read"),
        ("whole.pt", ["--size", "64x64", "--text", "."], "no text encoder in ."),
    ],
)
def test_bad_input_is_one_line(name: str, options: list[str], said: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(network().state_dict(), "whole.pt")
    Path("broken.safetensors").write_bytes(b'\x08\0\0\0\0\0\0\0{"half')
    assert main(["verify", name, "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# the numbers


def noise(frames: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(frames, 4, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drifting(frames: int = 6, step: int = 1) -> Tensor:
    """Waves that move from frame to frame: about mean 0, deviation 1."""
    place = torch.arange(16, dtype=torch.float64) + step * torch.arange(frames, dtype=torch.float64)[:, None]
    wave_FW = 2**0.5 * torch.sin(2 * math.pi * place / 16)
    return wave_FW[:, None, None].expand(frames, 4, 16, 16)


def failing(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def checks_of(latents: Tensor) -> set[str]:
    return failing([*latents_checks(latents, BLOCK, PATCH), *latent_colour_checks(latents)])


def test_each_fault_of_a_clip_fails_its_own_check() -> None:
    good = drifting()
    spoilt = good.clone()
    spoilt[2, 0, 0, 0] = math.inf
    stops = torch.cat([good[:3], good[2:3].expand(3, -1, -1, -1)])
    tinted = good + 3 * torch.tensor([1.0, 0, 0, 0]).view(-1, 1, 1)
    assert checks_of(good) == set()
    assert checks_of(noise()) == {"not_noise"}
    assert checks_of(drifting(step=0)) == {"not_frozen"}
    assert checks_of(stops) == {"not_frozen"}
    assert checks_of(tinted) - {"not_saturated"} == {"no_colour_cast"}
    assert checks_of(good * 0.05) == {"spread"}
    assert {"spread", "not_saturated"} <= checks_of(good * 10)
    assert "finite" in checks_of(spoilt)
    assert {"not_noise", "spread", "not_frozen"} <= checks_of(torch.zeros(6, 4, 16, 16))


@given(st.integers(0, 1000), st.floats(0.1, 10), st.floats(-5, 5))
def test_noise_is_told_whatever_its_size_and_mean(seed: int, scale: float, mean: float) -> None:
    assert abs(neighbours_alike(scale * noise(seed=seed) + mean, PATCH)) < 0.1
    assert math.isclose(motion(scale * noise(seed=seed) + mean, BLOCK), 1, abs_tol=0.1)


def test_cells_within_a_patch_are_not_compared() -> None:
    """Noise that is one number to a patch is noise still."""
    patches = noise()[..., :8, :8].repeat_interleave(PATCH, -1).repeat_interleave(PATCH, -2)
    assert abs(neighbours_alike(patches, PATCH)) < 0.1 < neighbours_alike(patches, 1)


def test_a_bound_includes_its_end_and_nothing_that_is_not_a_number() -> None:
    at = [Check(name="x", number=number, least=0, most=1, about="") for number in (0, 1, -1e-9, 1.1, math.nan)]
    assert [check.passed for check in at] == [True, True, False, False, False]
    assert at[-1].table()["number"] is None


def test_what_is_drawn_shows_the_latents() -> None:
    latents = torch.zeros(2, 4, 2, 2)
    latents[0, 0], latents[1, 1, 0, 0] = 3, -3
    pictures = verify.drawn(latents, scale=2)
    assert pictures.shape == (2, 4, 4, 3)
    assert (pictures[0] == np.array([255, 128, 128], np.uint8)).all()
    assert (pictures[1, :2, :2, 1] == 0).all() and (pictures[1, 2:] == 128).all()


def test_a_name_of_which_little_is_known_goes_with_any_recipe_and_others_with_theirs() -> None:
    assert _recipe_to_verify("salt", "self_forcing", 3)[1] == WAN_SHIFT
    assert _recipe_to_verify("rolling-forcing", None, 3)[0].name == "rolling_forcing"
    assert _recipe_to_verify("some.pt", None, 3)[0].name == "self_forcing"
    with pytest.raises(ValueError, match="blocks of 1 latent frames, and self_forcing of 3"):
        _recipe_to_verify("causal-forcing-framewise", "self_forcing", 3)
