"""How much memory a stream takes, without weights and without a GPU: its own code runs on torch's meta device.

There tensors have shapes and types but no numbers. Every storage that the code makes is counted for as long as it is
alive, so parameters, keys, values and far states are exact, and the working memory of a pass is what its tensors come
to, in the order in which our code makes them and lets them go. The largest of these are told by shape.

Attention counts as its fused kernels have it: the answer and a log-sum-exp, no scores; a block-sparse window counts as
a dense one. On top come, uncounted: the device's context, scratch memory of convolutions and matrix products, what the
allocator loses between blocks of memory, rotations kept for positions that come later, and the numbers that the text
encoder works with. On an H200 peaks were .94 to 1.04 of those predicted (docs/checkpoints.md). On a CPU, tiny streams
that really run have the same ones, within 2 %.
"""

import itertools
import re
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtake.attention.dense import dense
from longtake.generation.blockwise import redirect
from longtake.generation.recipe import Recipe
from longtake.generation.stream import Engine, StreamBatch, to_uint8
from longtake.generation.take import bytes_of
from longtake.memory.fixed_view import FixedView, FixedViews
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.models.checkpoints import NETWORKS
from longtake.models.codec import Codec, CodecState
from longtake.models.hub import nearest, registry
from longtake.models.known_levels import KnownLevels
from longtake.models.light_codec import LightCodec, LightCodecConfig
from longtake.models.standins import Fused, RandomText, network_without_numbers, without_numbers
from longtake.models.text import WordEncoder, WordEncoderConfig, WordText
from longtake.models.umt5 import LENGTH
from longtake.models.wan import PromptKeys, WanConfig, WanTransformer
from longtake.models.wan_vae import WanVAE, WanVAEConfig
from longtake.models.weights import described
from longtake.parallel import kind_of, mapped_tensors
from longtake.recipes import MODELS, RECIPES, recipe_named
from longtake.recipes.methods import AT_FULL_SIZE, recipe_for
from longtake.recipes.wan_engines import WAN_SHIFT, decoder_named, reading, require_block
from longtake.recipes.weight_files import CODEC_FILE, NETWORK_FILE, packaged
from longtake.toy.scenes import HEIGHT, WIDTH

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
META = torch.device("meta")
MOST_SIDE = 4096  # pixels
GIB = 2**30
_PROMPT = "keys and values of the prompt"
UMT5_XXL = {"words": 256384, "dim": 4096, "inner": 4096, "ffn": 10240, "layers": 24, "heads": 64, "buckets": 32}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model's parts. size: width and height of its pictures. text_rows: of an
    embedding; text_bytes: of the text encoder, which is on the device only to encode where it `text_leaves`."""

    network: WanConfig
    codec: Callable[[], Codec]
    size: tuple[int, int]
    text_rows: int
    text_bytes: int
    text_leaves: bool


@dataclass(frozen=True, kw_only=True)
class Working:
    """Bytes that a stream keeps from block to block, by part, and all that is alive, what is kept included, at the peak
    of each moment. largest: of the tensors alive at a moment's peak, (shape and type, how many, bytes)."""

    kept: Mapping[str, int]
    peaks: Mapping[str, int]
    largest: Mapping[str, Sequence[tuple[str, int, int]]]


class Alive(TorchDispatchMode):
    """Counts bytes of the storages on a device that are made or first seen while it is on, until they are let go.

    wait: called before each thing that is done.
    """

    def __init__(self, device: torch.device, known: Sequence[Tensor], wait: Callable[[], object] = lambda: None):
        super().__init__()
        self.device, self.now, self._wait = device, 0, wait
        self.peaks: dict[str, int] = {}
        self.largest: dict[str, list[tuple[str, int, int]]] = {}
        self._held: dict[int, tuple[str, int]] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._peak = 0
        self._at_peak: dict[int, tuple[str, int]] = {}

    @contextmanager
    def moment(self, name: str) -> Iterator[None]:
        """Note the peak of what runs inside, if it is higher than any before of that name."""
        self._mark()
        yield
        if self._peak >= self.peaks.get(name, 0):
            self.peaks[name], self.largest[name] = self._peak, _largest(self._at_peak)

    def working(self, call: Callable[[], Any]) -> tuple[Any, int]:
        """What a call gives, and the bytes that it needed at its peak beyond those that are alive after it."""
        before = self._peak, self._at_peak
        self._mark()
        made, most = call(), self._peak
        if before[0] > most:
            self._peak, self._at_peak = before
        return made, most - self.now

    def _mark(self) -> None:
        self._peak, self._at_peak = self.now, dict(self._held)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._wait()
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, made)):
            if isinstance(tensor, Tensor) and tensor.device == self.device:
                self._see(tensor)
        if self.now > self._peak:
            self._mark()
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known and key not in self._held:
            self._held[key] = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}", storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._let_go, key)

    def _let_go(self, key: int) -> None:
        self.now -= self._held.pop(key)[1]


