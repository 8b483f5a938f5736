"""One function per published method, and the table that says which weights run with which.

Recipes that are compared see equally many finished frames: 6 latent frames besides the current block of 3. Those that
are the published inference of a checkpoint, from `causvid` on, have its sizes, and options for others.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache, partial
from importlib import resources
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longtake import parallel
from longtake.attention.block_sparse import block_sparse
from longtake.attention.linear import WIDTHS
from longtake.distillation.trainer import STATE_FILE
from longtake.flow import even_levels
from longtake.generation.blockwise import blockwise
from longtake.generation.clip import sample_clip
from longtake.generation.noise import SeededNoise
from longtake.generation.recipe import Recipe
from longtake.generation.rolling import rolling
from longtake.generation.stream import Engine, to_uint8
from longtake.memory.far import RULES, Decay, Delta, FarShape, Keep, MassCap, rule_named
from longtake.memory.fixed_view import FixedView, FixedViews
from longtake.memory.policies import Absolute, BackAndForth, BankShape, EndToEnd, Policy, Recache
from longtake.models import checkpoints
from longtake.models.codec import Codec
from longtake.models.delta import is_delta, on_base
from longtake.models.features import Conversion
from longtake.models.hub import UNKNOWN, Published, located, nearest, registry
from longtake.models.light_codec import LightCodec, LightCodecConfig
from longtake.models.standins import NoDecoder, RandomText, drawn
from longtake.models.taehv import TAEHV, TAEHVConfig
from longtake.models.text import WordEncoder, WordEncoderConfig, WordText
from longtake.models.umt5 import LENGTH, UMT5Files, UMT5Text
from longtake.models.wan import WanConfig, WanTransformer
from longtake.models.wan_vae import WanVAE, WanVAEConfig
from longtake.models.weights import described, load_into, load_weights, save_weights
from longtake.toy import captions
from longtake.toy.scenes import HEIGHT, RATE, WIDTH


def self_forcing(past: int = 6, block: int = 3) -> Recipe:
    """Self Forcing (arXiv 2506.08009): block by block over a sliding window, distilled on its own rollouts.

    past: latent frames of it that a block sees; published are 18. block: latent frames of one; published are 3 and,
    for other weights, 1. ValueError for a block of less than 1.
    """
    return replace(Recipe(name="self_forcing", schedule=blockwise, sink=0, past=past), block=_at_least_one(block))


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
    tokens: int = 12,
    block: int = 3,
) -> Recipe:
    """Hybrid Forcing (arXiv 2604.10103): a fifth of the window's key blocks, and a far state of what left it.

    share: of the key blocks that each block of queries attends to; 1 is all. far: what is made of frames that left the
    window: they are kept for ever (published); "none"; or a rule of `memory.far`, decay, cap or delta. frames: the half
    life or the cap in latent frames, which decay and cap need. features: of the far state, beside the size of a head:
    0.5, 1 (published), 2 or 4. stiffness: how hard delta holds on to the old. turns: the positions that features of the
    far state bear, "all" (published) or "space", row and column but not frame: then it is the same how long ago
    something was absorbed. tokens: of a block of queries or keys; 12 are a row of the embedded model's latent frames,
    published are 64 of 1,560 a frame. block: latent frames of one; there are weights for 3 alone. ValueError for what
    cannot be.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    if tokens < 1:
        raise ValueError(f"blocks have 1 token or more, got tokens={tokens}")
    near = partial(block_sparse, share=share, block_q=tokens, block_k=tokens)
    return replace(
        self_forcing_sink(), name="hybrid_forcing", far=_far_state(far, frames, features, stiffness, turns), near=near,
        block=_at_least_one(block),
    )  # fmt: skip


def _at_least_one(block: int) -> int:
    """ValueError for a block of no latent frames."""
    if block < 1:
        raise ValueError(f"a block has one latent frame or more, got block={block}")
    return block


def _far_state(rule: str, frames: float, features: float, stiffness: float, turns: str) -> FarShape | None:
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
    made = rule_named(rule, frames, stiffness)
    return FarShape(form=WIDTHS[features], rule=made, turns_with_frames=turns == "all")


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


