"""One function per published method, and recipes by the names that options may follow.

Recipes that are compared see equally many finished frames: 6 latent frames besides the current block of 3. Those that
are the published inference of a checkpoint, from `causvid` on, have its sizes, and options for others.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

from longtake.attention.block_sparse import block_sparse
from longtake.attention.linear import WIDTHS
from longtake.generation.blockwise import blockwise
from longtake.generation.recipe import Recipe
from longtake.generation.rolling import rolling
from longtake.memory.far import PRESETS, RULES, Decay, Delta, FarShape, Keep, MassCap, rule_named
from longtake.memory.policies import Absolute, BackAndForth, BankShape, EndToEnd, Policy, Recache
from longtake.models.hub import nearest, registry


def self_forcing(past: int = 6, block: int = 3) -> Recipe:
    """Self Forcing (arXiv 2506.08009): block by block over a sliding window, distilled on its own rollouts.

    past: latent frames of it that a block sees; published are 18.
    block: latent frames of one; published are 3 and, for other weights, 1.
    ValueError for a block of less than 1.
    """
    return Recipe(name="self_forcing", schedule=blockwise, sink=0, past=past, block=_at_least_one(block))


def self_forcing_sink() -> Recipe:
    """Self Forcing whose first frames never leave, at capped positions (as in Rolling Forcing, arXiv 2509.25161)."""
    return replace(self_forcing(), name="self_forcing_sink", sink=3, past=3)


def hybrid_forcing(
    share: float = 0.2,
    far: str = "keep",
    frames: float = math.inf,
    features: float = 1.0,
    stiffness: float = Delta.stiffness,
    turns: str = "all",
    tokens: int = 4,
    block: int = 3,
    of: str = "window",
    form: str = "paper",
) -> Recipe:
    """Hybrid Forcing (arXiv 2604.10103): a fifth of the window's key blocks, and a far state of what left it.

    share: of the key blocks that each block of queries attends to; 1 is all.
    far: what becomes of frames that left the window: "keep", for ever (published); "none"; or a rule of `memory.far`,
    "decay", "cap" or "delta".
    frames: the half life or the cap in latent frames, which decay and cap need.
    features: of the far state, beside the size of a head: 0.5, 1 (published), 2 or 4.
    stiffness: how hard delta holds on to the old.
    turns: the positions that features of the far state bear, "all" (published) or "space", row and column but not
    frame: then it is the same how long ago something was absorbed.
    tokens: of a block of queries or keys; 4 are a third of a row of the embedded model's latent frames, which have 84.
    Wan's, of 1,560, have the published 64 unless told otherwise (`AT_FULL_SIZE`).
    block: latent frames of one; there are weights for 3 alone.
    of: what the share is of, the key blocks of a full "window", so that the first blocks of a take choose as many among
    fewer, or those "present" (published).
    form: what Figure 2 of the "paper" draws, or what the code released for training or inference does, "ref_train" or
    "ref_infer": far states of other features, which take the sink as well, and keys less their mean over the heads
    where blocks are chosen.
    ValueError for what cannot be.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    if tokens < 1:
        raise ValueError(f"blocks have 1 token or more, got tokens={tokens}")
    if of not in ("present", "window"):
        raise ValueError(f"of must be present or window, got {of}")
    if form not in PRESETS:
        raise ValueError(f"no form={form}: there are {', '.join(PRESETS)}")
    base = replace(self_forcing_sink(), name="hybrid_forcing", block=_at_least_one(block))
    full_window = (base.sink + base.past + block) / block if of == "window" else 0.0
    near = partial(block_sparse, share=share, block_q=tokens, block_k=tokens, full_window=full_window)
    if form != "paper":
        near = partial(near, centre_heads=True)
    return replace(base, far=_far_state(PRESETS[form], far, frames, features, stiffness, turns), near=near)


def _at_least_one(block: int) -> int:
    """ValueError for a block of no latent frames."""
    if block < 1:
        raise ValueError(f"a block has one latent frame or more, got block={block}")
    return block


