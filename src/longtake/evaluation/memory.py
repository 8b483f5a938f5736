"""What a recipe's memory holds, and what becomes of its errors.

Three things are measured, each defined where it is made:

- the far state over hours (`retention`): effective rank, saturation, and how well blocks seen once are read back. Any
  student will do, because a state needs keys and values only; so rules and sizes of states can be compared before a
  network learns to read them.
- its share of the output, in the real streams that keys are recorded from: |projected far answer| / |near answer| in L2
  over a layer's tokens and heads, the mean over streams and the passes of a block. None for a network that reads
  nothing far, and as long as nothing is far.
- how an error grows (`growth`), in real streams.

Shapes: B streams, L layers, T tokens, N heads, D per head.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, product
from operator import itemgetter
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from longtake import parallel
from longtake.attention.rope import Grid
from longtake.evaluation.growth import Growth, changed_block, error_growth, interval_95, latents_of
from longtake.evaluation.retention import Block, Recorded, Retention, Setting, retention
from longtake.evaluation.sources import batches, clip_seed, held_out_captions, seed_list
from longtake.generation.stream import Engine
from longtake.memory.far import FarShape, Rule, rule_named
from longtake.memory.policies import PLAIN
from longtake.memory.stream_memory import LayerKeys, MemoryShape, StreamMemory
from longtake.memory.view import MemoryView, Tokens

OWN = "own"  # the state as the recipe has it
USUAL = {"decay": 240.0, "cap": 240.0}  # latent frames of rules that need some; 240 are a minute
MOST_HOURS = 1000  # that a far state is followed
HELD_OUT = 4  # every so many-th stream is held out, the last one always
PROBES, QUERIED = 8, 2  # held-out blocks that are read back, and whose queries ask


def far_rules(names: Sequence[str]) -> dict[str, Rule]:
    """Rules by name, with their number of latent frames after an = sign if they take one, such as decay=480.

    They are `longtake.memory.far.RULES`. ValueError for anything else.
    """
    rules = {}
    for name in names:
        kind, _, number = name.partition("=")
        try:
            rules[name] = rule_named(kind, float(number) if number else USUAL.get(kind, math.inf))
        except ValueError as error:
            raise ValueError(f"rule {name!r} of a far state does not work: {error}") from None
    return rules


def evaluate_memory(
    recipes: Sequence[str],
    engine_of: Callable[[str], Engine],
    *,
    hours: float = 10.0,
    rules: Sequence[str] = (),
    prompts: int = 6,
    seeds: int = 1,
    blocks: int = 12,
    perturb: float = 0.05,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure what recipes remember, and how an error grows in them.

    Args:
        recipes: what to measure.
        engine_of: loads the engine of a recipe.
        hours: how long the far state is followed.
        rules: of the far states to follow, as `far_rules` reads them; if none, the recipe's own.
        prompts: how many captions of the fixed held-out list, 1 to 1000.
        seeds: streams for each caption, with seeds 0, 1, ...
        blocks: how many each stream is recorded for, and how many follow a change.
        perturb: the size of the change, beside its block's own; from 0.
        progress: is told, in words, how far it is.

    Returns:
        For each recipe a table ready for JSON: of a far state, lists of each layer go by `marks` or by `ages`. They are
        empty of a recipe with blocks in flight, which can have none: of it, the growth of an error is measured.

    Raises:
        ValueError: fewer than two streams, or anything that cannot be measured.
    """
    chosen, seed_numbers = held_out_captions(prompts), seed_list(seeds)
    if len(chosen) * len(seed_numbers) < 2:
        raise ValueError("memory is measured with two streams or more: one is held out")
    if blocks < 1:
        raise ValueError(f"streams are recorded for one block or more, got {blocks}")
    if not 0 <= perturb < math.inf:
        raise ValueError(f"a change has a size from 0, beside its block's own, got {perturb}")
    named = far_rules(rules)
    streams = [
        _Stream(caption, clip_seed(seed, number))
        for seed, (number, caption) in product(seed_numbers, enumerate(chosen))
    ]
    plans = [_Plan.of(recipe, engine_of(recipe), hours, named) for recipe in recipes]  # refused before work begins
    return [
        {
            "recipe": plan.recipe,
            "levels": len(plan.engine.recipe.steps),
            "prompts": prompts,
            "seeds": seeds,
            "hours": hours,
            **(_far_table(plan, streams, blocks, progress) if plan.states else _no_far_table(plan)),
            "error_growth": _growth_table(plan, streams, blocks, perturb, progress),
            "seed_list": seed_numbers,
            "seed_of_a_video": "100000 * seed + number of the caption, from 0",
        }
        for plan in plans
    ]


