"""A healthy machine is found healthy, and each thing that is broken on purpose is found, with what to do."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longtake import doctor, recipes
from longtake.attention.backends import BACKENDS, Backend
from longtake.cli import main
from longtake.doctor import Finding, Requirement
from longtake.evaluation import kernels
from longtake.recipes import devices, weight_files

LONGTAKE = [sys.executable, "-c", "import sys; from longtake.cli import main; sys.exit(main())"]
CPU = torch.device("cpu")


def found(part: Callable[[], Any]) -> list[Finding]:
    return list(doctor._tried("part", part, lambda text: None))


def test_this_machine_is_healthy(tmp_path: Path) -> None:
    done = subprocess.run([*LONGTAKE, "doctor", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)
    problems = [one for one in told["findings"] if one["state"] == "problem"]
    assert (done.returncode, problems, told["healthy"]) == (0, [], True)
    names = [one["name"] for one in told["findings"]]
    assert {"longtake", "torch", "av", "extra wan", "cpu", "embedded model", "student.safetensors"} <= set(names)
    assert "block-sparse, plain torch, cpu, float32" in names
    (speed,) = (one["numbers"] for one in told["findings"] if one["part"] == "speed")
    assert speed["frames_per_second"] > 0
    assert [line.split()[1] for line in done.stderr.splitlines()] == [
        "package", "extra", "device", "attention", "weights", "file", "speed", "disk",
    ]  # fmt: skip


def test_a_machine_without_torch_is_told_so(tmp_path: Path) -> None:
    program = """
import sys
class Without:
    def find_spec(self, name, *more):
        if name.partition(".")[0] == "torch":
            raise ImportError("libtorch.so: wrong machine\\nand more")
