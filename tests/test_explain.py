"""Recipes in words and numbers."""

from inspect import signature

import pytest

from longtake.explain import explain, in_words, recipes_in_short
from longtake.recipes import RECIPES

FIRST_ALIKE = {"rolling_forcing": 7, "reward_forcing": 2, "infinity_rope": 1}  # it remembers a block more; they, less
NEVER_ALIKE = ("causvid", "longlive", "memflow", "rolling_sink")  # clips begin anew, positions grow, the sink is played


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - set(NEVER_ALIKE)))
def test_a_table_ends_where_all_that_follows_is_alike(name: str) -> None:
    told = explain(name)
    first = FIRST_ALIKE.get(name, 6)
    assert told["alike_from"] == first
    assert [row["block"] for row in told["blocks"]] == list(range(first + 1))
    words = in_words(told)
    assert max(map(len, words.splitlines())) <= 100
    assert f"From block {first} on all are alike, each 3 latent frames later" in words


@pytest.mark.parametrize("name", NEVER_ALIKE)
def test_a_table_without_end_is_cut_off(name: str) -> None:
    told = explain(name)
    words = in_words(told)
    assert told["alike_from"] is None and len(told["blocks"]) == 30
    assert max(map(len, words.splitlines())) <= 100 and "all are alike" not in words


def test_rules_of_a_memory_are_told() -> None:
    assert "bank       3 latent frames, chosen by the prompt; one of 3 blocks offered" in in_words(
        explain("memflow", 1)
    )
    assert "positions  0, 1, 2, ... over all that is seen" in in_words(explain("reward_forcing", 1))
    lines = in_words(explain("rolling_sink")).splitlines()
    assert "8      93-104    6-17 17-15 @0-14  21-23 @15-17  24-26 @18-20  1764  21-23   0-17 24-26" in lines
    lines = in_words(explain("longlive:mask=block_causal,old_sink=new", 1)).splitlines()
    assert "redirect   the latest 12 latent frames are committed again, block by block; sink new" in lines


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_is_told_of_with_what_it_is_unless_given(name: str) -> None:
    told = explain(name, 1)
    assert {one: option["default"] for one, option in told["options"].items()} == {
        one: str(parameter.default) for one, parameter in signature(RECIPES[name]).parameters.items()
    }
    assert all(option["about"].endswith(".") for option in told["options"].values())
    assert "ValueError" not in in_words(told) and max(map(len, in_words(told).splitlines())) <= 100
    defaults = ",".join(f"{one}={option['default']}" for one, option in told["options"].items())
    assert explain(f"{name}:{defaults}" if defaults else name, 1) | {"recipe": name} == told


def test_as_many_blocks_as_asked_for() -> None:
    assert len(explain("self_forcing", 2)["blocks"]) == 2
    told = explain("self_forcing", 40)
    assert len(told["blocks"]) == 40 and told["blocks"][39]["frames"] == [117, 118, 119]
    assert max(map(len, in_words(told).splitlines())) <= 100


def test_hybrid_forcing_in_numbers() -> None:
    told = explain("hybrid_forcing", 21)
    assert (told["block"], told["sink"], told["past"], told["extent"]) == (3, 3, 3, 21)
    assert told["levels"] == pytest.approx([1, 0.9, 0.75, 0.5])
    assert told["near"] == {"attention": "block_sparse", "share": 0.2, "block_q": 4, "block_k": 4, "full_window": 3}
    assert told["far"]["rule"] == "Keep()" and told["far"]["sink"] == "never"
    assert [row["keys"] for row in told["blocks"][:4]] == [
        {"attended": 148, "of": 252},  # whole blocks, rounded down; as many as of a full window
        {"attended": 148, "of": 504},
        {"attended": 148, "of": 756},
        {"attended": 148, "of": 756},
    ]
    *_, last = told["blocks"]
    assert last["attended"]["past"] == [[57, 15], [58, 16], [59, 17]]
    assert last["absorbed"] == [[57, 12], [58, 13], [59, 14]]
    assert last["held"] == {"frames": [0, 1, 2, 60, 61, 62], "far_frames": 57}


def test_options_are_explained_and_a_far_state_of_any_width_is_placed_alike() -> None:
    plain, told = explain("hybrid_forcing"), explain("hybrid_forcing:far=delta,features=2,stiffness=0.1")
    assert (plain["far"]["features"], told["far"]["features"]) == (64, 128)
    assert told["far"]["rule"] == "Delta(half_life=inf, stiffness=0.1)"
    assert (told["about"], told["blocks"]) == (plain["about"], plain["blocks"])
    assert "128 features a head" in in_words(told)
    assert "positions by row and column alone" in in_words(explain("hybrid_forcing:turns=space", 1))
    assert "by row and column alone" not in in_words(told)


