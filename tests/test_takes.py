"""Takes and replays as a user meets them: the command line with the embedded model."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from longtake import load
from longtake.cli import _ended_as_by_ctrl_c, main
from longtake.cli.filming import _keep, show
from longtake.generation.stream import StreamBatch
from longtake.generation.take import Take
from longtake.media.mp4 import Mp4Writer, count_frames, first_difference, part_of, read_frames, read_record
from tests import tiny

PROMPT, SNOW, FISH = (
    "a red ball bounces over green hills",
    "it starts to snow at night",
    "a blue fish spins in the city",
)
QUICK = ["--levels", "1", "--dtype", "float32", "--device", "cpu"]
LONGTAKE = [sys.executable, "-c", "import sys; from longtake.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one.mp4, redirected at 0.5 s, and one.take, where it ends."""
    folder = tmp_path_factory.mktemp("takes")
    arguments = ["--seconds", "1", "--take", str(folder / "one.take"), "-o", str(folder / "one.mp4")]
    assert main(["generate", f"{PROMPT} | 0.5s: {SNOW}", *arguments, *QUICK]) == 0
    return folder


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """All pictures that writers are given."""
    seen: list[np.ndarray] = []
    write = Mp4Writer.write
    monkeypatch.setattr(Mp4Writer, "write", lambda writer, frames: seen.append(frames) or write(writer, frames))
    return seen


def test_a_take_whose_name_was_taken_meanwhile_gets_another(tmp_path: Path, capsys) -> None:
    path = tmp_path / "one.take"
    path.write_text("precious")
    _keep(tiny.engine().stream("a ball"), path, whole=True)
    assert path.read_text() == "precious" and Take.load(tmp_path / "one-2.take").state["blocks"] == 0
    assert "one-2.take" in capsys.readouterr().err


@pytest.mark.parametrize("trouble", ["a name that is taken", "a terminal that is closed"])
def test_whatever_comes_of_its_video_a_take_is_kept(tmp_path: Path, monkeypatch, trouble: str) -> None:
    video, take, write = tmp_path / "one.mp4", tmp_path / "one.take", Mp4Writer.write

    def troubled(writer: Mp4Writer, frames: np.ndarray) -> None:
        write(writer, frames)
        if trouble == "a name that is taken":
            video.write_text("precious")
        elif writer.frames_written > 9:
            signal.raise_signal(signal.SIGHUP), signal.raise_signal(signal.SIGHUP)  # of the shell, and of the system

    monkeypatch.setattr(Mp4Writer, "write", troubled)
    with open(os.devnull) as nowhere, monkeypatch.context() as patched, _ended_as_by_ctrl_c():
        if trouble == "a terminal that is closed":
            gone = {"write.side_effect": OSError(5, "Input/output error"), "fileno.return_value": nowhere.fileno()}
            patched.setattr(sys, "stdout", Mock(**gone)), patched.setattr(sys, "stderr", Mock(**gone))
        with pytest.raises(OSError):
            show(tiny.engine().stream("a ball"), {}, 21, video, {}, take)
    assert Take.load(take).state["blocks"] == 2
    kept = part_of(video) if trouble == "a name that is taken" else video
    assert count_frames(kept) == 21


def test_a_video_and_what_its_take_goes_on_with_are_one_video(first: Path, tmp_path: Path, written) -> None:
    assert count_frames(first / "one.mp4") == 21, "it ends with a whole block"
    resumed = ["take", "resume", str(first / "one.take"), "--seconds", "1", "-o", str(tmp_path / "two.mp4")]
    assert main(resumed) == 0
    two = np.concatenate(written)
    written.clear()
    prompt = f"{PROMPT} | 0.5s: {SNOW}"
    assert main(["generate", prompt, "--seconds", "2.3125", "-o", str(tmp_path / "all.mp4"), *QUICK]) == 0
    assert len(two) == 16 and np.array_equal(np.concatenate(written)[21:], two)


