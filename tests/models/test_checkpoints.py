"""Checkpoints of every published layout load to the same network, and convert without a changed bit."""

import json
import os
import resource
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.models.layouts import CONFIG, LAYOUTS, in_diffusers, network, prefixed, shards
from torch import Tensor

from longtake.cli import main
from longtake.models.checkpoints import WAN_1_3B, WAN_14B, load_wan, load_wan_vae, network_config, open_network
from longtake.models.convert import convert
from longtake.models.diffusers import from_transformer, to_transformer
from longtake.models.features import Conversion
from longtake.models.names import WRAPPERS, codec_name_in_diffusers, network_name_in_diffusers, without_wrappers
from longtake.models.wan import WanTransformer, converted, reading_far, with_far_maps
from longtake.models.wan_vae import WanVAE, WanVAEConfig
from longtake.models.weights import Checkpoint, open_checkpoint, save_weights
from longtake.recipes.weight_files import packaged

VAE_CONFIG = WanVAEConfig(dim=4)
Tensors = dict[str, Tensor]


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def written(path: Path) -> Tensors:
    """All tensors of a file or of a folder's files, read without our own code."""
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def refusal(path: Path, **options) -> str:
    with pytest.raises(ValueError) as refused:
        load_wan(path, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# loading


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_to_the_same_network(layout: str, tmp_path: Path) -> None:
    tensors = network().state_dict()
    loaded = load_wan(LAYOUTS[layout](tmp_path, tensors))
    assert equal(loaded.state_dict(), tensors)
    assert loaded.config == CONFIG
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@torch.no_grad()
def test_what_is_loaded_computes_what_was_saved(tmp_path: Path) -> None:
    made = network()
    loaded = load_wan(LAYOUTS["diffusers, a pipeline"](tmp_path, made.state_dict()))
    noisy, level = torch.randn(1, 2, 4, 4, 4), torch.full((1, 2), 0.5)
    texts = torch.randn(1, 1, 3, 8)
    expected, got = (one(noisy, level, one.prompt_keys(texts), one.clip_view(noisy)) for one in (made, loaded))
    assert torch.equal(got, expected)


def test_a_network_that_reads_a_far_state_says_so_by_its_names(tmp_path: Path) -> None:
    made = reading_far(network())
    path = LAYOUTS["generator_ema (Self Forcing)"](tmp_path, made.state_dict())
    assert load_wan(path).config == replace(CONFIG, reads_far=True)
    with pytest.raises(ValueError, match=r"diffusers' Wan has no place for blocks.0.self_attn.linear_proj.weight"):
        convert(path, tmp_path / "there", "diffusers")


def test_a_network_with_maps_for_its_far_state_says_so_by_its_names(tmp_path: Path) -> None:
    made = with_far_maps(reading_far(network()))
    for maps in made.far_maps.values():
        torch.nn.init.normal_(maps.keys)
    loaded = load_wan(LAYOUTS["generator_ema (Self Forcing)"](tmp_path, made.state_dict()))
    assert loaded.config == replace(CONFIG, reads_far=True, far_maps=True)
    assert equal(loaded.state_dict(), made.state_dict())


def test_the_type_is_the_file_s_unless_asked_for(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in network().state_dict().items()}
    path = LAYOUTS["original, one file"](tmp_path, tensors)
    assert equal(load_wan(path).state_dict(), tensors)
    assert {x.dtype for x in load_wan(path, dtype=torch.float32).parameters()} == {torch.float32}


def test_heads_are_told_by_a_config_beside_the_weights(tmp_path: Path) -> None:
    folder = shards(tmp_path / "wan", network().state_dict())
    (folder / "config.json").write_text(json.dumps({"num_heads": 4}))
    assert load_wan(folder).config.heads == 4


def test_the_entry_that_was_read_is_known(tmp_path: Path) -> None:
    path = LAYOUTS["generator_ema under FSDP, with others (Rolling Forcing)"](tmp_path, network().state_dict())
    assert open_checkpoint(path).entry == "generator_ema"
    other = load_wan(path, entries=("generator",)).state_dict()
    assert equal(other, {name: tensor + 1 for name, tensor in network().state_dict().items()})
    assert "no entry model: there are generator, critic, generator_ema, step" in refusal(path, entries=("model",))


@pytest.mark.parametrize(
    "config, tensors, numbers",
    [
        (WAN_1_3B, 825, 1_418_996_800),
        (replace(WAN_1_3B, reads_far=True), 885, 1_419_492_160),
        (WAN_14B, 1095, 14_288_491_584),
    ],
)
def test_the_published_sizes_are_told_by_their_names_and_shapes(config, tensors: int, numbers: int) -> None:
    with torch.device("meta"):
        meta = WanTransformer(config).state_dict()
    assert (len(meta), sum(tensor.numel() for tensor in meta.values())) == (tensors, numbers)
    checkpoint = Checkpoint(source=Path("meta"), meta=meta, read=meta.__getitem__)
    assert network_config(checkpoint) == config
    if not config.reads_far:
        assert {network_name_in_diffusers(name) for name in meta} == in_diffusers(meta).keys()


def test_diffusers_names_of_one_block() -> None:
    ours = [name for name in network().state_dict() if name.startswith("blocks.1.")]
    attention = ["to_q.weight", "to_q.bias", "to_k.weight", "to_k.bias", "to_v.weight", "to_v.bias"]
    attention += ["to_out.0.weight", "to_out.0.bias", "norm_q.weight", "norm_k.weight"]
    theirs = [f"attn1.{name}" for name in attention] + [f"attn2.{name}" for name in attention]
    theirs += ["norm2.weight", "norm2.bias", "ffn.net.0.proj.weight", "ffn.net.0.proj.bias"]
    theirs += ["ffn.net.2.weight", "ffn.net.2.bias", "scale_shift_table"]
    assert sorted(map(network_name_in_diffusers, ours)) == sorted(f"blocks.1.{name}" for name in theirs)


@given(st.data())
def test_wrappers_may_stand_anywhere(data) -> None:
    name = data.draw(st.sampled_from(sorted(network_names())))
    parts = name.split(".")
    for wrapper in data.draw(st.lists(st.sampled_from(WRAPPERS), max_size=4)):
        parts.insert(data.draw(st.integers(0, len(parts) - 1)), wrapper)
    leading = data.draw(st.sampled_from(["", "model.", "generator.", "module.model.", "net."]))
    assert without_wrappers(leading + ".".join(parts)) == name


def network_names() -> set[str]:
    with torch.device("meta"):
        return set(WanTransformer(CONFIG).state_dict())


# refusals


def test_leftovers_gaps_and_misfits_are_named(tmp_path: Path) -> None:
    tensors = network().state_dict()
    missing = {name: x for name, x in tensors.items() if name != "blocks.1.ffn.2.bias"}
    assert "1 missing (blocks.1.ffn.2.bias)" in refusal(saved(tmp_path, missing))
    assert "1 not known (img_emb.proj.weight)" in refusal(
        saved(tmp_path, tensors | {"img_emb.proj.weight": torch.ones(1)})
    )
    misfit = tensors | {"blocks.0.norm3.bias": torch.ones(7)}
    assert "1 of another shape (blocks.0.norm3.bias 7 for 256)" in refusal(saved(tmp_path, misfit))
    theirs = in_diffusers(tensors) | {"blocks.0.attn1.add_k_proj.weight": torch.ones(1)}
    assert "1 not known (blocks.0.attn1.add_k_proj.weight)" in refusal(saved(tmp_path, theirs))


@pytest.mark.parametrize("name", ["patch_embedding.weight", "text_embedding.0.weight", "blocks.0.ffn.0.weight"])
def test_what_the_sizes_are_read_from_may_be_missing_too(name: str, tmp_path: Path) -> None:
    tensors = network().state_dict()
    del tensors[name]
    assert "does not hold a" in refusal(saved(tmp_path, tensors))


def test_two_names_that_would_be_one_are_refused(tmp_path: Path) -> None:
    tensors = network().state_dict()
    double = tensors | {"model.head.head.bias": tensors["head.head.bias"] + 1}
    message = refusal(saved(tmp_path, double))
    assert "1 names twice, such as head.head.bias: head.head.bias and model.head.head.bias" in message


def saved(folder: Path, tensors: Tensors) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("layout", ["original, one file", "bare", "bare, of torch before 1.6"])
def test_a_file_cut_anywhere_is_refused_in_one_line(layout: str, tmp_path: Path) -> None:
    whole = LAYOUTS[layout](tmp_path, network().state_dict())
    content = whole.read_bytes()
    cut = whole.with_name("cut" + whole.suffix)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(content), (20,), generator=generator).tolist()
    for length in [0, 1, 7, 8, 100, len(content) - 1, *drawn]:
        cut.write_bytes(content[:length])
        assert "is not a whole" in refusal(cut)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("layout", ["original, one file", "bare", "bare, of torch before 1.6"])