class _Stream(NamedTuple):
    caption: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is measured of one recipe. states: the far states to follow, by the name of their rule, if any can be."""

    recipe: str
    engine: Engine
    setting: Setting
    states: Mapping[str, FarShape]
    blocks: int  # in so many hours

    @property
    def block_seconds(self) -> float:
        return _block_seconds(self.engine)

    @classmethod
    def of(cls, recipe: str, engine: Engine, hours: float, rules: Mapping[str, Rule]) -> Self:
        """ValueError for hours that are too few or too many, or a state that cannot be streamed."""
        memory = engine.recipe.memory(engine.network)
        if memory.policy != PLAIN:
            raise ValueError(
                f"recipe {recipe} has rules for its window that go with no far state: none can be followed"
            )
        if engine.recipe.joint:
            raise ValueError(f"recipe {recipe} has converted layers, whose far state this does not follow yet")
        if engine.recipe.rolls and rules:
            raise ValueError(f"recipe {recipe} has blocks in flight, which cannot read a far state: name no rules")
        states: dict[str, FarShape] = {}
        if not engine.recipe.rolls:
            shape = engine.recipe.far or FarShape()
            states = {name: replace(shape, rule=rule) for name, rule in rules.items()} or {OWN: shape}
            replace(memory, far=shape).require_fit(engine.recipe.block, engine.network.config.extent)
        setting = Setting(
            memory=replace(memory, maps={}),  # what is recorded is mapped already
            block=engine.recipe.block,
            grid=engine.network.grid(torch.empty(1, 1, *engine.latent_size)),
        )
        least = (setting.opening + 1) * _block_seconds(engine)
        if not least / 3600 <= hours <= MOST_HOURS:
            raise ValueError(
                f"a far state is followed for {least:g} seconds ({least / 3600:.3g} hours) or more, "
                f"at most {MOST_HOURS} hours, got {hours:g}"
            )
        return cls(
            recipe=recipe,
            engine=engine,
            setting=setting,
            states=states,
            blocks=round(3600 * hours / _block_seconds(engine)),
        )


def _block_seconds(engine: Engine) -> float:
    return engine.recipe.block * engine.codec.temporal_factor / engine.frame_rate


# ---------------------------------------------------------------------------------------------------------------------
# Far states
# ---------------------------------------------------------------------------------------------------------------------


def _far_table(plan: _Plan, streams: Sequence[_Stream], blocks: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Record streams and follow every far state through hours of them; ready for JSON."""
    parts = parallel.share_out(
        batches(streams, plan.engine.device), lambda batch: _record(plan, batch, blocks, progress)
    )
    made = [one for part in parts for one in part]
    recorded = _recorded(made, plan.engine.device)

    def follow(state: tuple[str, FarShape]) -> Retention:
        def tell(absorbed: int) -> None:
            hours = absorbed * plan.block_seconds / 3600
            progress(f"{plan.recipe}, {state[0]}: {hours:.1f} hours")

        return retention(plan.setting, state[1], recorded, blocks=plan.blocks, progress=tell)

    found = dict(zip(plan.states, parallel.share_out(list(plan.states.items()), follow), strict=True))
    shares_LK = torch.stack([one.shares_LK for one in made]).mean(0)
    first, shape = next(iter(found.values())), next(iter(plan.states.values()))
    tables = {name: _of_layers(one, plan.block_seconds) for name, one in found.items()}
    return {
        "block_seconds": plan.block_seconds,
        "marks": first.marks,
        "at_seconds": [(mark + plan.setting.delay(shape)) * plan.block_seconds for mark in first.marks],
        "ages": first.ages,
        "ages_seconds": [age * plan.block_seconds for age in first.ages],
        "recorded_blocks": sum(len(shot) for shot in recorded.shots),
        "held_out_blocks": len(recorded.held_out),
        "mean_of_layers": {name: _table(one, lambda x: x.mean(0)) for name, one in found.items()},
        "layers": [
            {
                "share_of_output": _numbers(shares_LK[layer]) if shares_LK.isfinite().any() else None,
                "states": {name: table[layer] for name, table in tables.items()},
            }
            for layer in range(len(shares_LK))
        ],
    }


