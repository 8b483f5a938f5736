"""The main job with the embedded model: a prompt goes in, a video that plays comes out."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import longtake
from longtake.cli import main
from longtake.generation.stream import Stream
from longtake.media.mp4 import Mp4Writer, read_comment, read_frames
from longtake.recipes import MODELS
from longtake.recipes.weight_files import packaged
from tests import processes

PROMPT = "a red ball bounces over green hills"
LONGTAKE = [sys.executable, "-c", "import sys; from longtake.cli import main; sys.exit(main())"]


def run(*arguments: str, folder: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return processes.run(main, arguments, folder=folder, **more)


def test_a_video_that_plays(tmp_path):
    command = [*LONGTAKE, "generate", PROMPT, "--seconds", "2", "--seed", "7"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path = tmp_path / done.stdout.strip()
    assert path.name == "a-red-ball-bounces-over-green-hills-7.mp4"
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        assert (video.codec_context.name, video.pix_fmt) == ("h264", "yuv420p")
        assert (video.width, video.height, video.average_rate, video.frames) == (192, 112, 16, 32)


def test_generate_writes_exactly_the_pictures_of_the_iterator(tmp_path, monkeypatch):
    written = []
    write = Mp4Writer.write
    monkeypatch.setattr(Mp4Writer, "write", lambda writer, frames: written.append(frames) or write(writer, frames))
    assert main(["generate", PROMPT, "--seconds", "1", "--dtype", "float32", "-o", str(tmp_path / "out.mp4")]) == 0
    with longtake.load("toy", recipe="hybrid_forcing", dtype=torch.float32).stream(PROMPT, seed=42) as stream:
        expected = np.concatenate([next(stream).frames for _ in range(2)])
    assert np.array_equal(np.concatenate(written), expected[:16])


@pytest.mark.parametrize("given, most", [(1, 9), (26, 21), (99, 81)])
def test_it_goes_on_from_an_image_or_from_the_end_of_a_video(given: int, most: int, tmp_path, monkeypatch) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (given, 112, 192, 3), dtype=np.uint8)
    seen = []
    stream = longtake.Engine.stream
    monkeypatch.setattr(
        longtake.Engine,
        "stream",
        lambda self, *said, **more: seen.append(more["pictures"]) or stream(self, *said, **more),
    )
    monkeypatch.setattr("longtake.media.reading.read_pictures", lambda path, **size: frames)
    path = tmp_path / "out.mp4"
    assert main(["generate", PROMPT, "--seconds", "0.2", "--video", "given.mp4", "-o", str(path)]) == 0
    assert len(seen[0]) == most, "whole blocks, at most the 21 latent frames that the network was trained on"
    assert np.array_equal(seen[0], frames.repeat(9, axis=0) if given == 1 else frames[-most:])
    assert json.loads(read_comment(path))["image"] == "given.mp4"


def test_after_a_given_image_prompts_come_at_their_times(tmp_path, monkeypatch) -> None:
    given = np.zeros((1, 112, 192, 3), np.uint8)
    monkeypatch.setattr("longtake.media.reading.read_pictures", lambda path, **size: given)
    made, redirected = [], []
    write, redirect = Mp4Writer.write, Stream.redirect
    monkeypatch.setattr(Mp4Writer, "write", lambda writer, frames: made.append(len(frames)) or write(writer, frames))
    monkeypatch.setattr(
        Stream,
        "redirect",
        lambda stream, text, **how: redirected.append((sum(made), text)) or redirect(stream, text, **how),
    )
    timeline = f"{PROMPT} | 0.75s: it starts to snow at night"
    arguments = ["--seconds", "1.5", "--levels", "1", "--image", "given.png", "-o", str(tmp_path / "out.mp4")]
    assert main(["generate", timeline, *arguments]) == 0
    assert redirected == [(12, "it starts to snow at night")], "0.75 seconds are 12 pictures"


def test_pictures_that_cannot_begin_a_video_are_one_line(tmp_path, capsys) -> None:
    with Mp4Writer(tmp_path / "short.mp4", 64, 64, 16) as writer:
        writer.write(np.zeros((5, 64, 64, 3), np.uint8))
    (tmp_path / "prompts.txt").write_text(PROMPT)
    one, many = ["generate", PROMPT], ["generate", "--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path)]
    for arguments, said in (
        ([*one, "--video", str(tmp_path / "short.mp4")], "has 5 pictures; a stream goes on from 9 or more"),
        ([*one, "--image", str(tmp_path / "absent.png")], "no image or video at"),
        ([*many, "--image", str(tmp_path / "short.mp4")], "--image goes with one PROMPT"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "short.mp4"]


def test_a_timeline_redirects_the_stream_at_its_times(tmp_path, monkeypatch):
    written = []
    write = Mp4Writer.write
    monkeypatch.setattr(Mp4Writer, "write", lambda writer, frames: written.append(frames) or write(writer, frames))
    path = str(tmp_path / "out.mp4")
    timeline = f"0s: {PROMPT} | 0.5s: it starts to snow at night"
    assert main(["generate", timeline, "--seconds", "1.3125", "--dtype", "float32", "-o", path]) == 0
    with longtake.load("toy", recipe="hybrid_forcing", dtype=torch.float32).stream(PROMPT, seed=42) as stream:
        expected = [next(stream).frames]
        stream.redirect("it starts to snow at night")
        expected.append(next(stream).frames)
    assert np.array_equal(np.concatenate(written), np.concatenate(expected))
    prompts = [(cue["at"], cue["prompt"]) for cue in json.loads(read_comment(path))["prompts"]]
    assert prompts == [(0, PROMPT), (0.5, "it starts to snow at night")]


def says_in_one_line(done: subprocess.CompletedProcess[str], said: str) -> None:
    """The last line, after what was told of progress if anything was, and nothing on stdout."""
    assert done.returncode == 2
    assert done.stdout == ""
    *progress, last = done.stderr.splitlines()
    assert all(" s made" in line for line in progress)
    assert last.startswith("longtake: ") and said in last


@pytest.mark.parametrize("prompt", ["", "   ", "a zorblax quuxes", f"{PROMPT} | a zorblax quuxes"])
def test_a_prompt_that_cannot_be_shown_is_one_clear_line(tmp_path, prompt):
    done = run("generate", prompt, "--dtype", "float32", folder=tmp_path)
    says_in_one_line(done, "does not know: 'zorblax'" if prompt.strip() else "empty")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def limited(size: int) -> Callable[[], None]:
    """For a process whose files cannot grow beyond so many bytes, as on a disk that is full; what it says is a file."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_keeps_what_is_made(tmp_path):
    done = run("generate", PROMPT, "--seconds", "60", "-o", "out.mp4", folder=tmp_path, limit=limited(60_000))
    says_in_one_line(done, "out.part.mp4: File too large; out.mp4 keeps what was made until then")
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert len(list(itertools.islice(container.decode(video=0), 16))) == 16


