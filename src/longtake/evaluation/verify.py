"""Does a checkpoint do here what it should? Names and shapes, one step against plain attention, a short clip looked at.

Each check is a number with bounds. The clip's bounds catch what is broken, not what is poor: they lie between what such
numbers are of noise, of stills or of one colour, and what they are of videos. None was set on published weights.

Shapes: F latent frames or pictures, C channels, H W height and width.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longtake import __version__
from longtake.attention import reference
from longtake.attention.dense import dense
from longtake.evaluation.speed import cpu_name
from longtake.files import whole
from longtake.generation.blockwise import view_for
from longtake.generation.noise import SeededNoise, generator_for
from longtake.generation.recipe import Recipe
from longtake.generation.stream import to_uint8
from longtake.media.pictures import contact_sheet, save_png
from longtake.memory.stream_memory import StreamMemory
from longtake.models.checkpoints import network_config
from longtake.models.codec import Codec
from longtake.models.wan import PromptKeys, WanTransformer
from longtake.models.weights import Checkpoint

STEP_ERROR = 12  # in roundings of the precision, which add up over layers; of float32, at least a thousandth
LATENT_RANGE = 4.0  # normalised latents beyond it count as saturated
STANDIN_ROWS, STANDIN_WORDS = 512, 32  # of a text embedding, as Wan's, and those that a prompt of some length fills
_SHOWN, _COLUMNS = 12, 4  # pictures of a contact sheet


@dataclass(frozen=True, kw_only=True)
class Check:
    """One number, the bounds within which it passes, ends included, and what it is. What is not finite fails."""

    name: str
    number: float
    least: float = -math.inf
    most: float = math.inf
    about: str

    @property
    def passed(self) -> bool:
        return math.isfinite(self.number) and self.least <= self.number <= self.most

    def table(self) -> dict[str, Any]:
        """Ready for JSON, which knows no infinity: a bound or number that is not finite is null."""
        numbers = {"number": self.number, "least": self.least, "most": self.most}
        told = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        return {"name": self.name, "passed": self.passed, **told, "about": self.about}

    def in_words(self) -> str:
        bounds = [f"at least {self.least:g}"] * math.isfinite(self.least)
        bounds += [f"at most {self.most:g}"] * math.isfinite(self.most)
        said = "passed" if self.passed else "failed"
        return f"{said}  {self.name}: {self.number:.4g}, {' and '.join(bounds)} ({self.about})"


class Clip(NamedTuple):
    """Latents [F, C, H, W] of a stream's first blocks, and its memory after them."""

    latents_FCHW: Tensor
    memory: StreamMemory


def fits(checkpoint: Checkpoint) -> Check:
    """How many names and shapes of an opened network are not those of the network that its sizes make."""
    with torch.device("meta"):
        own = WanTransformer(network_config(checkpoint)).state_dict()
    there = checkpoint.meta
    odd = sorted(own.keys() ^ there.keys() | {n for n in own.keys() & there.keys() if own[n].shape != there[n].shape})
    named = f": {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}" if odd else ""
    return Check(name="fits", number=len(odd), most=0, about=f"tensors missing, not known or of another shape{named}")


def weights_are_there(network: WanTransformer) -> Check:
    """How many tensors hold numbers that are not finite, or, of matrices and kernels, nothing but zeros.

    What reads the far state, a projection or a map of its own, may be zero: it begins so.
    """
    begin_at_zero = {p for part in (*network.projections, *network.far_maps.values()) for p in part.parameters()}
    odd = [
        name
        for name, x in network.named_parameters()
        if not x.isfinite().all() or (x.ndim > 1 and x not in begin_at_zero and not x.any())
    ]
    named = f": {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}" if odd else ""
    return Check(name="weights", number=len(odd), most=0, about=f"tensors not finite, or empty matrices{named}")


def standin_text(network: WanTransformer, seed: int) -> Tensor:
    """Text embeddings [1, L, E] that mean nothing: normal numbers from a seed, and zeros beyond, as behind a prompt."""
    weight = network.patch_embedding.weight
    rows_LE = torch.zeros(STANDIN_ROWS, network.config.text_dim)
    rows_LE[:STANDIN_WORDS].normal_(generator=generator_for(seed, STANDIN_WORDS))
    return rows_LE[None].to(weight.device, weight.dtype)


@torch.no_grad()
def make_clip(
    network: WanTransformer, recipe: Recipe, shift: float, prompt: PromptKeys, noise: SeededNoise, blocks: int
) -> Clip:  # fmt: skip
    """The first blocks of a stream, none for an empty memory. ValueError for what the network cannot read."""
    memory = StreamMemory(recipe.memory(network), network.config.layers, ring=True)
    latents = recipe.schedule(network, memory, lambda block: prompt, noise, recipe.levels(shift), end=blocks)
    made = [noise(0, 0)[0, :0], *(block_BFCHW[0].clone() for block_BFCHW in latents)]
    return Clip(torch.cat(made), memory)