sys.meta_path.insert(0, Without())
from longtake.cli import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (problem,) = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    assert "cannot be imported (libtorch.so: wrong machine); install it anew" in problem
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("broken, code", [(True, 1), (False, 0)])
def test_problems_are_lines_and_the_exit_code(
    broken: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding(part="a", name="a", about="is good"), Finding(part="b", name="b", about="slow", state="note")]
    if broken:
        findings.append(Finding(part="c", name="c", about="bad", state="problem", advice="mend it"))
    monkeypatch.setattr(doctor, "examine", lambda say: iter(findings))
    assert main(["doctor"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert ("problem  c: bad; mend it" in lines) == broken == ("all that longtake needs works here" not in lines)
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["healthy"] == (not broken)


# Packages


def test_requirements_are_those_of_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2.11",
        "numpy",
        "huggingface_hub<3,>=1.32; extra == 'wan'",
        "triton; (sys_platform == 'linux') and extra == \"dev\"",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert doctor.requirements() == [
        Requirement("torch", "2.11", None),
        Requirement("numpy", None, None),
        Requirement("huggingface_hub", None, "wan"),
        Requirement("triton", None, "dev"),
    ]


@pytest.mark.parametrize(
    "needed, state, said",
    [
        (Requirement("numpy", None, None), "ok", metadata.version("numpy")),
        (Requirement("torch", "2.9.12", None), "ok", torch.__version__),
        (Requirement("torch", "99.1", None), "problem", "but 99.1 is needed"),
        (Requirement("nowhere-to-be-found", "1", None), "problem", "not installed"),
    ],
)
def test_packages_of_the_core(needed: Requirement, state: str, said: str) -> None:
    finding = doctor._package(needed)
    assert finding.state == state and said in finding.about
    assert finding.advice == ("" if state == "ok" else f'pip install "{needed.name}>={needed.least}"')


def test_an_extra_that_is_not_whole_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        Requirement("numpy", None, "here"),
        Requirement("numpy", None, "gone"),
        Requirement("absent-1", None, "gone"),
    ]
    monkeypatch.setattr(doctor, "requirements", lambda: asked)
    whole, torn = found(doctor._extras)
    assert (whole.name, whole.state, whole.advice) == ("extra here", "ok", "")
    assert (torn.state, torn.advice) == ("note", 'pip install "longtake[gone]"') and "absent-1 missing" in torn.about


# Attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_this_machine_attends_with_is_right(dtype: torch.dtype) -> None:
    checks = list(kernels.attention_checks(CPU, dtype))
    assert all(check.passed for check in checks)
    assert {"dense, flash", "dense, math", "block-sparse, plain torch", "linear"} <= {check.name for check in checks}


@pytest.mark.parametrize(
    "planted, caught",
    [("block_sparse", "block-sparse"), ("joined", "near and far")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_answers_a_little_wrong_is_found(
    planted: str, caught: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, planted, a_little_wrong(getattr(kernels, planted)))
    (failed,) = [check.name for check in kernels.attention_checks(CPU, dtype) if not check.passed]
    assert failed.startswith(caught)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_that_answers_a_little_wrong_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.BACKENDS, "math", Backend(a_little_wrong(BACKENDS["math"].attend), on_cpu=True))
    assert [check.name for check in kernels.attention_checks(CPU, dtype) if not check.passed] == ["dense, math"]


def a_little_wrong(right: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrong(*given: Any, **more: Any) -> torch.Tensor:
        out_BTND = right(*given, **more).clone()
        out_BTND[:, -1] = 0  # the last of 90 queries
        return out_BTND

    return wrong


@pytest.mark.parametrize(
    "forced, state, said",
    [
        (None, "ok", "whichever kernel torch takes, but plain products for many keys in bfloat16"),
        ("math", "ok", "math; tried: none"),
        ("cudnn", "problem", "runs on a GPU alone"),
        ("quick", "problem", "there are cudnn, fa4, fa3, flash"),
    ],
)
def test_the_kernel_that_answers_is_told(forced: str, state: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGTAKE_ATTENTION", raising=False)
    if forced:
        monkeypatch.setenv("LONGTAKE_ATTENTION", forced)
    told = doctor._chosen_attention("cpu")
    assert told.state == state and said in told.about and bool(told.advice) == (state == "problem")


def test_a_name_that_cannot_be_taken_is_to_blame_and_not_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTAKE_ATTENTION", "quick")
    problems = [one for one in (*found(doctor._attention), *found(doctor._speed)) if one.state == "problem"]
    assert len(problems) == 4 and {one.advice for one in problems} == {"name another, or none"}


def test_a_wrong_linear_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    read = kernels.linear.read
    monkeypatch.setattr(kernels.linear, "read", lambda sums, queries: read(sums, queries) * 1.01)
    assert [one.name for one in kernels.attention_checks(CPU, torch.float32) if not one.passed] == ["linear"]


def test_a_kernel_that_breaks_off_is_a_problem_and_the_others_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*given: Any, **more: Any) -> torch.Tensor:
        raise RuntimeError("no image for this device\nat line 3")

    monkeypatch.setattr(kernels, "block_sparse", breaks)
    findings = found(doctor._attention)
    broken = [one for one in findings if one.state == "problem"]
    assert len(broken) == 2 and all("no image for this device" in one.in_words() for one in broken)
    assert all("\n" not in one.in_words() for one in broken) and len(findings) > 4


# The embedded model


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the embedded decoder, which is looked for in the place of every file."""
    path = tmp_path / "copy.safetensors"
    path.write_bytes(weight_files.packaged(weight_files.CODEC_FILE).read_bytes())
    monkeypatch.setattr(weight_files, "packaged", lambda name: path)
    return path


def test_weights_that_are_whole(packaged: Path) -> None:
    files = [*dict.fromkeys(recipes.MODELS.values()), weight_files.CODEC_FILE]
    assert [(one.state, one.name) for one in found(doctor._weights)] == [("ok", file) for file in files]


def test_weights_that_are_cut_off(packaged: Path) -> None:
    packaged.write_bytes(packaged.read_bytes()[:-100])
    for one in found(doctor._weights):
        assert one.state == "problem" and "not a whole safetensors file" in one.about and "pip install" in one.advice


def test_weights_that_are_not_numbers(packaged: Path) -> None:
    from safetensors.torch import load_file, save_file

    from longtake.models.weights import save_weights

    save_file({name: x.float() for name, x in load_file(packaged).items()}, packaged)
    assert all("no description" in one.about for one in found(doctor._weights))
    save_weights(packaged, {"x": torch.tensor([1.0, float("nan")])}, {"codec": {}}, int8=False)
    assert all(one.state == "problem" and "not finite, in x" in one.about for one in found(doctor._weights))


def test_weights_other_than_those_installed(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = SimpleNamespace(name=packaged.name, hash=metadata.FileHash("sha256=" + doctor._sha256(packaged)))
    record.locate = lambda: packaged
    monkeypatch.setattr(metadata, "files", lambda name: [record])
    assert all("as installed" in one.about for one in found(doctor._weights))
    changed = bytearray(packaged.read_bytes())
    changed[-7] ^= 1  # one bit of a number, which loads
    packaged.write_bytes(changed)
    assert all("SHA-256" in one.about and one.state == "problem" for one in found(doctor._weights))


def test_weights_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "TOY_WEIGHTS", "toy/nowhere")
    assert all("not part of this installation" in one.about for one in found(doctor._weights))


@pytest.mark.parametrize("factor, state", [(1.0, "ok"), (0.99, "note")])
def test_whether_it_is_live_is_said(factor: float, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"frames_per_second": 16 * factor, "real_time_factor": factor, "first_frame_seconds": 0.5}
    result |= {"device": "cpu", "precision": "float32"}
    monkeypatch.setattr("longtake.evaluation.speed.bench_stream", lambda *given, **more: result)
    monkeypatch.setattr(recipes, "load", lambda *given, **more: None)
    (speed,) = found(doctor._speed)
    assert speed.state == state and ("too slow to watch live" in speed.advice) == (state == "note")


# The rest of the machine


def test_a_file_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, frames: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longtake.media.mp4.Mp4Writer.write", full)
    (file,) = found(doctor._files)
    assert file.state == "problem" and "No space left on device" in file.about and file.advice


def test_pictures_that_come_back_otherwise_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.setattr("longtake.media.mp4.read_frames", lambda path: np.zeros((4, 64, 96, 3), np.uint8))
    (file,) = found(doctor._files)
    assert file.state == "problem" and "not what was written" in file.about


def test_a_driver_that_torch_cannot_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert [one.name for one in found(doctor._devices)] == ["cpu"]
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    *_, card = found(doctor._devices)
    assert (card.name, card.state) == ("cuda", "note") and "built for CUDA" in card.advice


def test_a_gpu_that_does_not_compute_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: Any) -> torch.device:
        raise ValueError("cannot compute on device 'cuda:0': out of memory")

    monkeypatch.setattr(devices, "device_named", refused)
    card = doctor._gpu("cuda:0")
    assert card.state == "problem" and "out of memory" in card.about and "--device cpu" in card.advice


def test_a_disk_too_small_for_what_is_published_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, state in ((10**9, "note"), (10**12, "ok")):
        monkeypatch.setattr("longtake.models.hub._free_bytes", lambda folder, free=free: free)
        (disk,) = found(doctor._disk)
        assert disk.state == state and bool(disk.advice) == (state == "note")