def test_a_full_disk_keeps_what_was_to_be_replaced(tmp_path):
    (tmp_path / "out.mp4").write_text("precious")
    options = ["--seconds", "60", "-o", "out.mp4", "--force"]
    done = run("generate", PROMPT, *options, folder=tmp_path, limit=limited(60_000))
    says_in_one_line(done, "out.part.mp4: File too large; out.part.mp4 keeps what was made until then")
    assert (tmp_path / "out.mp4").read_text() == "precious"
    with av.open(str(tmp_path / "out.part.mp4")) as container:
        assert len(list(itertools.islice(container.decode(video=0), 16))) == 16


def test_a_disk_on_which_nothing_fits(tmp_path):
    done = run("generate", PROMPT, "--seconds", "1", "-o", "out.mp4", folder=tmp_path, limit=limited(500))
    says_in_one_line(done, "out.part.mp4: File too large")
    assert "keeps" not in done.stderr


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="a folder that nobody can write to, root included")
def test_a_folder_that_cannot_be_written(tmp_path):
    says_in_one_line(run("generate", PROMPT, "--seconds", "1", folder=Path("/sys")), "a-red-ball-bounces-over-green-")


def test_weights_that_are_cut_off(tmp_path):
    for name in ("student.safetensors", "codec_decoder.safetensors"):
        shutil.copy(packaged(name), tmp_path)
    student = tmp_path / "student.safetensors"
    os.truncate(student, student.stat().st_size // 2)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run("generate", PROMPT, "--model", str(tmp_path), folder=tmp_path)
    says_in_one_line(done, "student.safetensors is not a whole safetensors file")
    assert "fetch it again" in done.stderr and before == sorted(path.name for path in tmp_path.iterdir())


def test_a_length_below_nothing(tmp_path):
    done = run("generate", PROMPT, "--seconds", "-1", folder=tmp_path)
    says_in_one_line(done, "a video lasts more than 0 seconds, and less than 1e+09, got -1")


@pytest.mark.parametrize("recipe", [recipe for model, recipe in MODELS if model == "toy"])
def test_every_recipe_that_is_listed_makes_a_video(recipe, tmp_path, capsys):
    path = tmp_path / "out.mp4"
    options = ["--recipe", recipe, "--levels", "1", "--seconds", "1.3", "--dtype", "float32", "-o", str(path), "--json"]
    assert main(["generate", PROMPT, *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["recipe"], told["pictures"], told["path"]) == (recipe, 21, str(path))
    assert len(read_frames(path)) == 21


def test_interrupt_keeps_what_is_made(tmp_path):
    command = [*LONGTAKE, "generate", PROMPT, "--seconds", "3600", "-o", "out.mp4"]
    # Where tests run in the background Ctrl-C is ignored, and what they start would inherit that.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, **pipes, **heard) as running:
        assert running.stderr is not None
        assert "s made" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        printed, _ = running.communicate(timeout=30)
    assert running.returncode == 130
    assert printed == "out.mp4\n"
    assert len(read_frames(tmp_path / "out.mp4")) >= 9
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_bench_prints_json_alone(tmp_path):
    done = run("bench", "stream", "--seconds", "2", "--repeats", "1", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["frames_per_second"] > 0
    assert result["model"] == "toy"


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "self_forcing"], ["models"]])
def test_a_reader_who_has_gone_hears_no_complaints(arguments):
    """As with `| head`, whether it goes before the first line or after."""
    with subprocess.Popen(
        [*LONGTAKE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        running.stdout.close()
        assert (running.stderr.read(), running.wait(60)) == ("", 141)


def test_what_is_made_is_kept_though_nobody_hears_of_it(tmp_path):
    command = [*LONGTAKE, "generate", PROMPT, "--seconds", "0.5", "--levels", "1", "-o", "out.mp4"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        running.stdout.close()
        assert running.wait(60) == 141
    assert len(read_frames(tmp_path / "out.mp4")) == 8
