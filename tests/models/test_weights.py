import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from longtake.models.text import WordEncoderConfig
from longtake.models.wan import WanConfig
from longtake.models.weights import load_into, load_weights, save_weights, sizes_of


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(6, 4),
        "a.bias": torch.randn(6),
        "conv": torch.randn(3, 2, 3, 3),
        "n": torch.arange(3),
    }


def test_exact_files_round_trip(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", tensors(), {"size": 3}, int8=False)
    loaded, description = load_weights(tmp_path / "w.safetensors")
    assert description == {"size": 3}
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors().items())


def test_int8_rows_err_by_half_a_step_of_their_own_largest_value(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", tensors(), {}, int8=True)
    loaded, _ = load_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors().keys()
    for name in ("a.weight", "conv"):
        rows, original = loaded[name].flatten(1), tensors()[name].flatten(1)
        step = original.abs().amax(1, keepdim=True) / 127
        assert ((rows - original).abs() <= step * 0.5001).all()
    assert torch.equal(loaded["a.bias"], tensors()["a.bias"].bfloat16().float())
    assert torch.equal(loaded["n"], torch.arange(3))


def test_one_scale_does_not_drown_the_small_parts_of_a_modulation(tmp_path: Path) -> None:
    modulation = torch.tensor([0.01, 1.0]).view(1, 2, 1).repeat(1, 1, 8) * torch.linspace(0.5, 1, 8)
    save_weights(tmp_path / "w.safetensors", {"modulation": modulation}, {}, int8=True)
    loaded, _ = load_weights(tmp_path / "w.safetensors")
    torch.testing.assert_close(loaded["modulation"], modulation, rtol=2**-8, atol=0)


def test_a_write_that_fails_is_told_of_and_leaves_what_was_there(tmp_path: Path) -> None:
    """Files may be no larger than 1 MiB meanwhile, so writing breaks off as on a full disk."""
    path = tmp_path / "w.safetensors"
    save_weights(path, tensors(), {}, int8=False)
    before, usual = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, usual[1]))
    try:
        with pytest.raises(ValueError, match=r"w\.safetensors could not be written"):
            save_weights(path, {"large": torch.zeros(2**19)}, {}, int8=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert [path] == list(tmp_path.iterdir()) and path.read_bytes() == before
    with pytest.raises(ValueError, match="could not be written"):
        save_weights(tmp_path / "nowhere" / "w.safetensors", tensors(), {}, int8=False)


def test_a_truncated_a_missing_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "w.safetensors"
    save_weights(whole, tensors(), {}, int8=False)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-7])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_weights(cut)
    with pytest.raises(ValueError, match="no weights at"):
        load_weights(tmp_path / "absent.safetensors")
    save_file(tensors(), tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="no description"):
        load_weights(tmp_path / "foreign.safetensors")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, tensors(), {"old": True}, int8=False)
    with pytest.raises(TypeError):
        save_weights(path, tensors(), {"not json": torch.zeros(1)}, int8=False)
    assert load_weights(path)[1] == {"old": True}


def test_leftovers_gaps_and_misfits_are_named() -> None:
    module, source = nn.Linear(4, 6), Path("w.safetensors")
    fitting = {"weight": torch.zeros(6, 4), "bias": torch.zeros(6)}
    load_into(module, fitting, source)
    assert module.weight.abs().sum() == 0
    with pytest.raises(ValueError, match=r"1 not known \(extra\)"):
        load_into(module, fitting | {"extra": torch.zeros(1)}, source)
    with pytest.raises(ValueError, match=r"1 missing \(bias\); 1 of another shape \(weight 6x5 for 6x4\)"):
        load_into(module, {"weight": torch.zeros(6, 5)}, source)


def test_sizes_that_this_version_does_not_know_are_refused_by_name() -> None:
    assert sizes_of(WordEncoderConfig, {"words": 9, "length": 5, "dim": 8}).layers == 2
    with pytest.raises(ValueError, match="WordEncoderConfig has no depth, pace in this version of longtake"):
        sizes_of(WordEncoderConfig, {"words": 9, "length": 5, "dim": 8, "pace": 2, "depth": 3})
    conversion = {"layers": [0], "learns": True}
    with pytest.raises(ValueError, match="Conversion has no learns"):
        WanConfig.of({"dim": 4, "heads": 1, "ffn_dim": 4, "layers": 1, "text_dim": 4, "conversion": conversion})
