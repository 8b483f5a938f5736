"""Loading: by name, folder and file; and what is refused."""

import shutil
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch

import longtake
from longtake import recipes
from longtake.attention.linear import PAPER, WIDTHS
from longtake.evaluation.trace import traced
from longtake.memory import far
from longtake.memory.far import Decay, Delta, FarShape, Keep, MassCap
from longtake.memory.stream_memory import StreamMemory
from longtake.memory.window import WindowShape
from longtake.models.features import Conversion
from longtake.models.wan import converted, reading_far
from longtake.models.weights import load_weights, save_weights
from longtake.recipes.devices import CPU
from longtake.recipes.methods import AT_FULL_SIZE, MEMORY_RULES
from longtake.recipes.teacher import toy_teacher
from longtake.recipes.weight_files import (
    CODEC_FILE,
    ENCODER_FILE,
    NETWORK_FILE,
    TEACHER_FILE,
    load_codec,
    load_network,
    packaged,
    save_network,
    toy_codec,
)
from longtake.toy.scenes import HEIGHT, RATE, WIDTH
from tests import tiny


def engine(model="toy", recipe="self_forcing_sink", dtype=torch.float32):
    return longtake.load(model, recipe=recipe, dtype=dtype)


def test_recipes_that_are_compared_see_equally_many_finished_frames_and_fit_the_network() -> None:
    network = converted(engine().network, Conversion(layers=(0, 9)))
    network.config = replace(network.config, reads_far=True)
    for name in recipes.RECIPES.keys() - set(MEMORY_RULES):
        recipe = recipes.recipe_named(name)
        assert recipe.name == name
        assert recipe.sink + recipe.past == 6
        assert recipe.memory(network).window.frames == (21 if recipe.rolls else 6)  # its commits see more
    assert ("toy", "self_forcing") in recipes.MODELS and ("toy", "self_forcing_sink") in recipes.MODELS


@pytest.mark.parametrize(
    "name, published, compared",
    [
        ("self_forcing:past=18", 18, "self_forcing"),
        ("causvid", 18, "causvid:past=6"),
        ("causal_forcing", 18, "causal_forcing:past=6"),
        ("longlive", 9, "longlive:past=3"),
        ("reward_forcing", 6, "reward_forcing"),
        ("memflow", 12, "memflow:past=0"),
        ("infinity_rope", 3, "infinity_rope:past=5"),
        ("rolling_sink", 18, "rolling_sink:library=6"),
    ],
)
def test_published_recipes_see_as_much_as_published_and_can_be_compared(
    name: str, published: int, compared: str
) -> None:
    """At most, by their last calls."""
    network = engine().network

    def seen(which: str) -> int:
        recipe = recipes.recipe_named(which)
        recipe.memory(network)
        return max(len(row.sink) + len(row.past) for row in islice(traced(recipe, network.config.extent), 14))

    assert seen(name) == published
    assert seen(compared) == 6


def test_a_network_that_cannot_read_a_far_state_is_refused_one() -> None:
    network = engine().network
    with pytest.raises(ValueError, match="hybrid_forcing has a far state, which this network was not trained to read"):
        recipes.hybrid_forcing().memory(network)


def test_blocks_in_flight_come_on_top_of_sink_and_past() -> None:
    network, recipe = engine().network, recipes.rolling_forcing()
    assert recipe.in_flight == 5 and recipes.self_forcing().in_flight == 1
    with pytest.raises(ValueError, match=r"sink 3 \+ past 3 \+ current 3 x 6 in flight = 24 latent frames do not fit"):
        recipe.with_levels(6).memory(network)
    network.config = replace(network.config, reads_far=True)
    with pytest.raises(ValueError, match="has a far state, which blocks in flight cannot read"):
        replace(recipe.with_levels(4), far=FarShape()).memory(network)
    with pytest.raises(ValueError, match="or blocks in flight, need a memory of sink and past as they are"):
        replace(recipe.with_levels(4), policy=recipes.reward_forcing().policy).memory(network)


def test_weights_of_a_folder_stream_under_a_recipe_they_were_not_made_for(tmp_path: Path) -> None:
    for name in (NETWORK_FILE, CODEC_FILE):
        shutil.copy(packaged(name), tmp_path / name)
    with engine(tmp_path, "rolling_forcing").stream("a red ball bounces over green hills") as stream:
        assert [len(next(stream).frames) for _ in range(2)] == [9, 12]