def test_a_file_with_flipped_bytes_loads_or_is_refused(layout: str, tmp_path: Path) -> None:
    """What describes the tensors is damaged; nothing but a refusal may come of it. In tensors, no flip can be seen."""
    path = LAYOUTS[layout](tmp_path, {f"blocks.{number}.modulation": torch.ones(2, 3) for number in range(3)})
    content, random = path.read_bytes(), Random(0)
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(random.choice([1, 2, 5])):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        path.write_bytes(damaged)
        with suppress(ValueError):
            opened = open_checkpoint(path)
            assert all(opened.read(name).shape == tensor.shape for name, tensor in opened.meta.items())


class Touch:
    """Would make a file if it were unpickled carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"generator": network().state_dict(), "extra": Touch(tmp_path / "ran")}, tmp_path / "model.pt")
    assert "holds code, which is not run" in refusal(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {}, {"a": 3}, {"generator": {"a": "text"}}, torch.ones(2)])
def test_other_things_than_named_tensors_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    assert "tensors" in refusal(tmp_path / "model.pt")


def test_paths_that_lead_to_no_checkpoint(tmp_path: Path) -> None:
    assert "no checkpoint at" in refusal(tmp_path / "absent.pt")
    assert "must hold one checkpoint, or be given with a file's name: there is none" in refusal(tmp_path)
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).touch()
    assert "there is a.pt, b.pt" in refusal(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    assert "does not hold a Wan network: it begins with x" in refusal(tmp_path / "x.safetensors")
    assert "as training here writes them" in refusal(packaged("student.safetensors"))


def test_shards_and_index_must_agree(tmp_path: Path) -> None:
    folder = shards(tmp_path / "wan", network().state_dict())
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    dropped = {name: file for name, file in listed.items() if name != "head.head.bias"}
    for changed, said in (
        (dropped, "do not agree: head.head.bias"),
        (dropped | {"head.head.bias": "absent.safetensors"}, "absent.safetensors, a shard of"),
        (dropped | {"head.head.bias": "../x.safetensors"}, "does not say which of the files beside it"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        assert said in refusal(folder)
    index.write_text("{")
    assert "is not JSON" in refusal(folder)


# LoRA


def lora_of(config=CONFIG, rank: int = 3, seed: int = 5) -> Tensors:
    """PEFT's names for every linear layer inside the blocks, as LongLive publishes them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in network(config=config).state_dict().items():
        if name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator)
    return tensors


