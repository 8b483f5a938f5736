"""Wan2.1's text-to-video transformer at any size: one class for teacher, causal student and critic.

What differs among the three is only the view that attention reads through (`memory.view`). Every latent frame has a
level of its own and may have a prompt of its own. Parameters carry the published names.

Shapes: B batch, F latent frames, C channels, H W height and width, P prompts, L text length, E model width, T tokens,
N heads, D per head. Tokens are patches of 1 x p x p, frame-major, then row, then column.
Source: Wan2.1 (arXiv 2503.20314); names and shapes from its published checkpoints.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.attention.dense import dense
from longtake.attention.rope import Grid, RotaryAxes, Rotation, rotate, split_like_wan
from longtake.memory.far import FarShape, Keep
from longtake.memory.rows import Memory
from longtake.memory.span_memory import SpanShape, SpanView
from longtake.memory.stream_memory import LayerKeys, MemoryShape
from longtake.memory.view import ClipView, LayeredView, MemoryView, Rotate, TeacherForcedView, Tokens, View, frame_mask
from longtake.memory.window import WindowShape
from longtake.models.features import Conversion, LearnedForm, OwnMaps
from longtake.models.weights import sizes_of


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes of the transformer. `extent` is how many latent frames it was trained to see at once.

    reads_far: whether its layers can read a far state, each through a projection of its own. far_maps: whether queries
    and keys of a far state pass maps of each head's own first (`OwnMaps`). conversion: which layers are converted
    (ReHyAt), if any are. ValueError for sizes below 1, a width that heads cannot share, an odd `level_dim`, maps
    without a far state that is read, and layers that there are not.
    """

    dim: int
    heads: int
    ffn_dim: int
    layers: int
    text_dim: int
    channels: int = 16
    patch: int = 2
    level_dim: int = 256
    rotary_split: tuple[int, int, int] | None = None
    extent: int = 21
    reads_far: bool = False
    far_maps: bool = False
    conversion: Conversion | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "ffn_dim", "layers", "text_dim", "channels", "patch", "level_dim", "extent"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.far_maps and not self.reads_far:
            raise ValueError("maps of its own are for a far state, which this network does not read")
        if self.conversion and max(self.conversion.layers) >= self.layers:
            raise ValueError(f"layer {max(self.conversion.layers)} cannot be converted: there are {self.layers}")
        if self.level_dim % 2:
            raise ValueError(f"half of a level's features are cosines, half sines: {self.level_dim} are an odd number")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"width {self.dim} cannot be shared among {self.heads} heads of an even size")

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Self:
        """From its fields as JSON holds them, see `sizes_of`."""
        conversion = described.get("conversion")
        return sizes_of(cls, {**described, "conversion": Conversion.of(conversion) if conversion else None})

    @property
    def axes(self) -> RotaryAxes:
        split = self.rotary_split or split_like_wan(self.dim // self.heads)
        return RotaryAxes(split=(split[0], split[1], split[2]))


class PromptKeys(NamedTuple):
    """Every layer's cross-attention keys and values of P prompts, [B, P, L, N, D] each; computed once a prompt."""

    layers: list[tuple[Tensor, Tensor]]

    def select(self, prompt_B: Tensor) -> "PromptKeys":
        """One prompt for each batch element, by its number."""
        batch = torch.arange(len(prompt_B), device=prompt_B.device)
        return PromptKeys([(k[batch, prompt_B, None], v[batch, prompt_B, None]) for k, v in self.layers])

    def means(self, prompt_BF: Tensor | None = None) -> list[Tensor]:
        """Every layer's mean key of the prompt, [B, N, D]; of several, of the one that the first frame has."""
        own = self if prompt_BF is None else self.select(prompt_BF[:, 0])
        return [k_BPLND[:, 0].mean(1) for k_BPLND, _ in own.layers]

    @classmethod
    def joined(cls, several: Sequence["PromptKeys"], dim: int = 1) -> "PromptKeys":
        """The prompts of all, in their order, for one batch; along 0, those of several streams as rows of a batch."""
        layers = zip(*(one.layers for one in several), strict=True)
        return cls([(torch.cat([k for k, _ in layer], dim), torch.cat([v for _, v in layer], dim)) for layer in layers])


class Levels(NamedTuple):
    """What a network makes of frames' levels: their embedding, and its projection for the layers."""

    level_BFE: Tensor
    layers_BF6E: Tensor


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), eps=1e-6).to(x.dtype)


