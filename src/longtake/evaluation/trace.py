"""What a recipe does, block by block, seen by a stand-in for its network.

The recipe's own schedule, memory and positions run; only the network is replaced. A latent of the stand-in is the
number of its frame, and noise is that number too, so every mixture of the two still tells which frame it is. A key's
angle is the position it was rotated to. What attention and far state are handed can therefore be read off.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.attention import linear
from longtake.attention.linear import Features, Sums
from longtake.attention.rope import RotaryAxes, rotate
from longtake.generation.recipe import Recipe
from longtake.memory.far import FarShape, Rule
from longtake.memory.stream_memory import LayerKeys, StreamMemory
from longtake.memory.view import Attend, Tokens, View
from longtake.models.features import Conversion
from longtake.models.wan import PromptKeys, WanConfig, WanTransformer

AXES = RotaryAxes(split=(8, 0, 0))  # the slowest pair turns by a thousandth a position, so thousands are told apart
HEAD_DIM = sum(AXES.split)


class AtLevel(NamedTuple):
    """A block, and the level at which it went through the network."""

    block: int
    level: float


class Placed(NamedTuple):
    """A latent frame, and the position that its keys were rotated to."""

    frame: int
    position: int


@dataclass(frozen=True, kw_only=True)
class BlockTrace:
    """One block of a stream: what was attended to make it, and what happened when it was committed.

    made: the frames it finished. calls: of the network since the block before, but for the one that committed it, with
    the blocks that went through together; what was attended is told of the last. commit: what its commit attended to,
    itself included. leaves: frames that slid out of the window. absorbed: into the far state.
    held, far: what was remembered afterwards, exactly and (how many frames) in the far state.
    """

    block: int
    sink: tuple[Placed, ...]
    past: tuple[Placed, ...]
    current: tuple[Placed, ...]
    made: tuple[int, ...]
    calls: tuple[tuple[AtLevel, ...], ...]
    commit: tuple[Placed, ...]
    leaves: tuple[int, ...]
    absorbed: tuple[Placed, ...]
    held: tuple[int, ...]
    far: float

    def looks_like(self, other: "BlockTrace", sink: int) -> bool:
        """Whether the two differ only in how far the stream has come. sink: frames that stay where they are."""
        return self._from_start(sink) == other._from_start(sink)

    def _from_start(self, sink: int) -> list[tuple[tuple[float, ...] | float, ...]]:
        """Frames counted from the block's first, but for the sink's; blocks from the block."""

        def moved(frame: int) -> int:
            return frame if frame < sink else frame - self.made[0]

        placed = (self.sink, self.past, self.current, self.commit, self.absorbed)
        return [
            *(tuple(Placed(moved(one.frame), one.position) for one in some) for some in placed),
            *(tuple(moved(frame) for frame in frames) for frames in (self.leaves, self.held)),
            *(tuple((one.block - self.block, one.level) for one in call) for call in self.calls),
        ]


def traced(recipe: Recipe, extent: int, shift: float = 1.0) -> Iterator[BlockTrace]:
    """What a recipe does with each block of an endless stream, for a network trained on `extent` latent frames.

    shift: of its levels. A far state gets the published features whatever its own, so that they show where keys are
    placed. A sink into which others are averaged stands for its own frames alone. A bank's prompt says nothing: the
    frames that it chooses first stay. Of a recipe with converted layers (`joint`), what one of these does is told, with
    the overlap that layers are converted with by default.
    """
    noted = _Noted()
    network = _StandIn(extent, recipe.block, noted, converted=recipe.joint is not None)
    policy = recipe.policy if recipe.policy.average is None else replace(recipe.policy, average=1.0)
    shape = replace(recipe, near=noted.near, far=_noting(recipe.far, noted), policy=policy).memory(network)
    shape = replace(shape, converted={layer: _noting(far, noted) for layer, far in shape.converted.items()})
    memory = StreamMemory(shape, network.config.layers, ring=False)
    blocks = recipe.schedule(
        network,
        memory,
        lambda block: PromptKeys([(torch.zeros(1, 1, 1, 1, HEAD_DIM),) * 2]),
        lambda block, step: _latents(range(recipe.block * block, recipe.block * (block + 1))),
        recipe.levels(shift),
    )
    before: tuple[int, ...] = ()
    for block, latents in enumerate(blocks):
        row = _row(block, _numbers(latents), before, noted, memory)
        yield row
        before = row.held
        noted.absorbed.clear()
        noted.calls.clear()
        noted.commit.clear()


def _row(
    block: int, made: tuple[int, ...], before: tuple[int, ...], noted: "_Noted", memory: StreamMemory
) -> BlockTrace:  # fmt: skip
    sink, keys = memory.shape.window_of(0).sink, memory.held(0)
    held = tuple(sorted(round(frame) for frame in keys.v_BTND[0, :, 0, 0].tolist())) if keys else ()
    sums = memory.far(0).sums if memory.shape.far_of(0) else None
    old = [one for one in noted.attended if one.frame < made[0]]
    return BlockTrace(
        block=block,
        sink=tuple(one for one in old if one.frame < sink),
        past=tuple(one for one in old if one.frame >= sink),
        current=tuple(one for one in noted.attended if one.frame >= made[0]),
        made=made,
        calls=tuple(noted.calls),
        commit=tuple(noted.commit),
        leaves=tuple(frame for frame in (*before, *made) if frame not in held),
        absorbed=tuple(noted.absorbed),
        held=held,
        far=sums.mass_B.item() if sums else 0.0,
    )


@torch.no_grad()
def keys_attended(near: Attend, queries: int, keys: int) -> int:
    """To how many of so many keys a query attends: of values that are all apart, those that its answer is made of."""
    nothing, everything = torch.zeros(1, keys, 1, keys), torch.eye(keys)[None, :, None]
    return int(near(nothing[:, :queries], nothing, everything)[0, 0].count_nonzero())


@dataclass
class _Noted:
    """What was handed to the attention last, denoising and committing, and to the far state since the last block."""

    attended: list[Placed] = field(default_factory=list)
    commit: list[Placed] = field(default_factory=list)
    calls: list[tuple[AtLevel, ...]] = field(default_factory=list)
    absorbed: list[Placed] = field(default_factory=list)

    def near(self, q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
        self.attended = _placed(k_BSND, v_BSND)
        return q_BTND


@dataclass(frozen=True)
class _NotingRule:
    """A far state's rule that notes what it absorbs."""

    rule: Rule
    noted: _Noted

    def absorb(self, sums: Sums | None, keys: Features, v_BTND: Tensor, frames: int) -> Sums:
        self.noted.absorbed += _placed(keys.above, v_BTND)
        return self.rule.absorb(sums, keys, v_BTND, frames)

    def read(self, sums: Sums, queries: Features) -> Tensor:
        return self.rule.read(sums, queries)