@pytest.mark.parametrize("alpha, scale", [(None, 1.0), (6.0, 2.0)])
@pytest.mark.parametrize("wrapped", [True, False])
def test_low_rank_updates_are_added_with_their_scale(alpha, scale, wrapped, tmp_path: Path) -> None:
    base, lora = network().state_dict(), lora_of()
    assert len(lora) == 2 * 10 * CONFIG.layers
    torch.save({"generator_lora": lora, "critic_lora": {}, "step": 3} if wrapped else lora, tmp_path / "lora.pt")
    path = LAYOUTS["generator (ode_init, CausVid, LongLive)"](tmp_path, base)
    loaded = load_wan(path, lora=tmp_path / "lora.pt", alpha=alpha).state_dict()
    for name, tensor in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in lora:
            update = lora[f"{module}.lora_B.weight"].double() @ lora[f"{module}.lora_A.weight"].double()
            torch.testing.assert_close(loaded[name].double(), tensor.double() + scale * update, rtol=0, atol=1e-5)
            assert not torch.equal(loaded[name], tensor)
        else:
            assert torch.equal(loaded[name], tensor)


def test_diffusers_names_and_the_adapter_s_are_taken_for_low_rank_updates_too(tmp_path: Path) -> None:
    path = LAYOUTS["bare"](tmp_path, network().state_dict())
    lora = lora_of()
    other = {
        name.replace("self_attn.", "attn1.").replace("cross_attn.", "attn2.").replace(".lora_A.", ".lora_A.default.")
        .replace("ffn.0", "ffn.net.0.proj").replace("ffn.2", "ffn.net.2"): tensor
        for name, tensor in lora.items()
    }  # fmt: skip
    for part in "qkv":
        other = {name.replace(f".{part}.", f".to_{part}."): tensor for name, tensor in other.items()}
    other = {name.replace(".o.", ".to_out.0."): tensor for name, tensor in other.items()}
    loaded = []
    for number, tensors in enumerate((lora, other)):
        save_file(tensors, tmp_path / f"lora{number}.safetensors")
        loaded.append(load_wan(path, lora=tmp_path / f"lora{number}.safetensors").state_dict())
    assert equal(*loaded)


