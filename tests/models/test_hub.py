"""The registry, and fetching from a hub on this machine: what breaks off, is damaged, missing, or has no space."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.models.layouts import CONFIG, LAYOUTS, network, shards
from tests.models.loopback_hub import COMMIT, Hub, serving
from tests.processes import run

from longtake.cli import main
from longtake.generation.stream import Engine
from longtake.models import hub
from longtake.models.checkpoints import load_published, load_wan, load_wan_vae
from longtake.models.hub import Download, published, registry
from longtake.models.wan_vae import WanVAE, WanVAEConfig
from longtake.recipes import recipe_named
from longtake.recipes.methods import is_here
from longtake.recipes.wan_engines import load_wan_network

pytest.importorskip("huggingface_hub")
NAME, FILE = "self-forcing", "checkpoints/self_forcing_dmd.pt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("published") / "model.pt"
    tensors = {f"model.{name}": tensor for name, tensor in network().state_dict().items()}
    torch.save({"generator_ema": tensors}, path)
    return path.read_bytes()


@pytest.fixture
def server(checkpoint: bytes) -> Iterator[Hub]:
    files = {FILE: checkpoint, "checkpoints/ode_init.pt": b"other", "README.md": b"# card"}
    with serving(published(NAME).repo, files) as running:
        yield running


def pull(server: Hub | str, home: Path, name: str = NAME, **variables: str) -> subprocess.CompletedProcess:
    """`longtake models pull`, in a process of its own: the hub's client reads its settings when it is imported."""
    url = server if isinstance(server, str) else server.url
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    places = {"HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    return run(main, ["models", "pull", name], **places, **quiet, **variables)


def complaint(done: subprocess.CompletedProcess) -> str:
    """The last line said, of a command that was refused."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


# the registry


def test_every_entry_is_well_formed() -> None:
    for name, one in registry().items():
        assert (one.repo is None) != (one.url is None), name
        assert one.files and one.note and one.licence, name
        assert one.layout in ("original", "diffusers", "taehv"), name
        assert one.commercial in ("yes", "no", "unknown"), name
        assert one.gigabytes == "unknown" or one.gigabytes > 0, name
        assert one.lora is None or one.lora in one.files, name
        assert one.network in (None, "wan2.1-1.3b", "wan2.1-14b"), name
        if one.licence == "unknown":
            assert one.commercial == "unknown", name


def test_the_field_s_checkpoints_are_there() -> None:
    bases = "wan2.1-1.3b wan2.1-1.3b-diffusers wan2.1-14b wan2.1-14b-diffusers"
    students = "self-forcing self-forcing-ode-init causvid causal-forcing rolling-forcing longlive reward-forcing"
    assert {*bases.split(), *students.split(), "memflow", "salt", "krea-realtime-14b", "taew2.1"} <= registry().keys()
    assert registry()["longlive"].lora
    assert registry()["rolling-forcing"].commercial == registry()["self-forcing"].commercial == "no"


def test_nothing_is_inherited_that_nobody_has_established() -> None:
    salt, krea = registry()["salt"], registry()["krea-realtime-14b"]
    assert {salt.block, salt.steps, salt.shift} == {krea.block, krea.extent, krea.steps, krea.shift} == {"unknown"}


def test_levels_in_the_registry_are_the_recipe_s_before_the_shift() -> None:
    for name in ("self-forcing", "causvid", "causal-forcing", "rolling-forcing", "longlive"):
        assert tuple(registry()[name].steps) == recipe_named(registry()[name].recipe).steps, name


def test_an_unknown_name_gets_the_nearest(capsys) -> None:
    assert main(["models", "pull", "self_forcing"]) == 2
    assert "no published checkpoint 'self_forcing': did you mean self-forcing" in capsys.readouterr().err


def test_what_is_published_elsewhere_is_not_pulled(capsys) -> None:
    assert main(["models", "pull", "taew2.1"]) == 2
    assert "fetch taew2_1.pth from https://github.com" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["models", "--json"], ["models", "list", "--json"]])
def test_the_list_as_json_holds_all_that_is_known(arguments, capsys) -> None:
    assert main(arguments) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"model": "toy", "recipe": "self_forcing_sink"} in listed["runs"]
    found = {one["name"]: one for one in listed["published"]}
    assert found.keys() == registry().keys()
    assert found[NAME]["licence"] == "CC-BY-NC-SA-4.0"
    assert found[NAME]["recipe_is_here"]


def test_the_list_tells_the_terms(capsys) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("rolling-forcing ")]
    assert "16 GB" in line and "academic use only" in line and "no commercial use" in line


# loading


def cache_of(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """What the hub's client leaves behind, made by hand."""
    repository = folder / ("models--" + published(name).repo.replace("/", "--"))
    for file, content in files.items():
        path = repository / "snapshots" / COMMIT / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def test_a_pulled_student_loads_for_its_recipe_by_name(cache: Path, checkpoint: bytes) -> None:
    cache_of(cache, NAME, {FILE: checkpoint})
    loaded = load_wan_network(NAME, recipe="self_forcing", device="cpu", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in network().state_dict().items())


def test_a_base_and_its_low_rank_updates_load_as_one(cache: Path, tmp_path: Path) -> None:
    base, lora = tmp_path / "base.pt", tmp_path / "lora.pt"
    torch.save({"generator": network().state_dict()}, base)
    update = {"lora_A.weight": torch.ones(1, 256), "lora_B.weight": torch.ones(256, 1)}
    torch.save({"generator_lora": {f"base_model.model.blocks.0.self_attn.q.{k}": x for k, x in update.items()}}, lora)
    cache_of(cache, "longlive", {"models/longlive_base.pt": base.read_bytes(), "models/lora.pt": lora.read_bytes()})
    loaded = load_published("longlive").state_dict()
    expected = network().state_dict()
    expected["blocks.0.self_attn.q.weight"] = expected["blocks.0.self_attn.q.weight"] + 1
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


STUDENTS = [name for name, one in registry().items() if is_here(one.recipe)]


@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_loads_and_streams_under_its_own_recipe(name: str, cache: Path, tmp_path: Path) -> None:
    """In the files and the entry that the registry tells of."""
    one, base, lora = published(name), tmp_path / "base.pt", tmp_path / "lora.pt"
    torch.save(network().state_dict() if one.entry == "unknown" else {one.entry: network().state_dict()}, base)
    update = {"lora_A.weight": torch.ones(1, 256), "lora_B.weight": torch.ones(256, 1)}
    torch.save({f"blocks.0.self_attn.q.{key}": tensor for key, tensor in update.items()}, lora)
    cache_of(cache, name, {file: (lora if file == one.lora else base).read_bytes() for file in one.files})
    recipe = recipe_named(one.recipe)
    loaded = load_wan_network(name, recipe=one.recipe, device="cpu")
    with replace(tiny.engine(), recipe=recipe, network=loaded).stream("anything", seed=1) as stream:
        assert [next(stream).pictures for _ in range(2)] == [4 * recipe.block - 3, 4 * recipe.block]


def test_a_base_of_shards_loads_from_its_folder(cache: Path, tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards", network().state_dict())
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/spiece.model")
    cache_of(cache, "wan2.1-14b", files | {"config.json": b"{}"} | dict.fromkeys(others, b""))
    loaded = load_published("wan2.1-14b").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in network().state_dict().items())


def test_a_pull_that_broke_off_is_not_taken_for_whole(cache: Path, tmp_path: Path) -> None:
    """One file of several patterns; then a file for each, but a shard that an index names is not there."""
    cache_of(cache, "longlive", {"models/longlive_base.pt": b""})
    with pytest.raises(ValueError, match=r"longlive: models/lora\.pt not in the cache.*longtake models pull longlive"):
        load_published("longlive")
    folder = shards(tmp_path / "shards", network().state_dict())
    parts = dict.fromkeys(("vae/x.json", "text_encoder/x.json", "tokenizer/x.json"), b"{}")
    files = {f"transformer/{path.name}": path.read_bytes() for path in folder.iterdir()}
    lacking = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
    content = files.pop(lacking)
    cache_of(cache, "wan2.1-1.3b-diffusers", files | parts)
    with pytest.raises(ValueError, match=f"wan2.1-1.3b-diffusers: {lacking} not in the cache"):
        load_published("wan2.1-1.3b-diffusers")
    cache_of(cache, "wan2.1-1.3b-diffusers", {lacking: content})
    assert load_published("wan2.1-1.3b-diffusers").config == CONFIG


def test_what_does_not_load_for_a_recipe_says_why(cache: Path, checkpoint: bytes) -> None:
    cache_of(cache, NAME, {FILE: checkpoint})
    for model, recipe, said in (
        (NAME, "hybrid_forcing", "was not trained to read the far state of hybrid_forcing"),
        ("causal-forcing-framewise", "self_forcing", "blocks of 1 latent frames, and self_forcing of 3"),
        ("causvid", "self_forcing", "longtake models pull causvid"),
        ("salt", "self_forcing", "longtake models pull salt"),
        ("wan2.1-1.3b", "self_forcing", "is no student of any method, and cannot stream"),
        ("absent.pt", "self_forcing", "no checkpoint at absent.pt"),
    ):
        with pytest.raises(ValueError, match=said):
            load_wan_network(model, recipe=recipe, device="cpu")


def test_what_is_not_on_the_hub_is_not_in_its_cache() -> None:
    with pytest.raises(ValueError, match="is not on the hub: fetch it from https://github"):
        load_published("taew2.1")


def test_a_published_layout_streams(tmp_path: Path) -> None:
    """Network and Wan VAE from files in diffusers' and the original layout, under a recipe, to pictures."""
    folder = LAYOUTS["diffusers, a pipeline"](tmp_path, network(config=replace(CONFIG, channels=16)).state_dict())
    torch.manual_seed(0)
    torch.save(WanVAE(WanVAEConfig(dim=4)).state_dict(), tmp_path / "Wan2.1_VAE.pth")
    engine = Engine(
        model_name="synthetic",
        recipe=recipe_named("self_forcing_sink"),
        text=tiny.AnyText(),
        network=load_wan_network(folder, recipe="self_forcing_sink", device="cpu"),
        codec=load_wan_vae(tmp_path / "Wan2.1_VAE.pth"),
        latent_size=(16, 4, 6),
        frame_rate=16,
        shift=5.0,
    )
    with engine.stream("anything", seed=1) as stream:
        pictures = [next(stream).frames for _ in range(3)]
    assert [frames.shape for frames in pictures] == [(9, 32, 48, 3), (12, 32, 48, 3), (12, 32, 48, 3)]
    assert pictures[0].std() > 0


# fetching


def test_a_pulled_checkpoint_loads_and_is_fetched_once(server: Hub, tmp_path: Path) -> None:
    done = pull(server, tmp_path, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    first, second = (line for line in done.stderr.splitlines() if line.startswith("longtake:"))
    assert "5.68 GB" in first and "CC-BY-NC-SA-4.0" in first and "no commercial use" in first
    assert "0.01 GB from gdhe17/Self-Forcing, 0.01 GB to fetch" in second
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path)
    assert [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()] == [Path(FILE)]
    loaded = load_wan(folder / FILE).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in network().state_dict().items())
    assert {token for *_, token in server.asked} == {"Bearer hf_secret"}
    server.asked.clear()
    assert pull(server, tmp_path).stdout == done.stdout
    assert not [path for method, path, *_ in server.asked if method == "GET" and "resolve" in path]
    assert pull("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1").stdout == done.stdout