def test_words_that_go_over_are_replayed_and_gone_on_from(tmp_path: Path, capsys) -> None:
    """Told by a file, kept half way, told again: what was made until then is made again to the bit."""
    lines = [{"at": 0, "prompt": PROMPT}, {"at": 0.5, "prompt": SNOW, "transition": 4, "method": "slerp"}]
    (tmp_path / "story.yaml").write_text(json.dumps(lines))
    asked = ["generate", "--prompts", str(tmp_path / "story.yaml"), "--seconds", "2", "-o", str(tmp_path / "made")]
    assert main([*asked, *QUICK]) == 0
    (video,) = (tmp_path / "made").glob("*.mp4")
    assert read_record(video)["prompts"][1] | {"over": 4, "blend": "slerp"} == read_record(video)["prompts"][1]
    assert main(["replay", str(video)]) == 0
    assert "the same, picture by picture" in capsys.readouterr().err
    engine = load("toy", recipe="self_forcing_sink", levels=1, dtype=torch.float32)
    with engine.stream(PROMPT, seed=3) as stream:
        next(stream)
        stream.redirect(SNOW, over=4)
        next(stream)
        Take.of(stream).save(tmp_path / "half.take")
    gone_on = str(tmp_path / "on.mp4")
    assert main(["take", "resume", str(tmp_path / "half.take"), "--seconds", "1.5", "-o", gone_on]) == 0
    assert main(["replay", gone_on]) == 0
    assert "the same, picture by picture" in capsys.readouterr().err


