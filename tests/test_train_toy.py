"""The training script end to end at a tiny size, on pictures of noise: every stage starts from the last one's files."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from longtake import recipes
from longtake.toy import clips, world

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_toy.py"
NETWORK = json.dumps({"dim": 32, "heads": 2, "ffn_dim": 64, "layers": 2, "text_dim": 16, "extent": 9})
CODEC = [f"{part}_{size}" for part in ("encoder", "decoder") for size in ("widths=[8,8,8]", "blocks=[1,0,0]")]


def noise_pictures(scenes, pictures, first=0, painter=None) -> world.Rendering:
    size = len(scenes), pictures
    frames = torch.rand(*size, 3, world.HEIGHT, world.WIDTH) * 2 - 1
    return world.Rendering(frames, torch.rand(*size, world.HEIGHT, world.WIDTH))


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Run one stage in this process; returns its folder."""
    specification = importlib.util.spec_from_file_location("train_toy", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "train_toy", script)
    specification.loader.exec_module(script)
    monkeypatch.setattr(world, "render", noise_pictures)
    monkeypatch.setattr(clips, "render", noise_pictures)

    def run(stage: str, *arguments: object) -> Path:
        out = tmp_path / stage
        monkeypatch.setattr(sys, "argv", ["train_toy.py", stage, "--out", str(out), *map(str, arguments)])
        script.main()
        record = json.loads((out / "record.json").read_text())
        assert record["stage"] == stage and record["spent"]["steps"] == record["config"]["steps"]
        return out

    return run


def test_from_nothing_to_a_student_that_streams(train, tmp_path) -> None:
    codec = train("codec", "--set", "steps=1", "batch=1", "pictures=5", *CODEC)
    pool = ("--codec", codec, "--set", "steps=2", "batch=2", "pool=2")
    teacher = train("teacher", *pool, f"network={NETWORK}") / recipes.TEACHER_FILE
    forced = train("teacher_forcing", *pool, "--weights", teacher) / recipes.NETWORK_FILE
    train("dmd", *pool, "most_blocks=4", "--teacher", teacher, "--weights", forced)
    student = tmp_path / "dmd" / recipes.NETWORK_FILE
    (tmp_path / "dmd" / recipes.CODEC_FILE).write_bytes((codec / recipes.CODEC_FILE).read_bytes())
    with recipes.load(student, recipe="self_forcing_sink", dtype=torch.float32).stream("a red ball") as stream:
        assert next(stream).frames.shape == (9, world.HEIGHT, world.WIDTH, 3)
    with pytest.raises(SystemExit, match="holds another run"):
        train("dmd", *pool, "--teacher", teacher, "--weights", forced)
    with pytest.raises(SystemExit, match="no setting 'bach'"):
        train("codec", "--set", "bach=1")