def test_a_connection_that_breaks_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    """The client writes 10 MiB at a time, so of a file of 30 MiB that breaks in the middle it has 10."""
    content = os.urandom(30 * 2**20)
    with serving(published(NAME).repo, {FILE: content}) as server:
        server.breaks = 1
        done = pull(server, tmp_path)
    assert (Path(done.stdout.strip()) / FILE).read_bytes() == content
    assert f"bytes={10 * 2**20}-" in [start for _, path, start, _ in server.asked if "resolve" in path]


def test_a_fetch_that_fails_leaves_nothing_half_in_the_cache(server: Hub, tmp_path: Path, checkpoint: bytes) -> None:
    server.fails = True
    assert "the same command fetches what is missing" in complaint(pull(server, tmp_path))
    assert not list(tmp_path.rglob("self_forcing_dmd.pt"))
    assert "not all of it is in the cache" in complaint(pull(server, tmp_path, HF_HUB_OFFLINE="1"))
    server.fails = False
    assert (Path(pull(server, tmp_path).stdout.strip()) / FILE).read_bytes() == checkpoint


def test_what_arrives_damaged_is_thrown_away(server: Hub, tmp_path: Path, checkpoint: bytes) -> None:
    server.damage = True
    assert "arrived damaged and was thrown away" in complaint(pull(server, tmp_path))
    server.damage = False
    done = pull(server, tmp_path)
    assert (Path(done.stdout.strip()) / FILE).read_bytes() == checkpoint


