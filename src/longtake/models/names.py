"""The names that published checkpoints give to the tensors of our networks, by table.

Our networks bear the original names of Wan2.1. What comes in besides: diffusers' names, the prefixes that wrappers
leave behind (Self Forcing's family, FSDP, `torch.compile`), rCM's, and low-rank updates (LoRA) in PEFT's names.

Layouts: "original", "diffusers", and "longtake", our own files, whose networks stand under `network.`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from longtake.models.wan_vae import WanVAEConfig
from longtake.models.weights import Checkpoint

WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")
LEADING = ("model.", "generator.", "net.")  # at most one of them is dropped
OURS = "network."

NETWORK_TO_DIFFUSERS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
BLOCK_TO_DIFFUSERS = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{ours}.{part}": f"{theirs}.{renamed}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, renamed in (
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"),
        )
    },
}  # fmt: skip

CODEC_TO_DIFFUSERS = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{
        f"{half}.{ours}": f"{half}.{theirs}"
        for half in ("encoder", "decoder")
        for ours, theirs in (
            ("conv1", "conv_in"),
            ("middle.0", "mid_block.resnets.0"),
            ("middle.1", "mid_block.attentions.0"),
            ("middle.2", "mid_block.resnets.1"),
            ("head.0", "norm_out"),
            ("head.2", "conv_out"),
        )
    },
}
RESIDUAL_TO_DIFFUSERS = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}

_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_PEFT = "base_model.model."


def network_in_ours(checkpoint: Checkpoint) -> tuple[Checkpoint, str]:
    """A video network under the names of `WanTransformer`, and the layout it had. Names not known keep their own.

    Changes rCM's flat patch embedding too. ValueError where two names would become one.
    """
    if "network" in (checkpoint.description or {}):
        return _renamed(checkpoint, {name: name.removeprefix(OURS) for name in checkpoint.meta}), "longtake"
    rcm = all(name.startswith("net.") for name in checkpoint.meta)
    kept = [name for name in checkpoint.meta if not (rcm and name.startswith("net.accum_"))]
    bare = unwrapped(checkpoint.renamed({name: name for name in kept}))
    if rcm:
        bare = _with_patches(bare)
    if "condition_embedder.time_proj.weight" in bare.meta:
        return _renamed(bare, {name: network_name_in_ours(name) for name in bare.meta}), "diffusers"
    return bare, "original"


def codec_in_ours(checkpoint: Checkpoint, config: WanVAEConfig, own_names: Iterable[str]) -> tuple[Checkpoint, str]:
    """An unwrapped Wan VAE under the names of `WanVAE`, which are given, and the layout it had.

    Names not known keep their own.
    """
    if "wan_vae" in (checkpoint.description or {}):
        return checkpoint, "longtake"
    if "post_quant_conv.weight" not in checkpoint.meta:
        return checkpoint, "original"
    ours = {codec_name_in_diffusers(name, config): name for name in own_names}
    return _renamed(checkpoint, {name: ours.get(name, name) for name in checkpoint.meta}), "diffusers"


def unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The same under names without what wrappers add. ValueError where two names would become one."""
    return _renamed(checkpoint, {name: without_wrappers(name) for name in checkpoint.meta})


def without_wrappers(name: str) -> str:
    """A name without the components that wrappers add anywhere, and without one leading `model.` or its like."""
    bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return next((bare.removeprefix(prefix) for prefix in LEADING if bare.startswith(prefix)), bare)


def network_name_in_diffusers(name: str) -> str:
    """One of our network's names in diffusers' `WanTransformer3DModel`. ValueError if that has nothing of the kind."""
    renamed = _by_table(name, NETWORK_TO_DIFFUSERS, BLOCK_TO_DIFFUSERS)
    if renamed is None:
        raise ValueError(f"diffusers' Wan has no place for {name}")
    return renamed


def network_name_in_ours(name: str) -> str:
    """Undoes `network_name_in_diffusers`; a name that is not diffusers' stays, for the fit to complain about."""
    return _by_table(name, _inverse(NETWORK_TO_DIFFUSERS), _inverse(BLOCK_TO_DIFFUSERS)) or name


def codec_name_in_diffusers(name: str, config: WanVAEConfig) -> str:
    """One of our Wan VAE's names in diffusers' `AutoencoderKLWan`, whose decoder groups layers by resolution."""
    module, end = _split(name)
    for ours, theirs in CODEC_TO_DIFFUSERS.items():
        if module == ours:
            return theirs + end
        if module.startswith(f"{ours}."):
            return f"{theirs}.{_residual(module.removeprefix(f'{ours}.'))}{end}"
    half, _, number, inside = module.split(".", 3)
    if half == "encoder":
        return f"encoder.down_blocks.{number}.{_residual(inside)}{end}"
    level, place = divmod(int(number), config.num_res_blocks + 2)
    within = f"resnets.{place}" if place <= config.num_res_blocks else "upsamplers.0"
    return f"decoder.up_blocks.{level}.{within}.{_residual(inside)}{end}"