def causal_forcing(past: int = 18) -> Recipe:
    """Causal Forcing (arXiv 2602.02214), chunk by chunk: Self Forcing's inference, with weights distilled otherwise.

    past: latent frames that a block sees; published are 18.
    """
    return replace(self_forcing(past), name="causal_forcing")


def longlive(
    sink: int = 3, past: int = 6, mask: str = "none", old_sink: str = "kept", positions: str = "absolute"
) -> Recipe:
    """LongLive (arXiv 2509.22622): a short window behind a sink, committed once more when the prompt changes.

    Where everything stands is its frame number, so the sink falls ever farther behind.

    sink, past: latent frames; published are 3 and 6. mask: what the frames that are committed once more see of each
    other, "none" everything (as released), or "block_causal" what they would while streaming, as if they had just been
    given. old_sink: "kept", or "new": then the first of these frames become the sink. positions: "absolute", or
    "relative" to the window (its released variant after 2511.20649). ValueError for others.
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
    and .5. ValueError outside 0 to 1.
    """
    policy = Policy(reads=EndToEnd(), average=average)
    return replace(self_forcing_sink(), name="reward_forcing", policy=policy)


def memflow(past: int = 6, bank: int = 3, every: int = 3) -> Recipe:
    """MemFlow (arXiv 2512.14699): LongLive, and a bank of single frames that the prompt chooses to remember.

    As released: by the prompt's keys (the paper: its queries), and all of sink and bank are seen: sparse memory
    activation is off there, and not built here.

    past, bank: latent frames; published are 6 and 3. every: of how many blocks one's first frame is offered to the
    bank. ValueError for a bank or blocks of less than 1.
    """
    made = longlive(past=past)
    policy = replace(made.policy, bank=BankShape(frames=bank, every=every))
    return replace(made, name="memflow", policy=policy)


def infinity_rope(past: int = 2, keep: int = 2, jump: int = 45) -> Recipe:
    """Infinity-RoPE (arXiv 2511.20649), training-free: positions begin with the window, and a cut jumps along them.

    A change of prompt flushes the window: the first frame stays, and the latest `keep`. A cut does so too, and its
    first block stands at position `jump`, the next one right behind the window again; pictures are counted on.

    past: latent frames beside a sink of 1; published are 2, of which a flush forgets nothing. keep: the code has 2, the
    paper says 1. jump: published is 45. ValueError for what cannot be.
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
    which comes to outweigh what is near), "decay", or "none". frames: the cap or the half life in latent frames; a cap
    is by default as many as were far in training. ValueError for what cannot be.
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

CPU = torch.device("cpu")
BFLOAT16_GAIN = 1.2  # how many times faster it must be to be chosen
TOY_WEIGHTS = "toy/weights"
NETWORK_FILE = "student.safetensors"
HYBRID_FILE = "student_hybrid.safetensors"
TEACHER_FILE = "teacher.safetensors"
CONVERTED_FILE = "converted.safetensors"
CODEC_FILE = "codec_decoder.safetensors"
ENCODER_FILE = "codec_encoder.safetensors"
TEACHER_STEPS = 32  # of a teacher's sampler
WAN_BASE, WAN_RATE, WAN_SHIFT = "wan2.1-1.3b", 16, 5.0
ENCODED_AT_ONCE = 4  # latent frames of given pictures, which bounds memory
DECODERS: dict[str, Callable[[], Codec]] = {
    "wan": lambda: WanVAE(WanVAEConfig()),
    "light": lambda: TAEHV(TAEHVConfig()),
    "none": lambda: NoDecoder(latent_channels=16, spatial_factor=8, temporal_factor=4),
}
"""What makes pictures of Wan's latents, for engines of random weights."""

MODELS: dict[tuple[str, str], str] = {
    ("toy", "self_forcing"): NETWORK_FILE,
    ("toy", "self_forcing_sink"): NETWORK_FILE,
    ("toy", "hybrid_forcing"): HYBRID_FILE,
    **{("toy", name): NETWORK_FILE for name in MEMORY_RULES},
}
"""(model, recipe) -> the network's weights: the student, distilled under the first two recipes, one of its own, or a
delta on the student."""