def _noting(far: FarShape | None, noted: _Noted) -> FarShape | None:
    """The same far state, noting what it takes and showing where."""
    return far and replace(far, form=linear.PAPER, rule=_NotingRule(far.rule, noted), turns_with_frames=True)


class _StandIn(WanTransformer):
    """One token a frame, in one layer: keys that show where they are placed, values that are their frames' numbers."""

    def __init__(self, extent: int, block: int, noted: _Noted, *, converted: bool):
        config = WanConfig(
            dim=HEAD_DIM, heads=1, ffn_dim=1, layers=1, text_dim=1, channels=1, level_dim=2,
            rotary_split=AXES.split, extent=extent, reads_far=True,
            conversion=Conversion(layers=(0,), current=block, degree=1) if converted else None,
        )  # fmt: skip
        super().__init__(config)
        self.block, self.noted = block, noted

    def forward(
        self, noisy_BFCHW: Tensor, level_BF: Tensor, prompts: PromptKeys, view: View, prompt_BF: Tensor | None = None
    ) -> Tensor:
        """Attends, and takes what it is given for clean."""
        view.attend(0, _tokens(noisy_BFCHW, view))
        firsts = zip(_numbers(noisy_BFCHW)[:: self.block], level_BF[0, :: self.block].tolist(), strict=True)
        self.noted.calls.append(tuple(AtLevel(frame // self.block, round(level, 6)) for frame, level in firsts))
        return torch.zeros_like(noisy_BFCHW)

    def keys_to_commit(
        self, clean_BFCHW: Tensor, level_BF: Tensor, prompts: PromptKeys, view: View, prompt_BF: Tensor | None = None
    ) -> LayerKeys:
        own, denoising = _tokens(clean_BFCHW, view), self.noted.attended
        view.attend(0, own)
        self.noted.commit = self.noted.commit or self.noted.attended  # a second commit is of frames known before
        self.noted.attended = denoising
        return [(own.plain_k, own.v)]


def _latents(frames: range) -> Tensor:
    """[1, F, 1, 2, 2]: one patch a frame, each number that of its frame."""
    return torch.tensor(frames, dtype=torch.float32).view(1, -1, 1, 1, 1).expand(-1, -1, -1, 2, 2)


def _numbers(latents_BFCHW: Tensor) -> tuple[int, ...]:
    return tuple(round(number) for number in latents_BFCHW[0, :, 0, 0, 0].tolist())


def _tokens(latents_BFCHW: Tensor, view: View) -> Tokens:
    numbers = latents_BFCHW[:, :, 0, 0, 0].round()
    v_BTND = numbers[:, :, None, None].expand(-1, -1, 1, HEAD_DIM)
    plain_BTND = torch.tensor([1.0, 0.0] * (HEAD_DIM // 2), dtype=v_BTND.dtype).expand_as(v_BTND)
    turned_BTND = rotate(plain_BTND, view.rotation)
    return Tokens(turned_BTND, turned_BTND, plain_BTND, plain_BTND, v_BTND)


def _placed(k_BTND: Tensor, v_BTND: Tensor) -> list[Placed]:
    """What frames the tokens of a stand-in are, and where they stand: the angle of a key's slowest pair says it."""
    slowest = AXES.angles([1], 1, 1)[0, -1]
    cos, sin = k_BTND[0, :, 0, -2:].double().unbind(-1)
    positions = (torch.atan2(sin, cos) / slowest).round().int().tolist()
    return [
        Placed(round(frame), position) for frame, position in zip(v_BTND[0, :, 0, 0].tolist(), positions, strict=True)
    ]
