"""Takes go on bit for bit, whatever the recipe and whatever was said before; tiny random networks."""

import json
import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tests import tiny
from torch import Tensor

from longtake import recipes
from longtake.generation import take as takes
from longtake.generation.stream import Engine, Stream
from longtake.generation.take import Take, fork, resume, retrace


class ByLength(tiny.AnyText):
    """Prompts of different lengths are different."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.cat([tiny.text(seed=len(prompt))[:, 0].float() for prompt in prompts])


SMALL = {  # the published sizes do not fit what the tiny network was trained to see
    "causvid": partial(recipes.causvid, past=6),
    "causal_forcing": partial(recipes.causal_forcing, past=6),
    "rolling_sink": partial(recipes.rolling_sink, library=6),
    "reward_forcing": partial(recipes.reward_forcing, average=0.5),  # the published share hardly moves the sink
}
NAMES = sorted(recipes.RECIPES)


@cache
def engine(name: str) -> Engine:
    made = (recipes.RECIPES | SMALL)[name]()
    engine = replace(tiny.engine(made.with_levels(3 if made.rolls else 2)), text=ByLength())
    if made.far:
        engine = replace(engine, network=tiny.with_drawn_maps(engine.network))
        for layer in engine.network.layers:
            torch.nn.init.normal_(layer.self_attn.linear_proj.weight)  # it matters what is read from far
    return engine


def pictures(stream: Stream, blocks: int) -> np.ndarray:
    return np.concatenate([next(stream).frames for _ in range(blocks)])


def tell(stream: Stream, verb: str) -> None:
    prompt = "x" * (3 + stream.blocks)
    if verb == "redirect":
        stream.redirect(prompt, far=0.5)
    elif verb == "new":
        stream.redirect(prompt, in_flight="new")
    elif verb == "blend":
        stream.redirect(prompt, over=3, blend="slerp")
    elif verb == "blend new":
        stream.redirect(prompt, over=4, in_flight="new")
    elif verb == "cut":
        stream.cut(prompt, far=0.25)


def same(one: object, other: object) -> bool:
    """Whether two states are equal, tensors to the bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


verbs = st.lists(
    st.sampled_from(["on", "on", "on", "redirect", "new", "blend", "blend new", "cut"]), min_size=1, max_size=7
)


def played(stream: Stream, told: Sequence[str]) -> np.ndarray:
    """Each word before a block; the last is left hanging, as a stream that is saved just after it."""
    made = []
    for verb in told:
        made.append(next(stream).frames)
        tell(stream, verb)
    return np.concatenate(made)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=6)
@given(before=verbs, after=verbs)
@example(before=["on"] * 4 + ["cut"], after=["on"])
@example(before=["on"] * 3 + ["redirect", "on", "new"], after=["on", "redirect"])
@example(before=["on"] * 3 + ["blend"], after=["on"] * 3)
@example(before=["on"] * 3 + ["blend", "on", "blend new"], after=["redirect", "on"])
def test_a_saved_stream_goes_on_bit_for_bit(name: str, before: list[str], after: list[str]) -> None:
    original = engine(name).stream("abc", seed=3)
    played(original, before)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "one.take"
        Take.of(original).save(path)
        resumed = resume(path, engine(name))
    expected = played(original, [*after, "on"])
    assert (played(resumed, [*after, "on"]) == expected).all()
    assert same(resumed.state(), original.state()), "what no picture shows yet is the same too"
    assert resumed.history == original.history and resumed.prompt == original.prompt


@pytest.mark.parametrize("name", ["reward_forcing", "hybrid_forcing"])
def test_means_and_sums_keep_more_than_the_networks_precision(name: str) -> None:
    made = replace(engine(name), network=deepcopy(engine(name).network), codec=deepcopy(engine(name).codec))
    made.to(torch.bfloat16)
    original = made.stream("abc", seed=3)
    pictures(original, 5)
    resumed = fork(original)
    pictures(original, 3), pictures(resumed, 3)
    assert same(resumed.state(), original.state())


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=3)
@given(told=verbs)
def test_a_retraced_stream_is_where_the_take_is(name: str, told: list[str]) -> None:
    original = engine(name).stream("abc", seed=3)
    played(original, told)
    again = retrace(engine(name), original.seed, original.history, original.blocks)
    forked = fork(original)
    assert (pictures(again, 3) == pictures(forked, 3)).all() and same(again.state(), forked.state())
    assert again.history == original.history