def test_a_model_without_weights_for_a_recipe_says_for_which_it_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(recipes.MODELS, ("toy", "rehyat"))
    with pytest.raises(ValueError, match="no weights for recipe rehyat: there are some for self_forcing,"):
        engine("toy", "rehyat")


@pytest.mark.parametrize("name, tokens", [("hybrid_forcing", 64), ("hybrid_forcing:tokens=6,share=0.5", 6)])
def test_wan_shapes_have_published_blocks_unless_others_are_named(name: str, tokens: int) -> None:
    chosen = recipes.recipe_named(name, usual=AT_FULL_SIZE)
    assert (chosen.name, chosen.near.keywords["block_q"], chosen.near.keywords["block_k"]) == (name, tokens, tokens)
    assert recipes.recipe_named("longlive", usual=AT_FULL_SIZE) == recipes.recipe_named("longlive")


def test_options_change_a_recipe_and_stay_in_its_name() -> None:
    assert recipes.recipe_named("hybrid_forcing").near.keywords["share"] == 0.2
    for options, blocks in (("of=window", 3), ("block=1", 7), ("of=present", 0)):
        assert recipes.recipe_named(f"hybrid_forcing:{options}").near.keywords["full_window"] == blocks
    chosen = recipes.recipe_named("hybrid_forcing:share=0.1,far=decay,frames=60")
    assert chosen.name == "hybrid_forcing:share=0.1,far=decay,frames=60"
    assert chosen.near.keywords["share"] == 0.1 and chosen.far == FarShape(rule=Decay(half_life=60))
    rules = {
        "keep": Keep(),
        "cap,frames=60": MassCap(frames=60),
        "delta": Delta(),
        "delta,frames=9": Delta(half_life=9),
        "delta,stiffness=0.5": Delta(stiffness=0.5),
    }
    for name, rule in rules.items():
        assert recipes.recipe_named(f"hybrid_forcing:far={name}").far == FarShape(rule=rule)
    for ratio in (0.5, 1, 2, 4):
        assert recipes.recipe_named(f"hybrid_forcing:features={ratio}").far == FarShape(form=WIDTHS[ratio])
    turning = FarShape(rule=Delta(), turns_with_frames=False)
    assert recipes.recipe_named("hybrid_forcing:turns=space,far=delta").far == turning
    assert recipes.recipe_named("hybrid_forcing:turns=all").far == FarShape(form=PAPER)
    assert recipes.recipe_named("hybrid_forcing").far == FarShape(form=PAPER)
    assert recipes.recipe_named("hybrid_forcing:far=none").far is None


def test_a_form_is_a_published_preset_of_choice_and_far_state() -> None:
    forms = {"paper": (far.PAPER, None), "ref_train": (far.REF_TRAIN, True), "ref_infer": (far.REF_INFER, True)}
    for form, (shape, centred) in forms.items():
        recipe = recipes.recipe_named(f"hybrid_forcing:form={form}")
        assert (recipe.far, recipe.near.keywords.get("centre_heads")) == (shape, centred)
        capped = recipes.recipe_named(f"hybrid_forcing:form={form},far=cap,frames=9,turns=space").far
        assert capped == replace(shape, rule=MassCap(frames=9), turns_with_frames=False)


