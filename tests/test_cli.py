"""The command line over an engine that makes grey pictures at once. With the embedded model: test_generate.py."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import longtake.evaluation
from longtake.cli import main
from longtake.cli.engines import load_engine
from longtake.media.mp4 import Mp4Writer, read_frames
from longtake.models.hub import registry
from longtake.recipes import MODELS, RECIPES
from longtake.recipes.methods import is_here


class GreyEngine:
    """An engine as the command line sees one; Ctrl-C, or `signal`, comes in block `stops_at`."""

    signal: int | None = None

    frame_rate, height, width = 16, 32, 48
    model_name, weights, codec_name, codec_weights = "toy", "0123", None, "4567"
    base_name = None
    circumstances: ClassVar = {"longtake": "0", "torch": "0", "device": "cpu", "dtype": "float32"}
    recipe = SimpleNamespace(name="self_forcing_sink", steps=(1000, 500), block=3, in_flight=1)
    dtype, device = torch.float32, torch.device("cpu")
    codec_device, works_ahead, fused = device, False, False

    def __init__(self, stops_at: int | None = None) -> None:
        self.stops_at = stops_at
        self.opened: list[tuple[str, int]] = []

    def pictures_in(self, blocks):
        return 12 * blocks - 3 if blocks else 0

    def prepare(self, prompts):
        if not all(prompts):
            raise ValueError("the prompt is empty:\nsay what to show")

    def stream(self, prompt, *, seed, pictures=None):
        self.opened.append((prompt, seed))
        return GreyStream(self, self.stops_at)


class GreyStream:
    blocks = since = 1

    def __init__(self, engine: GreyEngine, stops_at: int | None) -> None:
        self.engine, self.stops_at = engine, stops_at

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def redirect(self, prompt, **how):
        pass

    def __iter__(self):
        index = 0
        while index != self.stops_at:
            pictures = 12 if index else 9
            frames = np.full((pictures, 32, 48, 3), 128, np.uint8)
            yield SimpleNamespace(frames=frames, pictures=pictures, index=index, wait=lambda: None)
            index += 1
        if self.engine.signal is not None:
            signal.raise_signal(self.engine.signal)
        raise KeyboardInterrupt


@pytest.fixture
def engine(monkeypatch, tmp_path) -> GreyEngine:
    """The engine every verb gets; the current folder is empty."""
    engine = GreyEngine()
    engine.asked_for = []

    def load(model, **options):
        engine.asked_for.append((model, options))
        return engine

    monkeypatch.setattr("longtake.recipes.load", load)
    monkeypatch.chdir(tmp_path)
    return engine


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


# help


def test_help_does_not_wait_for_torch():
    program = """
import sys
from longtake.cli import main
try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    after = os.times()
    assert all(verb in done.stdout for verb in ["generate", "bench", "evaluate", "models"])
    # Of the processor's time, which a busy machine does not change much.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5


COMPILED = ("generate", "serve", "bench stream", "bench codec", "plan")


@pytest.mark.parametrize(
    "verb",
    [
        ["generate"],
        ["replay"],
        ["take", "info"],
        ["take", "sizes"],
        ["serve"],
        ["bench", "stream"],
        ["bench", "attention"],
        ["bench", "codec"],
        ["evaluate", "toy"],
        ["evaluate", "redirect"],
        ["evaluate", "recall"],
        ["evaluate", "memory"],
        ["evaluate", "compare"],
        ["train", "dmd"],
        ["models"],
        ["models", "list"],
        ["models", "pull"],
        ["models", "convert"],
        ["models", "delta"],
        ["models", "mix"],
        ["verify"],
        ["plan"],
        ["explain"],
        ["doctor"],
    ],
)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as leave:
        main([*verb, "--help"])
    assert leave.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: longtake {' '.join(verb)}")
    assert re.findall(r"--no-\w+", said) == ["--no-compile"] * (" ".join(verb) in COMPILED)


@pytest.mark.parametrize("flags, compiled", [("--compile", True), ("--no-compile", False), ("", False)])
def test_compile_can_be_said_either_way(engine, flags, compiled):
    main(["generate", "a red ball", "--seconds", "1", *flags.split()])
    assert [options["compile"] for _, options in engine.asked_for] == [compiled]


# generate


@pytest.mark.parametrize("seconds, pictures", [("2", 32), ("0.5", 8), ("0.01", 1), ("1.3125", 21)])
def test_a_video_has_the_length_asked_for(engine, capsys, seconds, pictures):
    assert main(["generate", "a red ball", "--seconds", seconds, "-o", "out.mp4"]) == 0
    assert read_frames("out.mp4").shape == (pictures, 32, 48, 3)
    assert capsys.readouterr().out == "out.mp4\n"
    assert files() == ["out.mp4"]