def test_low_rank_updates_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = LAYOUTS["bare"](tmp_path, network().state_dict())
    lora, first = lora_of(), "base_model.model.blocks.0.self_attn.q"
    half = {name: x for name, x in lora.items() if name != f"{first}.lora_B.weight"}
    for tensors, said in (
        (half, "has only lora_A of blocks.0.self_attn.q.weight"),
        (half | {f"{first}.lora_B.weight": torch.ones(256, 4)}, "does not fit blocks.0.self_attn.q.weight"),
        (lora | {"base_model.model.blocks.9.ffn.0.lora_A.weight": torch.ones(3, 4)}, "updates blocks.9.ffn.0.weight"),
        (lora | {"alpha": torch.ones(1)}, "holds alpha, which is no part of a low-rank update"),
        (lora | {f"{first}.lora_A.default.weight": torch.ones(3, 256)}, "updates blocks.0.self_attn.q twice"),
    ):
        save_file(tensors, tmp_path / "lora.safetensors")
        assert said in refusal(path, lora=tmp_path / "lora.safetensors")
    assert "none is given" in refusal(path, alpha=2.0)


# memory

PEAK = """
import sys, torch
from longtake.models.checkpoints import load_wan

def kibibytes(what):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(what)).split()[1])

load_wan(sys.argv[2], dtype=torch.bfloat16)  # a small one, so that what is only made once is there
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = kibibytes("VmRSS")
network = load_wan(sys.argv[1], dtype=torch.bfloat16)
weights = sum(parameter.nbytes for parameter in network.parameters())
print((kibibytes("VmHWM") - before) * 1024 / weights)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("layout", ["original, shards", "generator (ode_init, CausVid, LongLive)"])
def test_the_peak_of_memory_is_the_weights_and_little_more(layout: str, tmp_path: Path) -> None:
    """Resident memory, mapped parts of the file included, of a fresh process: 132 MB of file, 66 MB of weights."""
    (tmp_path / "small").mkdir()
    small = LAYOUTS[layout](tmp_path / "small", network().state_dict())
    config = replace(CONFIG, dim=384, heads=3, ffn_dim=1536, layers=14)
    path = LAYOUTS[layout](tmp_path, network(config=config).state_dict())
    program = [sys.executable, "-c", PEAK, str(path), str(small)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) <= 1.15


# converting


@pytest.mark.parametrize("layout", ["original, shards", "diffusers, a pipeline", "bare, model. (Reward Forcing)"])
def test_converting_there_and_back_changes_no_bit(layout: str, tmp_path: Path) -> None:
    tensors = {name: x.bfloat16() if "ffn" in name else x for name, x in network().state_dict().items()}  # mixed types
    source = LAYOUTS[layout](tmp_path, tensors)
    steps = [("diffusers", "a"), ("longtake", "b.safetensors"), ("diffusers", "c.safetensors"), ("original", "d")]
    for to, name in steps:
        convert(source, tmp_path / name, to)
        source = tmp_path / name
        expected = {"diffusers": in_diffusers(tensors), "longtake": prefixed(tensors, "network."), "original": tensors}
        assert equal(written(source), expected[to])
        assert load_wan(source).config == CONFIG
    assert not list(tmp_path.glob("*.part"))


def test_weights_larger_than_a_shard_are_written_in_shards_with_an_index(tmp_path: Path) -> None:
    tensors = network().state_dict()
    source = LAYOUTS["bare"](tmp_path, tensors)
    limit = max(tensor.nbytes for tensor in tensors.values())
    convert(source, tmp_path / "out", "diffusers", shard_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= limit for file in files)
    assert equal(load_wan(tmp_path / "out").state_dict(), tensors)
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    sizes = {file.name: sum(tensor.nbytes for tensor in load_file(file).values()) for file in files}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    in_order = [sizes[file] for file in dict.fromkeys(index["weight_map"].values())]
    assert all(one + other > limit for one, other in pairwise(in_order)), "no two would go in one"


@pytest.mark.parametrize("name, to", [("out.safetensors", "original"), ("out", "diffusers"), ("out", "original")])
def test_files_that_are_written_are_those_that_others_read(name: str, to: str, tmp_path: Path) -> None:
    """transformers asks what they are of, other users may read them; and a matrix may lie in memory as it likes."""
    tensors = {key: x.T.contiguous().T if x.ndim == 2 else x for key, x in network().state_dict().items()}
    torch.save(tensors, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / name, to)
    made = tmp_path / name
    (file,) = [made] if made.is_file() else made.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert file.stat().st_mode & 0o044 == 0o044
    assert equal(load_wan(made).state_dict(), tensors)


def test_a_folder_tells_the_sizes_in_the_words_of_the_original(tmp_path: Path) -> None:
    """Those of the config.json that is published with Wan2.1-T2V-1.3B, in small."""
    convert(LAYOUTS["bare"](tmp_path, network().state_dict()), tmp_path / "out", "original")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "_class_name": "WanModel", "dim": 256, "eps": 1e-6, "ffn_dim": 32, "freq_dim": 16, "in_dim": 4,
        "model_type": "t2v", "num_heads": 2, "num_layers": 2, "out_dim": 4, "text_len": 512,
    }  # fmt: skip


def test_a_merged_network_can_be_written(tmp_path: Path) -> None:
    source = LAYOUTS["bare"](tmp_path, network().state_dict())
    save_file(lora_of(), tmp_path / "lora.safetensors")
    convert(source, tmp_path / "out.safetensors", "original", lora=tmp_path / "lora.safetensors")
    expected = load_wan(source, lora=tmp_path / "lora.safetensors").state_dict()
    assert equal(written(tmp_path / "out.safetensors"), expected)


def test_conversions_that_cannot_be_are_refused_and_write_nothing(tmp_path: Path) -> None:
    source = LAYOUTS["bare"](tmp_path, network().state_dict())
    torch.save({"patch_embedding.weight": torch.ones(2, 2)}, tmp_path / "half.pt")
    there = tmp_path / "there"
    there.mkdir()
    before = sorted(tmp_path.rglob("*"))
    for arguments, said in (
        ((source, there, "diffusers"), "exists already"),
        ((source, tmp_path / "out", "onnx"), "no layout 'onnx': there are original, diffusers, longtake"),
        ((source, tmp_path / "out", "longtake"), "is one file"),
        ((source, tmp_path / "no" / "out", "diffusers"), "there is no folder"),
        ((tmp_path / "half.pt", tmp_path / "out", "diffusers"), "does not hold a whole Wan network"),
    ):
        with pytest.raises(ValueError, match=said):
            convert(*arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_space_is_told_of_beforehand(tmp_path: Path, monkeypatch) -> None:
    source = LAYOUTS["bare"](tmp_path, network().state_dict())
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"has 0\.0 GB free, and the weights take"):
        convert(source, tmp_path / "out", "original")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("to, name", [("original", "o.safetensors"), ("diffusers", "o"), ("longtake", "o.safetensors")])
def test_a_write_that_fails_leaves_nothing(to: str, name: str, tmp_path: Path) -> None:
    """Files may be no larger than 1 MiB meanwhile, so writing breaks off as on a full disk."""
    source = LAYOUTS["bare"](tmp_path, network().state_dict())
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, usual[1]))
    try:
        with pytest.raises(ValueError, match="could not be written"):
            convert(source, tmp_path / name, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_what_stands_beside_the_target_stays(tmp_path: Path) -> None:
    source = LAYOUTS["bare"](tmp_path, network().state_dict())
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "notes").write_text("mine")
    convert(source, tmp_path / "out", "diffusers")
    assert (tmp_path / "out.part" / "notes").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "out", "out.part"}


def test_our_own_files_of_other_models_are_refused(tmp_path: Path) -> None:
    tensors = prefixed(network().state_dict(), "network.") | {"text.x": torch.ones(1)}
    described = {"network": {"dim": 256, "heads": 2, "ffn_dim": 32, "layers": 2, "text_dim": 8, "channels": 4}}
    described["network"]["level_dim"] = 16
    save_weights(tmp_path / "toy.safetensors", tensors, described, int8=False)
    assert "1 not known (text.x)" in refusal(tmp_path / "toy.safetensors")


def ours(path: Path, made: WanTransformer) -> Path:
    """A file in our own layout, which alone tells all sizes."""
    save_weights(path, prefixed(made.state_dict(), "network."), {"network": asdict(made.config)}, int8=False)
    return path


def test_our_own_files_with_converted_layers_load_and_are_copied(tmp_path: Path) -> None:
    made = converted(network(), Conversion(layers=(1,)))
    source = ours(tmp_path / "ours.safetensors", made)
    convert(source, tmp_path / "again.safetensors", "longtake")
    for path in (source, tmp_path / "again.safetensors"):
        loaded = load_wan(path)
        assert loaded.config == made.config and equal(loaded.state_dict(), made.state_dict())


@pytest.mark.parametrize("to", ["original", "diffusers"])
@pytest.mark.parametrize(
    "sizes, file_loses, folder_loses",
    [
        ({"heads": 4}, "heads, rotary_split", None),
        ({"rotary_split": (32, 16, 16)}, "rotary_split", "rotary_split"),
        ({"rotary_split": (44, 42, 42)}, None, None),  # that of every head of 128
        ({"extent": 15}, "extent", "extent"),
        ({"conversion": Conversion(layers=(0,))}, "conversion", "conversion"),
    ],
)
def test_a_layout_that_would_lose_sizes_is_refused(to, sizes, file_loses, folder_loses, tmp_path: Path) -> None:
    made = network(config=replace(CONFIG, **sizes))
    source = ours(tmp_path / "ours.safetensors", made)
    for name, lost in (("a.safetensors", file_loses), ("b.pth", file_loses), ("c", folder_loses)):
        target = tmp_path / name
        if lost is None:
            convert(source, target, to)
            assert load_wan(target).config.heads == made.config.heads
            assert load_wan(target).config.axes == made.config.axes
        elif to == "original" or "conversion" not in sizes:  # diffusers' layout has no names for features
            with pytest.raises(ValueError, match=f"{name} would not tell {lost}: a file in the layout longtake does"):
                convert(source, target, to)
            assert not target.exists()


def test_convert_on_the_command_line(tmp_path: Path, capsys) -> None:
    path = LAYOUTS["generator_ema under FSDP, with others (Rolling Forcing)"](tmp_path, network().state_dict())
    target = tmp_path / "out"
    assert main(["models", "convert", str(path), str(target), "--to", "diffusers", "--entry", "critic"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{target}\n"
    assert f"{len(network().state_dict())} tensors of" in said.err and "entry critic" in said.err
    expected = {name: tensor + 1 for name, tensor in network().state_dict().items()}
    assert equal(load_wan(target).state_dict(), expected)
    assert main(["models", "convert", str(path), str(target)]) == 2
    assert capsys.readouterr().err == f"longtake: {target} exists already\n"


# the Wan VAE


def vae() -> WanVAE:
    torch.manual_seed(1)
    return WanVAE(VAE_CONFIG)


def published_vae_names() -> set[str]:
    """Names of diffusers' AutoencoderKLWan, layer by layer."""
    residual = ["norm1.gamma", "norm2.gamma", "conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
    both = ["weight", "bias"]
    names = {f"{conv}.{end}" for conv in ("quant_conv", "post_quant_conv") for end in both}
    for half in ("encoder", "decoder"):
        names |= {f"{half}.{conv}.{end}" for conv in ("conv_in", "conv_out") for end in both}
        names |= {f"{half}.mid_block.resnets.{i}.{name}" for i in (0, 1) for name in residual}
        names |= {f"{half}.mid_block.attentions.0.{conv}.{end}" for conv in ("to_qkv", "proj") for end in both}
        names |= {f"{half}.mid_block.attentions.0.norm.gamma", f"{half}.norm_out.gamma"}
    names |= {f"encoder.down_blocks.{i}.{name}" for i in (0, 1, 3, 4, 6, 7, 9, 10) for name in residual}
    names |= {f"encoder.down_blocks.{i}.resample.1.{end}" for i in (2, 5, 8) for end in both}
    names |= {f"encoder.down_blocks.{i}.time_conv.{end}" for i in (5, 8) for end in both}
    names |= {f"encoder.down_blocks.{i}.conv_shortcut.{end}" for i in (3, 6) for end in both}
    names |= {f"decoder.up_blocks.{i}.resnets.{j}.{name}" for i in range(4) for j in range(3) for name in residual}
    names |= {f"decoder.up_blocks.{i}.upsamplers.0.resample.1.{end}" for i in (0, 1, 2) for end in both}
    names |= {f"decoder.up_blocks.{i}.upsamplers.0.time_conv.{end}" for i in (0, 1) for end in both}
    return names | {f"decoder.up_blocks.1.resnets.0.conv_shortcut.{end}" for end in both}


def test_the_published_vae_s_names_are_diffusers_own() -> None:
    with torch.device("meta"):
        meta = WanVAE(WanVAEConfig()).state_dict()
    renamed = [codec_name_in_diffusers(name, WanVAEConfig()) for name in meta]
    assert len(renamed) == len(set(renamed)) == 194
    assert set(renamed) == published_vae_names()


def test_the_vae_goes_through_every_layout_without_a_changed_bit(tmp_path: Path) -> None:
    tensors = vae().state_dict()
    source = tmp_path / "Wan2.1_VAE.pth"
    torch.save(tensors, source)
    for to, name in [("diffusers", "vae"), ("longtake", "ours.safetensors"), ("original", "back.pth")]:
        convert(source, tmp_path / name, to)
        source = tmp_path / name
        loaded = load_wan_vae(source)
        assert equal(loaded.state_dict(), tensors)
        assert torch.equal(loaded.latent_mean, vae().latent_mean)
    assert equal(written(source), tensors)
    assert written(tmp_path / "vae").keys() == published_vae_names()
    assert equal(load_wan_vae(tmp_path).state_dict(), tensors)  # a folder of several: the one of the usual name


def test_a_vae_is_read_from_the_entry_that_is_named_and_takes_no_alpha(tmp_path: Path) -> None:
    tensors = vae().state_dict()
    torch.save({"model": {name: x + 1 for name, x in tensors.items()}, "ema": tensors}, tmp_path / "vae.pt")
    convert(tmp_path / "vae.pt", tmp_path / "out.pth", "original", entries=("ema",))
    assert equal(written(tmp_path / "out.pth"), tensors)
    for options in ({"alpha": 2.0}, {"lora": tmp_path / "out.pth"}):
        with pytest.raises(ValueError, match="is a Wan VAE, which takes no LoRA and no alpha"):
            convert(tmp_path / "vae.pt", tmp_path / "other.pth", "original", entries=("ema",), **options)
    with pytest.raises(ValueError, match="the original Wan VAE is one file"):
        convert(tmp_path / "vae.pt", tmp_path / "other", "original", entries=("ema",))


def test_a_vae_s_layout_that_would_lose_sizes_is_refused(tmp_path: Path) -> None:
    config = replace(VAE_CONFIG, latent_mean=(0.5,) * 16)
    description = {"wan_vae": asdict(config)}
    save_weights(tmp_path / "ours.safetensors", WanVAE(config).state_dict(), description, int8=False)
    with pytest.raises(ValueError, match=r"back\.pth would not tell latent_mean"):
        convert(tmp_path / "ours.safetensors", tmp_path / "back.pth", "original")
    convert(tmp_path / "ours.safetensors", tmp_path / "vae", "diffusers")
    assert torch.equal(load_wan_vae(tmp_path / "vae").latent_mean, WanVAE(config).latent_mean)


@torch.no_grad()
def test_a_loaded_vae_decodes_as_the_one_that_was_saved(tmp_path: Path) -> None:
    made = vae().eval()
    torch.save({"module." + name: x for name, x in made.state_dict().items()}, tmp_path / "vae.pth")
    latents = torch.randn(1, 2, 16, 2, 2)
    assert torch.equal(load_wan_vae(tmp_path / "vae.pth").decode(latents)[0], made.decode(latents)[0])


def test_a_network_is_no_vae(tmp_path: Path) -> None:
    path = LAYOUTS["bare"](tmp_path, network().state_dict())
    with pytest.raises(ValueError, match="does not fit WanVAE"):
        load_wan_vae(path)


def test_a_network_opened_for_its_names_reads_nothing(tmp_path: Path) -> None:
    checkpoint, layout = open_network(LAYOUTS["diffusers, one file"](tmp_path, network().state_dict()))
    assert layout == "diffusers"
    assert {tensor.device.type for tensor in checkpoint.meta.values()} == {"meta"}


def test_without_diffusers_one_line_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for hand_over in (lambda: to_transformer(network()), lambda: from_transformer(object())):
        with pytest.raises(ValueError, match=r'pip install "longtake\[diffusers\]"'):
            hand_over()
