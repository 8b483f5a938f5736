"""One hybrid attention layer over a stream with given inputs: what every pass answers, chooses and leaves behind."""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from longtake.attention import linear
from longtake.attention.linear import Sums
from longtake.attention.reference import attend_blocks, best_blocks, block_scores
from longtake.attention.rope import Grid, RotaryAxes, rotate
from longtake.memory.far import PAPER, REF_INFER, REF_TRAIN, FarShape, SinkInFar
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.memory.view import Tokens, View
from longtake.memory.window import WindowShape
from longtake.models.wan import SelfAttention
from tests.parity.fixture import Fixture

EXTENT = 21  # of the published networks


@torch.no_grad()
def check(fixture: Fixture) -> None:
    config = fixture.config
    layer = SelfAttention(config["dim"], config["num_heads"], reads_far=True)
    layer.load_state_dict(fixture.weights, strict=True)
    grid = Grid(RotaryAxes(split=tuple(config["rope_split_dims"])), *config["token_grid"])
    for variant in config["variants"]:
        for ring in (False, True):
            _check_variant(fixture, layer, grid, variant, ring)


@dataclass
class Choosing:
    """Block-sparse attention that notes which blocks of keys were chosen, as 0 and 1 [B, N, I, J]."""

    share: float
    block_q: int
    block_k: int
    centre_heads: bool
    chosen: list[Tensor] = field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = block_scores(q, k, block_q=self.block_q, block_k=self.block_k, centre_heads=self.centre_heads)
        best = best_blocks(scores, self.share)
        self.chosen.append(torch.zeros_like(scores).scatter(-1, best, 1))
        return attend_blocks(q, k, v, best, block_q=self.block_q, block_k=self.block_k)


def near_of(config: dict, variant: dict) -> Choosing:
    """A mean over the tokens changes no choice, so only the one over heads is spoken of."""
    return Choosing(
        variant["sparse_percent"], config["sparse_block_q"], config["sparse_block_k"], variant["centre"] == "heads"
    )


def memory_of(config: dict, variant: dict, near: Choosing, layers: int, ring: bool) -> StreamMemory:
    sink = config["sink_size"]
    past = config["local_attn_size"] - sink - config["num_frame_per_block"]
    shape = MemoryShape(window=WindowShape(sink=sink, past=past), extent=EXTENT, far=far_of(variant), near=near)
    shape.require_fit(config["num_frame_per_block"], EXTENT)
    return StreamMemory(shape, layers, ring=ring)


def far_of(variant: dict) -> FarShape:
    """The form drawn in the paper was recorded with the sink absorbed, as released."""
    paper = FarShape(form=PAPER.form, sink=SinkInFar.AS_WELL)
    shape = {"infer": REF_INFER, "train": REF_TRAIN, "phi": paper}[variant["module"]]
    maps = {"raw": linear.unchanged, "phi": torch.relu}
    assert (shape.form.keys, shape.form.queries) == (maps[variant["lin_num_k"]], maps[variant["lin_num_q"]])
    assert variant["absorb_sink"] and (shape.sink is SinkInFar.ROTATED_TWICE) == variant["first_chunk_prerotated"]
    return shape


def means_of(sums: Sums | None, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """As published: the means of keys and of products over tokens, and the number of tokens."""
    if sums is None:
        return torch.zeros(1, heads, head_dim), torch.zeros(1, heads, head_dim, head_dim), torch.zeros(())
    mass = sums.mass_B[:, None, None]
    return sums.k_BNR / mass, sums.kv_BNRD / mass[..., None], sums.mass_B[0]


def _check_variant(fixture: Fixture, layer: SelfAttention, grid: Grid, variant: dict, ring: bool) -> None:
    config, x = fixture.config, fixture.inputs["x"]
    frames, tokens = config["num_frame_per_block"], config["tokens_per_frame"]
    near = near_of(config, variant)
    memory = memory_of(config, variant, near, layers=1, ring=ring)
    answers, selected, states, ends = [], [], [], []
    for passes in x:
        view = memory.view(grid, frames, "cpu", [layer.linear_proj])
        states.append(means_of(memory.far(0).sums, config["num_heads"], config["head_dim"]))
        answers.append(torch.stack([_answer(layer, given, view) for given in passes]))
        selected.append(_padded(near.chosen[-len(passes)], config["max_k_blocks"]))
        memory.commit([layer.keys_values(passes[-1])], frames, grid)
        memory.audit()
        # The published buffer holds more frames than are read; where it ends says only how many have passed.
        ends.append([memory.frames * tokens, min(memory.frames, config["cache_frames"]) * tokens])
    fixture.compare(f"{variant['name']}.y", torch.stack(answers))
    fixture.compare(f"{variant['name']}.selected", torch.stack(selected))
    for name, values in zip(("kmean", "kv", "tokens"), zip(*states, strict=True), strict=True):
        fixture.compare(f"{variant['module']}.state_{name}", torch.stack(values))
    fixture.compare("end_indices", torch.tensor(ends))


def _answer(layer: SelfAttention, x: Tensor, view: View) -> Tensor:
    q, (k, v) = layer.queries(x), layer.keys_values(x)
    turned = partial(rotate, rotation=view.rotation)
    return layer.o(view.attend(0, Tokens(turned(q), turned(k), q, k, v)).flatten(2))


def _padded(chosen_BNIJ: Tensor, blocks: int) -> Tensor:
    return torch.nn.functional.pad(chosen_BNIJ, (0, blocks - chosen_BNIJ.shape[-1]))