def test_generate_asks_for_what_it_was_told(engine):
    arguments = "--seed 7 --recipe self_forcing --model folder --codec taew2_1.pth --levels 2 --device cpu --seconds 1"
    more = "--dtype bfloat16 --compile --codec-device cuda:1 --base Wan2.1 --out out.mp4"
    main(["generate", "a red ball", *arguments.split(), *more.split()])
    options = {"recipe": "self_forcing", "levels": 2, "device": "cpu", "dtype": torch.bfloat16, "codec": "taew2_1.pth"}
    assert engine.asked_for == [("folder", options | {"base": "Wan2.1", "codec_device": "cuda:1", "compile": True})]
    assert engine.opened == [("a red ball", 7)]


def test_generate_by_default(engine):
    main(["generate", "a red ball", "--seconds", "1"])
    options = {"recipe": "hybrid_forcing", "levels": None, "device": None, "dtype": None, "codec": None}
    assert engine.asked_for == [("toy", options | {"base": None, "codec_device": None, "compile": False})]
    assert engine.opened == [("a red ball", 42)]


STUDENTS = {name: one.recipe for name, one in registry().items() if is_here(one.recipe)}


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("verb", ["generate a", "bench stream --repeats 1"])
def test_a_published_student_runs_under_its_own_recipe_unless_another_is_given(engine, name, verb):
    main([*verb.split(), "--seconds", "1", "--model", name])
    main([*verb.split(), "--seconds", "1", "--model", name, "--recipe", "self_forcing"])
    asked = [options["recipe"] for _, options in engine.asked_for]
    assert asked == [STUDENTS[name], "self_forcing"]


def test_a_student_of_a_method_that_is_not_here_needs_a_recipe(engine, capsys):
    for verb in (["generate", "a"], ["plan"], ["verify"], ["bench", "stream"]):
        assert main([*verb, *(["salt"] if verb == ["verify"] else ["--model", "salt"])]) == 2
        said = "salt was trained under salt, which is not here: name a recipe to run it under"
        assert said in capsys.readouterr().err
    assert engine.asked_for == []


def test_a_free_name_is_made_of_prompt_and_seed(engine, capsys):
    for _ in range(2):
        assert main(["generate", "A red/ball, BOUNCES...", "--seconds", "1", "--seed", "7"]) == 0
    assert files() == ["a-red-ball-bounces-7-2.mp4", "a-red-ball-bounces-7.mp4"]
    assert capsys.readouterr().out.split() == ["a-red-ball-bounces-7.mp4", "a-red-ball-bounces-7-2.mp4"]


def test_a_drawn_seed_is_told(engine, capsys):
    main(["generate", "a red ball", "--seconds", "1", "--seed", "-1", "-o", "out.mp4"])
    (_, seed), *_ = engine.opened
    assert seed >= 0
    assert f"longtake: seed {seed}\n" in capsys.readouterr().err


def test_a_file_that_is_there_stays(engine, capsys):
    Path("out.mp4").write_text("precious")
    assert main(["generate", "a red ball", "-o", "out.mp4"]) == 2
    assert Path("out.mp4").read_text() == "precious"
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (
        "",
        "longtake: out.mp4 exists already: choose another name, or replace it with --force\n",
    )
    assert engine.asked_for == [], "it is said before anything is loaded"


@pytest.mark.parametrize("name", ["ball.avi", "ball"])
def test_a_name_that_promises_another_kind_of_file_is_refused(engine, capsys, name):
    assert main(["generate", "a red ball", "-o", name]) == 2
    assert capsys.readouterr().err == f"longtake: videos are mp4 files: name {name} ball.mp4\n"
    assert engine.asked_for == [] and files() == []


def test_a_file_is_replaced_if_asked_for(engine, capsys):
    Path("out.mp4").write_text("old")
    assert main(["generate", "a red ball", "--seconds", "1", "-o", "out.mp4", "--force"]) == 0
    assert len(read_frames("out.mp4")) == 16 and files() == ["out.mp4"]
    engine.stops_at = 0
    assert main(["generate", "a red ball", "--seconds", "1", "-o", "out.mp4", "--force"]) == 130
    assert len(read_frames("out.mp4")) == 16, "nothing was made in its place"


def test_a_folder_is_not_replaced(engine, capsys):
    Path("out").mkdir()
    assert main(["generate", "a red ball", "-o", "out", "--force"]) == 2
    assert capsys.readouterr().err == "longtake: out is a folder: name the file to write in it\n"