def _far_state(
    preset: FarShape, rule: str, frames: float, features: float, stiffness: float, turns: str
) -> FarShape | None:
    """ValueError for what cannot be."""
    if rule not in ("none", *RULES):
        raise ValueError(f"no far={rule}: there are {', '.join(RULES)} and none")
    if features not in WIDTHS:
        ratios = ", ".join(f"{ratio:g}" for ratio in WIDTHS)
        raise ValueError(f"features must be {ratios} of a head's size, got {features}")
    if turns not in ("all", "space"):
        raise ValueError(f"turns must be all or space, got {turns}")
    if rule == "none":
        if (frames, features, stiffness, turns) != (math.inf, 1, Delta.stiffness, "all"):
            raise ValueError("far=none takes no frames, features, stiffness or turns")
        return None
    made = replace(preset, rule=rule_named(rule, frames, stiffness), turns_with_frames=turns == "all")
    if features == 1:
        return made
    if preset.form not in WIDTHS.values():
        raise ValueError(f"released forms have as many features as a head has numbers, not {features:g} times as many")
    return replace(made, form=WIDTHS[features])


def rolling_forcing(sink: int = 3) -> Recipe:
    """Rolling Forcing (arXiv 2509.25161): a window of blocks at rising noise levels, one finished by each call.

    A call sees the sink and the latest frames that fit the extent beside the blocks in flight: 3 of them while all 5
    are. What it finishes is committed by a pass of its own, which sees the latest frames alone, 18 of them.

    sink: latent frames of it, 0, 3 (published) or 6; while all blocks are in flight, what is left of 6 are the latest.
    ValueError for any other number.
    """
    if sink not in (0, 3, 6):
        raise ValueError(f"sink must be 0, 3 or 6 latent frames, got {sink}")
    steps = (1000, 800, 600, 400, 200)
    return Recipe(name="rolling_forcing", schedule=rolling, sink=sink, past=6 - sink, steps=steps)


def causvid(past: int = 18) -> Recipe:
    """CausVid (arXiv 2412.07772): clips that see all of themselves, each begun with the last block of the one before.

    That block's latents are committed anew as the first of the next clip; the released code takes the first of its
    frames through the codec, to a picture and back, which is not done here. A change of prompt begins the next clip at
    once: published, each clip has a prompt. Published levels are 1, .757 and .522, which 1000, 280, 120 come to under
    its shift of 8; the released 4-step weights want `--levels 4`.

    past: latent frames of a clip that its last block sees; published are 18.
    """
    base = self_forcing(past)
    clips = Policy(recache=Recache(base.block, sink="new", each_clip=True))
    return replace(base, name="causvid", policy=clips, steps=(1000, 280, 120))


def causal_forcing(past: int = 18, block: int = 3) -> Recipe:
    """Causal Forcing (arXiv 2602.02214): Self Forcing's inference, with weights distilled otherwise.

    past: latent frames that a block sees; published are 18, and 20 frame by frame.
    block: latent frames of one; published are 3, and 1 frame by frame.
    ValueError for a block of less than 1.
    """
    return replace(self_forcing(past, block), name="causal_forcing")


def longlive(
    sink: int = 3, past: int = 6, mask: str = "none", old_sink: str = "kept", positions: str = "absolute"
) -> Recipe:
    """LongLive (arXiv 2509.22622): a short window behind a sink, committed once more when the prompt changes.

    Where everything stands is its frame number, so the sink falls ever farther behind.

    sink: latent frames; published are 3.
    past: latent frames; published are 6.
    mask: what the frames that are committed once more see of each other, "none" everything (as released), or
    "block_causal" what they would while streaming, as if they had just been given.
    old_sink: "kept", or "new": then the first of these frames become the sink.
    positions: "absolute", or "relative" to the window (its released variant after 2511.20649).
    ValueError for others.
    """
    if positions not in ("absolute", "relative"):
        raise ValueError(f"positions must be absolute or relative, got {positions}")
    base = self_forcing_sink()
    recache = Recache(sink + past + base.block, mask=mask, sink=old_sink)  # type: ignore[arg-type]  # checked there
    policy = Policy(reads=Absolute() if positions == "absolute" else EndToEnd(), recache=recache)
    return replace(base, name="longlive", sink=sink, past=past, policy=policy)