def test_forks_of_a_fork_go_on_under_other_prompts(first: Path, tmp_path: Path, written, capsys) -> None:
    def fork(take: Path, prompt: str, name: str) -> np.ndarray:
        written.clear()
        files = ["-o", str(tmp_path / f"{name}.mp4"), "--take", str(tmp_path / f"{name}.take")]
        assert main(["take", "fork", str(take), "--prompt", prompt, "--seconds", "0.75", *files]) == 0
        return np.concatenate(written)

    snow, fish = fork(first / "one.take", SNOW, "snow"), fork(first / "one.take", FISH, "fish")
    assert snow.shape == fish.shape == (12, 112, 192, 3) and not np.array_equal(snow, fish)
    fork(tmp_path / "fish.take", PROMPT, "back")
    capsys.readouterr()
    assert main(["take", "info", str(tmp_path / "back.take"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["at"], one["prompt"]) for one in told["told"]] == [
        (0, PROMPT), (9 / 16, SNOW), (21 / 16, FISH), (33 / 16, PROMPT),
    ]  # fmt: skip
    assert (told["blocks"], told["seconds"], told["recipe"]) == (4, 45 / 16, "hybrid_forcing")
    assert main(["take", "info", str(tmp_path / "back.take")]) == 0
    assert "hybrid_forcing, 1 levels, seed 42: 2.8125 s made" in capsys.readouterr().out
    again = str(tmp_path / "again.mp4")
    assert main(["replay", str(tmp_path / "back.mp4"), "-o", again]) == 0, "from its beginning, without any take"
    assert Path(again).read_bytes() == (tmp_path / "back.mp4").read_bytes()


def test_a_replay_is_the_same_file(first: Path, tmp_path: Path, capsys) -> None:
    video = shutil.copy(first / "one.mp4", tmp_path / "one.mp4")
    assert main(["replay", str(video)]) == 0
    out, error = capsys.readouterr()
    assert out.strip() == str(tmp_path / "one-again.mp4") and "the same, picture by picture" in error
    assert (tmp_path / "one-again.mp4").read_bytes() == video.read_bytes()


def rewritten(video: Path, to: Path, **changes: object) -> Path:
    """The same pictures, encoded anew, with something else in the record; None takes it out."""
    record = {key: value for key, value in (read_record(video) | changes).items() if value is not None}
    frames = read_frames(video)
    with Mp4Writer(to, frames.shape[2], frames.shape[1], 16, comment=json.dumps(record)) as writer:
        writer.write(frames)
    return to


def test_a_replay_tells_what_differs(first: Path, tmp_path: Path, capsys) -> None:
    other = rewritten(first / "one.mp4", tmp_path / "other.mp4", longtake="0.0.1", torch=None, seed=7)
    assert main(["replay", str(other)]) == 1
    error = capsys.readouterr().err
    assert "other.mp4 was made with longtake 0.0.1, and this is" in error
    assert "other.mp4 was made with torch unknown" in error
    assert "they differ from picture 0 on" in error


def test_a_replay_tells_that_blocks_had_company(first: Path, tmp_path: Path, capsys) -> None:
    told = {"verb": "begin", "prompts": [PROMPT], "block": 0, "picture": 0}
    record, count = read_record(first / "one.mp4"), len(read_frames(first / "one.mp4"))
    line = {"seed": record["seed"], "told": [told], "in_company": True}
    live = {"lines": [line], "spans": [[0, 0, count]]}
    assert main(["replay", str(rewritten(first / "one.mp4", tmp_path / "one.mp4", live=live))]) in (0, 1)
    assert "made together with other streams" in capsys.readouterr().err


def test_a_replay_of_what_went_on_from_an_image_needs_it(tmp_path: Path, capsys) -> None:
    with Mp4Writer(tmp_path / "given.mp4", 192, 112, 16) as writer:
        writer.write(np.random.default_rng(0).integers(0, 255, (9, 112, 192, 3), dtype=np.uint8))
    given, video = str(tmp_path / "given.mp4"), str(tmp_path / "one.mp4")
    assert main(["generate", PROMPT, "--seconds", "0.5", "--video", given, "-o", video, *QUICK]) == 0
    assert main(["replay", video]) == 2
    assert "one.mp4 goes on from given.mp4: name it with --image" in capsys.readouterr().err
    assert main(["replay", video, "--image", given]) == 0


def test_a_recipe_whose_steps_are_uneven_is_made_again_with_these(tmp_path: Path) -> None:
    files = ["--take", str(tmp_path / "one.take"), "-o", str(tmp_path / "one.mp4")]
    assert main(["generate", PROMPT, "--seconds", "0.5", "--recipe", "causvid", *files, *QUICK[2:]]) == 0
    assert main(["replay", str(tmp_path / "one.mp4")]) == 0
    resumed = ["take", "resume", str(tmp_path / "one.take"), "--seconds", "0.5", "-o", str(tmp_path / "two.mp4")]
    assert main(resumed) == 0


def test_what_cannot_be_replayed_is_one_line(first: Path, tmp_path: Path, capsys) -> None:
    video = first / "one.mp4"
    with Mp4Writer(tmp_path / "bare.mp4", 64, 64, 16) as writer:
        writer.write(np.zeros((1, 64, 64, 3), np.uint8))
    (tmp_path / "text.mp4").write_text("no video")
    other = rewritten(video, tmp_path / "other.mp4", weights="0123456789abcdef")
    old = rewritten(video, tmp_path / "old.mp4", seconds=None)
    lost = rewritten(video, tmp_path / "lost.mp4", recipe="self_forcign")
    nowhere = rewritten(video, tmp_path / "nowhere.mp4", device=7)
    untimed = rewritten(video, tmp_path / "untimed.mp4", prompts=[{"at": "soon", "unit": "seconds", "prompt": PROMPT}])
    astray = rewritten(video, tmp_path / "astray.mp4", take={"blocks": 3})
    deep = tmp_path / "deep.mp4"
    with Mp4Writer(deep, 64, 64, 16, comment="[" * 100_000) as writer:
        writer.write(np.zeros((1, 64, 64, 3), np.uint8))
    before = sorted(tmp_path.iterdir())
    for arguments, said in (
        ([str(deep)], "deep.mp4 tells nothing of how it was made"),
        ([str(tmp_path / "bare.mp4")], "bare.mp4 tells nothing of how it was made"),
        ([str(tmp_path / "text.mp4")], "text.mp4 is no video"),
        ([str(tmp_path / "absent.mp4")], "absent.mp4: No such file"),
        ([str(other)], "was made with weights 0123456789abcdef, and toy has"),
        ([str(old)], "does not tell all of how it was made: seconds is missing"),
        ([str(nowhere)], "does not tell all of how it was made: device is missing or unreadable"),
        ([str(untimed)], "a time is a number from 0, got 'soon'"),
        ([str(astray)], "the history of this video cannot be read"),
        ([str(lost)], "did you mean self_forcing"),
        ([str(video), "--image", "given.png"], "needs no --image"),
        ([str(video), "-o", str(other)], "exists already"),
    ):
        assert main(["replay", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and len(error.splitlines()) == 1, error
    assert sorted(tmp_path.iterdir()) == before


def test_takes_that_cannot_be_used_are_one_line(first: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    take, cut = first / "one.take", tmp_path / "cut.take"
    cut.write_bytes(take.read_bytes()[:9999])
    monkeypatch.chdir(tmp_path)
    for arguments, said in (
        (["take", "info", str(cut)], "cut.take is not a whole take"),
        (["take", "resume", str(first / "one.mp4")], "one.mp4 is not a whole take"),
        (["take", "resume", str(tmp_path / "absent.take")], "no take at"),
        (["take", "resume", str(take), "--seconds", "-1"], "lasts more than 0 seconds"),
        (["take", "resume", str(take), "--take", str(cut)], "cut.take exists already"),
        (["take", "fork", str(take), "--prompt", "a zorblax quuxes"], "zorblax"),
        (["take", "fork", str(take), "--prompt", " "], "the prompt is empty"),
        (["generate", PROMPT, "--take", str(take)], "one.take exists already"),
        (["generate", PROMPT, "--take", "absent/one.take"], "there is no folder absent"),
        (["generate", PROMPT, "--take", "/proc/one.take"], "/proc/one.take.part: "),
        (["generate", "--prompts", "a.txt", "--take", "one.take"], "--take goes with one PROMPT"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and len(error.splitlines()) == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["cut.take"]


def test_other_weights_are_refused_with_the_name_of_the_take(first: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("longtake.generation.stream.fingerprint", lambda tensors: "0123456789abcdef")
    assert main(["take", "resume", str(first / "one.take")]) == 2
    assert "one.take: this take does not go on here: it was made with weights" in capsys.readouterr().err


def test_ctrl_c_waits_for_the_block_and_keeps_a_take(tmp_path: Path) -> None:
    files = ["--take", "one.take", "-o", "one.mp4"]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [*LONGTAKE, "generate", PROMPT, "--seconds", "3600", *files, *QUICK]
    with subprocess.Popen(command, cwd=tmp_path, **pipes, **heard) as running:
        assert running.stderr is not None
        assert "s made" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        printed, said = running.communicate(timeout=30)
    assert (running.returncode, printed) == (130, "one.mp4\n") and "the take is one.take" in said
    assert (count_frames(tmp_path / "one.mp4") - 9) % 12 == 0, "whole blocks"
    assert main(["replay", str(tmp_path / "one.mp4")]) == 0, "as many pictures as there are, of an hour's record"


def test_a_stream_that_stops_within_a_block_leaves_its_pictures_and_says_so(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    after = StreamBatch.__next__

    def impatient(batch: StreamBatch) -> object:
        if batch.blocks == 1:
            batch.close()  # as it does whatever comes up within a block
            raise KeyboardInterrupt
        return after(batch)

    monkeypatch.setattr(StreamBatch, "__next__", impatient)
    files = ["--take", str(tmp_path / "one.take"), "-o", str(tmp_path / "one.mp4")]
    assert main(["generate", PROMPT, "--seconds", "2", *files, *QUICK]) == 130
    assert "no take at" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["one.mp4"]


def test_a_video_that_lacks_the_end_of_a_block_leaves_no_take(tmp_path: Path, capsys, monkeypatch) -> None:
    write = Mp4Writer.write

    def stop_early(writer: Mp4Writer, frames: np.ndarray) -> None:
        write(writer, frames[:3])
        if writer.frames_written > 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Mp4Writer, "write", stop_early)
    files = ["--take", str(tmp_path / "one.take"), "-o", str(tmp_path / "one.mp4")]
    assert main(["generate", PROMPT, "--seconds", "2", *files, *QUICK]) == 130
    assert "no take at" in capsys.readouterr().err and not (tmp_path / "one.take").exists()


def test_nobody_elses_file_is_touched_and_what_is_in_the_way_is_told_first(first: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "one.take.part").write_text("precious")
    generate = ["generate", PROMPT, "--seconds", "1", *QUICK, "-o", str(tmp_path / "one.mp4"), "--take"]
    assert main([*generate, str(tmp_path / "one.take")]) == 2
    assert "one.take.part is being written, or was left" in capsys.readouterr().err
    assert (tmp_path / "one.take.part").read_text() == "precious"
    assert main([*generate, str(tmp_path / "one.mp4")]) == 2
    assert "cannot be both the video and the take" in capsys.readouterr().err
    for verb in (["take", "resume", str(first / "one.take")], ["replay", str(first / "one.mp4")]):
        assert main([*verb, "-o", str(first / "one.mp4")]) == 2
        assert "one.mp4 exists already: choose another name, or remove it first\n" in capsys.readouterr().err
        assert main([*verb, "-o", str(tmp_path / "nowhere" / "two.mp4")]) == 2
        assert f"there is no folder {tmp_path / 'nowhere'}\n" in capsys.readouterr().err


def test_first_difference_counts_pictures(tmp_path: Path) -> None:
    for name, count, white in (("one", 3, 5), ("two", 3, 2), ("three", 4, 9)):
        frames = np.zeros((count, 64, 64, 3), np.uint8)
        frames[white:] = 255
        with Mp4Writer(tmp_path / f"{name}.mp4", 64, 64, 16) as writer:
            writer.write(frames)
    one, two, three = (tmp_path / f"{name}.mp4" for name in ("one", "two", "three"))
    assert [first_difference(one, other) for other in (one, two, three)] == [None, 2, 3]