def device_named(name: str | torch.device | None) -> torch.device:
    """The device of that name, by default the GPU if there is one. ValueError if there is no such device here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot compute on device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def usual_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def recipe_named(name: str) -> Recipe:
    """The recipe of that name, which options of its function may follow: "hybrid_forcing:share=0.1,far=none".

    The recipe bears the whole name. ValueError for unknown names, options and values, with those there are.
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
        recipe = RECIPES[function](**{key: _as(known[key], key, value) for key, value in options.items()})
    except ValueError as error:
        raise ValueError(f"recipe {name!r} does not work: {error}") from None
    return replace(recipe, name=name)


def _recipe(name: str, levels: int | None) -> Recipe:
    """The recipe of that name, with so many levels if a number is given."""
    recipe = recipe_named(name)
    return recipe if levels is None else recipe.with_levels(levels)


def _as(default: Any, key: str, value: str) -> Any:
    """An option's value, of the kind that its default is."""
    try:
        return type(default)(value)
    except ValueError:
        kind = "whole number" if isinstance(default, int) else "number"
        raise ValueError(f"{key} is a {kind}, such as {default}, not {value!r}") from None


def load(
    model: str | Path,
    *,
    recipe: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    levels: int | None = None,
    codec: str | Path | None = None,
    compile: bool = False,
) -> Engine:
    """Put text encoder, network and codec together under a recipe, with options if any follow its name.

    model: a name (`toy`), a folder that holds student.safetensors and codec_decoder.safetensors, or a network's
    weight file (its codec is looked for beside it, then in the package); whatever else there is goes to `load_wan`,
    with its defaults. device: the GPU if there is one. dtype: by default bfloat16 on a GPU; on a CPU whichever of
    float32 and bfloat16 a short trial finds faster. levels: the number of denoising steps, 1 to 1000; by default the
    recipe's own. codec: for `load_wan` alone. Streams that go on from pictures need codec_encoder.safetensors beside
    the codec; it is loaded when first needed. compile: whether the network's passes go by fused kernels and recorded
    graphs where there is a GPU with Triton; elsewhere nothing changes. Such a network is for streams alone.
    Raises ValueError, with what to do, for unknown names, for files that are not whole or do not fit, for a recipe that
    the network cannot be streamed under, and for one whose far state is not one that the weights learned to read, where
    their file says under which they were trained.
    """
    if _is_wan(model):
        return load_wan(model, recipe=recipe, device=device, dtype=dtype, levels=levels, codec=codec, compile=compile)
    if codec is not None:
        raise ValueError(f"model {model} has a codec of its own: others make pictures for networks of Wan's shape")
    chosen = _recipe(recipe, levels)
    network_file, codec_file = _weight_files(model, recipe)
    device = device_named(device)
    text, network, description = load_network(network_file, device)
    if description["role"] != "student":
        raise ValueError(f"{network_file} holds a {description['role']}, which cannot stream: name a student's weights")
    _require_taught(chosen, description.get("recipes", ()), network_file)
    chosen.memory(network)  # refuses what the network cannot read
    own_codec = load_codec([codec_file], device)
    engine = Engine(
        model_name=str(model),
        recipe=chosen,
        text=WordText(text, captions.encode),
        network=network,
        codec=own_codec,
        latent_size=latent_size(own_codec),
        frame_rate=RATE,
        shift=description["shift"],
        encode=_encoding(codec_file, device),
    )
    engine.to(dtype or (_faster_dtype(engine) if device.type == "cpu" else torch.bfloat16))
    return fused(engine) if compile else engine


