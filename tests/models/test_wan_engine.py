"""Wan's text encoder, network and VAE from their files to pictures: a synthetic model, tiny in width alone."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.models.layouts import CONFIG, LAYOUTS, network
from tests.models.test_taehv import published
from tests.models.test_umt5 import DIM, wan_tensors, write_tokenizer

import longtake
from longtake import recipes
from longtake.cli import main
from longtake.cli.engines import load_again, load_engine
from longtake.generation.script import record_of, script_from
from longtake.generation.stream import to_uint8
from longtake.generation.take import made_with
from longtake.models.taehv import TAEHV
from longtake.models.wan_vae import WanVAE, WanVAEConfig

RECIPE = "self_forcing_sink"
SIZE = (32, 48)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A model with all its parts: the network as diffusers has it, the others as Wan has them."""
    config = replace(CONFIG, channels=16, text_dim=DIM)
    made = tmp_path_factory.mktemp("wan")
    folder = LAYOUTS["diffusers, a pipeline"](made, network(config=config).state_dict())
    torch.manual_seed(0)
    torch.save(WanVAE(WanVAEConfig(dim=4)).state_dict(), folder / "Wan2.1_VAE.pth")
    write_tokenizer(folder / "google" / "umt5-xxl")
    torch.save(wan_tensors(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save({"generator_ema": network(1, config).state_dict()}, made / "student.pt")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    """No embeddings of other runs, and nothing that was ever pulled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def first_pictures(engine: longtake.Engine) -> np.ndarray:
    with engine.stream("a red ball", seed=1) as stream:
        made = [next(stream).frames for _ in range(2)]
        stream.redirect("a blue fox")
        return np.concatenate([*made, next(stream).frames])


def test_a_whole_model_streams_and_follows_its_prompts(whole: Path) -> None:
    engine = recipes.load_wan(whole, recipe=RECIPE, size=SIZE, device="cpu")
    pictures = first_pictures(engine)
    assert pictures.shape == (9 + 12 + 12, *SIZE, 3) and pictures.std() > 0
    assert (engine.shift, engine.frame_rate, engine.dtype) == (5.0, 16, torch.float32)
    with engine.stream("a blue fox", seed=1) as stream:
        assert not np.array_equal(next(stream).frames, pictures[:9]), "what is said reaches the network"
    given = torch.zeros(1, 9, *SIZE, 3, dtype=torch.uint8)
    assert engine.latents_of(given).shape == (1, 3, 16, 4, 6), "it goes on from pictures too"
    engine.to(torch.bfloat16)
    assert engine.latents_of(given).dtype == torch.bfloat16, "in whichever precision it computes by now"


def test_a_student_alone_takes_the_rest_from_its_base(whole: Path) -> None:
    student = whole.parent / "student.pt"
    engine = recipes.load_wan(student, recipe=RECIPE, base=whole, size=SIZE, shift=8, device="cpu")
    assert engine.shift == 8 and torch.equal(
        engine.network.head.head.weight, network(1, replace(CONFIG, channels=16, text_dim=DIM)).head.head.weight
    )
    with pytest.raises(ValueError, match=r"longtake models pull wan2\.1-1\.3b"):
        recipes.load_wan(student, recipe=RECIPE, device="cpu")


def test_the_command_line_names_a_base_and_a_record_keeps_it(whole: Path) -> None:
    """So that replay and takes find it again."""
    student = str(whole.parent / "student.pt")
    engine = load_engine(student, None, None, "cpu", "float32", base=str(whole))
    record = record_of(engine, script_from("a red ball"), 1, 2.0)
    assert record["base"] == made_with(engine)["base"] == str(whole)
    again = load_again(record, record["levels"], None)
    assert (again.weights, again.codec_weights) == (engine.weights, engine.codec_weights)
    with pytest.raises(ValueError, match="a base is for networks of Wan's shape"):
        load_engine("toy", None, None, "cpu", "float32", base=str(whole))


def test_a_light_decoder_shows_the_same_latents(whole: Path, tmp_path: Path) -> None:
    """In place of the VAE, which encodes given pictures all the same."""
    light = tmp_path / "taew2_1.pth"
    torch.save(published(), light)
    fully, quickly = (
        recipes.load_wan(whole, recipe=RECIPE, size=SIZE, device="cpu", codec=codec) for codec in (None, light)
    )
    assert isinstance(quickly.codec, TAEHV)
    seen: list[torch.Tensor] = []
    decode = quickly.codec.decode
    quickly.codec.decode = lambda latents, state: seen.append(latents) or decode(latents, state)
    pictures = first_pictures(quickly)
    assert pictures.shape == (9 + 12 + 12, *SIZE, 3)
    at_once = to_uint8(decode(torch.cat(seen, 1))[0])[0].numpy()
    assert np.abs(pictures.astype(int) - at_once).max() <= 1, "block by block as all at once, but for rounding"
    assert not np.array_equal(pictures, first_pictures(fully))
    given = torch.randint(256, (1, 9, *SIZE, 3), dtype=torch.uint8)
    assert torch.equal(quickly.latents_of(given), fully.latents_of(given))
    quickly.to(torch.bfloat16)
    assert quickly.latents_of(given).dtype == torch.bfloat16
    said = [record_of(engine, script_from("a red ball"), 1, 2.0).get("codec") for engine in (fully, quickly)]
    assert said == [None, str(light)], "a video that is there was made with the same codec, or is refused"


def test_a_light_decoder_in_verify(whole: Path, tmp_path: Path, capsys) -> None:
    torch.save(published(), tmp_path / "taew2_1.pth")
    arguments = ["--size", "48x32", "--blocks", "1", "--device", "cpu", "--json", "--codec"]
    main(["verify", str(whole), *arguments, str(tmp_path / "taew2_1.pth")])
    assert '"decoded by taew2_1.pth"' in capsys.readouterr().out


def test_load_knows_a_wan_model_by_what_is_there(whole: Path) -> None:
    engine = longtake.load(whole, recipe=RECIPE, device="cpu", levels=2)
    assert (engine.height, engine.width, len(engine.recipe.steps)) == (480, 832, 2)
    with pytest.raises(ValueError, match="longtake models pull"):
        longtake.load("self-forcing", recipe="self_forcing", device="cpu")
    with pytest.raises(ValueError, match="longtake models pull"):  # of a network alone the rest has to come from there
        longtake.load(whole / "transformer", recipe=RECIPE, device="cpu")


def test_a_folder_of_our_own_training_is_no_wan_model(tmp_path: Path) -> None:
    (tmp_path / "state.pt").touch()
    with pytest.raises(ValueError, match="no weights at"):
        longtake.load(tmp_path, recipe=RECIPE, device="cpu")


def test_a_folder_is_wan_s_only_if_something_of_it_is_there(whole: Path, tmp_path: Path) -> None:
    """A run that was stopped, and a folder without weights, lack a student of ours, not a text encoder."""
    for files in ((), ("state.pt",), ("codec_decoder.safetensors", "teacher.safetensors")):
        folder = tmp_path / f"run{len(files)}"
        folder.mkdir()
        for file in files:
            (folder / file).touch()
        with pytest.raises(ValueError, match=r"no weights at .*student\.safetensors"):
            longtake.load(folder, recipe=RECIPE, device="cpu")
    alone = tmp_path / "alone"
    shutil.copytree(whole / "transformer", alone)
    with pytest.raises(ValueError, match=r"longtake models pull wan2\.1-1\.3b"):  # the base, for all that it lacks
        longtake.load(alone, recipe=RECIPE, device="cpu")


def test_what_is_missing_or_does_not_fit_is_one_line(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 16 high and wide, not 40 x 48"):
        recipes.load_wan(whole, recipe=RECIPE, size=(40, 48), device="cpu")
    with pytest.raises(ValueError, match="no text encoder in"):
        recipes.load_wan(whole, recipe=RECIPE, base=whole / "transformer", device="cpu")
    with pytest.raises(ValueError, match="far state"):
        recipes.load_wan(whole, recipe="hybrid_forcing", size=SIZE, device="cpu")
    part = tmp_path / "part"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("*VAE*"))
    with pytest.raises(ValueError, match="VAE"):
        recipes.load_wan(part, recipe=RECIPE, size=SIZE, device="cpu")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(b"12345678")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        longtake.load(cut, recipe=RECIPE, device="cpu")
    torch.save({"a": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"foreign.pt does not hold a Wan network"):  # and not: pull a base
        longtake.load(tmp_path / "foreign.pt", recipe=RECIPE, device="cpu")
