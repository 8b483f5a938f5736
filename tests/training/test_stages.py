"""Every stage by its command at a tiny size, on pictures of noise; killed and resumed; in two processes."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from longtake import recipes, training
from longtake.cli import main, train
from longtake.distillation.stages import DmdStage, FinetuneStage, TeacherForcingStage, strips
from longtake.distillation.trainer import STATE_FILE, read_metrics
from longtake.models.delta import save_delta
from longtake.models.text import WordEncoder
from longtake.models.wan import WanTransformer
from longtake.models.weights import load_weights, save_weights
from longtake.recipes.devices import CPU
from longtake.recipes.teacher import toy_teacher
from longtake.recipes.weight_files import (
    CODEC_FILE,
    CONVERTED_FILE,
    NETWORK_FILE,
    TEACHER_FILE,
    load_network,
    save_network,
)
from longtake.toy import world
from longtake.training import STAGES, _seed_of_noise, report, with_settings
from tests.processes import Started
from tests.training import noise_world

ROOT = Path(__file__).parents[2]
NETWORK = json.dumps({"dim": 32, "heads": 2, "ffn_dim": 64, "layers": 2, "text_dim": 16, "extent": 12})
CODEC = [f"{part}_{size}" for part in ("encoder", "decoder") for size in ("widths=[8,8,8]", "blocks=[1,0,0]")]
STEPS = 5
HYBRID = "hybrid_forcing:share=0.4"
SETTINGS = {
    "codec": ["batch=1", "pictures=5", *CODEC],
    "teacher": ["batch=2", "pool=2", f"network={NETWORK}"],
    "attention_matching": ["batch=2", "updates=2", "sampling_steps=2"],
    "finetune": ["batch=2", "pool=2", "sampling_steps=2"],
    "teacher_forcing": ["batch=2", "pool=2", "frames=36", "memory_share=0.5", "rank=4"],
    "ode": ["batch=2", "pairs=4", "sampling_steps=4"],
    "dmd": [
        "batch=2", "most_blocks=5", "most_given=2", "pool=2", "levels=[2,1]", "pull=0.05", "pull_steps=2",
        "real_weight=0.5", "real_frames=36", "real_batch=1", "memory_share=0.5",
        "seed=13451",  # rollouts of every kind: by windows in the second step, pulled in the first and in the last
    ],
}  # fmt: skip
FORCED = ["batch=2", "pool=2", "frames=18"]
RECIPES = {"teacher_forcing": (HYBRID,), "dmd": (HYBRID, "rolling_forcing", "self_forcing")}
READS = {
    "teacher": "codec",
    "attention_matching": "teacher",
    "finetune": "attention_matching",
    "teacher_forcing": "teacher",
    "ode": "teacher",
    "dmd": "ode",
}
MAKES = {"codec": CODEC_FILE, "teacher": TEACHER_FILE}
MAKES |= dict.fromkeys(("attention_matching", "finetune"), CONVERTED_FILE)


def command(stage: str, out: Path, folders: Path) -> list[str]:
    start = ["--from", str(folders / READS[stage])] if stage in READS else []
    recipes = ["--recipe", *RECIPES[stage]] if stage in RECIPES else []
    return [stage, *start, "--out", str(out), *recipes, "--set", f"steps={STEPS}", "seconds=1e9", *SETTINGS[stage]]


def start(*arguments: str, **variables: str) -> Started:
    return Started(noise_world.main, [*arguments], **variables)


def finish(process: Started) -> None:
    done = process.finished()
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def folders(shared_folder: Path) -> Path:
    """Every stage once, uninterrupted, each from the one before; all processes of a run of tests share them."""
    made = shared_folder / "stages"
    with FileLock(made.with_suffix(".lock")):
        for stage in SETTINGS:
            if not (made / stage / "record.json").exists():
                finish(start(*command(stage, made / stage, made)))
    return made


def test_from_nothing_to_a_student_that_streams(folders) -> None:
    for stage in SETTINGS:
        record = json.loads((folders / stage / "record.json").read_text())
        assert record["stage"] == stage and record["spent"]["steps"] == STEPS
        assert all(record[name] for name in ("date", "device", "torch", "longtake"))
        assert not (folders / stage / STATE_FILE).exists()
        assert list((folders / stage / "samples").glob("*.png"))
    assert (folders / "dmd" / "samples" / "self_forcing.mp4").stat().st_size > 1000
    rows = read_metrics(folders / "dmd")
    assert rows[0]["step"] == 0 and rows[-1]["step"] == STEPS - 1
    assert all(row["pull"] > 0 for row in rows) and rows[-1]["far_weights"] > 0
    assert read_metrics(folders / "teacher_forcing")[-1]["far_weights"] > 0
    for stage in ("teacher_forcing", "dmd"):
        with safe_open(folders / stage / NETWORK_FILE, "pt") as file:
            assert json.loads(file.metadata()["longtake"])["recipes"] == list(RECIPES[stage])
    engine = recipes.load(folders / "dmd", recipe="self_forcing_sink", dtype=torch.float32, levels=2)
    with engine.stream("a red ball") as stream:
        assert next(stream).frames.shape == (9, world.HEIGHT, world.WIDTH, 3)


@pytest.mark.parametrize("stage", SETTINGS)
def test_a_run_killed_and_resumed_is_the_uninterrupted_run(stage: str, folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = start(*command(stage, out, folders))
    deadline = time.monotonic() + 120
    while not saved_step(out) and process.running() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert not (out / "record.json").exists(), "the kill came too late to test anything"
    assert 0 < saved_step(out) < STEPS
    finish(start(*command(stage, out, folders)))
    file = MAKES.get(stage, NETWORK_FILE)
    whole, resumed = load_file(folders / stage / file), load_file(out / file)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert metrics(out) == metrics(folders / stage)


def saved_step(out: Path) -> int:
    return torch.load(out / STATE_FILE, weights_only=True)["step"] if (out / STATE_FILE).exists() else 0


def metrics(out: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_metrics(out)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_asked_to_stop_saves_and_says_so(number: signal.Signals, folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    process = start(*command("dmd", out, folders), "steps=1000", SAVE_SECONDS="1000")
    while not read_metrics(out) and process.running():
        time.sleep(0.005)
    assert not (out / STATE_FILE).exists()
    os.kill(process.pid, number)
    done = process.finished()
    assert done.returncode == 130
    assert f"stopped at step {saved_step(out)}; the same command goes on" in done.stderr
    assert saved_step(out) > 0


def test_two_processes_share_the_structure_and_nothing_else(folders: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    checkout = os.pathsep.join([str(ROOT), str(ROOT / "src")])  # and not another that is installed
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": checkout, "SEEN": str(tmp_path)}
    program = [*torchrun, noise_world.__name__, *command("dmd", tmp_path / "two", folders), "rank=4"]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "record.json").read_text())["processes"] == 2
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["plans"] == two["plans"] and len(set(one["plans"])) > 1
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], two["weights"], strict=True))
    assert one["clips"] and one["prompts"], "some rollouts go on from clips, some begin with prompts alone"
    for name in ("prompts", "clips", "noise"):
        assert all(not torch.equal(a, b) for a, b in zip(one[name], two[name], strict=True)), name
    # Not other draws from one pool of clips, but other clips.
    frames, others = ({frame.sum().item() for x in seen["clips"] for frame in x.flatten(0, 1)} for seen in (one, two))
    assert not frames & others


def test_neighbouring_seeds_and_processes_have_noise_of_their_own() -> None:
    seeds = {_seed_of_noise(seed, rank) for seed, rank in product(range(40, 60), range(64))}
    assert len(seeds) == 20 * 64 and all(0 <= seed < 1 << 32 for seed in seeds)


def test_a_lone_process_does_not_take_up_the_run_of_two(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    out.mkdir()
    start_from = folders / READS["dmd"]
    asked = {"stage": "dmd", "from": str(start_from), "recipes": RECIPES["dmd"]}
    settings = asdict(with_settings(DmdStage(), [f"steps={STEPS}", "seconds=1e9", *SETTINGS["dmd"]]))
    (out / "config.json").write_text(json.dumps(asked | {"config": settings}))
    torch.save({"step": 1, "seconds": 0.0, "random": [{}, {}], "parts": {}}, out / STATE_FILE)
    done = start(*command("dmd", out, folders)).finished()
    assert done.returncode == 2 and "was saved by 2 processes" in done.stderr


def test_a_folder_is_trained_into_by_one_process(folders: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["train", "teacher", "--out", str(tmp_path), "--from", str(folders / "codec")]) == 2
    assert "another process trains into" in capsys.readouterr().err


def test_a_report_can_be_made_again_after_a_writer_was_killed(folders: Path, monkeypatch) -> None:
    monkeypatch.setattr(training, "FILMED", 1)
    monkeypatch.setattr(strips, "LOOKED_AT_BLOCKS", 2)
    (folders / "dmd" / "samples" / "self_forcing.part.mp4").touch()
    written = report(folders / "dmd")
    films = {"self_forcing.mp4", "rolling_forcing.mp4", "hybrid_forcing_share_0.4.mp4"}
    assert {path.name for path in written} == {"curves.png", *films}


def test_curves_are_drawn_of_metrics_that_not_every_step_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"stage": "codec"}))
    rows = [{"step": 0, "seconds": 1.0, "loss": 2.0}, {"step": 1, "seconds": 2.0, "loss": 1.0, "pull": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report(tmp_path) == [tmp_path / "curves.png"]


def test_a_student_of_another_teacher_is_refused(folders: Path, tmp_path: Path, capsys) -> None:
    mixed = shutil.copytree(folders / "dmd", tmp_path / "mixed")
    other = load_file(mixed / TEACHER_FILE)
    with safe_open(mixed / TEACHER_FILE, "pt") as file:
        described = file.metadata()
    name = "text.words.weight.scale"
    save_file(other | {name: other[name] * 2}, mixed / TEACHER_FILE, metadata=described)
    assert main(["train", "dmd", "--out", str(tmp_path / "out"), "--from", str(mixed)]) == 2
    assert "another teacher" in capsys.readouterr().err


def test_a_student_of_a_teacher_of_other_sizes_is_refused(folders: Path, tmp_path: Path, capsys) -> None:
    mixed = shutil.copytree(folders / "ode", tmp_path / "mixed")
    path = mixed / TEACHER_FILE
    text, network, about = load_network(path, CPU)
    text, network = WordEncoder(replace(text.config, dim=32)), WanTransformer(replace(network.config, text_dim=32))
    save_network(path, text, network, role="teacher", shift=about["shift"], int8=True)
    assert main(["train", "dmd", "--from", str(mixed), "--out", str(tmp_path / "out")]) == 2
    assert "a network of another teacher: their text encoders differ" in capsys.readouterr().err


def test_teacher_forcing_goes_on_from_a_student(folders: Path, tmp_path: Path) -> None:
    settings = ["--set", "steps=1", "seconds=1e9", "lr=1e-9", *SETTINGS["teacher_forcing"]]
    finish(start("teacher_forcing", "--from", str(folders / "ode"), "--out", str(tmp_path), *settings))

    def weight(path: Path) -> Tensor:
        return load_weights(path)[0]["network.blocks.0.ffn.0.weight"]

    student = weight(folders / "ode" / NETWORK_FILE)
    assert torch.allclose(weight(tmp_path / NETWORK_FILE), student, atol=1e-6)
    assert not torch.allclose(weight(tmp_path / TEACHER_FILE), student, atol=1e-6)


def test_maps_of_a_far_state_are_learned_saved_streamed_and_learned_on(folders: Path, tmp_path: Path) -> None:
    few = ["--recipe", HYBRID, "--set", "steps=2", "seconds=1e9"]
    for stage, source, settings in (
        ("teacher_forcing", folders / "ode", [*SETTINGS["teacher_forcing"], "anchor_weight=1", "far_maps=true"]),
        ("dmd", tmp_path / "teacher_forcing", [one for one in SETTINGS["dmd"] if "levels" not in one]),
    ):
        finish(start(stage, "--from", str(source), "--out", str(tmp_path / stage), *few, *settings))
    maps = [
        {name: x for name, x in load_weights(tmp_path / stage / NETWORK_FILE)[0].items() if ".far_maps." in name}
        for stage in ("teacher_forcing", "dmd")
    ]
    assert len(maps[0]) == 2 * 2 and all(x.any() for x in maps[0].values())
    assert all(not torch.equal(x, maps[1][name]) for name, x in maps[0].items())
    engine = recipes.load(tmp_path / "dmd", recipe=HYBRID, device="cpu")
    assert engine.network.config.far_maps
    with engine.stream("a red ball") as stream:
        assert sum(len(next(stream).frames) for _ in range(5)) == 9 + 4 * 12


def test_a_student_trained_at_a_rank_is_a_delta_of_that_rank(folders: Path, tmp_path: Path) -> None:
    finish(start(*command("dmd", tmp_path / "run", folders), "rank=4"))
    base, tuned = (folder / NETWORK_FILE for folder in (folders / "ode", tmp_path / "run"))
    told = save_delta(tmp_path / "delta.safetensors", base, tuned, rank=4)
    assert told["low_rank"] == 26 and told["error_of_change"] < 0.01
    engine = recipes.load(tmp_path / "run", recipe="self_forcing", device="cpu")
    shutil.copy(base, tmp_path)
    delta = recipes.load(tmp_path / "delta.safetensors", recipe="self_forcing", device="cpu")
    assert engine.network.config == delta.network.config and engine.weights != delta.weights  # rounded


def test_every_stage_is_a_verb() -> None:
    assert train._STAGES.keys() == STAGES.keys()


@pytest.mark.parametrize(
    "stage, arguments, said",
    [
        ("codec", ["--set", "bach=1"], "no setting 'bach'"),
        (
            "codec",
            ["--set", "steps=many"],
            "setting 'steps=many' does not work: a value such as 100000 is wanted, not many",
        ),
        ("codec", ["--set", "lr"], "setting 'lr' does not work: a value such as 0.0"),
        ("codec", ["--set", "lr=true"], "is wanted, not True"),
        ("finetune", ["--set", "softmax=2"], "a value such as false is wanted, not 2"),
        ("dmd", ["--set", "levels=4"], "a value such as [] is wanted, not 4"),
        ("teacher", ["--set", "network=3"], 'a value such as {"dim": '),
        ("codec", ["--set", "seconds=0"], "seconds must be above 0"),
        ("codec", ["--set", "steps=0.5"], "a whole number"),
        ("codec", ["--set", "steps=Infinity"], "does not work"),
        ("codec", ["--set", "lr=NaN"], "lr must be above 0, got nan"),
        ("codec", ["--set", 'decoder_widths="32"'], "a value such as [160, 96, 48] is wanted, not 32"),
        ("codec", ["--set", "decoder_widths=[3, 2.5]"], "a whole number"),
        ("teacher", ["--from", "{codec}", "--set", 'network={{"heads": 0}}'], "heads must be 1 or more, got 0"),
        ("teacher", ["--from", "{codec}", "--set", 'network={{"conversion": {{"layers": [10]}}}}'], "there are 10"),
        ("dmd", ["--from", "{ode}", "--set", "levels=[0]"], "levels must be above 0"),
        ("dmd", ["--from", "{ode}", "--set", "rank=-1"], "rank must be 0 or more"),
        ("dmd", ["--from", "{ode}", "--set", "rank=32"], "factors would be larger than every matrix"),
        ("teacher_forcing", ["--from", "{ode}", "--set", "rank=999"], "factors would be larger than every matrix"),
        ("dmd", ["--from", "{ode}", "--set", "most_blocks=2"], "must hold the teacher's clip"),
        ("dmd", ["--from", "{ode}", "--set", "memory_share=0.5"], "set real_weight above 0, too"),
        ("dmd", ["--from", "{ode}", "--set", "real_frames=32", "real_weight=1"], "whole blocks"),
        ("dmd", ["--from", "{ode}", "--set", "memory_share=0.5", "real_weight=1"], "take more frames"),
        ("teacher_forcing", ["--from", "{ode}", "--set", "frames=32"], "whole blocks"),
        ("teacher_forcing", ["--from", "{ode}", "--set", "memory_share=0.5"], "take more frames"),
        ("teacher_forcing", ["--from", "{ode}", "--set", "far_maps=true"], "far_maps is for recipes with a far state"),
        ("teacher_forcing", ["--from", "{ode}", "--set", "real_weight=0"], "nothing would be learned"),
        ("teacher", ["--from", "{ode}"], "another shape"),
        ("teacher", [], "--from"),
        ("codec", ["--from", "{ode}"], "begins with nothing: leave out --from"),
        ("finetune", ["--from", "{ode}", "--recipe", "rehyat"], "trains no student: leave out --recipe"),
        ("teacher_forcing", ["--from", "{ode}", "--recipe", "rehyat"], "these weights have none"),
        ("ode", ["--from", "{ode}", "--recipe", "rehyat"], "converted layers cannot be given: take teacher_forcing"),
        ("finetune", ["--from", "{ode}"], "holds no converted.safetensors"),
        ("attention_matching", ["--from", "{ode}", "--set", "current=12"], "nothing is far"),
        ("attention_matching", ["--from", "{ode}", "--set", "layers=[4]"], "layer 4 cannot be converted: there are 2"),
        ("dmd", ["--from", "{codec}"], "holds no teacher.safetensors"),
        ("dmd", ["--from", "nowhere"], "no folder nowhere"),
        ("dmd", ["--from", "{ode}", "--recipe", "self_forcin"], "did you mean self_forcing"),
        ("dmd", ["--from", "{ode}", "--recipe", "hybrid_forcing:far=no"], "no far=no: there are keep"),
    ],
)
def test_bad_input_is_one_line(stage, arguments, said, folders: Path, tmp_path: Path, capsys) -> None:
    arguments = [argument.format(codec=folders / "codec", ode=folders / "ode") for argument in arguments]
    assert main(["train", stage, "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_settings_that_hang_on_each_other_may_come_in_any_order() -> None:
    told = ["real_weight=0", "anchor_weight=1", "far_only=true", "rank=2", "far_only=false"]
    stage = with_settings(TeacherForcingStage(), told)
    assert (stage.real_weight, stage.anchor_weight, stage.far_only, stage.rank) == (0, 1, False, 2)


def test_a_folder_belongs_to_one_run(folders: Path, capsys) -> None:
    start_from = ["--from", str(folders / "codec"), "--set", "steps=1"]
    assert main(["train", "teacher", "--out", str(folders / "teacher"), *start_from]) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_matching_teaches_maps_alone_and_converts_the_layers_that_it_measured_best(folders: Path) -> None:
    teacher, _ = load_weights(folders / "teacher" / TEACHER_FILE)
    matched, description = load_weights(folders / "attention_matching" / CONVERTED_FILE)
    maps = matched.keys() - teacher.keys()
    assert maps and all(".self_attn.features." in name for name in maps) and teacher.keys() < matched.keys()
    assert all(torch.equal(teacher[name], matched[name]) for name in teacher)
    spent = json.loads((folders / "attention_matching" / "record.json").read_text())["spent"]
    errors = {int(layer): one["beside_answer"] for layer, one in spent["matching"].items()}
    assert set(errors) == {0, 1} and spent["converted"] == [min(errors, key=errors.get)]
    assert description["network"]["conversion"]["layers"] == spent["converted"]
    for one in spent["matching"].values():
        left_local = [head for head, error in enumerate(one["heads_beside_near"]) if error >= 1 - 1e-6]
        assert one["before"] > 0
        assert max(one["heads_beside_near"]) <= 1 + 1e-6 and set(one["local_heads"]) >= set(left_local)
    row = read_metrics(folders / "attention_matching")[0]
    assert row["loss"] == pytest.approx((row["layer_0"] + row["layer_1"]) / 2)
    tuned, _ = load_weights(folders / "finetune" / CONVERTED_FILE)
    changed = {name.split(".")[0] for name in tuned if not torch.equal(tuned[name], matched[name])}
    assert changed == {"network"} and tuned.keys() == matched.keys()


def test_the_softmax_twin_is_tuned_on_the_same_clips(folders: Path, tmp_path: Path) -> None:
    settings = ["--set", "steps=2", "seconds=1e9", *SETTINGS["finetune"], "softmax=true"]
    finish(start("finetune", "--from", str(folders / "teacher"), "--out", str(tmp_path), *settings))
    before, _ = load_weights(folders / "teacher" / TEACHER_FILE)
    after, description = load_weights(tmp_path / TEACHER_FILE)
    assert description["role"] == "teacher" and description["network"]["conversion"] is None
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert not (tmp_path / CONVERTED_FILE).exists()


def test_tuning_that_computes_layers_again_learns_the_same(folders: Path, tmp_path: Path) -> None:
    settings = ["--set", "steps=2", "seconds=1e9", *SETTINGS["finetune"], "log_every=1"]
    for name, recompute in (("kept", "false"), ("again", "true")):
        run = ["--from", str(folders / "attention_matching"), "--out", str(tmp_path / name)]
        finish(start("finetune", *run, *settings, f"recompute={recompute}"))
    (kept, _), (again, _) = (load_weights(tmp_path / name / CONVERTED_FILE) for name in ("kept", "again"))
    assert all(torch.allclose(kept[name], again[name], rtol=0, atol=1e-6) for name in kept)
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("kept", "again")]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1])


def test_a_converted_teacher_tuned_at_a_rank_is_a_delta_on_the_teacher(folders: Path, tmp_path: Path) -> None:
    settings = ["--set", "steps=2", "seconds=1e9", *SETTINGS["finetune"], "rank=2"]
    finish(start("finetune", "--from", str(folders / "attention_matching"), "--out", str(tmp_path), *settings))
    tuned = tmp_path / "tuned.safetensors"
    (tmp_path / CONVERTED_FILE).rename(tuned)
    told = save_delta(tmp_path / CONVERTED_FILE, tmp_path / TEACHER_FILE, tuned, rank=2)
    assert told["low_rank"] and told["error"] < 2e-3, "what int8 rounds is all that is lost"
    networks = [load_network(path, torch.device("cpu"))[1] for path in (tuned, Path(told["file"]))]
    assert networks[1].config == networks[0].config and networks[0].features
    for ours, theirs in zip(*(one.state_dict().values() for one in networks), strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm() + 1e-6


def test_clips_of_a_converted_teacher_are_evaluated_beside_the_teachers(folders: Path, capsys) -> None:
    """These are too short to be scored, which is said once they are made."""
    few = ["--prompts", "1", "--seeds", "1", "--dtype", "float32", "--device", "cpu"]
    assert main(["evaluate", "toy", "--model", str(folders / "finetune"), "--recipe", "converted", *few]) == 2
    assert "clips of 2.8 seconds cannot be scored at 5" in capsys.readouterr().err
    assert main(["evaluate", "toy", "--model", str(folders / "teacher"), "--recipe", "converted", *few]) == 2
    assert "nor a folder that holds converted.safetensors" in capsys.readouterr().err
    assert main(["evaluate", "toy", "--recipe", "converted", *few]) == 2
    assert "toy has no converted teacher: name a folder that holds converted.safetensors" in capsys.readouterr().err


def test_a_converted_teacher_becomes_a_student_that_streams(folders: Path, tmp_path: Path) -> None:
    forced, distilled = tmp_path / "forced", tmp_path / "distilled"
    few = ["--recipe", "rehyat", "--set", "steps=1", "seconds=1e9"]
    finish(start("teacher_forcing", "--from", str(folders / "finetune"), "--out", str(forced), *few, *FORCED))
    finish(start("dmd", "--from", str(forced), "--out", str(distilled), *few, *SETTINGS["dmd"]))
    engine = recipes.load(distilled, recipe="rehyat", dtype=torch.float32, levels=2)
    with engine.stream("a red ball") as stream:
        assert next(stream).frames.shape == (9, world.HEIGHT, world.WIDTH, 3)
    clips = toy_teacher(model=folders / "finetune", steps=1, file=CONVERTED_FILE)(["a red ball"], [1])
    assert clips.shape[:2] == (1, 45)


def test_a_student_is_converted_by_the_features_of_its_teacher(folders: Path, tmp_path: Path) -> None:
    """And held to what it answered before; from then on it is a student like any."""
    both, held, more = tmp_path / "both", tmp_path / "held", tmp_path / "more"
    shutil.copytree(folders / "attention_matching", both)
    shutil.copyfile(folders / "ode" / NETWORK_FILE, both / NETWORK_FILE)
    few = ["--recipe", "rehyat", "--set", "steps=1", "seconds=1e9", "real_weight=0", "anchor_weight=1", *FORCED]
    finish(start("teacher_forcing", "--from", str(both), "--out", str(held), *few))
    (before, _), (after, description) = (load_weights(folder / NETWORK_FILE) for folder in (both, held))
    conversion = load_weights(both / CONVERTED_FILE)[1]["network"]["conversion"]
    assert description["network"]["conversion"] == conversion and description["recipes"] == ["rehyat"]
    assert {name for name in after if ".features." not in name} == before.keys()
    assert read_metrics(held)[0]["anchor"] > 0
    finish(start("teacher_forcing", "--from", str(held), "--out", str(more), *few))
    assert load_weights(more / NETWORK_FILE)[0].keys() == after.keys()


def test_a_converted_teacher_can_be_held_to_what_its_teacher_answers(folders: Path, tmp_path: Path) -> None:
    settings = ["--set", "steps=1", "seconds=1e9", *SETTINGS["finetune"], "rank=2"]
    for name, more in {"held": ["anchored=true"], "free": []}.items():
        run = ["--from", str(folders / "attention_matching"), "--out", str(tmp_path / name), *settings, *more]
        finish(start("finetune", *run))
    held, free = (read_metrics(tmp_path / name)[0]["loss"] for name in ("held", "free"))
    assert 0 < held < free, "its layers are matched, and clips are news to it"
    other = tmp_path / "other"
    shutil.copytree(folders / "attention_matching", other)
    weights, description = load_weights(other / TEACHER_FILE)
    changed = {name: 1.1 * x if name.startswith("network.") else x for name, x in weights.items()}
    save_weights(other / TEACHER_FILE, changed, description, int8=True)
    finish(start("finetune", "--from", str(other), "--out", str(tmp_path / "far"), *settings, "anchored=true"))
    assert read_metrics(tmp_path / "far")[0]["loss"] > 2 * held, "what it is held to is the teacher beside it"
    with pytest.raises(ValueError, match="nothing to learn from itself"):
        FinetuneStage(softmax=True, anchored=True)
    with pytest.raises(ValueError, match="set anchored=true with guided"):
        FinetuneStage(guided=True)


def test_a_converted_teacher_is_told_its_teachers_answer_on_its_own_way(folders: Path, tmp_path: Path) -> None:
    settings = ["steps=3", "seconds=1e9", *SETTINGS["finetune"], "anchored=true", "guided=true", "log_every=1"]
    run = ["--from", str(folders / "attention_matching"), "--out", str(tmp_path), "--set", *settings]
    finish(start("finetune", *run, "on_the_way=true"))
    rows = read_metrics(tmp_path)
    assert len(rows) == 3 and all(row["loss"] > 0 and row["norm"] > 0 for row in rows)
    before, after = (load_weights(folder / CONVERTED_FILE)[0] for folder in (folders / "attention_matching", tmp_path))
    assert any(not torch.equal(x, before[name]) for name, x in after.items())
    with pytest.raises(ValueError, match="set anchored=true guided=true with on_the_way"):
        FinetuneStage(on_the_way=True)


def test_features_may_learn_alone(folders: Path, tmp_path: Path) -> None:
    """Then they are all that is new beside the teacher."""
    settings = ["--set", "steps=2", "seconds=1e9", *SETTINGS["finetune"], "anchored=true", "far_only=true"]
    finish(start("finetune", "--from", str(folders / "attention_matching"), "--out", str(tmp_path), *settings))
    before, after = (load_weights(f / CONVERTED_FILE)[0] for f in (folders / "attention_matching", tmp_path))
    changed = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert changed and all(".features." in name for name in changed)
    told = save_delta(tmp_path / "delta.safetensors", tmp_path / TEACHER_FILE, tmp_path / CONVERTED_FILE, rank=2)
    assert told["low_rank"] == 0 and told["in_full"] == len([name for name in after if ".features." in name])
    with pytest.raises(ValueError, match="no matrix that a rank could be of"):
        FinetuneStage(far_only=True, rank=2)