def fused(engine: Engine) -> Engine:
    """The same engine, on a GPU its network's passes by fused kernels and, once a memory is full, by recorded graphs.

    Wan's decoder goes by fused kernels too.

    It is for streams alone, and stays in its precision. Without a GPU, or without Triton there, it is as it was, as is
    one that goes so already.
    ValueError for a GPU that is not the process's current one, on which kernels run.
    """
    if engine.fused or engine.device.type != "cuda" or find_spec("triton") is None:
        return engine
    if engine.device.index != torch.cuda.current_device():
        raise ValueError(
            f"fused kernels run on the current GPU, which is not {engine.device}: choose it by CUDA_VISIBLE_DEVICES, "
            "or leave out --compile"
        )
    from longtake.attention.fused_triton import rotate
    from longtake.models import wan_triton

    fused_codec(engine.codec)
    network = engine.network
    wan_triton.fuse_layers(network)
    view_of = partial(network.memory_view, rotate=rotate)
    setattr(network, "memory_view", FixedViews(view_of, wan_triton.add_far))  # noqa: B010  # as in `parallel`
    parallel.record_calls([network], ("forward", "keys_to_commit"), chosen=_reads_fixed_view, lends=True)
    far = engine.recipe.far and wan_triton.FusedFar.of(engine.recipe.far)
    return replace(engine, recipe=replace(engine.recipe, far=far), fused=True)


def fused_codec(codec: Codec) -> bool:
    """Let Wan's decoder on a GPU go by fused kernels from now on, where Triton is; whether it does."""
    if not isinstance(codec, WanVAE) or codec.latent_mean.device.type != "cuda" or find_spec("triton") is None:
        return False
    from longtake.models.wan_vae_triton import fuse_decoder

    fuse_decoder(codec)
    return True


def _reads_fixed_view(*arguments: Any) -> bool:
    """Of a network's pass. While a memory fills, every block is of another kind, and none comes again."""
    return any(isinstance(one, FixedView) for one in arguments)


