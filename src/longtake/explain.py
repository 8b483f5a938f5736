"""Recipes explained: what each is, its numbers, and what it does block by block, as its own code does it."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from inspect import getdoc, signature
from itertools import islice, pairwise
from textwrap import fill
from typing import Any

import torch

from longtake.evaluation.trace import BlockTrace, keys_attended, traced
from longtake.generation.recipe import Recipe
from longtake.memory.far import FarShape
from longtake.memory.view import Attend
from longtake.models.codec import Codec
from longtake.models.features import Conversion
from longtake.recipes import MODELS, RECIPES, recipe_named
from longtake.recipes.devices import CPU
from longtake.recipes.engines import can_read, latent_size
from longtake.recipes.weight_files import CODEC_FILE, NETWORK_FILE, load_codec, load_network, packaged

MODEL = "toy"  # whose sizes are taken
MOST_BLOCKS = 10_000  # of a table
LOOKED_AT = 30  # blocks, to find the one from which on all are alike
COLUMNS = 100


def recipes_in_short() -> dict[str, str]:
    """Every recipe's name, and the first line said about it."""
    return {name: _about(name)[0].splitlines()[0] for name in RECIPES}


def explain(name: str, blocks: int | None = None) -> dict[str, Any]:
    """A recipe with the embedded model's sizes, ready for JSON.

    name: options may follow. Frames are latent frames; attended and absorbed ones are [frame, position]. Calls are of
    the network, each of its blocks [block, level]. Of a recipe with converted layers, `blocks` tells what the other
    layers do and `converted` what those do; elsewhere that is null.
    blocks: how many are told of, 1 to 10,000; by default those until all that follow are alike.
    ValueError for unknown names and for other numbers of blocks.
    """
    if blocks is not None and not 1 <= blocks <= MOST_BLOCKS:
        raise ValueError(f"a table has 1 to {MOST_BLOCKS} blocks, got {blocks}")
    recipe, function = recipe_named(name), name.partition(":")[0]
    _, network, description = load_network(packaged(MODELS.get((MODEL, function), NETWORK_FILE)), CPU)
    codec = load_codec([packaged(CODEC_FILE)], CPU)
    grid = network.grid(torch.zeros(1, 1, *latent_size(codec)))
    tokens, extent = grid.rows * grid.columns, network.config.extent

    def table(part: Recipe) -> dict[str, Any]:
        """What the layers of a recipe do block by block, and from which on they always do the same."""
        sink = 0 if part.joint else part.sink
        rows = list(islice(traced(part, extent, description["shift"]), max(LOOKED_AT, blocks or 0)))
        alike_from = next((a.block for a, b in pairwise(rows) if b.looks_like(a, sink)), None)
        enough = LOOKED_AT if alike_from is None else alike_from + 1
        shown = [_row(row, part, codec, tokens) for row in rows[: blocks or enough]]
        return {"blocks": shown, "alike_from": alike_from}

    return {
        "recipe": name,
        "about": _about(function),
        "options": _options(function),
        "model": MODEL,
        "has_weights": (MODEL, function) in MODELS and can_read(recipe, description.get("recipes", ())),
        "block": recipe.block,
        "sink": recipe.sink,
        "past": recipe.past,
        "in_flight": recipe.in_flight,
        "extent": extent,
        "steps": list(recipe.steps),
        "shift": description["shift"],
        "levels": list(recipe.levels(description["shift"])),
        "tokens_per_frame": tokens,
        "policy": recipe.policy.in_words(extent),
        "near": _near(recipe.near),
        "far": recipe.far and _far(recipe.far, network.config.dim // network.config.heads),
        **table(replace(recipe, joint=None)),
        "converted": recipe.joint and {**_converted(recipe, extent), **table(recipe)},
    }


def in_words(told: dict[str, Any]) -> str:
    """What `explain` gives, as text."""
    about = [fill(paragraph, COLUMNS) for paragraph in told["about"]]
    calls = [_calls(told)] if told["in_flight"] > 1 else []
    options = [_how_to_choose(told)] if told["options"] else []
    parts = [told["recipe"], *about, *options, _numbers(told), *calls, _table(told), _legend(told)]
    if converted := told["converted"]:
        parts += ["converted layers", _table(told | converted), _legend(told | converted)]
    return "\n\n".join(parts)


def _about(name: str) -> list[str]:
    """The paragraphs of a recipe's docstring, but that of its options."""
    paragraphs = (getdoc(RECIPES[name]) or "").split("\n\n")
    return paragraphs[:-1] if signature(RECIPES[name]).parameters else paragraphs


def _options(name: str) -> dict[str, dict[str, str]]:
    """Of each option of a recipe what it is unless given, and what its docstring says of it, in a last paragraph in
    which each begins a line; without what that says to callers about errors."""
    told = (getdoc(RECIPES[name]) or "").split("\n\n")[-1].partition("\nValueError")[0]
    defaults = {one: parameter.default for one, parameter in signature(RECIPES[name]).parameters.items()}
    parts = re.split(rf"^({'|'.join(defaults)}): ", told, flags=re.MULTILINE)[1:] if defaults else []
    about = {one: " ".join(text.split()) for one, text in zip(parts[::2], parts[1::2], strict=True)}
    return {one: {"default": str(default), "about": about[one]} for one, default in defaults.items()}


def _how_to_choose(told: dict[str, Any]) -> str:
    name, options = told["recipe"].partition(":")[0], told["options"]
    example = ",".join(f"{one}={option['default']}" for one, option in [*options.items()][:2])
    width = max(len(f"{one}={option['default']}") for one, option in options.items()) + 4
    lines = [f"options, and what they are unless they follow the name, as {name}:{example}"]
    for one, option in options.items():
        start = f"  {one}={option['default']}".ljust(width)
        lines.append(fill(option["about"], COLUMNS, initial_indent=start, subsequent_indent=" " * width))
    return "\n".join(lines)


def _near(near: Attend) -> dict[str, Any]:
    """How the window is attended: the function's name, and what it is called with."""
    if isinstance(near, partial):
        return {"attention": near.func.__name__, **near.keywords}
    return {"attention": near.__name__}


def _far(far: FarShape, head: int) -> dict[str, Any]:
    return {
        "rule": repr(far.rule),
        "rule_in_short": (getdoc(far.rule) or "").splitlines()[0],
        "features": far.form.features(head),
        "sink": far.sink.name.lower(),
        "turns_with_frames": far.turns_with_frames,
    }


def _converted(recipe: Recipe, extent: int) -> dict[str, Any]:
    """How converted layers differ from the others, with the overlap that they have by default."""
    conversion = Conversion(layers=(0,), current=recipe.block)
    rule = recipe.joint(conversion.far_frames(extent)) if recipe.joint else None
    return {
        "sink": 0,
        "past": conversion.overlap,
        "far": rule and {"rule": repr(rule), "rule_in_short": (getdoc(rule) or "").splitlines()[0]},
    }


def _row(row: BlockTrace, recipe: Recipe, codec: Codec, tokens: int) -> dict[str, Any]:
    queries, keys = tokens * len(row.current), tokens * sum(map(len, (row.sink, row.past, row.current)))
    return {
        "block": row.block,
        "frames": list(row.made),
        "pictures": list(range(codec.pictures(row.made[0]), codec.pictures(row.made[-1] + 1))),
        "attended": {
            "sink": [list(one) for one in row.sink],
            "past": [list(one) for one in row.past],
            "current": [list(one) for one in row.current],
        },
        "calls": [[list(one) for one in call] for call in row.calls],
        "commit": [list(one) for one in row.commit],
        "keys": {"attended": keys_attended(recipe.near, queries, keys), "of": keys},
        "leaves": list(row.leaves),
        "absorbed": [list(one) for one in row.absorbed],
        "held": {"frames": list(row.held), "far_frames": row.far},
    }


def _numbers(told: dict[str, Any]) -> str:
    near = told["near"]
    setting = ", ".join(f"{key} {value}" for key, value in near.items() if key != "attention")
    steps = " ".join(f"{step:g}" for step in told["steps"])
    lines = {
        "model": f"{told['model']}{'' if told['has_weights'] else ' (its sizes; no weights for this recipe yet)'}",
        "block": f"{told['block']} latent frames of {told['tokens_per_frame']} tokens",
        "levels": f"{' '.join(f'{level:.3f}' for level in told['levels'])} "
        f"(steps {steps} under a shift of {told['shift']:g})",
        "sink": f"{told['sink']} latent frames{''.join(f', {text}' for text in [told['policy'].get('sink')] if text)}",
        "past": f"{told['past']} latent frames",
        **{key: text for key, text in told["policy"].items() if key != "sink"},
        "attention": near["attention"] + (f" ({setting})" if setting else ""),
        "far state": "none: what leaves the past is forgotten",
    }
    if converted := told["converted"]:
        rule = converted["far"]["rule"] if converted["far"] else "none"
        lines["converted"] = (
            f"layers as the weights have them: {converted['past']} latent frame before the block by default,\n"
            f"{'':11}and what came before it, under one denominator: {rule}"
        )
    if told["in_flight"] > 1:
        lines["in flight"] = f"{told['in_flight']} blocks, on top of sink and past"
    if far := told["far"]:
        lines["far state"] = (
            f"{far['rule']}, {far['features']} features a head, sink absorbed: {far['sink'].replace('_', ' ')}"
            f"{'' if far['turns_with_frames'] else ', positions by row and column alone'}\n"
            f"{'':11}{far['rule_in_short']}"
        )
    return "\n".join(f"{key:11}{value}" for key, value in lines.items())


def _calls(told: dict[str, Any]) -> str:
    """Which blocks go through the network together, call by call, and what the commit of a finished one sees."""
    rows = [["call", "blocks", *[""] * (told["in_flight"] - 1), "finishes", "its commit sees"]]
    for row in told["blocks"]:
        for call in row["calls"]:
            cells = [f"{block} @{level:.3f}" for block, level in call]
            then = [str(row["block"]), _placed(row["commit"])] if call is row["calls"][-1] else ["-", "-"]
            rows.append([str(len(rows) - 1), *cells, *[""] * (told["in_flight"] - len(cells)), *then])
    return _in_columns(rows)


def _table(told: dict[str, Any]) -> str:
    title = "enters far" if told["far"] else "leaves"
    rows = [["block", "pictures", "sink", "past", "current", "keys", title, "held"]]
    for row in told["blocks"]:
        attended, keys, held = row["attended"], row["keys"], row["held"]
        rows.append(
            [
                str(row["block"]),
                _span(row["pictures"]),
                *(_placed(attended[part]) for part in ("sink", "past", "current")),
                f"{keys['attended']} of {keys['of']}" if keys["attended"] < keys["of"] else str(keys["of"]),
                _placed(row["absorbed"]) if told["far"] else _span(row["leaves"]),
                _span(held["frames"]) + (f" +{held['far_frames']:g}" if held["far_frames"] else ""),
            ]
        )
    return _in_columns(rows)


def _in_columns(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _legend(told: dict[str, Any]) -> str:
    lines = ["sink, past, current: latent frames attended @ their positions; keys: of one query."]
    if told["in_flight"] > 1:
        lines.append("Calls: blocks in flight @ their levels. Of each block, it is told what its last call attends to.")
    if told["far"]:
        lines.append("held: latent frames in the window, + how many the far state holds.")
    if told["alike_from"] is not None:
        but = "; only the number behind + differs" if told["far"] else ""
        lines.append(
            f"From block {told['alike_from']} on all are alike, each {told['block']} latent frames later{but}."
        )
    return "\n".join(lines)


def _placed(placed: Sequence[Sequence[int]]) -> str:
    return f"{_span([f for f, _ in placed])} @{_span([p for _, p in placed])}" if placed else "-"


def _span(numbers: Sequence[int]) -> str:
    """Runs of numbers, up or down, by their ends: 0-2 9-11, or 17-15."""
    runs: list[list[int]] = []
    for n in numbers:
        steps = {n - runs[-1][-1], *(b - a for a, b in pairwise(runs[-1]))} if runs else set()
        if steps in ({1}, {-1}):
            runs[-1].append(n)
        else:
            runs.append([n])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "-"