@pytest.mark.parametrize("options, there", [("", True), (":far=cap,frames=60", True), (":form=ref_train", False)])
def test_weights_are_there_for_far_states_that_they_learned_to_read(options: str, there: bool) -> None:
    told = explain(f"hybrid_forcing{options}", 2)
    assert told["has_weights"] is there
    assert ("no weights for this recipe yet" not in in_words(told)) is there


def test_hybrid_forcing_in_words() -> None:
    lines = in_words(explain("hybrid_forcing")).splitlines()
    assert "attention  block_sparse (share 0.2, block_q 4, block_k 4, full_window 3.0)" in lines
    assert "6      69-80     0-2 @0-2  15-17 @15-17  18-20 @18-20  148 of 756  15-17 @12-14  0-2 18-20 +15" in lines


@pytest.mark.parametrize("name, sink, past", [("self_forcing", 0, 6), ("self_forcing_sink", 3, 3)])
def test_self_forcing_sees_everything_in_its_window_and_forgets_the_rest(name: str, sink: int, past: int) -> None:
    told = explain(name)
    assert (told["sink"], told["past"], told["near"], told["far"]) == (sink, past, {"attention": "dense"}, None)
    assert [row["keys"]["of"] for row in told["blocks"]] == [252, 504, *[756] * 5]
    assert all(row["keys"]["attended"] == row["keys"]["of"] and not row["absorbed"] for row in told["blocks"])
    assert [len(row["leaves"]) for row in told["blocks"]] == [0, 0, *[3] * 5]
    assert "forgotten" in in_words(told)


def test_rehyat_tells_of_converted_layers_and_of_the_others() -> None:
    told, plain = explain("rehyat", 9), explain("self_forcing_sink", 9)
    assert told["blocks"] == plain["blocks"] and plain["converted"] is None
    converted = told["converted"]
    assert (converted["past"], converted["far"]["rule"]) == (1, "MassCap(frames=17)")
    last = converted["blocks"][8]
    assert last["attended"] == {"sink": [], "past": [[23, 17]], "current": [[24, 18], [25, 19], [26, 20]]}
    assert [frame for frame, _ in last["absorbed"]] == [23, 24, 25] and last["held"]["frames"] == [26]
    assert [row["held"]["far_frames"] for row in converted["blocks"]] == [2, 5, 8, 11, 14, 17, 17, 17, 17]
    words = in_words(told)
    assert "5      57-68     -     14 @14  15-17 @15-17  336   14-16 @14-16  17 +17" in words.splitlines()
    assert max(map(len, words.splitlines())) <= 100
    assert explain("rehyat:far=none", 1)["converted"]["far"] is None


def test_rolling_forcing_call_by_call() -> None:
    told = explain("rolling_forcing")
    levels = told["levels"]
    made = [call for row in told["blocks"] for call in row["calls"]]
    assert [len(row["calls"]) for row in told["blocks"]] == [5] + [1] * 7
    for number, call in enumerate(made):
        assert [block for block, _ in call] == list(range(max(0, number - 4), number + 1))
        assert [level for _, level in call] == pytest.approx([levels[number - block] for block, _ in call], abs=1e-6)
    lines = in_words(told).splitlines()
    assert "1     0 @0.923  1 @1.000                                  -         -" in lines
    assert "11    7 @0.429  8 @0.667  9 @0.818  10 @0.923  11 @1.000  7         3-23 @0-20" in lines


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"rolling_forcing"}))
def test_block_by_block_every_call_is_over_one(name: str) -> None:
    told = explain(name)
    for row in told["blocks"]:
        assert [call[0] for call in row["calls"]] == [
            [row["block"], pytest.approx(level, abs=1e-6)] for level in told["levels"]
        ]
    assert not any(line.startswith("call") for line in in_words(told).splitlines())


def test_pictures_are_counted_through() -> None:
    pictures = [picture for row in explain("self_forcing")["blocks"] for picture in row["pictures"]]
    assert pictures == list(range(9 + 6 * 12))


def test_every_recipe_has_a_line() -> None:
    assert recipes_in_short().keys() == RECIPES.keys()
    assert all("arXiv" in line for line in recipes_in_short().values())