@pytest.mark.parametrize(
    "name, said",
    [
        ("hybrid_forcin:share=1", "did you mean hybrid_forcing"),
        ("hybrid_forcing:shar=1", "has no option 'shar': there are share=0.2, far=keep, frames=inf"),
        ("hybrid_forcing:", "has no option ''"),
        ("self_forcing:share=1", "has no option 'share': there are past=6"),
        ("self_forcing_sink:share=1", "has no option 'share': there are none"),
        ("longlive:mask=causal", "mask must be none or block_causal, got causal"),
        ("longlive:old_sink=gone", "after a recache the sink is kept or new, got gone"),
        ("longlive:positions=capped", "positions must be absolute or relative, got capped"),
        ("reward_forcing:average=1.5", "a sink keeps a share of 0 to 1 of itself, got 1.5"),
        ("memflow:bank=0", "a bank has 1 latent frame or more, of every 1 block or more"),
        ("infinity_rope:keep=-1", "a flush keeps 0 latent frames or more, got -1"),
        ("hybrid_forcing:share=lots", "share=lots' does not work: share is a number, such as 0.2, not 'lots'"),
        ("self_forcing:past=many", "past is a whole number, such as 6, not 'many'"),
        ("hybrid_forcing:share=0.1,far=none,share=0.3", "share is given twice"),
        ("hybrid_forcing:of=all", "of must be present or window, got all"),
        ("hybrid_forcing:share=0", "share must be above 0 and at most 1, got 0.0"),
        ("hybrid_forcing:far=kept", "no far=kept: there are keep, decay, cap, delta and none"),
        ("hybrid_forcing:far=decay", "decay and cap need a number of latent frames"),
        ("hybrid_forcing:frames=60", "keep takes none"),
        ("hybrid_forcing:far=cap,frames=0", "frames must be above 0"),
        ("hybrid_forcing:features=3", "features must be 0.5, 1, 2, 4 of a head's size, got 3.0"),
        ("hybrid_forcing:features=nan", "features must be 0.5, 1, 2, 4 of a head's size, got nan"),
        ("hybrid_forcing:far=none,features=2", "far=none takes no frames, features, stiffness or turns"),
        ("hybrid_forcing:far=delta,stiffness=0", "stiffness must be above 0 and finite, got 0.0"),
        ("hybrid_forcing:stiffness=0.1", "only delta has a stiffness, keep has none"),
        ("hybrid_forcing:tokens=0", "blocks have 1 token or more, got tokens=0"),
        ("hybrid_forcing:block=0", "a block has one latent frame or more, got block=0"),
        ("self_forcing:block=0", "a block has one latent frame or more, got block=0"),
        ("hybrid_forcing:form=figure", "no form=figure: there are paper, ref_train, ref_infer"),
        ("hybrid_forcing:form=ref_infer,features=2", "as many features as a head has numbers, not 2 times as many"),
        ("hybrid_forcing:turns=time", "turns must be all or space, got time"),
        ("hybrid_forcing:far=none,turns=space", "far=none takes no frames"),
        ("hybrid_forcing:far=none,frames=60", "far=none takes no frames"),
        ("rolling_forcing:sink=1", "sink must be 0, 3 or 6 latent frames, got 1"),
    ],
)
def test_options_that_there_are_not_are_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        recipes.recipe_named(name)


@pytest.mark.parametrize("sink", [0, 3, 6])
def test_a_rolling_window_sees_six_finished_frames_whatever_its_sink(sink: int) -> None:
    recipe, network = recipes.recipe_named(f"rolling_forcing:sink={sink}"), engine().network
    assert (recipe.sink, recipe.past) == (sink, 6 - sink)
    assert recipe.memory(network).window == WindowShape(sink=sink, past=18)


@torch.no_grad()
def test_hybrid_forcing_without_what_is_new_in_it_is_self_forcing_with_a_sink() -> None:
    """Exactly: with all key blocks, and with projections at zero or no far state."""
    made, prompt = tiny.network(reads_far=True), tiny.prompt(tiny.network())

    def video(name: str) -> torch.Tensor:
        recipe = recipes.recipe_named(name)
        memory = StreamMemory(recipe.memory(made), made.config.layers, ring=True)
        blocks = recipe.schedule(made, memory, lambda block: prompt, tiny.noise(3), tiny.LEVELS)
        return torch.cat(list(islice(blocks, 6)), dim=1)

    expected = video("self_forcing_sink")
    assert torch.equal(video("hybrid_forcing:share=1"), expected)
    assert torch.equal(video("hybrid_forcing:share=1,far=none"), expected)
    assert not torch.equal(video("hybrid_forcing:share=0.5"), expected)