class Attention(nn.Module):
    """Projections of one attention, with queries and keys normed over the full width before the heads are split."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def queries(self, x: Tensor) -> Tensor:
        return self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm_k(self.k(x)).unflatten(-1, (self.heads, -1)), self.v(x).unflatten(-1, (self.heads, -1))


class SelfAttention(Attention):
    """Attention among video tokens. `linear_proj`, shared by the heads, is for what they read from a far state.

    It begins at zero, so that a network that learns to read begins as the one it was. `far_maps` are for what is asked
    of such a state and put into it. `features`, of a converted layer, are what it reads all but its near span by.
    """

    def __init__(
        self, dim: int, heads: int, reads_far: bool, features: LearnedForm | None = None, *, far_maps: bool = False
    ):  # fmt: skip
        super().__init__(dim, heads)
        self.linear_proj = _zero_linear(dim // heads) if reads_far else None
        self.far_maps = OwnMaps(heads, dim // heads) if far_maps else None
        self.features = features


class Block(nn.Module):
    """One transformer layer, in the two halves on either side of its self-attention."""

    def __init__(
        self, dim: int, heads: int, ffn_dim: int, reads_far: bool = False, features: LearnedForm | None = None,
        *, far_maps: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.self_attn = SelfAttention(dim, heads, reads_far, features, far_maps=far_maps)
        self.cross_attn = Attention(dim, heads)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def before_attention(self, x_BFTE: Tensor, levels_BF6E: Tensor, rotation: Rotation) -> Tokens:
        """The layer's own tokens, [B, F * T, N, D] each."""
        q, k, v = self.plain_tokens(x_BFTE, levels_BF6E)
        return Tokens(rotate(q, rotation), rotate(k, rotation), q, k, v)

    def plain_tokens(self, x_BFTE: Tensor, levels_BF6E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unrotated queries, keys and values, [B, F * T, N, D] each."""
        shift, scale = self._modulation(levels_BF6E)[:2]
        x = _modulated(x_BFTE, shift, scale).flatten(1, 2)
        return self.self_attn.queries(x), *self.self_attn.keys_values(x)

    def after_attention(
        self, x_BFTE: Tensor, attended_BTND: Tensor, levels_BF6E: Tensor,
        prompt: tuple[Tensor, Tensor], prompt_BF: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The layer's output: attended values, then the prompt, then the feed-forward part, each added."""
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = self._modulation(levels_BF6E)
        x = x_BFTE + gate * self.self_attn.o(attended_BTND.flatten(2)).view_as(x_BFTE)
        x = x + self._read_prompt(x, prompt, prompt_BF)
        return x + ffn_gate * self.ffn(_modulated(x, ffn_shift, ffn_scale))

    def _modulation(self, levels_BF6E: Tensor) -> tuple[Tensor, ...]:
        return (levels_BF6E + self.modulation).unsqueeze(3).unbind(2)

    def _read_prompt(self, x_BFTE: Tensor, prompt: tuple[Tensor, Tensor], prompt_BF: Tensor | None) -> Tensor:
        """Cross-attention of each frame to its own prompt; without `prompt_BF` there is one prompt for all."""
        q = self.cross_attn.queries(self.norm3(x_BFTE))
        return self.cross_attn.o(read_prompt(q, prompt, prompt_BF)).view_as(x_BFTE)


class Head(nn.Module):
    """From tokens to patches of velocity; within a token: patch row, patch column, channel."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x_BFTE: Tensor, level_BFE: Tensor) -> Tensor:
        shift, scale = (level_BFE.unsqueeze(2) + self.modulation).unsqueeze(3).unbind(2)
        return self.head(_modulated(x_BFTE, shift, scale))


class WanTransformer(nn.Module):
    """Noisy latents, a level per frame, prompts and a view -> velocity. A forward pass writes nothing."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        dim, patch_size = config.dim, config.channels * config.patch**2
        kernel = (1, config.patch, config.patch)
        self.patch_embedding = nn.Conv3d(config.channels, dim, kernel_size=kernel, stride=kernel)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.level_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            Block(
                dim, config.heads, config.ffn_dim, config.reads_far, _features(config, i, 1), far_maps=config.far_maps
            )
            for i in range(config.layers)
        )
        self.head = Head(dim, patch_size)

    @property
    def layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    @property
    def projections(self) -> list[nn.Linear]:
        """What each layer passes its reading of a far state through; none in a network that reads no such state."""
        return [block.self_attn.linear_proj for block in self.layers if block.self_attn.linear_proj is not None]

    @property
    def far_maps(self) -> dict[int, OwnMaps]:
        """What queries and keys of each layer's far state pass, by number; none in a network without such maps."""
        return {i: b.self_attn.far_maps for i, b in enumerate(self.layers) if b.self_attn.far_maps is not None}

    @property
    def features(self) -> dict[int, LearnedForm]:
        """Of the converted layers, by number."""
        return {i: b.self_attn.features for i, b in enumerate(self.layers) if b.self_attn.features is not None}

    def far_shapes(self, rule: Keep) -> dict[int, FarShape]:
        """What each converted layer makes of what left its near span, by its number, summed under that rule."""
        turns = bool(self.config.conversion and self.config.conversion.turns_with_frames)
        return {i: FarShape(form=form, rule=rule, turns_with_frames=turns) for i, form in self.features.items()}

    def with_own_far(self, memory: MemoryShape) -> MemoryShape:
        """The same shape, if it was made for another network like this one, with this one's maps and features."""
        converted = {i: far and replace(far, form=self.features[i]) for i, far in memory.converted.items()}
        return replace(memory, maps=self.far_maps, converted=converted)

    def prompt_keys(self, text_BPLE: Tensor) -> PromptKeys:
        """Cross-attention keys of P prompts per batch element. Every one of the L rows is attended, as published."""
        text = self.text_embedding(text_BPLE)
        return PromptKeys([block.cross_attn.keys_values(text) for block in self.layers])

    def forward(
        self, noisy_BFCHW: Tensor, level_BF: Tensor, prompts: PromptKeys, view: View, prompt_BF: Tensor | None = None
    ) -> Tensor:
        """Velocity [B, F, C, H, W] of noisy latents at levels in 0..1; `prompt_BF` numbers each frame's prompt."""
        return self.velocity_at(self.embed_levels(level_BF), noisy_BFCHW, prompts, view, prompt_BF)

    def velocity_at(
        self, levels: Levels, noisy_BFCHW: Tensor, prompts: PromptKeys, view: View, prompt_BF: Tensor | None = None
    ) -> Tensor:
        """As `forward`, at levels that are embedded already."""
        x = self.embed(noisy_BFCHW)
        for i in range(len(self.blocks)):
            x = self.through_layer(i, x, levels.layers_BF6E, prompts.layers[i], view, prompt_BF)
        return self._unpatch(self.head(x, levels.level_BFE), noisy_BFCHW.shape)

    def through_layer(
        self, i: int, x_BFTE: Tensor, levels_BF6E: Tensor, prompt: tuple[Tensor, Tensor], view: View,
        prompt_BF: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The output of one layer, its attention included: all of a layer that there is to compute again at once."""
        block = self.layers[i]
        own = block.before_attention(x_BFTE, levels_BF6E, view.rotation)
        return block.after_attention(x_BFTE, view.attend(i, own), levels_BF6E, prompt, prompt_BF)

    def keys_to_commit(
        self, clean_BFCHW: Tensor, level_BF: Tensor, prompts: PromptKeys, view: View, prompt_BF: Tensor | None = None
    ) -> LayerKeys:
        """Every layer's unrotated keys and values of finished latents. The last layer stops once it has its own."""
        return self.keys_at(self.embed_levels(level_BF), clean_BFCHW, prompts, view, prompt_BF)

    def keys_at(
        self, levels: Levels, clean_BFCHW: Tensor, prompts: PromptKeys, view: View, prompt_BF: Tensor | None = None
    ) -> LayerKeys:
        """As `keys_to_commit`, at levels that are embedded already."""
        x, levels_BF6E = self.embed(clean_BFCHW), levels.layers_BF6E
        keys = []
        for i, block in enumerate(self.layers):
            own = block.before_attention(x, levels_BF6E, view.rotation)
            keys.append((own.plain_k, own.v))
            if i + 1 < len(self.blocks):
                x = block.after_attention(x, view.attend(i, own), levels_BF6E, prompts.layers[i], prompt_BF)
        return keys

    def clip_view(self, latents_BFCHW: Tensor, allowed_FF: Tensor | None = None) -> ClipView | SpanView:
        """A view in which the frames of a clip see each other, or those that `allowed_FF` (query, key) allows.

        In converted layers they see their near span and what came before it. ValueError for a converted network and
        frames that are not allowed: sums cannot leave single ones out.
        """
        conversion = self.config.conversion
        if conversion is None:
            return self.exact_view(latents_BFCHW, allowed_FF)
        if allowed_FF is not None:
            raise ValueError("converted layers cannot be masked: take a network without any, or another stage")
        grid, exact, shapes = self.grid(latents_BFCHW), self.exact_view(latents_BFCHW), self.far_shapes(Keep()).items()
        return SpanView(exact.rotation, {i: SpanShape(span=conversion.span, grid=grid, far=far) for i, far in shapes})

    def exact_view(self, latents_BFCHW: Tensor, allowed_FF: Tensor | None = None) -> ClipView:
        """As `clip_view`, but that converted layers see so too, as they did before they were converted."""
        grid = self.grid(latents_BFCHW)
        rotation = grid.rotation(range(latents_BFCHW.shape[1]), latents_BFCHW.device)
        return ClipView(rotation, None if allowed_FF is None else frame_mask(allowed_FF, grid.rows * grid.columns))

    def memory_view(
        self, memory: Memory, latents_BFCHW: Tensor, *, commits: bool = False, text: Sequence[Tensor] = (),
        rotate: Rotate = rotate,
    ) -> MemoryView:  # fmt: skip
        """A view of a memory for the passes of its next frames, of the shape of these latents, or for their commit.

        text: the mean keys of their prompt, which a memory with a bank chooses by. rotate: what turns remembered keys.
        """
        grid, count, place = self.grid(latents_BFCHW), latents_BFCHW.shape[1], latents_BFCHW.device
        return memory.view(grid, count, place, self.projections, commits=commits, text=text, rotate=rotate)

    def grid(self, latents_BFCHW: Tensor) -> Grid:
        """Where the tokens of one frame of these latents stand."""
        return Grid(self.config.axes, *self._grid(latents_BFCHW))

    def teacher_forced_view(
        self, clean_BFCHW: Tensor, block: int, memory: MemoryShape, together: Sequence[int] = ()
    ) -> TeacherForcedView | LayeredView:  # fmt: skip
        """A view for [clean copy | noisy copy] of a clip: every noisy block in front of its clean past, in parallel.

        together: how many noisy blocks, one after the other, are denoised in one call; none given: each alone.
        """
        blocks, place = clean_BFCHW.shape[1] // block, (*self._grid(clean_BFCHW), clean_BFCHW.device)
        far = {i: shape for i in range(len(self.blocks)) if memory.far and (shape := memory.far_of(i))}
        most = TeacherForcedView(
            self.config.axes, memory.window, memory.extent, block, blocks, *place,
            near=memory.near, commits_keep_sink=memory.commits_keep_sink, far=far, projections=self.projections,
            together=together,
        )  # fmt: skip
        if not memory.converted:
            return most
        span = WindowShape(sink=0, past=memory.overlap)
        far = {layer: shape for layer, shape in memory.converted.items() if shape}
        others = TeacherForcedView(
            self.config.axes, span, memory.extent, block, blocks, *place, near=memory.near, far=far, together=together
        )  # fmt: skip
        return LayeredView(most, dict.fromkeys(memory.converted, others))

    def _grid(self, latents_BFCHW: Tensor) -> tuple[int, int]:
        height, width = latents_BFCHW.shape[-2:]
        patch = self.config.patch
        if height % patch or width % patch:
            raise ValueError(f"latents of {height} x {width} cannot be cut into patches of {patch} x {patch}")
        return height // patch, width // patch

    def embed(self, latents_BFCHW: Tensor) -> Tensor:
        """Tokens [B, F, T, E]."""
        weight = self.patch_embedding.weight
        rows, columns = self._grid(latents_BFCHW)
        p = self.config.patch
        patches = latents_BFCHW.unflatten(4, (columns, p)).unflatten(3, (rows, p)).permute(0, 1, 3, 5, 2, 4, 6)
        return functional.linear(
            patches.flatten(4).flatten(2, 3).to(weight.dtype), weight.flatten(1), self.patch_embedding.bias
        )

    def embed_levels(self, level_BF: Tensor) -> Levels:
        """Of every frame's level, in 0..1."""
        features = level_features(level_BF, self.config.level_dim).to(self.patch_embedding.weight.dtype)
        level_BFE = self.time_embedding(features)
        return Levels(level_BFE, self.time_projection(level_BFE).unflatten(-1, (6, -1)))

    def _unpatch(self, x_BFTE: Tensor, shape: torch.Size) -> Tensor:
        p = self.config.patch
        rows, columns = shape[3] // p, shape[4] // p
        x = x_BFTE.unflatten(3, (p, p, -1)).unflatten(2, (rows, columns)).permute(0, 1, 6, 2, 4, 3, 5)
        return x.reshape(shape)


def reading_far(network: WanTransformer) -> WanTransformer:
    """The same network, able to read a far state through projections that begin at zero; itself if it already is."""
    return network if network.config.reads_far else _grown(network, replace(network.config, reads_far=True))


def with_far_maps(network: WanTransformer) -> WanTransformer:
    """The same network with maps of its own for its far state, at the identity at first; itself if it has them.

    ValueError for a network that reads no far state.
    """
    return network if network.config.far_maps else _grown(network, replace(network.config, far_maps=True))


def _grown(network: WanTransformer, config: WanConfig) -> WanTransformer:
    """The same network in a configuration that adds to it; what is added is as it begins."""
    made = WanTransformer(config)
    made.load_state_dict(made.state_dict() | network.state_dict())
    weight = network.patch_embedding.weight
    return made.to(weight.device, weight.dtype).requires_grad_(weight.requires_grad).train(network.training)


def converted(network: WanTransformer, conversion: Conversion | None, *, far_tokens: int = 1) -> WanTransformer:
    """The same network with these layers converted and no others.

    Features that it has are kept; those that it has not begin as those of clips in which so many tokens are far.
    ValueError for features of another degree, and for layers that it has not.
    """
    old = network.config.conversion
    if old and conversion and old.degree != conversion.degree:
        raise ValueError(f"features of degree {old.degree} cannot become features of degree {conversion.degree}")
    weight = network.patch_embedding.weight
    made = WanTransformer(replace(network.config, conversion=conversion))
    for i, block in enumerate(made.layers):
        block.self_attn.features = _features(made.config, i, far_tokens)
    own = made.state_dict()
    made.load_state_dict(own | {name: x for name, x in network.state_dict().items() if name in own})
    return made.to(weight.device, weight.dtype).requires_grad_(weight.requires_grad).train(network.training)


def converted_as(network: WanTransformer, other: WanTransformer) -> WanTransformer:
    """The same network with the layers converted that are so in another, and with a copy of its features.

    ValueError for one of another shape.
    """
    shapes = [(one.config.dim, one.config.heads, one.config.layers) for one in (network, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"features of a network of {shapes[1]} (dim, heads, layers) do not fit one of {shapes[0]}")
    made = converted(network, other.config.conversion)
    for layer, form in other.features.items():
        made.features[layer].load_state_dict(form.state_dict())
    return made


def level_features(level_BF: Tensor, size: int) -> Tensor:
    """Cosines, then sines, of 1000 * level at `size` / 2 frequencies from 1 down to 1/10000, computed in float64."""
    half = size // 2
    steps = torch.arange(half, dtype=torch.float64, device=level_BF.device)
    angles = 1000 * level_BF.double().unsqueeze(-1) * torch.exp(-math.log(10000) / half * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def _features(config: WanConfig, layer: int, far_tokens: int) -> LearnedForm | None:
    """Of a layer, if it is converted."""
    if config.conversion is None or layer not in config.conversion.layers:
        return None
    return LearnedForm(config.heads, config.dim // config.heads, degree=config.conversion.degree, far_tokens=far_tokens)


def _zero_linear(size: int) -> nn.Linear:
    layer = nn.Linear(size, size)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def read_prompt(q_BFTND: Tensor, prompt: tuple[Tensor, Tensor], prompt_BF: Tensor | None) -> Tensor:
    """What queries of cross-attention read of their frames' prompts: [B, F * T, E], or [B * F, T, E] of several."""
    k, v = prompt
    if prompt_BF is None:
        return dense(q_BFTND.flatten(1, 2), k[:, 0], v[:, 0]).flatten(2)
    k_BFLND, v_BFLND = _of_frames(k, prompt_BF), _of_frames(v, prompt_BF)
    return dense(q_BFTND.flatten(0, 1), k_BFLND.flatten(0, 1), v_BFLND.flatten(0, 1)).flatten(2)


def _of_frames(keys_BPLND: Tensor, prompt_BF: Tensor) -> Tensor:
    """The keys of each frame's prompt, [B, F, L, N, D]. A product with ones and zeros: indexing's backward is slow."""
    chosen_BFP = functional.one_hot(prompt_BF, keys_BPLND.shape[1]).to(keys_BPLND.dtype)
    return (chosen_BFP @ keys_BPLND.flatten(2)).unflatten(2, keys_BPLND.shape[2:])


def _modulated(x_BFTE: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then a scale and a shift per frame."""
    return functional.layer_norm(x_BFTE, (x_BFTE.shape[-1],), eps=1e-6) * (1 + scale) + shift
