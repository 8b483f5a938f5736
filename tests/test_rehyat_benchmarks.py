"""What the benchmarks of converted layers tell, at tiny size."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longtake.models.features import Conversion
from longtake.models.text import WordEncoder, WordEncoderConfig
from longtake.models.wan import converted
from longtake.recipes.weight_files import CODEC_FILE, CONVERTED_FILE, ENCODER_FILE, TEACHER_FILE, save_network
from tests import tiny
from tests.scripts import BENCHMARKS, benchmark


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # they import each other
    return benchmark(name)


def told(module: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["it", "--out", str(out), *options])
    module.main()


def test_any_attention_is_converted_and_losses_fall(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    conversion = script("rehyat_conversion", monkeypatch)
    told(conversion, tmp_path, monkeypatch, "--shape", "tiny", "--steps", "51")
    found = json.loads((tmp_path / "conversion.json").read_text())
    losses = found["another_attention"]["losses"]
    assert len(losses) == 153 and sum(losses[-10:]) < 0.9 * sum(losses[:10])
    network = found["network"]
    assert len(network["losses"]) == 51 and network["losses"][-1] < 0.9 * network["losses"][0]
    assert network["held_out_after"] < 0.9 * network["held_out_before"]
    assert len(network["converted"]) == 1 and network["tokens"] == 126
    tuned = found["finetune"]
    assert tuned["settings"]["recompute"] and tuned["converted"] == [1]
    assert len(tuned["losses"]) == 6 and len(tuned["step_seconds"]) == 5


def test_parts_run_alone_and_options_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    conversion = script("rehyat_conversion", monkeypatch)
    told(conversion, tmp_path, monkeypatch, "--shape", "tiny", "--parts", "finetune", "--finetune-steps", "2")
    found = json.loads((tmp_path / "conversion.json").read_text())
    assert found.keys() == {"about", "finetune"}
    assert found["about"]["options"]["finetune_steps"] == 2 and found["about"]["options"]["shape"] == "tiny"


def test_every_length_of_every_part_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    speed = script("rehyat_speed", monkeypatch)
    told(speed, tmp_path / "speed.json", monkeypatch, "--tiny", "--span", "4", "2")
    found = json.loads((tmp_path / "speed.json").read_text())
    assert (found["about"]["current"], found["about"]["overlap"]) == (4, 2)
    timed = {(case["part"], case["kind"], case["frames"]) for case in found["cases"] if case["ms"] > 0}
    kinds = {"attention": ("dense", "converted", "plain"), "self_attention": ("dense", "converted")}
    kinds["layer"] = ("dense", "converted", "step")
    assert timed == {(part, kind, frames) for part, some in kinds.items() for kind in some for frames in (6, 12)}
    assert all(case["off"] < 1e-5 for case in found["cases"] if "off" in case)
    assert found["gains"].keys() == {f"tiny {part}" for part in kinds}


@torch.no_grad()
def test_kernels_and_plain_torch_are_given_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """One takes keys that are rotated, the other rotates them itself: they must be the same keys."""
    pytest.importorskip("triton", reason="triton is not installed (it comes with longtake[dev] on Linux)")
    from longtake.models.wan_triton import FusedSpanView

    speed = script("rehyat_speed", monkeypatch)
    inputs = speed.Inputs.drawn("tiny", "attention", 9, (3, 1), whole=True)
    plain, own = inputs._view("plain"), inputs.own
    assert speed.distance(FusedSpanView(**vars(plain)).attend(0, own), plain.attend(0, own)) < 1e-2


def test_bytes_that_move_are_counted_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    length = script("rehyat_length", monkeypatch)
    x = torch.zeros(1, 2, 300, 4)  # heads before tokens, as torch's attention takes them
    with length.Traffic() as traffic:
        (x + 1).view(-1)
        assert (traffic.bytes, traffic.again) == (2 * x.nbytes, 0)
        torch.ops.aten._assert_tensor_metadata(x, dtype=torch.float32)  # as exported programs do
        assert traffic.bytes == 2 * x.nbytes
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    log_masses = 4 * 2 * 300
    assert (traffic.bytes, traffic.again) == (6 * x.nbytes + log_masses, 2 * 2 * x.nbytes), "three tiles of queries"


@torch.no_grad()
def test_tensors_without_numbers_move_as_much_as_those_with(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic, length = script("rehyat_traffic", monkeypatch), script("rehyat_length", monkeypatch)
    for kind in ("dense", "clip"):
        real = length.measured(kind, 12, "tiny", 1)
        without = traffic.counted("tiny", "layer", kind, 12, torch.float32, 16)
        assert all(without[name] == real[name] for name in ("traffic_mb", "tiled_mb"))
    (one, _), exported = traffic.case("tiny", "layer", "step", 3, torch.float32, 16), length.case("step", 3, "tiny")
    counts = []
    for run in (one, exported):
        with length.Traffic() as moved:
            run()
        counts.append(moved.bytes)
    assert 0.98 < counts[0] / counts[1] < 1.02, "the program that is exported moves what the layer does"


def test_traffic_of_every_kind_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed (it comes with longtake[dev] on Linux)")
    traffic = script("rehyat_traffic", monkeypatch)
    told(traffic, tmp_path / "it.json", monkeypatch, "--shapes", "tiny", "--frames", "6", "90")
    cases = json.loads((tmp_path / "it.json").read_text())["cases"]
    found = {(one["part"], one["kind"], one["frames"]): one for one in cases}
    assert len(found) == len(cases) == 2 * sum(map(len, traffic.PARTS.values()))
    short, long = (found["layer", "step", frames] for frames in (6, 90))
    assert short["traffic_mb"] == long["traffic_mb"] and short["least_mb"] == long["least_mb"]
    assert found["layer", "dense_step", 90]["least_mb"] > found["layer", "dense_step", 6]["least_mb"]
    for part in traffic.PARTS:
        assert found[part, "clip_kernels", 90]["traffic_mb"] < found[part, "clip", 90]["traffic_mb"]
    gain = found["layer", "clip", 90]["of_dense"]["scored_mb"]
    assert gain > found["layer", "clip", 6]["of_dense"]["scored_mb"]
    dense = {name: found["layer", "dense", 90][name] for name in ("traffic_mb", "tiled_mb", "scored_mb")}
    queries, heads = 90 * 6, 2  # of 2 bytes; the prompt has 512 keys
    scores = 4 * 2 * heads * queries * (queries + 512) / 1e6
    assert dense["scored_mb"] - dense["traffic_mb"] == pytest.approx(scores, abs=0.11)


def test_every_kind_of_a_layer_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    length = script("rehyat_length", monkeypatch)
    found = {kind: length.measured(kind, 6, "tiny", 1) for kind in length.KINDS}
    assert found["dense"]["traffic_mb"] < found["clip"]["traffic_mb"] <= found["step"]["traffic_mb"]
    assert all(one["seconds"] >= 0 and one["clip_seconds"] == 1.3 for one in found.values())


def test_a_share_of_a_matching_holds_the_maps_that_it_kept_and_no_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shares = script("rehyat_shares", monkeypatch)
    errors = {0: 0.3, 1: 0.1, 2: 0.2}
    for name, layers in (("all", (0, 1, 2)), ("some", (1,))):
        folder = tmp_path / name
        folder.mkdir()
        made = converted(tiny.network().float(), Conversion(layers=layers))
        text = WordEncoder(WordEncoderConfig(words=9, length=5, dim=8))
        save_network(folder / CONVERTED_FILE, text, made, role="teacher", shift=3.0, int8=False)
        for file in (CODEC_FILE, ENCODER_FILE, TEACHER_FILE):
            (folder / file).touch()
        matching = {layer: {"beside_answer": error} for layer, error in errors.items()}
        (folder / "record.json").write_text(json.dumps({"spent": {"matching": matching}}))
    out = ["--out", str(tmp_path / "share_")]
    monkeypatch.setattr(sys, "argv", ["it", str(tmp_path / "all"), "--shares", "0.67", *out])
    shares.main()
    whole, part = (load_file(tmp_path / name / CONVERTED_FILE) for name in ("all", "share_67"))
    assert part.keys() == {name for name in whole if ".0.self_attn.features." not in name}
    assert all(torch.equal(x, whole[name]) for name, x in part.items())
    near = ["--near-only", "--out", str(tmp_path / "near_")]
    monkeypatch.setattr(sys, "argv", ["it", str(tmp_path / "all"), "--shares", "0.67", *near])
    shares.main()
    alone = load_file(tmp_path / "near_67" / CONVERTED_FILE)
    changed = {name for name, x in alone.items() if not torch.equal(x, part[name])}
    assert changed == {name for name in part if ".features." in name and ".out_" in name}
    monkeypatch.setattr(sys, "argv", ["it", str(tmp_path / "some"), "--shares", "0.67", *out])
    with pytest.raises(SystemExit, match=r"did not keep the maps of layers \[0, 2\]"):
        shares.main()


def test_gains_are_of_what_was_timed_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = script("rehyat_speed", monkeypatch)

    def case(kind: str, frames: int, **more: Any) -> dict[str, Any]:
        return {"shape": "1.3B", "part": "layer", "kind": kind, "frames": frames, **more}

    cases = [case("dense", 21, ms=4.0), case("dense", 42, ms=16.0), case("dense", 84, refused="no room")]
    cases += [case("converted", 21, ms=5.0), case("converted", 42, ms=8.0), case("converted", 84, ms=16.0)]
    found = speed.summed_up(cases)
    assert found == {"gains": {"1.3B layer": {21: 0.8, 42: 2.0}}, "crossing": {"1.3B layer": 42}}


def test_jumps_are_found_where_chunks_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that move on by 1 each, and by 9 where the second and the third chunk of three latent frames begin."""
    edges = script("rehyat_edges", monkeypatch)
    moved = torch.ones(2, 33)  # nine latent frames
    moved[:, [9, 21]] = 9  # the first pictures of latent frames 3 and 6
    videos = moved.cumsum(1)[..., None, None, None].expand(-1, -1, 2, 2, 3).to(torch.uint8)
    changes = edges.changes(videos)
    assert changes.tolist() == [[1, 1, 9, 1, 1, 9, 1, 1]] * 2
    assert edges.at_edges(changes, 3) == {"edge": 9.0, "inside": 1.0, "ratio": 9.0}
    assert edges.at_edges(changes, 2)["edge"] == 3.0


def test_errors_of_prompt_and_none_are_weighed_as_guidance_weighs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    guided_errors = script("guided_errors", monkeypatch)
    teacher = [torch.zeros(1000), torch.zeros(1000)]
    alike = guided_errors.errors(teacher, [torch.ones(1000)] * 2, guidance=3.0)
    assert (alike["guided"], alike["correlation"], alike["of_which_is_lost"]) == pytest.approx((1.0, 1.0, 0.0))
    apart = guided_errors.errors(teacher, [torch.ones(1000), -torch.ones(1000)], guidance=3.0)
    assert (apart["guided"], apart["correlation"], apart["of_which_is_lost"]) == pytest.approx((25.0, -1.0, 4.0))