@torch.no_grad()
def step_checks(
    network: WanTransformer, memory: StreamMemory, prompt: PromptKeys, noise_BFCHW: Tensor
) -> list[Check]:  # fmt: skip
    """The first step of the next block: by the fast attention, beside plain attention, and beside the noise it got.

    The window is attended densely in both, whatever else the recipe would do; what is far is read alike in both. A
    velocity is noise less what is clean (`flow`), so it goes along with the noise, whatever the prompt; one that has
    lost its weights knows nothing of it.
    """
    view = view_for(network, memory, noise_BFCHW, prompt)
    level_BF = torch.ones(noise_BFCHW.shape[:2], device=noise_BFCHW.device)
    fast = network(noise_BFCHW, level_BF, prompt, replace(view, near=dense)).double()
    with sdpa_kernel(SDPBackend.MATH):  # the prompt is read by torch's plain form
        plain = network(noise_BFCHW, level_BF, prompt, replace(view, near=_plain)).double()
    both = torch.stack([fast.flatten(), noise_BFCHW.double().flatten()])
    return [
        Check(
            name="block_step",
            number=float((fast - plain).norm() / plain.norm().clamp_min(1e-12)),
            most=max(1e-3, STEP_ERROR * torch.finfo(network.patch_embedding.weight.dtype).eps),
            about="how far a step by the fast attention is from one by plain float32 attention, as a share of it",
        ),
        Check(
            name="finds_noise",
            number=float(both.corrcoef()[0, 1]),
            least=0.4,  # what is clean, unrelated and of deviation s, leaves 1 / sqrt(1 + s^2): 0.7 for 1, 0.4 for 2.3
            about="correlation of that step with the noise it was given; 0 if it knows nothing of it",
        ),
    ]


def latents_checks(latents_FCHW: Tensor, block: int, patch: int) -> list[Check]:
    """Whether normalised latents of a clip are those of a video at all.

    block: latent frames of it. patch: cells of a token's side; cells so far apart are compared, for the network makes
    those within a patch together.
    """
    x = latents_FCHW.double()
    return [
        Check(name="finite", number=float((~x.isfinite()).sum()), most=0, about="numbers that are not"),
        Check(
            name="not_noise",
            number=neighbours_alike(x, patch),
            least=0.1,
            about=f"correlation of latent cells {patch} apart; of noise it is 0",
        ),
        Check(
            name="spread",
            number=float(x.std(dim=(2, 3)).pow(2).mean().sqrt()),
            least=0.1,
            most=3.0,
            about="deviation of cells within a latent frame; about 1 in training",
        ),
        Check(
            name="not_frozen",
            number=motion(x, block),
            least=0.01,
            about="change from latent frame to frame in the stillest block; 0 is a still, 1 unrelated frames",
        ),
    ]


def latent_colour_checks(latents_FCHW: Tensor) -> list[Check]:
    """Colour cast and saturation where there is no codec, of normalised latents: each channel's mean is about 0."""
    x = latents_FCHW.double()
    return [
        Check(
            name="no_colour_cast",
            number=float(x.mean(dim=(0, 2, 3)).abs().max()),
            most=2.0,
            about="largest mean of a latent channel, in deviations",
        ),
        Check(
            name="not_saturated",
            number=float((~(x.abs() <= LATENT_RANGE)).double().mean()),
            most=0.02,
            about=f"share of latents beyond {LATENT_RANGE:g} deviations",
        ),
    ]


def picture_colour_checks(pictures_FHWC: np.ndarray) -> list[Check]:
    """Colour cast and saturation of uint8 pictures."""
    means = pictures_FHWC.mean(axis=(0, 1, 2)) / 255
    return [
        Check(
            name="no_colour_cast",
            number=float(means.max() - means.min()),
            most=0.4,
            about=f"red, green and blue are {', '.join(f'{mean:.2f}' for mean in means)} on average: largest gap",
        ),
        Check(
            name="not_saturated",
            number=float(((pictures_FHWC <= 1) | (pictures_FHWC >= 254)).mean()),
            most=0.5,
            about="share of values at the ends of the range",
        ),
    ]


def neighbours_alike(latents_FCHW: Tensor, distance: int) -> float:
    """Correlation of cells so far apart along rows and columns; each frame's channels about their own means.

    NaN where nothing varies, or where the latents are too small to hold two such cells.
    """
    x = latents_FCHW - latents_FCHW.mean(dim=(2, 3), keepdim=True)
    pairs = [(x[..., distance:], x[..., :-distance]), (x[..., distance:, :], x[..., :-distance, :])]
    products = sum(float((one * other).sum()) for one, other in pairs)
    squares = sum(float((one**2).sum() + (other**2).sum()) / 2 for one, other in pairs)
    return products / squares if squares else math.nan