def load_network(path: Path, device: torch.device) -> tuple[WordEncoder, WanTransformer, dict[str, Any]]:
    """A network with its text encoder from one file, frozen and in fp32, and the file's description."""
    tensors, description = load_tensors(path)
    if missing := {"text", "network", "shift", "role"} - description.keys():
        raise ValueError(f"{path} does not hold a network: it says nothing of {', '.join(sorted(missing))}")
    text = WordEncoder(WordEncoderConfig(**description["text"]))
    network = WanTransformer(WanConfig.of(description["network"]))
    load_into(nn.ModuleDict({"text": text, "network": network}), tensors, path)
    for module in (text, network):
        module.requires_grad_(False).eval().to(device)
    return text, network, description


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `load_weights`, but that a delta's tensors are those of base and delta together.

    Its base is the student or the teacher beside it, or else the embedded ones. ValueError if none is.
    """
    tensors, description = load_weights(path)
    return on_base(path, tensors, description, _bases(path)) if is_delta(description) else tensors, description


def _bases(delta: Path) -> Iterator[Path]:
    for name in (NETWORK_FILE, TEACHER_FILE):
        beside, embedded = delta.with_name(name), _in_package(name)
        if beside.is_file() and beside not in (delta, embedded):
            yield beside
        if embedded.is_file():
            yield embedded


def load_wan_network(
    model: str | Path,
    *,
    recipe: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> WanTransformer:
    """A Wan network for a recipe, frozen, straight to a device and a type: the network's part of an engine.

    model: a name of `longtake models` that was pulled, or a path as `models.checkpoints.load_wan` takes it.
    ValueError where that does not load, is a many-step teacher, or was trained for blocks of another size or without
    the recipe's far state.
    """
    chosen = recipe_named(recipe)
    known = registry().get(str(model))
    if known and known.recipe is None:
        raise ValueError(f"{model} is no student of any method, and cannot stream: name one that is")
    if known:
        require_block(known, chosen)
    load_named = checkpoints.load_wan if known is None else checkpoints.load_published
    network = load_named(str(model), device=device_named(device), dtype=dtype)
    if chosen.far and not network.config.reads_far:
        raise ValueError(f"{model} was not trained to read the far state of {chosen.name}")
    return network


def load_wan(
    model: str | Path,
    *,
    recipe: str,
    base: str | Path | None = None,
    size: tuple[int, int] | None = None,
    shift: float | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    levels: int | None = None,
    codec: str | Path | None = None,
    compile: bool = False,
) -> Engine:
    """Put a network of Wan's shape together with Wan's text encoder and VAE, under a recipe.

    model: a name of `longtake models` that was pulled, or a path as `models.checkpoints.load_wan` takes it. base: where
    text encoder, tokenizer and VAE are, a pulled name or the folder of a whole Wan2.1 model, in its own layout or in
    that of diffusers; by default the model's own folder if it is one, else wan2.1-1.3b as pulled: all sizes share them.
    size: height and width of pictures, by default those of the registry (480 x 832). shift: of the levels; by default
    the registry's, and for a path 5, that of Self Forcing and most students. dtype: by default bfloat16 on a GPU and
    float32 on a CPU. levels: as for `load`. codec: what makes pictures in place of the base's VAE, as
    `models.checkpoints.load_codec` takes it: a light decoder, for previews. Given pictures are encoded by Wan's VAE all
    the same, which is then loaded when first needed. compile: as for `load`.
    ValueError, with what to do, for what is missing, does not fit or cannot be streamed.
    """
    if shift is not None and not shift > 0:
        raise ValueError(f"the shift of levels is above 0, got {shift:g}")
    chosen = _recipe(recipe, levels)
    known = registry().get(str(model), registry()[WAN_BASE])
    place = device_named(device)
    dtype = dtype or usual_dtype(place)
    folder = _wan_base(model, base)
    files = UMT5Files.in_folder(folder)
    decoder = checkpoints.load_codec(codec or folder, device=place, dtype=dtype)
    network = load_wan_network(model, recipe=recipe, device=place, dtype=dtype)
    chosen.memory(network)  # refuses what the network cannot read
    sides = latent_sides(size or (known.height, known.width), decoder.spatial_factor, network.config.patch)
    engine = Engine(
        model_name=str(model),
        recipe=chosen,
        text=UMT5Text(files, device=place),
        network=network,
        codec=decoder,
        latent_size=(decoder.latent_channels, *sides),
        frame_rate=known.frame_rate or WAN_RATE,
        shift=shift or (known.shift if isinstance(known.shift, int | float) else WAN_SHIFT),
        encode=_wan_encoding(network, decoder, folder),
        codec_name=None if codec is None else str(codec),
    )
    return fused(engine) if compile else engine


def load_random(
    model: str,
    *,
    recipe: str,
    size: tuple[int, int] | None = None,
    decoder: str = "wan",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    levels: int | None = None,
    compile: bool = False,
) -> Engine:
    """An engine of a published model's size whose weights are random numbers: as fast and as large as the real one.

    model: a name of `longtake models` that is a network; nothing needs to be pulled. The network can read whatever the
    recipe remembers. size: height and width of pictures, by default those of the registry. decoder: of `DECODERS`:
    Wan's VAE, the light one in TAEHV's layout, or none, whose pictures have no pixels. Random numbers stand in for
    text. device, dtype, levels, compile: as for `load_wan`. ValueError for unknown names, and for what cannot be.
    """
    chosen = _recipe(recipe, levels)
    config, height, width = published_sizes(model, size)
    place = device_named(device)
    dtype = dtype or usual_dtype(place)
    codec = drawn(decoder_named(decoder), place, dtype)
    network = drawn(lambda: WanTransformer(reading(config, chosen)), place, dtype)
    chosen.memory(network)  # refuses what the network cannot read
    engine = Engine(
        model_name=model,
        recipe=chosen,
        text=RandomText(LENGTH, config.text_dim, place),
        network=network,
        codec=codec,
        latent_size=(codec.latent_channels, height, width),
        frame_rate=WAN_RATE,
        shift=WAN_SHIFT,
    )
    return fused(engine) if compile else engine


def published_sizes(model: str, size: tuple[int, int] | None = None) -> tuple[WanConfig, int, int]:
    """A published network's sizes, and height and width of the latents of pictures of such a size, by default its own.

    ValueError for unknown names, and for pictures that cannot be.
    """
    known = {name: one for name, one in registry().items() if one.network in checkpoints.NETWORKS}
    if model not in known:
        raise ValueError(f"no published network {model!r}: {nearest(model, known)}")
    config = checkpoints.NETWORKS[str(known[model].network)]
    factor = 2 ** len(WanVAEConfig().temporal_downsample)
    return config, *latent_sides(size or (known[model].height, known[model].width), factor, config.patch)


def decoder_named(name: str) -> Callable[[], Codec]:
    """What makes a decoder, of `DECODERS`. ValueError for others."""
    if name not in DECODERS:
        raise ValueError(f"no decoder {name!r}: there are {', '.join(DECODERS)}")
    return DECODERS[name]


def reading(config: WanConfig, recipe: Recipe) -> WanConfig:
    """The same network, able to read all that a recipe remembers.

    Where that takes converted layers and it has none, the first half of them are, as published (ReHyAt: 15 of 30).
    """
    conversion = config.conversion
    if recipe.joint and conversion is None:
        conversion = Conversion(layers=tuple(range(config.layers // 2)), current=recipe.block)
    return replace(config, reads_far=config.reads_far or recipe.far is not None, conversion=conversion)


def latent_sides(size: tuple[int | None, int | None], factor: int, patch: int) -> tuple[int, int]:
    """Height and width of the latents of pictures of that height and width. ValueError if there are none."""
    height, width = size
    step = factor * patch
    if not height or not width or height % step or width % step:
        raise ValueError(f"pictures must be multiples of {step} high and wide, not {height} x {width}")
    return height // factor, width // factor


def require_block(known: Published, chosen: Recipe) -> None:
    """ValueError where a published checkpoint is known to make blocks of another size than a recipe's."""
    if known.block not in (None, UNKNOWN, chosen.block):
        raise ValueError(
            f"{known.name} makes blocks of {known.block} latent frames, and {chosen.name} of {chosen.block}"
        )


