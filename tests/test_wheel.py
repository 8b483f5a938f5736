"""A wheel built from this tree, in an environment that holds nothing else of longtake, makes a video."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from longtake import recipes
from longtake.media.mp4 import read_frames
from longtake.recipes.weight_files import CODEC_FILE, NETWORK_FILE

ROOT = Path(__file__).parents[1]
WEIGHTS = "longtake/toy/weights/"
MIB = 2**20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    (built,) = folder.glob("longtake-*.whl")
    return built


def test_the_wheel_carries_what_generate_needs_and_no_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    weights = {name.removeprefix(WEIGHTS) for name in names if name.startswith(WEIGHTS) and "safetensors" in name}
    assert weights == {CODEC_FILE, NETWORK_FILE, *recipes.MODELS.values()}
    assert "longtake/models/hub.yaml" in names
    assert "longtake/serving/static/index.html" in names
    assert all(name.startswith("longtake") for name in names)
    assert wheel.stat().st_size < 30 * MIB


def test_the_wheel_generates(wheel, tmp_path):
    environment = fresh_environment(tmp_path / "environment", wheel)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    command = [str(environment / "bin" / "longtake"), "generate", "a red ball bounces over green hills"]
    done = subprocess.run(
        [*command, "--seconds", "1", "--out", "out.mp4"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin"},  # above all no PYTHONPATH that leads back to this tree
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert read_frames(folder / "out.mp4").shape == (16, 112, 192, 3)


def fresh_environment(folder: Path, wheel: Path) -> Path:
    """An environment with the wheel in it, that finds the dependencies where this one has them.

    Python looks into its own folder first and does not follow the links (.pth) of the other, so an editable longtake
    there stays out of sight.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    assert (packages / "longtake" / "cli" / "__main__.py").exists()
    paths = sysconfig.get_paths()
    (packages / "dependencies.pth").write_text(f"{paths['purelib']}\n{paths['platlib']}\n")
    return folder