def reward_forcing(average: float = 0.999) -> Recipe:
    """Reward Forcing (arXiv 2512.04678): what leaves the past is averaged into the sink.

    Positions begin with the window. A change of prompt changes nothing in the memory.

    average: the share of itself that the sink keeps when a block leaves; the code has .999, the paper ablates .99, .9
    and .5.
    ValueError outside 0 to 1.
    """
    policy = Policy(reads=EndToEnd(), average=average)
    return replace(self_forcing_sink(), name="reward_forcing", policy=policy)


def memflow(past: int = 6, bank: int = 3, every: int = 3) -> Recipe:
    """MemFlow (arXiv 2512.14699): LongLive, and a bank of single frames that the prompt chooses to remember.

    As released: by the prompt's keys (the paper: its queries), and all of sink and bank are seen: sparse memory
    activation is off there, and not built here.

    past: latent frames; published are 6.
    bank: latent frames of it; published are 3.
    every: of how many blocks one's first frame is offered to the bank.
    ValueError for a bank or blocks of less than 1.
    """
    made = longlive(past=past)
    policy = replace(made.policy, bank=BankShape(frames=bank, every=every))
    return replace(made, name="memflow", policy=policy)


def infinity_rope(past: int = 2, keep: int = 2, jump: int = 45) -> Recipe:
    """Infinity-RoPE (arXiv 2511.20649), training-free: positions begin with the window, and a cut jumps along them.

    A change of prompt flushes the window: the first frame stays, and the latest `keep`. A cut does so too, and its
    first block stands at position `jump`, the next one right behind the window again; pictures are counted on.

    past: latent frames beside a sink of 1; published are 2, of which a flush forgets nothing.
    keep: latent frames that a flush keeps; the code has 2, the paper says 1.
    jump: the position after a cut; published is 45.
    ValueError for what cannot be.
    """
    policy = Policy(reads=EndToEnd(), flush=keep, jump=jump)
    return replace(self_forcing(past), name="infinity_rope", sink=1, policy=policy)


def rolling_sink(library: int = 18) -> Recipe:
    """Rolling Sink (arXiv 2602.07775), training-free: all but the latest block of the window is played from the first.

    The first frames are a library, shown forwards and backwards in turn; the latest block is real.

    library: latent frames of it, and as many finished ones are seen; published are 18.
    """
    return replace(self_forcing_sink(), name="rolling_sink", sink=library, past=3, policy=Policy(reads=BackAndForth()))


def rehyat(far: str = "cap", frames: float = math.inf) -> Recipe:
    """ReHyAt's layers (arXiv 2601.04342) in a causal student: softmax over a near span, sums of all before it, one bar.

    Converted layers see their block and the overlap before it exactly, and through learned features all that came
    earlier; the others see sink and past, as in self_forcing_sink. Published are whole clips by a bidirectional model;
    streams of it are ours. Which layers are converted, and how far they overlap, is part of the weights.

    far: what becomes of frames before the near span: "cap" (never more than so many frames' mass), "keep" (all of it,
    which comes to outweigh what is near), "decay", or "none".
    frames: the cap or the half life in latent frames; a cap is by default as many as were far in training.
    ValueError for what cannot be.
    """
    if far not in ("cap", "keep", "decay", "none"):
        raise ValueError(f"no far={far}: there are cap, keep, decay and none")
    if far == "none" and frames != math.inf:
        raise ValueError("far=none takes no frames")
    if far != "none" and (far, frames) != ("cap", math.inf):
        rule_named(far, frames)  # refuses what cannot be
    return replace(self_forcing_sink(), name="rehyat", joint=partial(_joint_rule, far, frames))