def merged(base: Checkpoint, lora: Checkpoint, *, alpha: float | None = None) -> Checkpoint:
    """A network, in our names, with low-rank updates added as it is read: W + (alpha / r) B A, reckoned in float32.

    lora: PEFT's names, `lora_A` [r, in] and `lora_B` [out, r], in the original names or diffusers'. alpha: by default
    r, a scale of 1, as LongLive's is published. ValueError for updates that are not whole or have no place.
    """
    sides = _lora_sides(lora)
    ranks = {name: _lora_rank(name, side, base, lora) for name, side in sides.items()}

    def add(name: str, weight: Tensor) -> Tensor:
        side, rank = sides[name], ranks[name]
        update = lora.read(side["B"]).float() @ lora.read(side["A"]).float()
        scale = 1.0 if alpha is None else alpha / rank
        return (weight.float() + scale * update).to(weight.dtype)

    return base.changed({name: base.meta[name].shape for name in sides}, add)


def is_low_rank(name: str) -> bool:
    """Whether a tensor of that name is a factor of a low-rank update."""
    return _LORA.fullmatch(name) is not None


def low_rank_names(weight: str) -> tuple[str, str]:
    """What the factors A and B of a weight's low-rank update are called."""
    module = weight.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _lora_sides(lora: Checkpoint) -> dict[str, dict[str, str]]:
    """For each weight that is updated, in our names, what its A and its B are called."""
    sides: dict[str, dict[str, str]] = {}
    for given in lora.meta:
        found = _LORA.fullmatch(given)
        if found is None:
            raise ValueError(f"{lora.source} holds {given}, which is no part of a low-rank update in PEFT's names")
        module = without_wrappers(found["module"].removeprefix(_PEFT))
        side = sides.setdefault(network_name_in_ours(f"{module}.weight"), {})
        if found["side"] in side:
            raise ValueError(f"{lora.source} updates {module} twice: {side[found['side']]} and {given}")
        side[found["side"]] = given
    return sides


def _lora_rank(name: str, side: Mapping[str, str], base: Checkpoint, lora: Checkpoint) -> int:
    """The rank of one update. ValueError unless both its sides are there and fit the weight."""
    if name not in base.meta:
        raise ValueError(f"{lora.source} updates {name}, which {base.source} does not have")
    if side.keys() != {"A", "B"}:
        raise ValueError(f"{lora.source} has only lora_{next(iter(side))} of {name}")
    down, up, weight = lora.meta[side["A"]].shape, lora.meta[side["B"]].shape, base.meta[name].shape
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or (up[0], down[1]) != tuple(weight):
        raise ValueError(f"{lora.source}: {list(up)} times {list(down)} does not fit {name} {list(weight)}")
    return down[0]


def _with_patches(rcm: Checkpoint) -> Checkpoint:
    """rCM's patch embedding, a matrix over a patch's numbers, as the convolution it stands for: [E, C, 1, 2, 2]."""
    name = "patch_embedding.weight"
    flat = rcm.meta.get(name)
    if flat is None or flat.ndim != 2 or flat.shape[1] % 4:
        return rcm
    shape = torch.Size([flat.shape[0], flat.shape[1] // 4, 1, 2, 2])
    return rcm.changed({name: shape}, lambda _, weight: weight.reshape(shape))


def _renamed(checkpoint: Checkpoint, new_names: Mapping[str, str]) -> Checkpoint:
    double = sorted(name for name, count in Counter(new_names.values()).items() if count > 1)
    if double:
        both = " and ".join(old for old, new in new_names.items() if new == double[0])
        raise ValueError(f"{checkpoint.source} has {len(double)} names twice, such as {double[0]}: {both}")
    return checkpoint.renamed({new: old for old, new in new_names.items()})


def _by_table(name: str, whole: Mapping[str, str], of_block: Mapping[str, str]) -> str | None:
    """A name by the table of the whole network, or of its blocks; None if its table lacks it."""
    module, end = _split(name)
    found = re.fullmatch(r"(blocks\.\d+\.)(.+)", module)
    start, table, inside = (found[1], of_block, found[2]) if found else ("", whole, module)
    return f"{start}{table[inside]}{end}" if inside in table else None


def _split(name: str) -> tuple[str, str]:
    """A module's or a bare parameter's name, and the rest, such as `.weight`."""
    for end in (".weight", ".bias", ".gamma"):
        if name.endswith(end):
            return name.removesuffix(end), end
    return name, ""


def _residual(inside: str) -> str:
    return RESIDUAL_TO_DIFFUSERS.get(inside, inside)


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}