def test_weights_stream_under_the_far_state_they_learned_to_read_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "student.safetensors"
    text, network, about = load_network(packaged(NETWORK_FILE), CPU)
    network, taught = reading_far(network), "hybrid_forcing:far=delta,features=2"

    def saved(*names: str) -> None:
        save_network(file, text, network, role="student", shift=about["shift"], int8=True, recipes=names)

    saved("self_forcing", taught)
    assert load_network(file, CPU)[2]["recipes"] == ["self_forcing", taught]
    for name in (taught, "hybrid_forcing:features=2.0,share=1,far=delta", "hybrid_forcing:far=none", "self_forcing"):
        assert engine(file, name).recipe.name == name
    for name in (
        "hybrid_forcing:features=2",
        "hybrid_forcing:far=delta",
        "hybrid_forcing:far=delta,features=2,frames=9",
    ):
        said = (
            f"was trained under self_forcing and {taught}, and cannot read the far state of {name}: "
            "name one of those recipes, or far=none$"
        )
        with pytest.raises(ValueError, match=said):
            engine(file, name)
    saved("hybrid_forcing:share=0.5")
    for forgets in ("far=keep", "far=cap,frames=60", "far=decay,frames=120"):  # sums, all read alike
        assert engine(file, f"hybrid_forcing:{forgets}").recipe.far
    for unlike in ("far=delta", "far=cap,frames=60,features=2", "turns=space"):
        with pytest.raises(ValueError, match="cannot read the far state"):
            engine(file, f"hybrid_forcing:{unlike}")
    saved()  # as files were written before
    assert "recipes" not in load_network(file, CPU)[2]
    assert engine(file, "hybrid_forcing").recipe.far == FarShape()


@pytest.mark.parametrize("int8", [False, True])
def test_maps_of_a_far_state_come_back_from_a_file(int8: bool, tmp_path: Path) -> None:
    text, network, about = load_network(packaged(NETWORK_FILE), torch.device("cpu"))
    network, file = tiny.with_drawn_maps(network), tmp_path / NETWORK_FILE
    save_network(file, text, network, role="student", shift=about["shift"], int8=int8)
    _, loaded, _ = load_network(file, torch.device("cpu"))
    assert loaded.config == network.config and loaded.config.far_maps
    for layer, maps in network.far_maps.items():
        for one, other in zip(maps.parameters(), loaded.far_maps[layer].parameters(), strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=(one.abs().max() / 254 + 1e-6).item() if int8 else 1e-9)


def test_options_need_no_weights_of_their_own(monkeypatch) -> None:
    monkeypatch.setitem(recipes.MODELS, ("toy", "hybrid_forcing"), NETWORK_FILE)
    engine_of = engine("toy", "hybrid_forcing:share=0.1,far=none")
    assert engine_of.recipe.name == "hybrid_forcing:share=0.1,far=none"


