"""One stream made by several processes: sequence parallelism with heads in place of tokens (Ulysses, 2309.14509).

Each process has all weights and its share of every latent frame's tokens, for all that is done token by token. Before
attention they exchange shares of tokens for shares of heads, and after it back. So what a process remembers, keys of a
window and far states alike, is of its own heads, of all tokens.

Shapes: P processes, t a process's tokens of a frame, n its heads, others as in `models.wan`.
"""

import torch
from torch import Tensor, distributed

from longtake.attention.rope import Rotation, rotate
from longtake.memory.view import Rotate, Tokens
from longtake.models.wan import Block, WanTransformer


def split_tokens(network: WanTransformer, rotate: Rotate = rotate) -> None:
    """Share out a network's passes over the processes of the default group, which must all make the same ones.

    They take and answer whole latents; `keys_to_commit` gives the own heads' keys. For calls without gradients. Goes
    around fused layers: fuse first. rotate: what turns a layer's own tokens. ValueError for heads, and at a pass for
    tokens, that cannot be shared out evenly, and for layers with parameters of each head.
    """
    count, heads = distributed.get_world_size(), network.config.heads
    if heads % count:
        raise ValueError(f"{heads} heads cannot be shared out evenly over {count} processes")
    if network.features or network.far_maps:
        raise ValueError("converted layers, and maps of a far state's own, cannot be shared out over processes")
    for block in network.layers:
        layer = SplitLayer(block, rotate)
        for method in ("before_attention", "after_attention"):
            setattr(block, method, getattr(layer, method))
    whole, head = network.embed, network.head.forward
    # a type checker forbids the plain way
    setattr(network, "embed", lambda latents_BFCHW: own_tokens(whole(latents_BFCHW)))  # noqa: B010
    setattr(network.head, "forward", lambda x_BFtE, level_BFE: all_tokens(head(x_BFtE, level_BFE)))  # noqa: B010


class SplitLayer:
    """The two halves of a layer for this process's tokens, with all tokens of its heads between them."""

    def __init__(self, block: Block, rotate: Rotate):
        self._plain_tokens, self._after = block.plain_tokens, block.after_attention
        self._rotate = rotate

    def before_attention(self, x_BFtE: Tensor, levels_BF6E: Tensor, rotation: Rotation) -> Tokens:
        """As `Block.before_attention`, [B, F * T, n, D] each. Turned after the exchange, which has less to carry so."""
        q, k, v = to_heads(self._plain_tokens(x_BFtE, levels_BF6E), x_BFtE.shape[1])
        return Tokens(self._rotate(q, rotation), self._rotate(k, rotation), q, k, v)

    def after_attention(
        self, x_BFtE: Tensor, attended_BTnD: Tensor, levels_BF6E: Tensor,
        prompt: tuple[Tensor, Tensor], prompt_BF: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """As `Block.after_attention`."""
        return self._after(x_BFtE, to_tokens(attended_BTnD, x_BFtE.shape[1]), levels_BF6E, prompt, prompt_BF)


def own_tokens(x_BFTE: Tensor) -> Tensor:
    """This process's share of each frame's tokens, [B, F, t, E]. ValueError for tokens that cannot be shared out."""
    count = distributed.get_world_size()
    if x_BFTE.shape[2] % count:
        raise ValueError(f"{x_BFTE.shape[2]} tokens of a frame cannot be shared out evenly over {count} processes")
    return x_BFTE.chunk(count, dim=2)[distributed.get_rank()].contiguous()


def all_tokens(x_BFtE: Tensor) -> Tensor:
    """Every process's share of each frame's tokens, [B, F, T, E]."""
    shares = [torch.empty_like(x_BFtE) for _ in range(distributed.get_world_size())]
    distributed.all_gather(shares, x_BFtE.contiguous())
    return torch.cat(shares, dim=2)


def to_heads(own: tuple[Tensor, ...], frames: int) -> tuple[Tensor, ...]:
    """Tensors of the own tokens of all heads, [B, F * t, N, D] each -> of all tokens of the own heads."""
    parts = (distributed.get_world_size(), -1)
    given = [x.unflatten(2, parts).unflatten(1, (frames, -1)).permute(3, 0, 1, 2, 4, 5) for x in own]
    taken_PxBFtnD = _exchanged(torch.stack(given, dim=1))
    return taken_PxBFtnD.permute(1, 2, 3, 0, 4, 5, 6).flatten(2, 4).unbind()


def to_tokens(attended_BTnD: Tensor, frames: int) -> Tensor:
    """All tokens of the own heads -> the own tokens of all heads, [B, F * t, N, D]."""
    parts = (frames, distributed.get_world_size(), -1)
    taken_PBFtnD = _exchanged(attended_BTnD.unflatten(1, parts).permute(2, 0, 1, 3, 4, 5).contiguous())
    return taken_PBFtnD.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)


def _exchanged(given: Tensor) -> Tensor:
    """The p-th part for process p -> the p-th part from process p."""
    taken = torch.empty_like(given)
    distributed.all_to_all_single(taken, given)
    return taken
