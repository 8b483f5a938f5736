"""Many prompts, a video each: `longtake generate --prompts FILE -o DIR` over a tiny engine, once over a real one."""

import fcntl
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import longtake.recipes
from longtake import batch, parallel
from longtake.cli import main
from longtake.generation.script import Script, script_from
from longtake.generation.stream import StreamBatch
from longtake.media.mp4 import Mp4Writer, read_comment, read_frames
from tests import tiny
from tests.chat_server import chat_server
from tests.processes import free_port, run_ranks

HALF_A_SECOND = ["--seconds", "0.5"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Three prompts in a file, and an engine that is there at once."""
    monkeypatch.setattr("longtake.recipes.load", lambda model, **options: tiny.engine())
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("A red ball.\na fox\nA red ball, at night\n")
    return tmp_path


def generate(*arguments: str) -> int:
    return main(["generate", "--prompts", "prompts.txt", "-o", "out/videos", *HALF_A_SECOND, *arguments])


def videos() -> list[str]:
    return sorted(path.name for path in Path("out/videos").glob("*.mp4"))


def test_a_video_for_each_prompt_and_seed(folder, capsys) -> None:
    assert generate("--seeds", "2", "--seed", "7") == 0
    names = [
        f"{number}-{slug}-{seed}.mp4"
        for number, slug in (("0001", "a-red-ball"), ("0002", "a-fox"), ("0003", "a-red-ball-at-night"))
        for seed in (7, 8)
    ]
    assert videos() == names
    captured = capsys.readouterr()
    assert captured.out.split() == [f"out/videos/{name}" for name in names]
    assert captured.err == "longtake: 6 videos: 0 are there, 6 to make\n"
    assert {len(read_frames(f"out/videos/{name}")) for name in names} == {8}
    assert main(["generate", "A red ball.", "--seed", "8", "-o", "alone.mp4", *HALF_A_SECOND]) == 0
    assert np.array_equal(read_frames("alone.mp4"), read_frames(f"out/videos/{names[1]}"))
    assert json.loads(read_comment(f"out/videos/{names[1]}")) == json.loads(read_comment("alone.mp4"))


def test_names_as_vbench_wants_them(folder) -> None:
    assert generate("--seeds", "2", "--names", "vbench") == 0
    prompts = ["A red ball, at night", "A red ball.", "a fox"]
    assert videos() == [f"{prompt}-{i}.mp4" for prompt in prompts for i in range(2)]


def test_a_long_video_tells_how_far_it_is(folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(batch, "_TELL_EVERY_SECONDS", 0.0)
    assert generate("--seconds", "1") == 0
    assert "longtake: 0002-a-fox-42.mp4: 0.6 of 1.0 s made\n" in capsys.readouterr().err


def test_what_is_there_is_not_made_again(folder, capsys, monkeypatch) -> None:
    assert generate() == 0
    Path("out/videos/0002-a-fox-42.mp4").unlink()
    kept = {name: Path("out/videos", name).stat().st_mtime_ns for name in videos()}
    capsys.readouterr()
    assert generate() == 0
    assert capsys.readouterr().out == "out/videos/0002-a-fox-42.mp4\n"
    assert all(Path("out/videos", name).stat().st_mtime_ns == when for name, when in kept.items())
    monkeypatch.setattr(batch, "_make", lambda *_: pytest.fail("made again"))
    assert generate() == 0
    assert capsys.readouterr() == ("", "longtake: 3 videos: 3 are there, 0 to make\n")


def test_what_was_made_otherwise_is_refused(folder, capsys) -> None:
    assert generate() == 0
    capsys.readouterr()
    assert generate("--seconds", "0.75") == 2
    assert "is there, but was made with other seconds: choose another folder" in capsys.readouterr().err
    with Mp4Writer("out/videos/0002-a-fox-42.mp4", 48, 32, 16, overwrite=True) as writer:
        writer.write(np.zeros((1, 32, 48, 3), np.uint8))
    assert generate() == 2
    assert "0002-a-fox-42.mp4 is there, but tells nothing of how it was made" in capsys.readouterr().err


def test_videos_of_weights_that_were_trained_on_are_refused(folder, capsys, monkeypatch) -> None:
    assert generate() == 0
    trained = tiny.engine()
    with torch.no_grad():
        trained.network.layers[1].ffn[0].weight[0, 0] += 0.1
    monkeypatch.setattr("longtake.recipes.load", lambda model, **options: trained)
    assert generate() == 2
    assert "is there, but was made with other weights" in capsys.readouterr().err


def test_other_versions_and_devices_go_on_with_a_folder_and_other_codecs_do_not(folder, capsys, monkeypatch) -> None:
    assert generate() == 0
    there = dict.fromkeys(longtake.Engine.circumstances.fget(tiny.engine()), "another")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(longtake.Engine, "circumstances", there)
        assert generate() == 0
    assert ", 0 to make" in capsys.readouterr().err
    other = tiny.engine()
    with torch.no_grad():
        next(other.codec.parameters())[0] += 0.1
    monkeypatch.setattr("longtake.recipes.load", lambda model, **options: other)
    assert generate() == 2
    assert "is there, but was made with other codec_weights" in capsys.readouterr().err


def test_weights_are_the_same_in_other_precisions() -> None:
    engine, lower = tiny.engine(), tiny.engine()
    lower.to(torch.bfloat16)
    assert engine.weights == lower.weights


def test_interrupt_keeps_finished_videos_and_pictures(folder, capsys, monkeypatch) -> None:
    calls = []
    real = StreamBatch._next_pictures

    def stopped(stream, latents):
        calls.append(1)
        if len(calls) == 4:  # a second is two blocks: this is the second of the second video
            raise KeyboardInterrupt
        return real(stream, latents)

    monkeypatch.setattr(StreamBatch, "_next_pictures", stopped)
    assert generate("--seconds", "1") == 130
    assert videos() == ["0001-a-red-ball-42.mp4", "unfinished-0002-42.mp4"]
    assert len(read_frames("out/videos/unfinished-0002-42.mp4")) == 9
    assert "stopped: the same command goes on" in capsys.readouterr().err
    assert generate("--seconds", "1") == 0
    assert len(capsys.readouterr().out.split()) == 2
    assert videos() == ["0001-a-red-ball-42.mp4", "0002-a-fox-42.mp4", "0003-a-red-ball-at-night-42.mp4"]


def test_what_a_killed_run_left_does_not_stop_the_next(folder) -> None:
    Path("out/videos").mkdir(parents=True)
    Path("out/videos/unfinished-0002-42.part.mp4").write_bytes(b"left")
    assert generate() == 0
    assert len(videos()) == 3


def test_one_run_at_a_time(folder, capsys) -> None:
    Path("out/videos").mkdir(parents=True)
    with Path("out/videos/.longtake.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert generate() == 2
    assert "another run is writing to out/videos" in capsys.readouterr().err
    assert generate() == 0


def test_timelines_and_lengths_of_a_file(folder) -> None:
    Path("prompts.jsonl").write_text(
        '{"prompts": ["a", "b"]}\n'
        '{"prompts": [{"startTime": 0, "endTime": 0.25, "prompts": [{"text": "c", "weight": 1}]}]}\n'
    )
    arguments = ["generate", "--prompts", "prompts.jsonl", "-o", "out"]
    assert main([*arguments, "--seconds", "2"]) == 0
    assert len(read_frames("out/0002-c-42.mp4")) == 32
    assert [cue["prompt"] for cue in json.loads(read_comment("out/0001-a-42.mp4"))["prompts"]] == ["a", "b"]
    Path("prompts.jsonl").write_text(Path("prompts.jsonl").read_text().splitlines()[1])
    assert main([*arguments[:-1], "own"]) == 0
    assert len(read_frames("own/0001-c-42.mp4")) == 4


@pytest.mark.parametrize(
    "prompts, arguments, says",
    [
        ("a/b", ["--names", "vbench"], "no file can be called 'a/b-0.mp4'"),
        ("x" * 300, ["--names", "vbench"], "no file can be called"),
        ("a\na", ["--names", "vbench"], "2 videos would be called 'a-0.mp4'"),
        ("a", ["--seeds", "0"], "videos have seeds from 0, one or more, got 0 from 42"),
        ("a", ["--seed", "-1"], "videos have seeds from 0, one or more, got 1 from -1"),
    ],
)
def test_bad_input_is_one_clear_line(folder, capsys, prompts, arguments, says) -> None:
    Path("prompts.txt").write_text(prompts)
    assert generate(*arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not Path("out").exists()


def test_numbered_names_take_any_prompt_twice(folder) -> None:
    Path("prompts.txt").write_text("a/b\na/b\n" + "x" * 300)
    assert generate() == 0
    assert videos() == ["0001-a-b-42.mp4", "0002-a-b-42.mp4", f"0003-{'x' * 60}-42.mp4"]


def test_the_embedded_model_reads_every_prompt_before_the_first_video(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    load = longtake.recipes.load
    monkeypatch.setattr("longtake.recipes.load", lambda model, **options: load(model, **options | {"device": "cpu"}))
    Path("prompts.txt").write_text("a red ball bounces over green hills\na zorblax quuxes\n")
    assert generate("--dtype", "float32") == 2
    assert "zorblax" in capsys.readouterr().err and videos() == []
    Path("prompts.txt").write_text("a red ball bounces over green hills\n")
    assert generate("--dtype", "float32", "--levels", "1") == 0
    assert read_frames("out/videos/0001-a-red-ball-bounces-over-green-hills-42.mp4").shape == (8, 112, 192, 3)


# prompts that are written out

CAPTIONS = {"a ball": "a red ball bounces over green hills", "night": "a red ball bounces over green hills at night"}


def caption(messages: list[dict]) -> str:
    return CAPTIONS[messages[1]["content"].rpartition(" on: ")[2]]


def test_prompts_are_written_out_once_and_both_are_recorded(folder, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    Path("prompts.txt").write_text("a ball\nnight\n")
    with chat_server(answer=caption) as server:
        assert generate("--rewrite", server.url, "--seeds", "2") == 0
        asked = len(server.asked)
        assert generate("--rewrite", server.url, "--seeds", "2") == 0
    assert asked == len(server.asked) == 2 * 3  # captions are short, so each is asked for three times
    assert "2 of 2 prompts are not of 80 to 100 words" in capsys.readouterr().err
    assert videos() == ["0001-a-ball-42.mp4", "0001-a-ball-43.mp4", "0002-night-42.mp4", "0002-night-43.mp4"]
    (cue,) = json.loads(read_comment("out/videos/0002-night-43.mp4"))["prompts"]
    assert (cue["prompt"], cue["rewritten"]) == ("night", CAPTIONS["night"])


def test_one_prompt_is_written_out_and_shown(folder, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    shown = []
    real = tiny.AnyText.encode
    monkeypatch.setattr(tiny.AnyText, "encode", lambda text, prompts: shown.extend(prompts) or real(text, prompts))
    with chat_server(answer=caption) as server:
        arguments = ["generate", "a ball | 0.5s: night", "--rewrite", server.url, "--device", "cpu"]
        assert main([*arguments, "--seconds", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "a-ball-42.mp4\n"
    assert f"longtake: 'night' is written out: {CAPTIONS['night']}\n" in captured.err
    assert shown == [CAPTIONS["a ball"], CAPTIONS["night"]]
    cues = json.loads(read_comment("a-ball-42.mp4"))["prompts"]
    assert [(cue["prompt"], cue["rewritten"]) for cue in cues] == list(CAPTIONS.items())


def test_what_cannot_be_written_out_is_one_line(folder, capsys) -> None:
    Path("prompts_extended.txt").write_text("a red ball\na red fox\nnight\n")
    extended = ["generate", "--prompts", "prompts_extended.txt", "-o", "out"]
    assert main([*extended, "--rewrite", "http://127.0.0.1:9/v1"]) == 2
    assert "these prompts are written out already" in capsys.readouterr().err
    assert generate("--rewrite", "http://127.0.0.1:9/v1") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not Path("out").exists()


# processes


def work(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    parallel.join()
    scripts = [script_from(f"prompt number {number}") for number in range(5)]
    made: list[str] = []
    said: list[str] = []
    batch.make_all(
        tiny.engine(), listed(scripts, Path(folder, "out")), made=lambda path: made.append(path.name), say=said.append
    )
    Path(folder, f"{rank}.json").write_text(json.dumps([made, said]))
    parallel.leave()


def work_apart(rank: int, folder: str) -> None:
    """The second process makes its video only when the first is through, and another run was refused."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    parallel.join()
    through, out = Path(folder, "through"), Path(folder, "out")

    def made_alone(path: Path) -> None:
        deadline = time.monotonic() + 20
        while rank == 1 and not through.exists():
            assert time.monotonic() < deadline, "the first process waits for the second"
            time.sleep(0.05)
        if rank == 1:
            with (out / ".longtake.lock").open("a") as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    videos = listed([script_from("prompt number 0"), script_from("prompt number 1")], out)
    batch.make_all(tiny.engine(), videos, made=made_alone, say=lambda text: None)
    if rank == 0:
        through.touch()
        while not Path(folder, "1.done").exists():  # it serves the exchange of addresses
            time.sleep(0.05)
    Path(folder, f"{rank}.done").touch()
    parallel.leave()


def test_a_process_that_is_through_waits_for_no_other_and_the_folder_stays_locked(tmp_path) -> None:
    (tmp_path / "port").write_text(free_port())
    assert run_ranks(work_apart, str(tmp_path)) == [0, 0]
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2


def listed(scripts: list[Script], folder: Path) -> list[batch.Video]:
    return batch.videos_of(scripts, folder, first_seed=1, seeds=1, seconds=0.5, names="vbench")


def test_two_processes_make_each_missing_video_once(tmp_path) -> None:
    (tmp_path / "port").write_text(free_port())
    there = listed([script_from(f"prompt number {number}") for number in range(5)], tmp_path / "out")[1:2]
    batch.make_all(tiny.engine(), there, made=print, say=print)
    assert run_ranks(work, str(tmp_path)) == [0, 0]
    (one, told), (two, silent) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == ["prompt number 0-0.mp4", "prompt number 3-0.mp4"]
    assert two == ["prompt number 2-0.mp4", "prompt number 4-0.mp4"]
    assert (told, silent) == (["5 videos: 1 are there, 4 to make"], [])
    assert sorted(path.name for path in (tmp_path / "out").glob("*.mp4")) == [
        f"prompt number {i}-0.mp4" for i in range(5)
    ]