def _no_far_table(plan: _Plan) -> dict[str, Any]:
    """The table of a recipe that cannot have a far state."""
    nothing = ("marks", "at_seconds", "ages", "ages_seconds", "layers")
    return {"block_seconds": plan.block_seconds, "mean_of_layers": {}} | {name: [] for name in nothing}


def _of_layers(found: Retention, block_seconds: float) -> list[dict[str, Any]]:
    ages = found.remembered_L
    return [
        {
            **_table(found, itemgetter(layer)),
            "remembered_seconds": None if age is None else age * block_seconds,
        }
        for layer, age in enumerate(ages)
    ]


def _table(found: Retention, choose: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """One layer's numbers, or those of all together."""
    return {
        "effective_rank": _numbers(choose(found.rank_LM)),
        "news": _numbers(choose(found.news_LM)),
        "saturation": _numbers(choose(found.saturation_LM)),
        "read_back_newest": _numbers(choose(found.newest_LM)),
        "read_back": _numbers(choose(found.read_back_LA)),
        "recalled": _numbers(choose(found.recalled_LA)),
        "read_back_never": _number(choose(found.never_L).item()),
    }


def _numbers(x: Tensor) -> list[float | None]:
    return [_number(value) for value in x.tolist()]


def _number(value: float) -> float | None:
    """Four digits are more than is known; None for what is not there."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


# Recording


class _Made(NamedTuple):
    """One recorded stream, on the host: its blocks, the queries of the last, and the far's shares (nan where none)."""

    blocks: list[Block]
    queries_LTND: Tensor
    shares_LK: Tensor


@torch.no_grad()
def _record(plan: _Plan, batch: Sequence[_Stream], blocks: int, progress: Callable[[str], None]) -> list[_Made]:
    """Run streams for so many blocks and keep what each commits."""
    engine = plan.engine
    memory = _Recorder(engine.recipe.memory(engine.network), engine.network.config.layers)
    captions, seeds = zip(*batch, strict=True)
    latents = latents_of(engine, memory, engine.prompt_keys(*captions), seeds)
    for number, _ in enumerate(islice(latents, blocks), 1):
        progress(f"{plan.recipe}: block {number} of {blocks} of {len(batch)} streams is recorded")
    queries, shares_BLK = torch.stack(memory.queries), torch.stack(memory.shares, -1)
    return [
        _Made(
            [
                Block(*(torch.stack(parts)[:, row].cpu() for parts in zip(*keys, strict=True)))
                for keys in memory.committed
            ],
            queries[:, row].cpu(),
            shares_BLK[row],
        )
        for row in range(len(batch))
    ]


def _recorded(made: Sequence[_Made], device: torch.device) -> Recorded:
    """Every so many-th stream is held out, and the last; of their blocks, some evenly spread ones."""
    aside = [number % HELD_OUT == HELD_OUT - 1 or number == len(made) - 1 for number in range(len(made))]
    held_out = [one for one, out in zip(made, aside, strict=True) if out]
    others = [block for one in held_out for block in one.blocks]
    return Recorded(
        shots=[[_to(block, device) for block in one.blocks] for one, out in zip(made, aside, strict=True) if not out],
        held_out=[_to(block, device) for block in others[:: -(-len(others) // PROBES)]],
        queries=[one.queries_LTND.to(device) for one in held_out[:QUERIED]],
    )


def _to(block: Block, device: torch.device) -> Block:
    return Block(*(x.to(device) for x in block))


class _Recorder(StreamMemory):
    """A memory that keeps all that is committed, and watches how the far state is read.

    Keys and queries are kept as a far state gets them: through the layers' own maps, if they have any.
    """

    def __init__(self, shape: MemoryShape, layers: int):
        super().__init__(shape, layers, ring=True)
        self.committed: list[LayerKeys] = []
        self.queries: list[Tensor] = []  # of the last block's last whole pass: [B, T, N, D] a layer
        self.shares: list[Tensor] = []  # of each block: [B, L], nan where nothing was far
        self._watched = _Watched(layers)

    def view(
        self, grid: Grid, count: int, device: torch.device | str,
        projections: Sequence[Callable[[Tensor], Tensor]] = (), **more: Any,
    ) -> MemoryView:  # fmt: skip
        plain = super().view(grid, count, device, projections, **more)
        self._watched = _Watched(self.layers)
        return _WatchedView(plain.rotation, plain.layers, plain.near, plain.far, self._watched)

    def commit(self, keys: LayerKeys, count: int, grid: Grid | None = None, **more: Any) -> None:
        super().commit(keys, count, grid, **more)
        far = [self.shape.far_of(layer) or FarShape() for layer in range(self.layers)]
        self.committed.append([(one.mapped_keys(k), v) for one, (k, v) in zip(far, keys, strict=True)])
        asked = self._watched.last_whole_pass()
        self.queries = [one.mapped_queries(q) for one, q in zip(far, asked, strict=True)]
        nowhere = torch.full((len(keys[0][0]),), torch.nan)
        means = [torch.stack(shares).mean(0).cpu() if shares else nowhere for shares in self._watched.shares]
        self.shares.append(torch.stack(means, 1))


class _Watched:
    """What the passes of one block asked, layer by layer, and what share of the answers was far."""

    def __init__(self, layers: int):
        self.queries: list[list[Tensor]] = [[] for _ in range(layers)]
        self.shares: list[list[Tensor]] = [[] for _ in range(layers)]

    def last_whole_pass(self) -> list[Tensor]:
        """Queries of the last pass through all layers; the one that commits stops before the last."""
        whole = min(map(len, self.queries))
        return [asked[whole - 1] for asked in self.queries]


@dataclass(frozen=True)
class _WatchedView(MemoryView):
    """Answers as the view that it was made of."""

    watched: _Watched = field(default_factory=lambda: _Watched(0))

    def attend(self, layer: int, own: Tokens) -> Tensor:
        self.watched.queries[layer].append(own.plain_q)
        near_BTND = MemoryView(self.rotation, self.layers, self.near).attend(layer, own)
        if not self.far:
            return near_BTND
        far_BTND = self.far[layer].add_to(torch.zeros_like(near_BTND), own.plain_q)
        norms = [x.float().flatten(1).norm(dim=1) for x in (far_BTND, near_BTND)]
        self.watched.shares[layer].append(norms[0] / norms[1])
        return near_BTND + far_BTND


# ---------------------------------------------------------------------------------------------------------------------
# Error growth
# ---------------------------------------------------------------------------------------------------------------------


def _growth_table(
    plan: _Plan, streams: Sequence[_Stream], blocks: int, size: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Lists by blocks after the changed one, from 0: mean over streams, and the ends of its 95 % interval."""

    def follow(batch: Sequence[_Stream]) -> Growth:
        captions, seeds = zip(*batch, strict=True)
        progress(f"{plan.recipe}: {len(batch)} streams and their twins")
        return error_growth(plan.engine, captions, seeds, blocks=blocks, size=size)

    parts = parallel.share_out(batches(streams, plan.engine.device), follow)
    found = Growth(*(torch.cat(part) for part in zip(*parts, strict=True)))
    return {
        "perturb": size,
        "changed_block": changed_block(plan.engine),
        "latents": _mean(found.latents_BK),
        "pictures": _mean(found.pictures_BK),
        "unrelated_latents": _numbers(found.unrelated_latents_BK.nanmean(0)),
        "unrelated_pictures": _numbers(found.unrelated_pictures_BK.nanmean(0)),
    }


def _mean(x_BK: Tensor) -> dict[str, Any]:
    ends = [interval_95(column) for column in x_BK.unbind(1)]
    return {"mean": _numbers(x_BK.mean(0)), "interval_95": [tuple(map(_number, pair)) for pair in ends]}