def test_every_damaged_file_is_thrown_away_however_it_came(tmp_path: Path) -> None:
    """Both of two, at once; and one that an earlier run fetched, which broke off before it was checked."""
    name, files = "longlive", {"models/longlive_base.pt": os.urandom(100), "models/lora.pt": os.urandom(99)}
    with serving(published(name).repo, files) as server:
        server.damage = True
        assert "longlive_base.pt, lora.pt arrived damaged" in complaint(pull(server, tmp_path, name))
        server.damage = False
        folder = Path(pull(server, tmp_path, name).stdout.strip())
        assert {file: (folder / file).read_bytes() for file in files} == files
        (folder / "models/lora.pt").resolve().write_bytes(bytes(99))
        assert "lora.pt arrived damaged" in complaint(pull(server, tmp_path, name))
        assert pull(server, tmp_path, name).returncode == 0
        assert (folder / "models/lora.pt").read_bytes() == files["models/lora.pt"]


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    assert "not all of it is in the cache, and the hub cannot be reached" in complaint(
        pull("http://127.0.0.1:9", tmp_path)
    )


def test_what_the_hub_refuses_is_said(server: Hub, tmp_path: Path) -> None:
    assert "the hub has no tianweiy/CausVid" in complaint(pull(server, tmp_path, name="causvid"))
    server.files[FILE + ".old"] = server.files.pop(FILE)
    assert f"gdhe17/Self-Forcing holds nothing called {FILE}" in complaint(pull(server, tmp_path))
    server.gated = True
    assert "accept the terms at https://huggingface.co/gdhe17/Self-Forcing" in complaint(pull(server, tmp_path))


def test_a_cache_without_space_is_told_of_before_anything_is_fetched(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9})())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "there"))
    with pytest.raises(ValueError, match=r"has 1\.0 GB free, and 5\.7 GB are to be fetched"):
        hub.fetch(published(NAME), Download(bytes=5_680_000_000, missing_bytes=5_680_000_000))
    assert not list(tmp_path.iterdir())


def test_without_the_client_the_extra_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["models", "pull", NAME]) == 2
    assert 'pip install "longtake[wan]"' in capsys.readouterr().err
