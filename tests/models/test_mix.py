"""Students between two students."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from longtake.cli import main
from longtake.models.delta import save_delta
from longtake.models.mix import save_mix
from longtake.models.weights import load_weights, save_weights


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    save_weights(path, tensors, {"network": {}, "recipes": [path.stem]}, int8=False)
    return path


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    dice = torch.Generator().manual_seed(0)
    w, moved, far = (torch.randn(6, 8, generator=dice) for _ in range(3))
    bias = torch.randn(6, generator=dice)
    return saved(tmp_path / "base.safetensors", w=w, b=bias), saved(
        tmp_path / "tuned.safetensors", w=moved, b=2 * bias, far=far
    )


@pytest.mark.parametrize("share", [0.25, 0.7])
def test_it_is_so_far_on_the_way_and_what_is_new_is_there_whole(pair, tmp_path, share) -> None:
    before, after = (load_weights(file)[0] for file in pair)
    told = save_mix(tmp_path / "mixed.safetensors", *pair, share=share)
    mixed, said = load_weights(tmp_path / "mixed.safetensors")
    assert mixed.keys() == after.keys() and said["recipes"] == ["tuned"] and said["mix"]["share"] == share
    for name in before:
        expected = (1 - share) * before[name] + share * after[name]
        torch.testing.assert_close(mixed[name], expected, rtol=0.01, atol=0.03)  # int8 or bfloat16
    torch.testing.assert_close(mixed["far"], after["far"], rtol=0.01, atol=0.03)
    assert told["bytes"] == (tmp_path / "mixed.safetensors").stat().st_size


def test_what_cannot_be_mixed_is_refused_in_one_line(pair, tmp_path, capsys) -> None:
    base, tuned = map(str, pair)
    for share in ("0", "1", "1.5"):
        assert main(["models", "mix", base, tuned, "-o", str(tmp_path / "m.safetensors"), "--share", share]) == 2
        assert "above 0 and below 1" in capsys.readouterr().err
    assert main(["models", "mix", tuned, base, "-o", str(tmp_path / "m.safetensors"), "--share", "0.5"]) == 2
    assert "it lacks or reshapes 1 tensors (far)" in capsys.readouterr().err
    assert main(["models", "mix", base, tuned, "-o", tuned, "--share", "0.5"]) == 2
    assert "must be a new file" in capsys.readouterr().err and not (tmp_path / "m.safetensors").exists()


def test_students_that_are_deltas_are_mixed_as_what_they_stand_for(pair, tmp_path) -> None:
    base, tuned = pair
    start, delta = tmp_path / "student.safetensors", tmp_path / "delta.safetensors"
    shutil.copyfile(base, start)
    save_delta(delta, start, tuned, rank=0)
    out = [tmp_path / "of_delta.safetensors", tmp_path / "of_whole.safetensors"]
    for second, mixed in zip((delta, tuned), out, strict=True):
        assert main(["models", "mix", str(base), str(second), "-o", str(mixed), "--share", "0.5"]) == 0
    assert main(["models", "mix", str(delta), str(tuned), "-o", str(tmp_path / "m.safetensors"), "--share", "0.5"]) == 0
    (made, said), (expected, _) = map(load_weights, out)
    assert said.keys() == {"network", "recipes", "mix"}, "a mix is no delta"
    for name, x in expected.items():
        torch.testing.assert_close(made[name], x, rtol=0.01, atol=0.04)


def test_the_command_tells_what_it_wrote(pair, tmp_path, capsys) -> None:
    out = tmp_path / "m.safetensors"
    assert main(["models", "mix", *map(str, pair), "-o", str(out), "--share", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(out), "bytes": out.stat().st_size, "share": 0.5}