class Records:
    """Stand in for `parallel.Recorded` where there are no numbers: keep what records keep.

    A call that reads a fixed view runs once, on copies; later ones of its kind find the same answer. Others just run.
    All work in one memory, which stays theirs: as much as the call that takes most, between calls too.
    """

    def __init__(self, alive: Alive) -> None:
        self._alive = alive
        self._kept: dict[Hashable, tuple[Any, Any]] = {}
        self._common = torch.empty(0, dtype=torch.uint8, device=alive.device)

    @property
    def nbytes(self) -> int:
        """Of the copies, the answers and the common memory."""
        kept = [self._common]
        mapped_tensors(list(self._kept.values()), kept.append)
        return sum(x.nbytes for x in kept)

    def around(self, method: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as it is when its calls are recorded."""

        def recorded(*arguments: Any) -> Any:
            if not any(isinstance(one, FixedView) for one in arguments):
                return call(*arguments)
            kind = method, kind_of(arguments)
            if kind not in self._kept:
                own = mapped_tensors(arguments, Tensor.clone)
                answer, working = self._alive.working(lambda: call(*own))
                self._kept[kind] = own, answer
                if working > self._common.nbytes:
                    self._common = self._common.new_empty(working)
            return self._kept[kind][1]

        return recorded


def plan(
    model: str, *, size: tuple[int, int] | None = None, recipe: str | None = None, dtype: str = "bfloat16",
    decoder: str | None = None, compile: bool = False, say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Bytes of a stream by part, its moments and its peak, ready for JSON; nothing is loaded.

    model: toy, or a name of `longtake models`. size: width and height of pictures. recipe: by default that of
    `recipe_for`. decoder: of `wan_engines.DECODERS`, by default the model's own.
    compile: as for `recipes.load`, on a GPU. say: is told what is waited for. `moments` are what is there at the same
    time. ValueError for unknown names, with the nearest, and for sizes, recipes and decoders that cannot be.
    """
    parts = _parts_of(model, recipe)
    name = recipe or recipe_for(model)
    chosen = recipe_named(name, usual=_usual(model))
    if model in registry():
        require_block(registry()[model], chosen)
    if decoder is not None:
        if model == "toy":
            raise ValueError("decoders are of Wan's latents: the embedded model has its own")
        parts = replace(parts, codec=decoder_named(decoder))
    network, codec = _made(parts, chosen, dtype)
    width, height = size or parts.size
    step = codec.spatial_factor * network.config.patch
    if not all(0 < side <= MOST_SIDE and side % step == 0 for side in (width, height)):
        raise ValueError(f"pictures are multiples of {step} high and wide, {MOST_SIDE} at most, not {width}x{height}")
    say("a stream is run without numbers: of a large model that takes up to a minute")
    with Fused():
        how = replace(chosen, near=dense)
        working = streamed(network, codec, parts.text_rows, how, (width, height), compile=compile)
    weights = {"network": nbytes(network), "codec": nbytes(codec)}
    text = {"text encoder": parts.text_bytes}
    always = weights if parts.text_leaves else text | weights
    kept, base = dict(working.kept), sum(working.kept.values())
    moments = {
        "first prompt": text | weights,
        **{moment: always | kept | {"working memory": peak - base} for moment, peak in working.peaks.items()},
    }
    moments["new prompt read"] |= text
    totals = {moment: sum(sizes.values()) for moment, sizes in moments.items()}
    return {
        "model": model, "recipe": name, "size": [width, height], "dtype": dtype, "decoder": decoder, "compile": compile,
        "moments": moments, "totals": totals,
        "peak": max(totals.values()), "peak_at": max(totals, key=lambda moment: totals[moment]),
        "largest": {key: [list(one) for one in rows] for key, rows in working.largest.items()},
    }  # fmt: skip


def bytes_of_stream(engine: Engine, wait: Callable[[], object] = lambda: None) -> tuple[int, int, int]:
    """Of a stream of an engine: bytes that it keeps from block to block at most, and what it takes on top while a block
    is made, and while a prompt is read or taken.

    Predicted, as by `plan`, for whatever weights there are; with a text encoder that comes to the device to encode.
    wait: called before each of many thousand steps, so that work of other threads can go first.
    """
    words = engine.text.encoder.config.length if isinstance(engine.text, WordText) else None
    network, codec = network_without_numbers(engine.network), without_numbers(engine.codec)
    recipe = replace(engine.recipe, near=dense, far=engine.recipe.far and engine.recipe.far.plain())
    with Fused():
        working = streamed(network, codec, words or LENGTH, recipe, (engine.width, engine.height), wait)
    kept, peaks = sum(working.kept.values()), working.peaks
    block = max(peaks["network pass"], peaks["decoding"])
    encoder = 0 if words else 2 * umt5_parameters()  # one that stays is there already
    prompt = max(peaks["new prompt read"] + encoder, peaks["new prompt taken"])
    of_others = (recipe.in_flight - 1) * working.kept[_PROMPT]  # words that go over: each block in flight has its own
    return kept + of_others, block - kept, prompt - kept


def take_sizes(model: str, recipe: str, *, dtype: str = "bfloat16") -> dict[str, int]:
    """Bytes of a take by part at the largest that it gets, around a change of prompt too; nothing is loaded.

    What is counted is the state itself, of a stream that runs on the meta device. A recipe that reads through converted
    layers is given a network with half of them converted, as published (ReHyAt: 15 of 30). ValueError as for `plan`.
    """
    parts, chosen = _parts_of(model, recipe), recipe_named(recipe, usual=_usual(model))
    network, codec = _made(parts, chosen, dtype)
    width, height = parts.size
    engine = Engine(
        model_name=model,
        recipe=replace(chosen if chosen.rolls else chosen.with_levels(1), near=dense),  # nothing of a level is kept
        text=RandomText(parts.text_rows, network.config.text_dim, META),
        network=network,
        codec=codec,
        latent_size=(codec.latent_channels, height // codec.spatial_factor, width // codec.spatial_factor),
        frame_rate=1,
        shift=WAN_SHIFT,
    )
    with Fused():
        streams = StreamBatch(engine, ["before"], [0])
        blocks = chosen.memory(network).blocks_until_full(chosen.block)
        sizes = [bytes_of(streams.state()) for _ in itertools.islice(streams, blocks)]
        streams.redirect(["after"])
        sizes += [bytes_of(streams.state()) for _ in itertools.islice(streams, 1)]  # blocks in flight have two prompts
    return max(sizes, key=lambda parts: sum(parts.values()))


def _made(parts: Parts, chosen: Recipe, dtype: str) -> tuple[WanTransformer, Codec]:
    """A network that can read what a recipe remembers, and a codec, without numbers."""
    with META:
        network, codec = WanTransformer(reading(parts.network, chosen)), parts.codec()
    for part in (network, codec):
        part.requires_grad_(False).to(META).to(TYPES[dtype])
    return network, codec


@torch.no_grad()
def streamed(
    network: WanTransformer, codec: Codec, text_rows: int, recipe: Recipe, size: tuple[int, int],
    wait: Callable[[], object] = lambda: None, *, compile: bool = False,
) -> Working:  # fmt: skip
    """Stream until the memory is full, then change the prompt, and count what is alive. wait: as for `Alive`.

    Beside recorded passes everything happens once more: the next view is made, or a whole next clip.

    A schedule that finishes block by block takes two steps instead of its own: they are all alike. compile: by views at
    fixed addresses and recorded passes, whose memory is theirs for good; the network is not to be used again.
    """
    weight = network.patch_embedding.weight
    text = weight.new_zeros(1, 1, text_rows, network.config.text_dim)
    latents = (1, recipe.block, codec.latent_channels, size[1] // codec.spatial_factor, size[0] // codec.spatial_factor)
    levels = recipe.levels(WAN_SHIFT)
    shape, prompt = recipe.memory(network), network.prompt_keys(text)
    alive = Alive(weight.device, [*network.parameters(), *codec.parameters(), *codec.buffers()], wait)
    memory = StreamMemory(shape, network.config.layers, ring=True)
    views, records = FixedViews(network.memory_view), Records(alive)
    if compile:
        replaced = {"memory_view": views, "embed_levels": KnownLevels(network)} | {
            method: records.around(method, getattr(network, method)) for method in ("velocity_at", "keys_at")
        }
        for name, call in replaced.items():
            setattr(network, name, call)
    blocks = recipe.schedule(
        network, memory, lambda block: prompt, lambda block, step: torch.zeros(latents, device=weight.device),
        levels if recipe.rolls else levels[:2],
    )  # fmt: skip
    state: CodecState | None = None
    most: dict[str, int] = {}
    with alive:
        for _ in range(_blocks(shape, recipe.block, compile)):
            with alive.moment("network pass"):
                block = next(blocks)
            with alive.moment("decoding"):
                given, state = state and state.given_up(), None
                pictures, state = codec.decode(block.to(weight.dtype), given)
                shown = to_uint8(pictures)
            del block, pictures, shown
            kept = _kept(memory, prompt, state) | {"fixed views": views.nbytes, "recorded passes": records.nbytes}
            most = kept if sum(kept.values()) > sum(most.values()) else most
        with alive.moment("new prompt read"):
            new = network.prompt_keys(text)
        with alive.moment("new prompt taken"):
            redirect(network, memory, new)
    return Working(kept=most, peaks=alive.peaks, largest=alive.largest)


def _blocks(shape: MemoryShape, block: int, compile: bool) -> int:
    """How many blocks a stream makes until nothing new happens."""
    recache = shape.policy.recache
    again = -(-shape.window.frames // block) if recache and recache.each_clip else 1
    return shape.blocks_until_full(block) + (again if compile else 0)


def _kept(memory: StreamMemory, prompt: PromptKeys, state: CodecState) -> dict[str, int]:
    far = sum(memory.far(layer).nbytes() for layer in range(memory.layers) if memory.shape.far_of(layer))
    return {
        "keys and values": memory.nbytes() - far,
        "far state": far,
        _PROMPT: sum(tensor.nbytes for layer in prompt.layers for tensor in layer),
        "codec state": state.nbytes,
    }


def nbytes(module: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def umt5_parameters() -> int:
    """Of the encoder of UMT5-XXL: embedding, and in each layer four projections, a gated feed-forward part, a bias of
    its own for each distance, and two norms."""
    sizes = UMT5_XXL
    layer = 4 * sizes["dim"] * sizes["inner"] + 3 * sizes["dim"] * sizes["ffn"] + sizes["buckets"] * sizes["heads"]
    return sizes["words"] * sizes["dim"] + sizes["layers"] * (layer + 2 * sizes["dim"]) + sizes["dim"]


def vram(text: str) -> int:
    """Bytes of a size such as 24G or 24000M, in GiB and MiB, as graphics cards are sold. ValueError for others."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM])(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ValueError(f"memory is a number with G or M, such as 24G, not {text!r}")
    return int(float(found[1]) * {"G": GIB, "M": 2**20}[found[2].upper()])


def pixels(text: str) -> tuple[int, int]:
    """Width and height of a size such as 832x480. ValueError for others."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise ValueError(f"a size is a width and a height, such as 832x480, not {text!r}")
    return int(found[1]), int(found[2])


def _usual(model: str) -> Mapping[str, Any]:
    """Options of recipes where a name does not say."""
    return {} if model == "toy" else AT_FULL_SIZE


def ways_to_fit(told: Mapping[str, Any], say: Callable[[str], None] = lambda line: None) -> dict[str, int]:
    """What could be changed, one thing at a time, in the words of the command line, and the peak that each gives.

    say: is told of each before it is tried.
    """
    width, height = told["size"]
    function, _, options = told["recipe"].partition(":")
    recipe = recipe_named(told["recipe"])
    changes: dict[str, dict[str, Any]] = {}
    if told["dtype"] == "float32":
        changes["--dtype bfloat16"] = {"dtype": "bfloat16"}
    for share in (0.75, 0.5):
        smaller = [max(16, int(side * share) // 16 * 16) for side in (width, height)]
        changes[f"--size {smaller[0]}x{smaller[1]}"] = {"size": tuple(smaller)}
    has_past = "past" in signature(RECIPES[function]).parameters
    if has_past and recipe.past > recipe.block and recipe.sink % recipe.block == 0:
        others = [option for option in options.split(",") if option and not option.startswith("past=")]
        smallest = f"{function}:{','.join([f'past={recipe.block}', *others])}"
        changes[f"--recipe {smallest}"] = {"recipe": smallest}
    if told["model"] in registry() and registry()[told["model"]].network == "wan2.1-14b":
        changes["--model wan2.1-1.3b"] = {"model": "wan2.1-1.3b"}
    if told["decoder"] is None and told["model"] in registry():
        changes["--decoder light"] = {"decoder": "light"}
    asked = {name: told[name] for name in ("model", "recipe", "dtype", "decoder", "compile")} | {
        "size": (width, height)
    }
    peaks = {}
    for words, change in changes.items():
        say(f"trying {words}")
        peaks[words] = plan(**(asked | change))["peak"]
    return peaks


def in_words(told: Mapping[str, Any]) -> str:
    """What `plan` gives, as text."""
    how = f"{told['dtype']}{', compiled' * told['compile']}"
    lines = [f"{told['model']}, {told['recipe']}, {told['size'][0]}x{told['size'][1]}, {how}; predicted:"]
    for moment, parts in told["moments"].items():
        lines.append(f"\n{moment:32}{gib(told['totals'][moment]):>12}")
        lines += [f"  {part:30}{gib(size):>12}" for part, size in parts.items() if size]
        lines += [f"    {what} x {count}: {gib(size)}" for what, count, size in told["largest"].get(moment, [])]
    lines.append(f"\npeak {gib(told['peak'])} ({told['peak_at']}); context, scratch memory and gaps come on top")
    if ways := told.get("ways_to_fit"):
        lines.append("instead, one thing at a time:")
        lines += [f"  {words:32}{gib(peak)}{', fits' * (peak <= told['vram'])}" for words, peak in ways.items()]
    return "\n".join(lines)


def takes_in_words(counted: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown of what `take_sizes` gives, in MB."""
    parts = list(dict.fromkeys(part for one in counted for part in one["bytes"]))
    heads = ["model", "recipe", "MB", *(part.replace("_", " ") for part in parts)]
    rows = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2)]
    for one in counted:
        sizes = [sum(one["bytes"].values()), *(one["bytes"].get(part, 0) for part in parts)]
        rows.append([one["model"], f"`{one['recipe']}`", *(f"{size / 1e6:,.1f}" if size else "" for size in sizes)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def gib(size: int) -> str:
    """As text, in GiB or MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def _largest(held: Mapping[int, tuple[str, int]]) -> list[tuple[str, int, int]]:
    """The three kinds of tensors that come to most."""
    counts = Counter(what for what, _ in held.values())
    sums: Counter[str] = Counter()
    for what, size in held.values():
        sums[what] += size
    return [(what, counts[what], size) for what, size in sums.most_common(3)]


def _parts_of(model: str, recipe: str | None) -> Parts:
    """Of a model under a recipe. ValueError for names of none, with the nearest."""
    if model == "toy":
        file = MODELS.get((model, (recipe or "").partition(":")[0]), NETWORK_FILE)
        network, codec = described(packaged(file)), described(packaged(CODEC_FILE))
        words = WordEncoderConfig(**network["text"])
        with META:
            text = WordEncoder(words)  # in float32 whatever the network is in
        return Parts(
            network=WanConfig.of(network["network"]), size=(WIDTH, HEIGHT),
            codec=lambda: LightCodec(LightCodecConfig(**codec["codec"]), encoder=False),
            text_bytes=nbytes(text), text_rows=words.length, text_leaves=False,
        )  # fmt: skip
    networks = {name: one for name, one in registry().items() if one.network in NETWORKS}
    if model not in networks:
        raise ValueError(f"no model {model!r}: {nearest(model, ['toy', *networks])}")
    one = networks[model]
    assert one.width is not None and one.height is not None, "every network of the registry says its size"
    return Parts(
        network=NETWORKS[str(one.network)], size=(one.width, one.height),
        codec=lambda: WanVAE(WanVAEConfig()),
        text_bytes=2 * umt5_parameters(),  # in bfloat16 whatever the network is in
        text_rows=LENGTH, text_leaves=True,
    )  # fmt: skip