def _is_wan(model: str | Path) -> bool:
    """Whether a name or a path is that of a network which comes without text encoder and codec of ours."""
    path = Path(model)
    if str(model) in registry() or str(model) in _model_names():  # names come first
        return str(model) in registry()
    if path.is_dir():
        ours = (NETWORK_FILE, TEACHER_FILE, CONVERTED_FILE, CODEC_FILE, STATE_FILE)
        theirs = ("transformer", "*.safetensors", "*.pt", "*.pth")
        return not any((path / file).is_file() for file in ours) and _holds(path, theirs)
    if path.suffix == ".safetensors":
        return path.is_file() and described(path).keys() <= {"network"}  # of our networks, one that was converted
    return path.is_file() and path.suffix in (".pt", ".pth", ".json")


def _holds(folder: Path, patterns: Sequence[str]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _wan_base(model: str | Path, base: str | Path | None) -> Path:
    """The folder that holds text encoder, tokenizer and VAE. ValueError if the default one was never pulled."""
    own = Path(model)
    if base is None and own.is_dir() and _holds(own, ("text_encoder", "models_t5_umt5*")):
        return own
    return located(base or WAN_BASE)


def _require_taught(chosen: Recipe, taught: Sequence[str], path: Path) -> None:
    """ValueError where the weights learned to read other far states; how much of a window is seen may change."""
    if chosen.far and taught and chosen.far not in [recipe_named(name).far for name in taught]:
        raise ValueError(
            f"{path} was trained under {' and '.join(taught)}, and cannot read the far state of {chosen.name}: "
            "name one of those recipes, or far=none"
        )


def save_network(
    path: Path,
    text: WordEncoder,
    network: WanTransformer,
    *,
    role: str,
    shift: float,
    int8: bool,
    recipes: Sequence[str] = (),
) -> None:
    """Write a network with its text encoder to one file that `load_network` reads.

    role: teacher or student. shift: of the levels it was trained with. recipes: the names, options included, of those
    that a student was trained under last.
    """
    parts = {"text": text.state_dict(), "network": network.state_dict()}
    tensors = {f"{prefix}.{name}": tensor for prefix, part in parts.items() for name, tensor in part.items()}
    description = {"role": role, "shift": shift, "text": asdict(text.config), "network": asdict(network.config)}
    if recipes:
        description["recipes"] = list(recipes)
    save_weights(path, tensors, description, int8=int8)


def load_codec(paths: Sequence[Path], device: torch.device, *, span: int | None = None) -> LightCodec:
    """A light codec, frozen and in fp32, from its decoder's file alone or from both parts' (decoder first).

    span: latent frames that go through it at once; None takes whole clips.
    """
    tensors, description = load_weights(paths[0])
    if "codec" not in description:
        raise ValueError(f"{paths[0]} does not hold a codec")
    for path in paths[1:]:
        tensors |= load_weights(path)[0]
    codec = LightCodec(LightCodecConfig(**description["codec"]), encoder=len(paths) > 1, span=span)
    load_into(codec, tensors, paths[0])
    return codec.requires_grad_(False).eval().to(device)


def save_codec(folder: Path, codec: LightCodec, *, int8: bool) -> None:
    """Write a light codec as two files, so that a package that only decodes can leave the encoder out."""
    tensors = codec.state_dict()
    encoder = {name: x for name, x in tensors.items() if name.startswith("encoder.")}
    decoder = {name: x for name, x in tensors.items() if name not in encoder}
    description = {"codec": asdict(codec.config)}
    save_weights(folder / CODEC_FILE, decoder, description, int8=int8)
    save_weights(folder / ENCODER_FILE, encoder, description, int8=int8)


def toy_codec(device: torch.device = CPU, *, model: str | Path = "toy") -> LightCodec:
    """A model's whole codec, encoder included. model: a name, or a folder with both parts; ValueError for others."""
    return load_codec([_file_of(model, CODEC_FILE), _file_of(model, ENCODER_FILE)], device)


def toy_teacher(
    device: torch.device = CPU,
    *,
    model: str | Path = "toy",
    dtype: torch.dtype | None = None,
    steps: int = TEACHER_STEPS,
    guidance: float = 3.0,
    file: str = TEACHER_FILE,
) -> Callable[[Sequence[str], Sequence[int]], Tensor]:
    """A model's teacher as a function of B prompts and B seeds: whole clips, uint8 [B, F, H, W, 3] on its device.

    model: a name, or a folder that holds teacher.safetensors and codec_decoder.safetensors; ValueError for others.
    file: the teacher's, or that of another network that makes whole clips: `CONVERTED_FILE` (ReHyAt's published way).
    dtype: by default bfloat16 on a GPU, float32 on a CPU.
    """
    text, network, description = load_network(_file_of(model, file), device)
    codec = load_codec([_file_of(model, CODEC_FILE)], device)
    dtype = dtype or usual_dtype(device)
    network.to(dtype)
    codec.to(dtype)
    own = network.patch_embedding.weight.device
    if own.type == "cuda" and own.index == torch.cuda.current_device() and find_spec("triton"):
        from longtake.models.wan_triton import fuse_clips

        fuse_clips(network)
    levels = even_levels(steps, description["shift"])
    words = WordText(text, captions.encode)

    @torch.no_grad()
    def sample(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        shape = (network.config.extent, *latent_size(codec))
        noise = SeededNoise(seeds, shape, device, torch.float32)(0, 0)
        said = network.prompt_keys(words.encode(prompts)[:, None].to(dtype))
        nothing = network.prompt_keys(text(text.no_prompt(len(prompts)))[:, None].to(dtype))
        latents = sample_clip(network, noise, said, nothing, levels, guidance).to(dtype)
        few = latents.split(8)  # pictures need far more memory than latents
        return torch.cat([to_uint8(codec.decode(latents_BFCHW)[0]) for latents_BFCHW in few])

    return sample


def _in_package(name: str) -> Path:
    return Path(str(resources.files("longtake") / TOY_WEIGHTS / name))


def packaged(name: str) -> Path:
    """The path of one of the embedded model's weight files. ValueError if this installation has none of that name."""
    path = _in_package(name)
    if not path.is_file():
        raise ValueError(f"{name} is not part of this installation: use a checkout of the repository")
    return path


def _encoding(codec_file: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From pictures in -1..1 to the latents of a decoder's file, by the encoder beside it, in fp32.

    Loaded at the first call, so that streams without given pictures neither wait for it nor need it.
    """
    encoder_file = codec_file.with_name(ENCODER_FILE)

    @cache
    def codec() -> LightCodec:
        if not encoder_file.is_file():
            raise ValueError(f"pictures cannot be encoded without {encoder_file}, which a checkout of longtake has")
        return load_codec([codec_file, encoder_file], device, span=ENCODED_AT_ONCE)

    return lambda frames_BFCHW: codec().encode(frames_BFCHW)[0]


def _wan_encoding(network: WanTransformer, decoder: Codec, folder: Path) -> Callable[[Tensor], Tensor]:
    """From pictures in -1..1 to latents, by Wan's VAE, in whichever precision the network computes by now.

    If the decoder is none, the VAE in the folder is loaded at the first call.
    """

    @cache
    def vae() -> Codec:
        place = network.patch_embedding.weight.device
        return decoder if isinstance(decoder, WanVAE) else checkpoints.load_wan_vae(folder, device=place)

    def encode(frames_BFCHW: Tensor) -> Tensor:
        dtype = network.patch_embedding.weight.dtype
        return vae().to(dtype).encode(frames_BFCHW.to(dtype))[0]

    return encode


def _file_of(model: str | Path, name: str) -> Path:
    """One of the files of a model, which is a name or a folder; only a name's are looked for in the package."""
    if str(model) in _model_names():
        return packaged(name)
    path = Path(model) / name
    if not path.is_file():
        raise ValueError(f"model {str(model)!r} is neither a known name nor a folder that holds {name}")
    return path


def student_file(model: str | Path) -> Path:
    """The weights of a model that is a name, a folder that holds student.safetensors, or a file; else ValueError."""
    path = Path(model)
    return path if path.is_file() and str(model) not in _model_names() else _file_of(model, NETWORK_FILE)


def _model_names() -> set[str]:
    return {name for name, _ in MODELS}


def _weight_files(model: str | Path, recipe: str) -> tuple[Path, Path]:
    name, path = str(model), Path(model)
    function = recipe.partition(":")[0]
    if (name, function) in MODELS:  # names come first: ./toy is a folder of that name
        return packaged(MODELS[name, function]), packaged(CODEC_FILE)
    if name in _model_names():
        there = ", ".join(other for model, other in MODELS if model == name)
        raise ValueError(f"model {name} has no weights for recipe {function}: there are some for {there}")
    if path.is_dir():
        return path / NETWORK_FILE, path / CODEC_FILE
    if path.is_file():
        beside = path.with_name(CODEC_FILE)
        return path, beside if beside.is_file() else packaged(CODEC_FILE)
    raise ValueError(f"no model, folder or file {name!r}: {nearest(name, _model_names() | registry().keys())}")


@torch.no_grad()
def _faster_dtype(engine: Engine) -> torch.dtype:
    """bfloat16 if it passes one block through the network in clearly less time on this machine, else float32.

    Where the two are close float32 wins, so that one machine answers the same each time.
    """
    latents = torch.zeros(1, engine.recipe.block, *engine.latent_size)
    level_BF = torch.ones(latents.shape[:2])
    passes: dict[torch.dtype, Callable[[], Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        network = deepcopy(engine.network).to(dtype)  # a copy: weights that were bfloat16 once stay rounded
        text = torch.zeros(1, 1, 1, network.config.text_dim, dtype=dtype)
        passes[dtype] = partial(network, latents, level_BF, network.prompt_keys(text), network.clip_view(latents))
    seconds = dict.fromkeys(passes, math.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of one thread its own time is known, whatever else the machine does meanwhile
    try:
        for _ in range(4):
            for dtype, run in passes.items():
                started = time.thread_time()
                run()
                seconds[dtype] = min(seconds[dtype], time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    clearly = seconds[torch.float32] > BFLOAT16_GAIN * seconds[torch.bfloat16]
    return torch.bfloat16 if clearly else torch.float32


def latent_size(codec: LightCodec) -> tuple[int, int, int]:
    """Channels, height and width of the toy world's latent frames."""
    return codec.latent_channels, HEIGHT // codec.spatial_factor, WIDTH // codec.spatial_factor
