"""One converted layer as a function of tensors alone: a chunk and a state in, the chunk and the next state out.

What a device runs that knows no Python: nothing in it grows, no frame is numbered, and one program serves all chunks of
a clip or stream, however many, the first one too; but not a shorter last one. ReHyAt's layer (2601.04342) in the form
that `torch.export` takes; the same numbers as `memory.span_memory` (tested).

Shapes: B batch, F latent frames of a chunk, T tokens, E model width, N heads, D per head, R features per head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longtake.attention import linear
from longtake.attention.dense import dense
from longtake.attention.join import under_one_bar
from longtake.attention.linear import Features, Sums
from longtake.attention.rope import Grid, Rotation, rotate
from longtake.memory.far import FarShape, Keep
from longtake.models.features import Conversion
from longtake.models.wan import Block


class StepState(NamedTuple):
    """What a layer carries from chunk to chunk: overlap [B, To * tokens, N, D] each, unrotated, and which of its tokens
    there are at all; sums [B, N, R, D], [B, N, R], and how many tokens they hold (float64), [B]."""

    k_BSND: Tensor
    v_BSND: Tensor
    there_S: Tensor
    kv_BNRD: Tensor
    k_BNR: Tensor
    mass_B: Tensor


class BlockStep(nn.Module):
    """A converted layer, chunk by chunk: `forward` answers one and returns the state after it.

    A stream that passes a block several times keeps the state of its last, clean pass alone. ValueError for a layer
    that is not converted, and for features that turn with frames, which are not numbered here: positions are counted
    from the overlap on, as scores know no others.
    """

    def __init__(self, layer: Block, conversion: Conversion, grid: Grid, rule: Keep):
        super().__init__()
        if layer.self_attn.features is None:
            raise ValueError("only a converted layer can go from chunk to chunk")
        if conversion.turns_with_frames:
            raise ValueError("features that turn with frames cannot go from chunk to chunk")
        span = conversion.span
        span.require_exact("a layer that goes from chunk to chunk")
        self.layer, self.features, self.span, self.rule = layer, layer.self_attn.features, span, rule
        self.tokens = grid.rows * grid.columns
        place, held = range(span.overlap, span.overlap + span.current), range(span.overlap)
        far = FarShape(turns_with_frames=False)
        for name, rotation in {
            "own": grid.rotation(place, "cpu"),
            "held": grid.rotation(held, "cpu"),
            "far": far.rotation(grid, place, "cpu"),  # of a chunk that asks, and of as many frames that leave
        }.items():
            self.register_buffer(f"{name}_cos", rotation.cos_TA.clone(), persistent=False)
            self.register_buffer(f"{name}_sin", rotation.sin_TA.clone(), persistent=False)

    def empty(self, batch: int) -> StepState:
        """The state before the first chunk, in the type and on the device of the layer."""
        weight = self.layer.modulation
        attention, size = self.layer.self_attn, weight.shape[-1] // self.layer.self_attn.heads
        wide = torch.promote_types(weight.dtype, torch.float32)
        held = weight.new_zeros(batch, self.span.overlap * self.tokens, attention.heads, size)
        sums = weight.new_zeros(batch, attention.heads, self.features.features(size), size, dtype=wide)
        there = torch.zeros(held.shape[1], dtype=torch.bool, device=weight.device)
        mass = torch.zeros(batch, dtype=torch.float64, device=weight.device)
        return StepState(held, held.clone(), there, sums, sums[..., 0].clone(), mass)

    def forward(
        self, x_BFTE: Tensor, levels_BF6E: Tensor, prompt_k_B1LND: Tensor, prompt_v_B1LND: Tensor, *state_parts: Tensor
    ) -> tuple[Tensor, ...]:
        """A whole chunk of Tc frames with its level embedding and the layer's keys of one prompt: (x, *next state).

        state_parts: those of a `StepState`, one by one, for an exported program knows tensors alone.
        """
        state = StepState(*state_parts)
        own = self.layer.before_attention(x_BFTE, levels_BF6E, self._rotation("own"))
        near = dense(
            own.q,
            torch.cat([rotate(state.k_BSND, self._rotation("held")), own.k], dim=1),
            torch.cat([state.v_BSND, own.v], dim=1),
            torch.cat([state.there_S, torch.ones_like(own.k[0, :, 0, 0], dtype=torch.bool)]).expand(own.q.shape[1], -1),
        )
        sums = Sums(state.kv_BNRD, state.k_BNR, state.mass_B)
        queries = self.features.of_queries(own.plain_q, self._rotation("far"))
        attended = under_one_bar(near, linear.weigh(sums, queries))
        x = self.layer.after_attention(x_BFTE, attended, levels_BF6E, (prompt_k_B1LND, prompt_v_B1LND), None)
        return x, *self._after(state, sums, own.plain_k, own.v)

    def _after(self, state: StepState, sums: Sums, k_BTND: Tensor, v_BTND: Tensor) -> StepState:
        """The state once these keys are near to the next chunk, and those that no longer are have entered the sums."""
        count = self.span.current * self.tokens
        k, v = torch.cat([state.k_BSND, k_BTND], dim=1), torch.cat([state.v_BSND, v_BTND], dim=1)
        there = torch.cat([state.there_S, torch.ones_like(k_BTND[0, :, 0, 0], dtype=torch.bool)])
        keys = self.features.of_keys(k[:, :count], self._rotation("far"))
        leaves = there[:count, None, None].to(keys.above.dtype)
        new = linear.sums_of(Features(keys.above * leaves, keys.below * leaves), v[:, :count])
        new = new._replace(mass_B=torch.zeros_like(state.mass_B) + there[:count].sum())
        after = self.rule.add(sums, new, self.span.current)
        return StepState(k[:, count:], v[:, count:], there[count:], *after)

    def _rotation(self, name: str) -> Rotation:
        return Rotation(self.get_buffer(f"{name}_cos"), self.get_buffer(f"{name}_sin"))