@pytest.mark.parametrize("name", ["self_forcing_sink", "hybrid_forcing", "rolling_forcing", "memflow", "rehyat"])
@settings(deadline=None, max_examples=4)
@given(before=verbs, order=st.permutations([0, 0, 0, 1, 1, 1, 2, 2, 2]))
def test_forks_do_not_know_of_each_other(name: str, before: list[str], order: list[int]) -> None:
    """Each of three, woven in any order under words of its own, shows what it would have shown alone."""
    original = engine(name).stream("abc", seed=3)
    played(original, before)
    kept = Take.of(original)
    words = ("on", "redirect", "cut")
    alone = [played(kept.resume(engine(name)), [word] * 3) for word in words]
    three = [original, fork(original), fork(original)]
    woven: list[list[np.ndarray]] = [[], [], []]
    for which in order:
        woven[which].append(played(three[which], [words[which]]))
    for one, made in zip(alone, woven, strict=True):
        assert (np.concatenate(made) == one).all()
    assert not (alone[0] == alone[1]).all(), "the words matter"


def test_takes_of_the_first_form_go_on(tmp_path: Path) -> None:
    """They know of no blends."""
    original = engine("rolling_forcing").stream("abc", seed=3)
    played(original, ["on", "on", "redirect"])
    Take.of(original).save(tmp_path / "new.take")
    with safe_open(tmp_path / "new.take", "pt") as file:
        described = json.loads(file.metadata()["longtake_take"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert described["form"] == 2
    del described["state"]["blends"]
    for told in described["state"]["history"]:
        del told["over"], told["blend"]
    for form in (1, 3):
        metadata = {"longtake_take": json.dumps(described | {"form": form})}
        save_file(tensors, tmp_path / f"{form}.take", metadata=metadata)
    resumed = resume(tmp_path / "1.take", engine("rolling_forcing"))
    going_on = ["on", "blend", "on", "on"]
    assert (played(resumed, going_on) == played(original, going_on)).all()
    assert same(resumed.state(), original.state())
    with pytest.raises(ValueError, match="a take of form 3, and this version reads forms 1 and 2"):
        Take.load(tmp_path / "3.take")


@pytest.mark.parametrize("name", ["rolling_forcing", "memflow"])
def test_rewind_shows_the_same_again_even_after_a_failure(name: str) -> None:
    stream = engine(name).stream("abc", seed=3)
    pictures(stream, 3)
    stream.redirect("defgh")
    kept = Take.of(stream)
    first = pictures(stream, 4)
    stream.cut("another one")
    pictures(stream, 1)
    kept.rewind(stream)
    assert (stream.prompt, stream.blocks) == ("defgh", 3)
    assert (pictures(stream, 4) == first).all()
    stream.close()
    kept.rewind(stream)
    assert not stream.closed and (pictures(stream, 4) == first).all(), "a take is a value: it serves again"


def test_a_take_is_of_a_stream_that_goes_on() -> None:
    stream = engine("self_forcing").stream("abc")
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        Take.of(stream)


def test_a_take_goes_on_from_given_pictures_but_cannot_be_retraced() -> None:
    given = np.zeros((9, engine("longlive").height, engine("longlive").width, 3), np.uint8)
    stream = engine("longlive").stream("abc", seed=3, pictures=given)
    pictures(stream, 2)
    twin = fork(stream)
    assert (pictures(stream, 2) == pictures(twin, 2)).all()
    with pytest.raises(ValueError, match="9 given pictures"):
        retrace(engine("longlive"), 3, stream.history, stream.blocks)


def other_weights() -> Engine:
    return replace(engine("self_forcing"), network=tiny.network(seed=5).float().requires_grad_(False))


def other_codec() -> Engine:
    changed = tiny.engine(engine("self_forcing").recipe)
    with torch.no_grad():
        next(changed.codec.parameters()).add_(1)
    return replace(engine("self_forcing"), codec=changed.codec)


def other_precision() -> Engine:
    made = tiny.engine(engine("self_forcing").recipe)
    made.to(torch.bfloat16)
    return made


@pytest.mark.parametrize(
    "other, why",
    [
        (other_weights, "it was made with weights"),
        (other_codec, "it was made with codec weights"),
        (other_precision, "it was made with dtype float32, and here it is bfloat16"),
        (lambda: engine("self_forcing_sink"), "it was made with recipe self_forcing, and here it is self_forcing_sink"),
        (
            lambda: replace(engine("self_forcing"), recipe=engine("self_forcing").recipe.with_levels(4)),
            "it was made with levels",
        ),
        (lambda: replace(engine("self_forcing"), latent_size=(4, 4, 8)), "it was made with latent size"),
    ],
)
def test_what_would_not_be_the_same_is_refused_with_the_reason(other, why: str, tmp_path: Path) -> None:
    stream = engine("self_forcing").stream("abc")
    pictures(stream, 1)
    Take.of(stream).save(tmp_path / "one.take")
    with pytest.raises(ValueError, match=f"one.take: this take does not go on here: {why}"):
        resume(tmp_path / "one.take", other())


@pytest.mark.parametrize(
    "key, value",
    [
        ("longtake", "0.0.1"), ("torch", "1.0"), ("device", "cuda NVIDIA H200"), ("sink", 9), ("past", 9),
        ("block", 9), ("frame_rate", 9), ("passes", "fused"),
    ],
)  # fmt: skip
def test_other_versions_devices_and_sizes_are_refused(key: str, value: str | int) -> None:
    stream = engine("self_forcing").stream("abc")
    kept = Take.of(stream)
    elsewhere = replace(kept, made_with=kept.made_with | {key: value})
    with pytest.raises(ValueError, match=f"made with {key.replace('_', ' ')} {value}"):
        elsewhere.resume(engine("self_forcing"))


def test_a_take_of_before_passes_were_told_goes_on() -> None:
    kept = Take.of(engine("self_forcing").stream("abc"))
    untold = {key: value for key, value in kept.made_with.items() if key != "passes"}
    assert len(untold) < len(kept.made_with)
    replace(kept, made_with=untold).resume(engine("self_forcing"))


def test_another_name_for_the_same_weights_is_no_difference() -> None:
    kept = Take.of(engine("self_forcing").stream("abc"))
    names = {"model": "one", "codec": "two", "base": "three"}
    replace(kept, made_with=kept.made_with | names).resume(engine("self_forcing"))


def test_files_that_are_no_takes_are_one_line(tmp_path: Path) -> None:
    stream = engine("self_forcing").stream("abc")
    pictures(stream, 1)
    whole, cut, weights = (tmp_path / name for name in ("whole.take", "cut.take", "weights.safetensors"))
    Take.of(stream).save(whole)
    cut.write_bytes(whole.read_bytes()[:-100])
    save_file({"x": torch.zeros(1)}, weights)
    damaged = tmp_path / "damaged.take"
    for part, other in ((b"seeds", b"sedes"), (b"levels", b"lovels"), (b"prompts", b"promqts"), (b"state.", b"stbte.")):
        damaged.write_bytes(whole.read_bytes().replace(part, other, 1))
        with pytest.raises(ValueError, match=r"damaged.take is damaged"):
            Take.load(damaged)
    for path, error, why in (
        (cut, ValueError, "cut.take is not a whole take"),
        (weights, ValueError, "weights.safetensors is no take"),
        (tmp_path / "none.take", FileNotFoundError, "no take at"),
        (tmp_path, FileNotFoundError, "no take at"),
    ):
        with pytest.raises(error, match=why):
            Take.load(path)


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch) -> None:
    stream = engine("self_forcing").stream("abc")
    path = tmp_path / "one.take"
    kept = Take.of(stream)
    kept.save(path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        kept.save(path)
    pictures(stream, 1)

    def full(tensors: dict[str, Tensor], beside: Path, **more: object) -> None:
        beside.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(takes, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        Take.of(stream).save(path, overwrite=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["one.take"]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        kept.save(tmp_path / "absent" / "one.take")


def test_numbers_may_be_numpys(tmp_path: Path) -> None:
    made, states = engine("hybrid_forcing"), []
    for number in (int, np.int64):
        stream = made.stream("abc", seed=number(5))
        pictures(stream, 1)
        stream.redirect("defgh", far=np.float32(0.5))
        Take.of(stream).save(tmp_path / "one.take", overwrite=True)
        states.append(resume(tmp_path / "one.take", made).state())
    assert same(*states)
    with pytest.raises(TypeError, match="float"):
        made.stream("abc", seed=1.5)  # type: ignore[arg-type]


def test_engines_chunks_and_takes_are_shown_without_their_numbers() -> None:
    stream = engine("self_forcing").stream("abc")
    shown = repr((stream.engine, next(stream), Take.of(stream)))
    assert len(shown) < 2000 and "self_forcing" in shown and "start_seconds" in shown


def test_info_says_what_was_told_and_when() -> None:
    stream = engine("rolling_forcing").stream("abc", seed=7)
    pictures(stream, 2)
    stream.redirect("defgh")
    stream.redirect("abc", over=3, blend="slerp")
    told = Take.of(stream).info()
    assert told == json.loads(json.dumps(told))
    assert told["told"] == [
        {"at": 0, "verb": "begin", "prompt": "abc"},
        {"at": 21 / 16, "verb": "redirect", "prompt": "defgh"},
        {"at": 21 / 16, "verb": "redirect", "prompt": "abc", "over": 3, "blend": "slerp"},
    ]
    assert (told["seed"], told["blocks"], told["seconds"]) == (7, 2, 21 / 16)
    assert told["bytes"]["in_flight"] == 2 * 4 * np.prod(tiny.LATENTS), "two blocks are half made"