def _joint_rule(far: str, frames: float, trained: int) -> Keep | None:
    if far == "cap":
        return MassCap(frames=frames if math.isfinite(frames) else trained)
    return {"keep": Keep(), "decay": Decay(half_life=frames), "none": None}[far]


RECIPES: dict[str, Callable[..., Recipe]] = {
    "self_forcing": self_forcing,
    "self_forcing_sink": self_forcing_sink,
    "hybrid_forcing": hybrid_forcing,
    "rolling_forcing": rolling_forcing,
    "causvid": causvid,
    "causal_forcing": causal_forcing,
    "longlive": longlive,
    "reward_forcing": reward_forcing,
    "memflow": memflow,
    "infinity_rope": infinity_rope,
    "rolling_sink": rolling_sink,
    "rehyat": rehyat,
}
MEMORY_RULES = ("causvid", "causal_forcing", "longlive", "reward_forcing", "memflow", "infinity_rope", "rolling_sink")
"""Recipes that read a window as Self Forcing does: weights made for it run under them, as good as they may."""


AT_FULL_SIZE: Mapping[str, Any] = MappingProxyType({"tokens": 64})
"""Options of recipes for networks of Wan's shapes, where a latent frame of the embedded model has 84 tokens and theirs
1,560: the published ones."""


def recipe_named(name: str, levels: int | None = None, usual: Mapping[str, Any] = MappingProxyType({})) -> Recipe:
    """The recipe of that name, which options of its function may follow: "hybrid_forcing:share=0.1,far=none".

    The recipe bears the whole name. levels: the number of denoising steps, 1 to 1000; by default the recipe's own.
    usual: what options are where the name does not say, of those that the function has, such as `AT_FULL_SIZE`.
    ValueError for unknown names, options and values, with those there are.
    """
    function, colon, given = name.partition(":")
    if function not in RECIPES:
        raise ValueError(f"no recipe {function!r}: {nearest(function, RECIPES)}")
    known = {key: parameter.default for key, parameter in signature(RECIPES[function]).parameters.items()}
    options: dict[str, str] = {}
    for option in given.split(",") if colon else ():
        key, _, value = option.partition("=")
        if key not in known:
            there = ", ".join(f"{key}={value}" for key, value in known.items()) or "none"
            raise ValueError(f"recipe {function} has no option {key!r}: there are {there}")
        if key in options:
            raise ValueError(f"recipe {name!r} does not work: {key} is given twice")
        options[key] = value
    try:
        said = {key: _as(known[key], key, value) for key, value in options.items()}
        recipe = RECIPES[function](**{key: value for key, value in usual.items() if key in known} | said)
    except ValueError as error:
        raise ValueError(f"recipe {name!r} does not work: {error}") from None
    recipe = replace(recipe, name=name)
    return recipe if levels is None else recipe.with_levels(levels)


def is_here(name: str | None) -> bool:
    """Whether there is a recipe of that name, which options may follow; there is none without a name."""
    return name is not None and name.partition(":")[0] in RECIPES


def recipe_for(model: str | Path, otherwise: str = "self_forcing_sink") -> str:
    """The recipe to run a model under where none is given: the one that a published student was trained under, and
    `hybrid_forcing` for the embedded model.

    otherwise: that of all other models. ValueError for a published student whose method is not here.
    """
    if str(model) == "toy":
        return "hybrid_forcing"
    known = registry().get(str(model))
    if known is None or known.recipe is None:
        return otherwise
    if not is_here(known.recipe):
        raise ValueError(f"{model} was trained under {known.recipe}, which is not here: name a recipe to run it under")
    return known.recipe


def _as(default: Any, key: str, value: str) -> Any:
    """An option's value, of the kind that its default is."""
    try:
        return type(default)(value)
    except ValueError:
        kind = "whole number" if isinstance(default, int) else "number"
        raise ValueError(f"{key} is a {kind}, such as {default}, not {value!r}") from None