def test_a_name_a_folder_and_a_file_load_the_same_network(tmp_path: Path) -> None:
    for name in (NETWORK_FILE, CODEC_FILE):
        shutil.copy(packaged(name), tmp_path / name)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / NETWORK_FILE, alone / "mine.safetensors")
    prompt = "a red ball bounces over green hills"
    frames = []
    for model in ("toy", tmp_path, alone / "mine.safetensors"):
        with engine(model).stream(prompt) as stream:
            frames.append(next(stream).frames)
    assert (frames[0] == frames[1]).all() and (frames[0] == frames[2]).all()
    assert frames[0].shape == (9, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    "model, recipe, said",
    [
        ("toi", "self_forcing", "did you mean toy"),
        ("toy", "self_forcing_sinc", "did you mean self_forcing_sink"),
        ("/nowhere/at/all", "self_forcing", "no model, folder or file"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_ones(model: str, recipe: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        longtake.load(model, recipe=recipe)


def test_a_shift_that_is_none_is_refused() -> None:
    for shift in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"the shift of levels is above 0, got {shift:g}"):
            recipes.load_wan("self-forcing", recipe="self_forcing", shift=shift)


def test_devices_that_are_not_here_are_refused() -> None:
    for device in ("nonsense", "meta", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(ValueError, match="cannot compute on device"):
            longtake.load("toy", recipe="self_forcing", device=device)
    for dtype in ("bfloat16", torch.int8):
        with pytest.raises(ValueError, match=r"such as torch\.bfloat16"):
            longtake.load("toy", recipe="self_forcing", dtype=dtype)


def test_a_folder_of_the_models_name_does_not_hide_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path)
    assert engine("toy").model_name == "toy"
    with pytest.raises(ValueError, match="no weights at"):
        engine("./toy")


def test_weights_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="holds a teacher, which cannot stream"):
        engine(packaged(TEACHER_FILE))
    with pytest.raises(ValueError, match="does not hold a network"):
        engine(packaged(CODEC_FILE))
    with pytest.raises(ValueError, match="does not hold a codec"):
        load_codec([packaged(NETWORK_FILE)], torch.device("cpu"))


@pytest.mark.parametrize("file, part", [(NETWORK_FILE, "text"), (NETWORK_FILE, "network"), (CODEC_FILE, "codec")])
def test_weights_with_sizes_that_only_later_versions_have_are_refused(file: str, part: str, tmp_path: Path) -> None:
    for name in (NETWORK_FILE, CODEC_FILE):
        shutil.copy(packaged(name), tmp_path / name)
    tensors, description = load_weights(tmp_path / file)
    description[part]["hue"] = 3
    save_weights(tmp_path / file, tensors, description, int8=False)
    with pytest.raises(ValueError, match="has no hue in this version of longtake"):
        engine(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    cut = tmp_path / "student.safetensors"
    cut.write_bytes(packaged(NETWORK_FILE).read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        longtake.load(cut, recipe="self_forcing")


def test_a_chosen_precision_leaves_the_weights_unrounded() -> None:
    assert engine(dtype=torch.bfloat16).dtype == torch.bfloat16
    chosen = longtake.load("toy", recipe="self_forcing")
    exact = engine().network.state_dict()
    for name, tensor in chosen.network.state_dict().items():
        assert torch.equal(tensor, exact[name].to(chosen.dtype))


def test_the_teacher_makes_whole_clips() -> None:
    clips = toy_teacher(steps=1)(["a red ball"], [1])
    assert clips.dtype == torch.uint8
    assert clips.shape == (1, 1 + 4 * (engine().network.config.extent - 1), HEIGHT, WIDTH, 3)
    assert clips.shape[1] >= 5 * RATE


def test_codec_and_teacher_are_taken_from_a_folder(tmp_path: Path) -> None:
    for name in (CODEC_FILE, ENCODER_FILE):
        shutil.copy(packaged(name), tmp_path / name)
    assert toy_codec(model=tmp_path).latent_channels == toy_codec().latent_channels
    with pytest.raises(ValueError, match=r"nor a folder that holds teacher\.safetensors"):
        toy_teacher(model=tmp_path)
    with pytest.raises(ValueError, match=r"nor a folder that holds codec_decoder\.safetensors"):
        toy_codec(model=tmp_path / CODEC_FILE)


def test_the_number_of_levels_can_be_chosen() -> None:
    assert engine().recipe.steps == (1000, 750, 500, 250)
    assert longtake.load("toy", recipe="self_forcing", levels=2, dtype=torch.float32).recipe.steps == (1000, 500)
    for count in (0, -1, 1001, 2.5):
        with pytest.raises(ValueError, match="a whole number from 1 to 1000, got"):
            longtake.load("toy", recipe="self_forcing", levels=count)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "count, steps",
    [(4, (1000, 750, 500, 250)), (5, (1000, 800, 600, 400, 200)), (2, (1000, 500)), (1, (1000,))],
)
def test_levels_are_evenly_spaced(count: int, steps: tuple[float, ...]) -> None:
    recipe = recipes.self_forcing()
    assert recipe.with_levels(count).steps == steps
    assert recipe.with_levels(4) == recipe and recipe.with_levels(4).levels(3.0) == recipe.levels(3.0)


@pytest.mark.parametrize("seconds, chosen", [(3.0, torch.bfloat16), (1.1, torch.float32)])
def test_the_faster_type_is_found_by_one_threads_own_time(
    monkeypatch: pytest.MonkeyPatch, seconds: float, chosen: torch.dtype
) -> None:
    ticks, threads = cycle([0.0, seconds, 0.0, 1.0]), torch.get_num_threads()  # of float32, then of bfloat16
    monkeypatch.setattr("longtake.recipes.devices.time.thread_time", lambda: next(ticks))
    assert longtake.load("toy", recipe="self_forcing_sink").dtype == chosen
    assert torch.get_num_threads() == threads