def motion(latents_FCHW: Tensor, block: int) -> float:
    """Change from frame to frame in the block that has least, 1 for unrelated frames; NaN where nothing varies.

    A block's change counts from the last frame before it, so that a video that freezes at any block shows.
    """
    unrelated = float(latents_FCHW.var(dim=(2, 3)).mean().mul(2).sqrt())
    changes_F = latents_FCHW.diff(dim=0).pow(2).mean(dim=(1, 2, 3))
    first, later = changes_F[: block - 1], changes_F[block - 1 :].split(block)
    blocks = [float(part.mean().sqrt()) for part in (first, *later) if len(part)]
    return min(blocks, default=math.nan) / unrelated if unrelated else math.nan


@torch.no_grad()
def decoded(codec: Codec, latents_FCHW: Tensor) -> np.ndarray:
    """The pictures of a clip, uint8 [F, H, W, 3]."""
    frames_BFCHW, _ = codec.decode(latents_FCHW[None].to(codec.latent_mean.dtype))
    return to_uint8(frames_BFCHW.nan_to_num())[0].cpu().numpy()


def drawn(latents_FCHW: Tensor, scale: int = 4) -> np.ndarray:
    """The first three channels as red, green and blue, each -3..3 for dark..bright; cells `scale` pixels wide."""
    cells = to_uint8(latents_FCHW[None, :, :3].nan_to_num() / 3)[0].cpu().numpy()
    return cells.repeat(scale, axis=1).repeat(scale, axis=2)


def facts(checkpoint: Checkpoint, layout: str) -> dict[str, Any]:
    """What an opened checkpoint is, ready for JSON; of where it lies only the file's name."""
    return {
        "file": checkpoint.source.name,
        "layout": layout,
        "entry": checkpoint.entry,
        "tensors": len(checkpoint.meta),
        "parameters": sum(x.numel() for x in checkpoint.meta.values()),
        "stored_as": sorted({str(x.dtype).removeprefix("torch.") for x in checkpoint.meta.values()}),
        "sizes": asdict(network_config(checkpoint)),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were made with."""
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"longtake": __version__, "torch": torch.__version__, "device": named}


def verify(
    network: WanTransformer,
    recipe: Recipe,
    *,
    shift: float,
    text_BLE: Tensor,
    size: tuple[int, int],
    blocks: int,
    seed: int,
    codec: Codec | None = None,
) -> tuple[list[Check], np.ndarray | None]:
    """Every check on a network that is loaded, and the clip's pictures, uint8 [F, H, W, 3].

    size: height and width of its latents. blocks: of the clip; with 0 there are neither clip nor pictures, and one step
    is made from an empty memory. text_BLE: one prompt's embedding. ValueError for what cannot be, with the numbers.
    """
    channels, weight = network.config.channels, network.patch_embedding.weight
    if codec is not None and codec.latent_channels != channels:
        raise ValueError(f"the codec's latents have {codec.latent_channels} channels, and the network's {channels}")
    if text_BLE.shape[-1] != network.config.text_dim:
        raise ValueError(
            f"the text's embeddings are {text_BLE.shape[-1]} wide, and the network reads {network.config.text_dim}"
        )
    if blocks < 0:
        raise ValueError(f"a clip has 0 blocks or more, got {blocks}")
    noise = SeededNoise([seed], (recipe.block, channels, *size), weight.device, torch.float32)
    with torch.no_grad():
        prompt = network.prompt_keys(text_BLE[:, None].to(weight.device, weight.dtype))
    clip = make_clip(network, recipe, shift, prompt, noise, blocks)
    checks = [weights_are_there(network), *step_checks(network, clip.memory, prompt, noise(blocks, 0))]
    if not blocks:
        return checks, None
    checks += latents_checks(clip.latents_FCHW, recipe.block, network.config.patch)
    if codec is None:
        return checks + latent_colour_checks(clip.latents_FCHW), drawn(clip.latents_FCHW)
    pictures_FHWC = decoded(codec, clip.latents_FCHW)
    return checks + picture_colour_checks(pictures_FHWC), pictures_FHWC


def save_report(folder: Path, report: Mapping[str, Any], pictures_FHWC: np.ndarray | None) -> list[Path]:
    """Write verify.json, and contact_sheet.png if there are pictures, each beside and renamed; returns their paths.

    Those of an earlier report are replaced, and a sheet that has no successor goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told, sheet = folder / "verify.json", folder / "contact_sheet.png"
    with whole(told) as beside:
        beside.write_text(dumps(report, indent=2) + "\n", encoding="utf-8")
    if pictures_FHWC is None:
        sheet.unlink(missing_ok=True)
        return [told]
    shown = np.linspace(0, len(pictures_FHWC) - 1, min(_SHOWN, len(pictures_FHWC))).round().astype(int)
    with whole(sheet) as beside:
        save_png(beside, contact_sheet(pictures_FHWC[shown], _COLUMNS))
    return [told, sheet]


def _plain(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    """The reference in float32, head by head, as the scores of all heads would not fit where the network does."""
    heads = zip(*(x.float().split(1, dim=2) for x in (q_BTND, k_BSND, v_BSND)), strict=True)
    return torch.cat([reference.dense(*head) for head in heads], dim=2).to(q_BTND.dtype)