def test_generate_tells_one_json_object(engine, capsys):
    assert main(["generate", "a | 1s: b", "--seconds", "2", "--seed", "7", "-o", "out.mp4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": "out.mp4", "pictures": 32, "seconds": 2, "fps": 16, "seed": 7, "recipe": "self_forcing_sink",
        "levels": 2, "model": "toy", "weights": "0123", "dtype": "float32",
        "codec_weights": "4567", "device": "cpu", "longtake": "0", "torch": "0",
        "prompts": [
            {"at": 0, "unit": "seconds", "prompt": "a"},
            {"at": 1, "unit": "seconds", "prompt": "b"},
        ],
    }  # fmt: skip


def test_json_of_a_video_that_was_stopped_tells_what_there_is(engine, capsys):
    engine.stops_at = 2
    assert main(["generate", "a red ball", "--seconds", "60", "-o", "out.mp4", "--json"]) == 130
    told = json.loads(capsys.readouterr().out)
    assert (told["pictures"], told["seconds"]) == (21, 21 / 16) and len(read_frames("out.mp4")) == 21
    engine.stops_at = 0
    assert main(["generate", "a red ball", "-o", "other.mp4", "--json"]) == 130
    assert capsys.readouterr().out == ""


def test_of_a_file_of_prompts_each_video_is_one_line_of_json(engine, capsys):
    Path("prompts.txt").write_text("a red ball\na blue cube\n")
    assert main(["generate", "--prompts", "prompts.txt", "--seconds", "1", "--seeds", "2", "-o", "out", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["prompts"][0]["prompt"], one["seed"]) for one in told] == [
        ("a red ball", 42), ("a red ball", 43), ("a blue cube", 42), ("a blue cube", 43),
    ]  # fmt: skip
    assert all(len(read_frames(one["path"])) == one["pictures"] == 16 for one in told)


@pytest.mark.parametrize("stops_after, kept", [(2, True), (0, False)])
def test_what_a_full_disk_leaves_is_told(engine, capsys, monkeypatch, stops_after, kept):
    write = Mp4Writer.write

    def full(writer, frames):
        if writer.frames_written >= 12 * stops_after:
            raise OSError(28, "No space left on device", "out.part.mp4")
        write(writer, frames)

    monkeypatch.setattr(Mp4Writer, "write", full)
    assert main(["generate", "a red ball", "-o", "out.mp4"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    added = "; out.mp4 keeps what was made until then" if kept else ""
    assert last == f"longtake: out.part.mp4: No space left on device{added}"
    assert files() == ["out.mp4"] * kept
    assert not kept or len(read_frames("out.mp4")) == 9 + 12 + 12


def test_a_full_disk_leaves_the_file_that_was_to_be_replaced_and_what_is_made_beside_it(engine, capsys, monkeypatch):
    Path("out.mp4").write_text("precious")
    write = Mp4Writer.write

    def full(writer, frames):
        write(writer, frames)
        raise OSError(28, "No space left on device", "out.part.mp4")

    arguments = ["generate", "a red ball", "--seconds", "1", "-o", "out.mp4", "--force"]
    with monkeypatch.context() as patched:
        patched.setattr(Mp4Writer, "write", full)
        assert main(arguments) == 2
    assert capsys.readouterr().err.endswith("; out.part.mp4 keeps what was made until then\n")
    assert Path("out.mp4").read_text() == "precious" and len(read_frames("out.part.mp4")) == 9
    assert main(arguments) == 2, "it is not written over by the next"
    assert "move it away first\n" in capsys.readouterr().err and len(read_frames("out.part.mp4")) == 9
    Path("out.part.mp4").unlink()
    assert main(arguments) == 0 and len(read_frames("out.mp4")) == 16 and files() == ["out.mp4"]


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_keeps_what_is_made(engine, capsys, number):
    engine.stops_at, engine.signal = 3, number
    assert main(["generate", "a red ball", "--seconds", "60", "-o", "out.mp4"]) == 130
    assert len(read_frames("out.mp4")) == 9 + 12 + 12
    assert capsys.readouterr().out == "out.mp4\n"


def test_interrupt_before_the_first_block_leaves_nothing(engine, capsys):
    engine.stops_at = 0
    assert main(["generate", "a red ball", "-o", "out.mp4"]) == 130
    assert files() == []
    assert capsys.readouterr().out == ""


def test_a_log_gets_a_few_whole_lines(engine, capsys):
    main(["generate", "a red ball", "--seconds", "20", "-o", "out.mp4"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "longtake: 0.6 s made"
    assert lines[-1].startswith("longtake: 20.0 s made, ")
    assert lines[-1].endswith(" times real time")
    assert len(lines) <= 4


def test_a_terminal_gets_one_line_that_rewrites_itself(engine, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(["generate", "a red ball", "--seconds", "2", "-o", "out.mp4"])
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert [line.split(" s made")[0] for line in text.split("\r")[1:]] == ["0.6", "1.3", "2.0"]
    assert "frames a second" in text


# bad input


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["generate", ""], "the prompt is empty: say what to show"),
        (["generate"], "give one PROMPT, or a file of them with --prompts"),
        (["generate", "--prompts", "y.txt", "-o", "z", "--force"], "--force goes with one PROMPT"),
        (["generate", "x", "--prompts", "y.txt"], "give one PROMPT, or a file of them with --prompts"),
        (["generate", "x", "--seeds", "2"], "--seeds and --names go with --prompts"),
        (["generate", "a | 5s: b | c"], "'c' has no time, such as 5s: in front"),
        (["generate", "3s: a | 5s: b"], "the first prompt must begin at 0, but it is 'a' at 3 seconds"),
        (["generate", "a | 12s: b"], "'b' at 12 seconds would begin after the last picture of 10 seconds"),
        (["generate", "a | 1s: b | 1.1s: c"], "'c' at 1.1 seconds begins in the same block"),
        (["generate", "[5s:0s] a"], "a span ends after it begins, got 5 to 0 seconds"),
        (["generate", "--prompts", "nowhere.txt", "-o", "out"], "nowhere.txt: No such file or directory"),
        (["generate", "--prompts", "nowhere.txt"], "--prompts needs a folder for the videos: -o DIR"),
        (["generate", "--prompts", "nowhere.doc", "-o", "out"], "there are .txt, .jsonl, .json and .yaml"),
        (["generate", "a red ball", "--seconds", "0"], "more than 0 seconds, and less than 1e+09, got 0"),
        (["generate", "a red ball", "--seconds", "-3"], "more than 0 seconds, and less than 1e+09, got -3"),
        (["generate", "a red ball", "--seconds", "nan"], "more than 0 seconds, and less than 1e+09, got nan"),
        (["generate", "a red ball", "--seconds", "inf"], "less than 1e+09, got inf"),
        (["generate", "a red ball", "--seconds", "1e308"], "less than 1e+09, got 1e+308"),
        (["generate", "a red ball", "-o", "nowhere/out.mp4"], "there is no folder nowhere"),
        (["bench", "stream", "--repeats", "0"], "at least one repeat"),
        (["bench", "stream", "--seconds", "0.1"], "at least two blocks"),
        (["bench", "stream", "--seconds", "nan"], "a benchmark comes to an end, got nan seconds"),
        (["plan", "--model", "self-forsing"], "no model 'self-forsing': did you mean self-forcing"),
        (["plan", "--size", "832"], "such as 832x480, not '832'"),
        (["plan", "--size", "100x100"], "pictures are multiples of 16 high and wide, 4096 at most, not 100x100"),
        (["plan", "--vram", "much"], "a number with G or M, such as 24G, not 'much'"),
        (["explain", "hybrid_forsing"], "no recipe 'hybrid_forsing': did you mean hybrid_forcing"),
        (["explain", "self_forcing", "--blocks", "0"], "a table has 1 to 10000 blocks, got 0"),
        (["explain", "self_forcing", "--blocks", "99999999"], "a table has 1 to 10000 blocks, got 99999999"),
        (["bench", "stream", "--blocks", "2", "-o", "/dev/null/kept"], "/dev/null/kept: Not a directory"),
        (["evaluate", "toy", "--prompt-file", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["evaluate", "compare"], "nothing to compare with"),
    ],
)
def test_bad_input_is_one_clear_line(engine, capsys, arguments, says):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("longtake: ")
    assert says in captured.err
    assert files() == []


def test_too_little_memory_is_one_clear_line_and_other_failures_are_not_hidden(engine, capsys, monkeypatch):
    def fails_with(error):
        def stream(*given, **options):
            raise error

        monkeypatch.setattr(engine, "stream", stream)
        return main(["generate", "a red ball", "-o", "out.mp4"])

    assert fails_with(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")) == 2
    told = capsys.readouterr().err
    assert told.startswith("longtake: CUDA out of memory. Tried to allocate 20.00 GiB. (") and told.count("\n") == 1
    with pytest.raises(RuntimeError, match="a fault of ours"):
        fails_with(RuntimeError("a fault of ours"))


def test_a_closed_stdout_is_no_fault():
    program = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    verb = ["-m", "longtake.cli", "explain"]
    done = subprocess.run([sys.executable, "-c", program, *verb], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_is_told_as_one_though_the_terminal_is_gone(engine, monkeypatch):
    engine.stops_at = 0
    with open(os.devnull) as nowhere:
        gone = {"flush.side_effect": OSError(5, "Input/output error"), "fileno.return_value": nowhere.fileno()}
        monkeypatch.setattr(sys, "stdout", Mock(**gone))
        assert main(["generate", "a red ball", "-o", "out.mp4"]) == 130


def test_a_full_stdout_is_one_clear_line():
    verb = [sys.executable, "-m", "longtake.cli", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(verb, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("longtake: ") and done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("stderr", [None, "/dev/full"])
def test_a_video_is_made_though_its_progress_cannot_be_told(engine, monkeypatch, stderr):
    with open(os.devnull if stderr is None else stderr, "w", buffering=1) as log:
        monkeypatch.setattr(sys, "stderr", None if stderr is None else log)
        assert main(["generate", "a red ball", "-o", "out.mp4"]) == 0
        sys.stderr.close()
    assert files() == ["out.mp4"]


def test_help_can_be_read_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(SystemExit):
        main(["models", "list", "--help"])
    assert "Print one JSON object" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option, nearest",
    [
        (["--recipe", "self_forcing_sing"], "did you mean self_forcing_sink"),
        (["--recipe", "self_forcing:pasd=3"], "there are past=6"),
        (["--recipe", "foo"], "there are causal_forcing, "),
        (["--model", "toi"], "did you mean toy"),
        (["--model", "self-forsing"], "did you mean self-forcing"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(capsys, option, nearest):
    assert main(["generate", "a red ball", *option]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert nearest in captured.err


@pytest.mark.parametrize(
    "verb",
    ["generate x", "bench stream", "evaluate toy", "evaluate redirect", "evaluate recall", "evaluate memory"],
)
def test_a_number_of_levels_that_makes_no_sense_is_one_clear_line(verb, capsys):
    assert main([*verb.split(), "--levels", "0"]) == 2
    assert capsys.readouterr().err == "longtake: the number of levels is a whole number from 1 to 1000, got 0\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["generate", "x", "--seconds", "soon"]])
def test_what_cannot_be_parsed_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as leave:
        main(arguments)
    assert leave.value.code == 2
    assert capsys.readouterr().out == ""


# bench, evaluate, models, explain


def test_bench_prints_json_alone(engine, capsys):
    assert main(["bench", "stream", "--seconds", "3", "--repeats", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["block_ms"]) == {"p50", "p95", "p99"}
    assert result["frames_per_second"] == max(run["frames_per_second"] for run in result["repeats"])
    assert result["real_time_factor"] == pytest.approx(result["frames_per_second"] / 16)
    assert len(result["repeats"]) == 4
    assert result["precision"] == "float32"
    assert result["threads"] == torch.get_num_threads()
    assert 10 < result["peak_memory_mib"] < 1_000_000
    assert result["first_frame_seconds"] > 0
    assert (result["model"], result["recipe"], result["levels"]) == ("toy", "self_forcing_sink", 2)


def test_bench_in_words(engine, capsys):
    assert main(["bench", "stream", "--seconds", "3", "--repeats", "2"]) == 0
    said = capsys.readouterr().out
    assert "best of 2" in said and ", with block 1" in said.splitlines()[-1]


@pytest.fixture
def small_wan(monkeypatch):
    """The published network's name for one that is tiny in width."""
    from longtake.models import checkpoints

    small = replace(checkpoints.WAN_1_3B, dim=24, heads=2, ffn_dim=32, layers=2, text_dim=8)
    monkeypatch.setitem(checkpoints.NETWORKS, "wan2.1-1.3b", small)
    return "--model wan2.1-1.3b --random-weights --decoder none --size 32x16 --levels 2 --blocks 2 --device cpu"


def test_an_engine_of_a_wan_shape_has_published_blocks(small_wan):
    from longtake.recipes.wan_engines import load_random

    engine = load_random("wan2.1-1.3b", recipe="hybrid_forcing", size=(16, 32), decoder="none", device="cpu")
    assert engine.recipe.near.keywords["block_k"] == 64


def test_bench_of_random_weights_prints_json_alone_and_keeps_files(small_wan, capsys, tmp_path):
    folder = tmp_path / "made" / "here"
    arguments = ["bench", "stream", *small_wan.split(), "--recipe", "self_forcing", "hybrid_forcing:tokens=2"]
    assert main([*arguments, "-o", str(folder), "--json"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert [result["recipe"] for result in results] == ["self_forcing", "hybrid_forcing:tokens=2"]
    assert all((result["size"], result["blocks"], result["levels"]) == ("32x16", 2, [1000, 500]) for result in results)
    files = {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
    assert files == {
        f"wan2.1-1.3b-{recipe}-NoDecoder-32x16-float32-eager-2levels.json": result
        for recipe, result in zip(("self_forcing", "hybrid_forcing_tokens_2"), results, strict=True)
    }
    assert "hybrid_forcing:tokens=2: counting" in captured.err


def test_bench_of_random_weights_in_words(small_wan, capsys):
    assert main(["bench", "stream", *small_wan.split(), "--recipe", "self_forcing"]) == 0
    said = capsys.readouterr().out
    assert "wan2.1-1.3b, 32x16, NoDecoder, float32" in said and "network pass 2" in said and "TFLOP" in said


def test_bench_of_random_weights_tells_of_kernels_that_are_compiled(small_wan, monkeypatch):
    from longtake.cli import bench

    asked = []
    monkeypatch.setattr(bench, "tell_of_kernels", asked.append)
    assert main(["bench", "stream", *small_wan.split(), "--recipe", "self_forcing", "--compile", "--json"]) == 0
    assert [engine.model_name for engine in asked] == ["wan2.1-1.3b"]


def test_bench_of_eight_bits_says_so(small_wan, capsys):
    more = "--recipe self_forcing --precision fp8 --json"
    assert main(["bench", "stream", *small_wan.split(), *more.split()]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "fp8"


def test_bench_of_minutes_fails_where_a_stream_grows(small_wan, monkeypatch, capsys):
    from longtake.evaluation import steady

    arguments = ["bench", "stream", *small_wan.split(), "--recipe", "self_forcing", "--minutes", "0.05"]
    monkeypatch.setattr(steady, "MOST_LATER", dict.fromkeys(steady.MOST_LATER, 1e9))
    assert main(arguments) == 0
    monkeypatch.setitem(steady.MOST_LATER, "block_ms", 0.0)
    assert main(arguments) == 1
    assert "self_forcing: changes over its minutes: block_ms\n" in capsys.readouterr().err


def test_bench_of_attention_has_a_row_for_each_window_and_backend(small_wan, capsys):
    recipes = ["hybrid_forcing:tokens=4", "hybrid_forcing:tokens=4,form=ref_train", "longlive", "rolling_forcing"]
    arguments = ["bench", "attention", "--size", "64x32", "--device", "cpu", "--recipe", *recipes]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows, frame = result["rows"], 2 * 4  # tokens of a latent frame of 4 x 8
    windows = [(3, 9), (3, 64), (3, 12), (15, 21), (15, 64)]  # frames; the prompt's 512 rows are as many as 64
    dense = [row for row in rows if row["form"] == "dense"]
    assert list(dict.fromkeys((row["queries"], row["keys"]) for row in dense)) == [
        (frame * asking, frame * asked) for asking, asked in windows
    ]
    ran = [row for row in dense if "refused" not in row]
    assert {row["backend"] for row in ran} == {"flash", "products", "math"}
    assert all(row["right"] and row["ms"] > 0 for row in ran)
    assert {row["refused"] for row in dense if row["backend"] == "cudnn"} == {"runs on a GPU alone"}
    sparse = [row for row in rows if row["form"] == "block-sparse"]
    assert [(row["share"], row["block"], row["keys"]) for row in sparse] == [(0.2, 4, 9 * frame)] * 4
    assert result["device"] and result["versions"]["torch"] and result["precision"] == "float32"
    assert main(arguments) == 0
    assert "backend flash" in capsys.readouterr().out


def test_bench_of_codecs_has_a_row_for_each_step(small_wan, monkeypatch, capsys):
    from longtake.models.wan_vae import WanVAE, WanVAEConfig
    from longtake.recipes.wan_engines import DECODERS

    monkeypatch.setitem(DECODERS, "wan", lambda: WanVAE(WanVAEConfig(dim=4)))
    arguments = ["bench", "codec", "--size", "32x16", "--device", "cpu"]
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    steps = [("decode", 1), ("decode", 3), ("to bytes", None), ("copy to host", None)]
    assert [(row["step"], row.get("at_once")) for row in rows] == 2 * steps
    assert [row["decoder"] for row in rows] == ["wan"] * 4 + ["light"] * 4
    assert all(row["pictures"] == 12 and row["pictures_a_second"] == pytest.approx(12000 / row["ms"]) for row in rows)
    assert rows[0]["tflops"] * rows[0]["ms"] == pytest.approx(rows[1]["tflops"] * rows[1]["ms"]), "the same operations"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("attention --model toy", "no published network 'toy'"),
        ("attention --recipe nothing", "no recipe 'nothing'"),
        ("attention --size 30x16", "multiples of 16"),
        ("codec --decoder heavy", "no decoder 'heavy'"),
        ("codec --frames 0", "one latent frame or more, got 0"),
        ("codec --size large", "a size is a width and a height"),
    ],
)
def test_pieces_that_cannot_be_timed_are_one_clear_line(small_wan, capsys, arguments, said):
    assert main(["bench", *arguments.split(), "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--size 32x32", "--decoder and --size are for --random-weights"),
        ("--decoder none", "--decoder and --size are for --random-weights"),
        ("--random-weights --codec taew2_1.pth", "it is --decoder"),
        ("-o folder", "add --blocks or --minutes"),
        ("--random-weights", "no published network 'toy'"),
        ("--random-weights --model wan2.1-1.3b --size 16x16 --blocks 1", "at least two blocks, got 1"),
        ("--random-weights --model wan2.1-1.3b --size 16x16 --blocks 0", "at least two blocks, got 0"),
        ("--random-weights --model wan2.1-1.3b --size 16x16 --minutes nan", "comes to an end, got nan minutes"),
        ("--random-weights --model wan2.1-1.3b --size 30x16", "multiples of 16 high and wide, not 16 x 30"),
    ],
)
def test_benchmarks_that_cannot_be_are_one_clear_line(small_wan, capsys, arguments, said):
    assert main(["bench", "stream", *arguments.split(), "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""


SCORES = {
    "recipe": "truth",
    "at": {"5": {"subject": 0.5, "colour": 1.0, "place": None}},
    "one_subject": {"5": 0.75},
}


@pytest.fixture
def scorer(engine, monkeypatch) -> list:
    """Stands for the toy world's judge; holds what it was asked."""
    asked = []

    def evaluate_toy(recipes, engine_of, *, prompts, prompt_file, seeds, at, sources, device, progress):
        engine_of("self_forcing")
        asked.append((recipes, prompts, prompt_file, seeds, at, sorted(sources), device.type))
        return [SCORES] * len(recipes)

    judge = SimpleNamespace(evaluate_toy=evaluate_toy)
    monkeypatch.setitem(sys.modules, "longtake.evaluation.toy", judge)
    monkeypatch.setattr(longtake.evaluation, "toy", judge, raising=False)
    return asked


def test_evaluate_gives_one_object_a_recipe(scorer, engine, capsys):
    arguments = "evaluate toy --recipe truth codec --prompts 3 --seeds 4 --at 5 60 --levels 2 --device cpu --json"
    assert main(arguments.split()) == 0
    assert json.loads(capsys.readouterr().out) == [SCORES, SCORES]
    assert scorer == [(("truth", "codec"), 3, None, 4, (5, 60), ["codec"], "cpu")]
    options = {"recipe": "self_forcing", "levels": 2, "device": torch.device("cpu"), "dtype": None, "codec": None}
    assert engine.asked_for == [("toy", options | {"base": None, "codec_device": None, "compile": False})]


def test_evaluate_reads_captions_from_a_file(scorer, capsys, tmp_path):
    path = tmp_path / "captions.txt"
    assert main(["evaluate", "toy", "--prompt-file", str(path)]) == 0
    assert [(asked[0], asked[2]) for asked in scorer] == [(("self_forcing_sink",), path)]
    words = "truth at 5 s: subject 0.50, colour 1.00, place -, one subject 0.75\n"
    assert capsys.readouterr().out == words


def test_a_guidance_is_told_to_what_is_guided(scorer, monkeypatch, capsys):
    made = []
    monkeypatch.setattr("longtake.recipes.teacher.toy_teacher", lambda device, **told: made.append(told))
    assert main(["evaluate", "toy", "--recipe", "teacher", "converted", "--guidance", "3.5", "--device", "cpu"]) == 0
    assert [(told["file"], told["guidance"]) for told in made] == [
        ("teacher.safetensors", 3.5),
        ("converted.safetensors", 3.5),
    ]
    capsys.readouterr()
    assert main(["evaluate", "toy", "--recipe", "rehyat", "truth", "--guidance", "3.5", "--device", "cpu"]) == 2
    assert "a guidance is of teacher and converted" in capsys.readouterr().err


def test_evaluate_scores_other_weights(scorer, engine, capsys, tmp_path):
    assert main(["evaluate", "toy", "--model", str(tmp_path)]) == 0
    assert engine.asked_for[0][0] == str(tmp_path)
    for mark in ("teacher", "codec"):
        assert main(["evaluate", "toy", "--model", str(tmp_path), "--recipe", mark]) == 2
        assert "nor a folder that holds" in capsys.readouterr().err


def test_redirects_in_words_and_json(engine, capsys, monkeypatch):
    result = {
        "recipe": "self_forcing",
        "reached_within_4s": {"time": 0.5, "weather": None},
        "reached_within_4s_control": {"time": 0.0, "weather": None},
        "median_seconds": 1.5,
        "kept_unchanged": 0.9,
        "kept_unchanged_control": 1.0,
    }
    asked = []

    def evaluate_redirect(recipes, engine_of, *, prompts, seeds, transition, over, far, in_flight, progress):
        asked.append((recipes, engine_of("self_forcing"), prompts, seeds, transition, over, far, in_flight))
        return [result]

    judge = SimpleNamespace(evaluate_redirect=evaluate_redirect)
    monkeypatch.setitem(sys.modules, "longtake.evaluation.redirect", judge)
    monkeypatch.setattr(longtake.evaluation, "redirect", judge, raising=False)
    arguments = ["evaluate", "redirect", "--recipe", "self_forcing", "--prompts", "3"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [result]
    assert main([*arguments, "--in-flight", "new", "--over", "4"]) == 0
    assert capsys.readouterr().out == (
        "self_forcing: reached within 4 s: time 0.50, weather - (by chance: time 0.00, weather -), "
        "after 1.50 s in the middle; kept 0.90 (1.00 when left alone)\n"
    )
    ways = (1, None, "own"), (4, None, "new")
    assert asked == [(("self_forcing",), engine, 3, 2, "redirect", *way) for way in ways]


def test_recall_in_words_and_json(engine, capsys, monkeypatch):
    result = {
        "recipe": "self_forcing",
        "after": {"2": {"colour": 0.5, "landmark": 0.25}, "4": {"colour": 0.0, "landmark": 0.0}},
        "returned": {"2": 0.75, "4": 0.0},
        "stayed_away": {"2": 0.5, "4": 0.5},
        "seen_first": {"after": {"2": {"colour": 1.0}}, "returned": {"2": 1.0}, "stayed_away": {"2": 0.0}},
    }
    asked = []

    def evaluate_recall(recipes, engine_of, *, prompts, seeds, after, lead, absence, codec, device, progress):
        asked.append((recipes, engine_of("self_forcing"), prompts, seeds, after, lead, absence, codec, device.type))
        return [result]

    judge = SimpleNamespace(evaluate_recall=evaluate_recall)
    monkeypatch.setitem(sys.modules, "longtake.evaluation.recall", judge)
    monkeypatch.setattr(longtake.evaluation, "recall", judge, raising=False)
    arguments = ["evaluate", "recall", "--recipe", "self_forcing", "--after", "2", "4", "--device", "cpu"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [result]
    assert main(arguments) == 0
    assert capsys.readouterr().out == (
        "self_forcing, seen later, after 2 s: colour 0.50, landmark 0.25 (returned 0.75, stayed away 0.50)\n"
        "self_forcing, seen later, after 4 s: colour 0.00, landmark 0.00 (returned 0.00, stayed away 0.50)\n"
        "self_forcing, seen first, after 2 s: colour 1.00 (returned 1.00, stayed away 0.00)\n"
    )
    assert asked == [(("self_forcing",), engine, 40, 2, (2, 4), 3, "streamed", None, "cpu")] * 2


def test_models_lists_what_runs(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [f"--model {model} --recipe {recipe}" for model, recipe in MODELS] == lines[: len(MODELS)]
    published = {line.split()[0]: line for line in lines[len(MODELS) + 2 :]}
    assert published.keys() == registry().keys()
    assert all("licence" in line and "commercial use" in line for line in published.values())
    assert {name for name, line in published.items() if "(not here)" in line} == {"salt", "krea-realtime-14b"}


def test_models_in_json(capsys):
    assert main(["models", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["model"], one["recipe"]) for one in told["runs"]] == list(MODELS)
    assert {one["name"] for one in told["published"]} == registry().keys()
    here = {one["name"]: one["recipe_is_here"] for one in told["published"]}
    assert here["self-forcing"] and not here["wan2.1-1.3b"], "a teacher has no recipe"


@pytest.mark.parametrize("name", RECIPES)
def test_explain_tells_of_every_recipe(name, capsys):
    assert main(["explain", name]) == 0
    words = capsys.readouterr().out
    assert main(["explain", name, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert name in words.splitlines()[0] and len(told["blocks"]) >= 2
    assert main(["explain", name, "--blocks", "1", "--json"]) == 0
    assert [row["block"] for row in json.loads(capsys.readouterr().out)["blocks"]] == [0]


def test_explain_lists_the_recipes(capsys):
    assert main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = list(RECIPES)
    assert [line.split()[0] for line in lines] == names
    assert "2509.25161" in lines[names.index("rolling_forcing")]
    assert main(["explain", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == names


def test_explain_in_words_and_json(capsys):
    assert main(["explain", "hybrid_forcing"]) == 0
    words = capsys.readouterr().out
    assert "Hybrid Forcing (arXiv 2604.10103)" in words
    assert main(["explain", "hybrid_forcing", "--blocks", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["frames"] for row in told["blocks"]] == [[0, 1, 2], [3, 4, 5]]


def test_scores_are_compared_in_pairs(tmp_path, capsys):
    def scores(recipe: str, verdicts: str, **more: object) -> str:
        counts = {"5": {"at": {"camera": {"verdicts": verdicts}}}}
        table = {"recipe": recipe, "prompts": 2, "seed_list": [0, 1], "counts": counts}
        path = tmp_path / f"{recipe}.json"
        path.write_text(json.dumps([table | more]))
        return str(path)

    one, other = scores("self_forcing", "1100"), scores("hybrid_forcing", "1110")
    assert main(["evaluate", "compare", one, other]) == 0
    assert capsys.readouterr().out == (
        "hybrid_forcing less self_forcing, 5 at camera: +0.250 (+0.000 to +0.500; 4 videos of each)\n"
    )
    assert main(["evaluate", "compare", one, other, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["differences"]["5 at camera"]["interval_95"] == [0, 0.5]
    (tmp_path / "broken.json").write_text("[")
    for files, wrong in (
        ([one], "nothing to compare with"),
        ([one, str(tmp_path / "none.json")], "cannot read"),
        ([one, str(tmp_path / "broken.json")], "is not JSON"),
        ([one, scores("longlive", "1110", seed_list=[1])], "these scores are of other videos: seed_list"),
        ([scores("causvid", "11", seed_list=None)] * 2, "these scores do not say of which seeds they are"),
    ):
        assert main(["evaluate", "compare", *files]) == 2
        assert wrong in capsys.readouterr().err


@pytest.mark.parametrize("by_kernels", [False, True])
def test_a_wait_for_kernels_is_told(
    by_kernels: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = GreyEngine()
    made.fused = by_kernels
    monkeypatch.setattr("longtake.recipes.load", lambda *args, **options: made)
    assert load_engine("toy", None, None, "cpu", "float32", compile=by_kernels) is made
    assert ("wait for kernels to be compiled" in capsys.readouterr().err) == by_kernels
