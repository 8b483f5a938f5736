"""A stream: prompt in, pictures out, block by block, redirected while it runs. A batch of streams moves in step.

Shapes: B streams of a batch, T pictures of a block, H W height and width.
"""

import operator
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, wraps
from threading import RLock
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from longtake import __version__
from longtake.generation.blend import Blend, Interpolation, require_blend
from longtake.generation.blockwise import commit, redirect
from longtake.generation.noise import DrawnAhead, SeededNoise
from longtake.generation.recipe import Recipe
from longtake.generation.rolling import InFlight, begins_next
from longtake.generation.together import Making, next_latents
from longtake.memory.stream_memory import StreamMemory
from longtake.models.codec import Codec, CodecState
from longtake.models.fp8 import is_eight_bit
from longtake.models.wan import PromptKeys, WanTransformer
from longtake.models.weights import fingerprint

FAR_AFTER_REDIRECT = 1.0  # as it is: no difference shows (docs/hybrid_forcing.md)
FAR_AFTER_CUT = 0.0  # a new shot owes nothing to the old one

MOST_TOLD = 10_000
"""Things that a stream was told, the latest, that its history keeps; without its beginning it cannot be retraced."""

UNTOLD = {"passes": "eager"}
"""Circumstances that files of earlier versions do not tell, as they were."""

PromptInFlight = Literal["own", "new"]
"""Which prompt blocks in flight go on under after a redirect: the one that they began with, or the new one."""


class TextEncoder(Protocol):
    """Whatever turns B prompts into embeddings [B, L, E]; ValueError for a prompt it cannot read.

    prepare: make ready for prompts that will be asked for, with the same ValueError.
    """

    def encode(self, prompts: list[str]) -> Tensor: ...

    def prepare(self, prompts: Sequence[str]) -> None: ...


class Timings(NamedTuple):
    """Seconds spent on one chunk: denoising, commit, codec, and all with everything between.

    Where a pass over several streams failed after it, a block is decoded alone: then the first two are next to nothing.
    Of a chunk that is waited for later than it was begun, all until it was there.
    """

    denoise_seconds: float
    commit_seconds: float
    codec_seconds: float
    total_seconds: float


@dataclass(frozen=True, eq=False)
class Chunk:
    """The pictures of one block: uint8 [T, H, W, 3], the reader's own, and where they stand in the stream.

    Of an engine that `works_ahead` a codec may still be at them: frames and timings are waited for at the first look.
    read: gives both, once they are there. pictures: how many they are.
    """

    read: Callable[[], tuple[np.ndarray, Timings]] = field(repr=False)
    pictures: int
    index: int
    start_seconds: float

    @cached_property
    def _read(self) -> tuple[np.ndarray, Timings]:
        return self.read()

    @property
    def frames(self) -> np.ndarray:
        return self._read[0]

    @property
    def timings(self) -> Timings:
        return self._read[1]

    def wait(self) -> Self:
        """The same, once its frames are there."""
        self._read  # noqa: B018  # a look
        return self


@dataclass(frozen=True, kw_only=True)
class Told:
    """What streams were told, each with its own prompt, before the block of that number was made.

    They begin with the first; block and picture are then those given. picture: how many each had shown. far, in_flight:
    as for `Stream.redirect`, None where they have no part. over, blend: of a redirect.
    """

    verb: Literal["begin", "redirect", "cut"]
    prompts: tuple[str, ...]
    block: int
    picture: int
    far: float | None = None
    in_flight: PromptInFlight | None = None
    over: int = 1
    blend: Interpolation = "lerp"

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """From its fields as JSON holds them. KeyError or TypeError for what cannot be read."""
        return cls(**dict(plain) | {"prompts": tuple(plain["prompts"])})


def begins(history: Sequence[Told], in_flight: int) -> list[tuple[int, tuple[str, ...]]]:
    """From which block on streams are under which prompts, as they were told; what was told later holds.

    in_flight: how many blocks are denoised together, of which all but the one to enter keep their prompt.
    """
    shot, found = history[0].block, []
    for told in history:
        if told.verb != "redirect":
            shot = told.block
        keep = told.in_flight == "own" and told.block > shot  # a shot that has no block yet has none in flight
        found.append((told.block + (in_flight - 1 if keep else 0), told.prompts))
    return found


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A text encoder, a network and a codec under one recipe, on one device, or the codec on its own: opens streams.

    latent_size: [C, H, W] of a latent frame. shift: of the levels the network was trained with. encode: from pictures
    [B, T, C, H, W] in -1..1 on the codec's device to latents, for streams that go on from given pictures; None if the
    codec only decodes.
    codec_name: of a codec that was chosen in place of the model's own. base_name: of where text encoder and codec come
    from, if that was named. fused: whether the network's passes go by fused kernels and recorded graphs.
    """

    model_name: str
    recipe: Recipe
    text: TextEncoder = field(repr=False)
    network: WanTransformer = field(repr=False)
    codec: Codec = field(repr=False)
    latent_size: tuple[int, int, int]
    frame_rate: int
    shift: float
    encode: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    codec_name: str | None = None
    base_name: str | None = None
    fused: bool = False

    @property
    def height(self) -> int:
        return self.latent_size[1] * self.codec.spatial_factor

    @property
    def width(self) -> int:
        return self.latent_size[2] * self.codec.spatial_factor

    @property
    def dtype(self) -> torch.dtype:
        return self.network.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.network.patch_embedding.weight.device

    @property
    def codec_device(self) -> torch.device:
        return self.codec.latent_mean.device

    @property
    def works_ahead(self) -> bool:
        """Whether the network makes the next block while the codec, on a GPU of its own, decodes the last."""
        return self._to_codec is not None

    @cached_property
    def _to_codec(self) -> torch.cuda.Stream | None:
        """By which latents travel to a GPU that is the codec's own: the network does not wait for the decoder there."""
        place = self.codec_device
        return torch.cuda.Stream(place) if place != self.device and place.type == "cuda" else None

    @cached_property
    def weights(self) -> str:
        """Tells this network's weights from others, in any precision."""
        return fingerprint(self.network.state_dict())

    @cached_property
    def codec_weights(self) -> str:
        """Tells this codec's weights from others, in any precision."""
        return fingerprint(self.codec.state_dict())

    @property
    def circumstances(self) -> dict[str, str]:
        """What bits hang on beside weights, recipe and seed: versions, kind of device, precision, kernels."""
        kinds = dict.fromkeys(map(_kind_of, (self.device, self.codec_device)))
        return {
            "longtake": __version__,
            "torch": torch.__version__,
            "device": ", codec on ".join(kinds),
            "dtype": "fp8" if is_eight_bit(self.network) else str(self.dtype).removeprefix("torch."),
            "passes": "fused" if self.fused else "eager",
        }

    @property
    def blocks_until_full(self) -> int:
        """How many blocks a stream makes until all that it remembers is full, and nothing grows any more."""
        return self.recipe.memory(self.network).blocks_until_full(self.recipe.block)

    def to(self, dtype: torch.dtype) -> None:
        """Compute in another precision from now on; streams already open do not go on."""
        self.network.to(dtype)
        self.codec.to(dtype)

    def prompt_keys(self, *prompts: str) -> PromptKeys:
        """Cross-attention keys of prompts, one for each stream. ValueError if one is empty or cannot be read."""
        return self.keys_of(self.embedded(*prompts))

    @torch.no_grad()
    def embedded(self, *prompts: str) -> Tensor:
        """Text embeddings [B, L, E] of prompts. ValueError as for `prompt_keys`."""
        _require_words(prompts)
        return self.text.encode(list(prompts))

    @torch.no_grad()
    def keys_of(self, text_BLE: Tensor) -> PromptKeys:
        """Cross-attention keys of text embeddings, one for each stream."""
        return self.network.prompt_keys(text_BLE[:, None].to(self.dtype))

    def prepare(self, prompts: Sequence[str]) -> None:
        """Read prompts that streams will show, before the first is opened. ValueError as for `prompt_keys`."""
        _require_words(prompts)
        self.text.prepare(prompts)

    def pictures_in(self, blocks: int) -> int:
        """How many pictures the first blocks of a stream are."""
        return self.codec.pictures(self.recipe.block * blocks)

    @torch.no_grad()
    def latents_of(self, pictures_BTHWC: Tensor) -> Tensor:
        """Latents [B, F, C, H, W] of the uint8 pictures of a stream's first blocks. ValueError for any others."""
        shape = list(pictures_BTHWC.shape)
        if pictures_BTHWC.dtype != torch.uint8 or len(shape) != 5 or shape[2:] != [self.height, self.width, 3]:
            expected = f"uint8 [streams, pictures, {self.height}, {self.width}, 3]"
            raise ValueError(f"pictures to go on from are {expected}, got {pictures_BTHWC.dtype} {shape}")
        first, second = self.pictures_in(1), self.pictures_in(2)
        if shape[1] < first or (shape[1] - first) % (second - first):
            fitting = f"{first}, {second}, {self.pictures_in(3)}, ..."
            raise ValueError(f"a stream goes on from whole blocks, which are {fitting} pictures, got {shape[1]}")
        if self.encode is None:
            raise ValueError(f"model {self.model_name} cannot go on from pictures: its codec only decodes")
        return self.encode(from_uint8(pictures_BTHWC.to(self.codec_device))).to(self.device)

    def stream(self, prompt: str, *, seed: int = 42, pictures: np.ndarray | None = None) -> "Stream":
        """Open an endless stream. The same seed gives the same pictures on one device, version and precision.

        seed: -1 draws one; `stream.seed` tells which. ValueError for other negative ones.
        pictures: uint8 [T, H, W, 3] to go on from, as if the stream had made them: it shows what follows them.
        ValueError unless they are whole blocks (`pictures_in`) and the model can encode them.
        """
        if seed < -1:
            raise ValueError(f"a seed is a whole number from 0, or -1 to draw one, got {seed}")
        return Stream(self, prompt, random.SystemRandom().randrange(2**31) if seed == -1 else seed, pictures)

    def stream_batch(
        self, prompts: Sequence[str], *, seeds: Sequence[int], pictures: Tensor | None = None
    ) -> "StreamBatch":
        """Open B streams that move in step, each with its own prompt and seed (a whole number from 0).

        Each shows what it would show alone, but for rounding. ValueError unless there are as many seeds as prompts.
        pictures: uint8 [B, T, H, W, 3] to go on from, as for `stream`.
        """
        return StreamBatch(self, prompts, seeds, pictures)

    def next_together(self, streams: Sequence["Stream"]) -> list[Chunk]:
        """The next chunk of each of several streams of this engine, in one pass of the network and the codec.

        They are what each makes alone, but for rounding; their timings are those of the pass. ValueError unless all
        have the same `phase`. If it fails, each goes on alone as if it had not been asked for: where all blocks were
        finished, the next chunk of each is its block, decoded alone. Those whose memory was being written are closed.
        """
        with ExitStack() as held:
            for stream in sorted(streams, key=id):  # in one order, lest two threads wait for each other
                held.enter_context(stream.lock)
            return _next_together(self, streams)


def _kind_of(device: torch.device) -> str:
    on_gpu = device.type == "cuda"
    return f"{device.type} {torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()}"


def _require_words(prompts: Sequence[str]) -> None:
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is a string, got {prompt!r}")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty: say what to show")


_CLOSED = "this stream is closed, or failed: open another one"
_UNDECODED = "a pass over several streams failed before this block was decoded: ask for the next chunk first"


class _Closing(ABC):
    """What is closed when its `with` is left."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


Moment = float | torch.cuda.Event
"""On a device's own line: an event of a GPU; of others, which have done by then what came before, seconds."""


def _now(device: torch.device) -> Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begun: Moment, ended: Moment) -> float:
    """Between two moments of one device, the later of which is waited for."""
    if isinstance(begun, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
        ended.synchronize()
        return begun.elapsed_time(ended) / 1000
    assert isinstance(begun, float) and isinstance(ended, float)
    return ended - begun


class _Stopwatch:
    """Times the parts of chunks, each on its device's line: nobody waits. A commit is told of as it begins."""

    def __init__(self, engine: Engine) -> None:
        self._network, self._codec = engine.device, engine.codec_device
        self.start()

    def start(self) -> None:
        self._began = _now(self._network)
        self._commit_began: Moment | None = None

    def begin_commit(self) -> None:
        self._commit_began = _now(self._network)

    def made(self) -> None:
        """Denoised and committed."""
        self._made = _now(self._network)

    def begin_decoding(self) -> None:
        """The latents are on the codec's device."""
        self._arrived = _now(self._codec)

    def decoded(self) -> Callable[[], Timings]:
        """What it took, once that is known, for which it waits; all of it is the sum of the parts."""
        began, made, arrived, decoded = self._began, self._made, self._arrived, _now(self._codec)
        committing = made if self._commit_began is None else self._commit_began

        def timings() -> Timings:
            parts = _seconds(began, committing), _seconds(committing, made), _seconds(arrived, decoded)
            return Timings(*parts, sum(parts))

        return timings


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _in_turn(
    call: Callable[Concatenate["StreamBatch", _P], _R],
) -> Callable[Concatenate["StreamBatch", _P], _R]:
    """A call that waits while another thread is making a block, or changing what the next is made from."""

    @wraps(call)
    def waiting(self: "StreamBatch", /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self.lock:
            return call(self, *args, **kwargs)

    return waiting


class StreamBatch(_Closing):
    """Endless videos made in step: an iterator of uint8 pictures [B, T, H, W, 3] on the codec's device.

    It never ends by itself; close it or leave its `with`. blocks, pictures: how many each video has so far, given ones
    included. timings: of the last block. history: what they were told, from the beginning. in_company: whether any
    block was made together with other streams, so that its bits may not be those of streams made alone. lock: held by
    whoever makes a block or changes anything, so that other threads wait for the end of the block.
    """

    def __init__(
        self, engine: Engine, prompts: Sequence[str], seeds: Sequence[int], pictures_BTHWC: Tensor | None = None
    ):
        if not prompts or len(prompts) != len(seeds) or min(seeds) < 0:
            raise ValueError(
                f"streams need a prompt and a seed from 0 each, got {len(prompts)} prompts and seeds {list(seeds)}"
            )
        self.engine, self.lock = engine, RLock()
        self.seeds = list(map(operator.index, seeds))  # numpy's are no numbers to noise, nor to JSON
        self.blocks = self.pictures = 0
        self.in_company = False
        self._timings: Callable[[], Timings] | None = None
        self.prompts = list(prompts)
        self._go_over_to(engine.prompt_keys(*prompts))
        self._codec_state: CodecState | None = None
        memory = StreamMemory(engine.recipe.memory(engine.network), engine.network.config.layers, ring=True)
        if pictures_BTHWC is not None:
            self._begin_with(pictures_BTHWC, memory)
        self.history = [Told(verb="begin", prompts=tuple(prompts), block=self.blocks, picture=self.pictures)]
        self._go_on_with(memory, [])

    def _go_on_with(self, memory: StreamMemory, in_flight: list[InFlight]) -> None:
        """Make the next blocks from what is remembered, and from blocks that are half made."""
        engine = self.engine
        self._memory: StreamMemory | None = memory
        self._finished_BFCHW: Tensor | None = None  # a block that is committed and not decoded
        self._in_flight = in_flight
        self._noise = DrawnAhead(
            SeededNoise(self.seeds, (engine.recipe.block, *engine.latent_size), engine.device, torch.float32)
        )
        self._stopwatch = _Stopwatch(engine)
        self._latents: Iterator[Tensor] | None = engine.recipe.schedule_with(in_flight)(
            engine.network,
            memory,
            self._keys_at,
            self._noise,
            engine.recipe.levels(engine.shift),
            commits=self._stopwatch.begin_commit,
        )

    @classmethod
    def of_state(cls, engine: Engine, state: Mapping[str, Any]) -> Self:
        """Streams that go on from the `state()` of others under an engine like theirs; see `restore`."""
        made = cls.__new__(cls)
        made.engine, made.lock = engine, RLock()
        made.restore(state)
        return made

    def state(self) -> dict[str, Any]:
        """All that the next blocks are made from: plain values, in which tensors stand as they are.

        The next block writes over some of them, so whoever keeps it copies them, and holds `lock` if another thread may
        make it. RuntimeError for closed streams.
        """
        memory = self._open_memory()
        prompts = list(
            {id(keys): keys for keys in (self._prompt_keys, *(one.prompt for one in self._in_flight))}.values()
        )
        number = {id(keys): index for index, keys in enumerate(prompts)}
        return {
            "seeds": self.seeds,
            "blocks": self.blocks,
            "pictures": self.pictures,
            "in_company": self.in_company,
            "history": [asdict(told) for told in self.history],
            "prompt_keys": [[list(layer) for layer in keys.layers] for keys in prompts],  # the first is of `prompts`
            "blends": [dict(vars(blend)) for blend in self._blends],
            "in_flight": [
                {"block": one.block, "step": one.step, "noisy": one.noisy_BFCHW, "prompt": number[id(one.prompt)]}
                for one in self._in_flight
            ],
            "codec": None if self._codec_state is None else list(self._codec_state.tensors),
            "memory": memory.state(),
        }

    @_in_turn
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()` on the network's device, whatever was made since; closed streams are open again."""
        self.seeds, self.blocks, self.pictures = list(state["seeds"]), state["blocks"], state["pictures"]
        self.in_company = state.get("in_company", False)  # takes of earlier versions were all made alone
        self._timings = None
        self.history = list(map(Told.of, state["history"]))
        self.prompts = list(self.history[-1].prompts)
        prompts = [PromptKeys([(k, v) for k, v in layers]) for layers in state["prompt_keys"]]
        blends = state.get("blends", [])  # takes of the first form have none
        self._go_over_to(prompts[0], [Blend(**blend) for blend in blends])
        carried, place = state["codec"], self.engine.codec_device
        self._codec_state = None if carried is None else CodecState(tuple(one.to(place) for one in carried))
        in_flight = [
            InFlight(one["block"], one["step"], one["noisy"], prompts[one["prompt"]]) for one in state["in_flight"]
        ]
        shape = self.engine.recipe.memory(self.engine.network)
        self._go_on_with(StreamMemory.of_state(shape, state["memory"], ring=True), in_flight)

    def _begin_with(self, pictures_BTHWC: Tensor, memory: StreamMemory) -> None:
        """Take given pictures for the streams' own: their latents are committed and decoded as if just made."""
        if len(pictures_BTHWC) != len(self.seeds):
            raise ValueError(f"{len(self.seeds)} streams cannot go on from the pictures of {len(pictures_BTHWC)}")
        for latents_BFCHW in self.engine.latents_of(pictures_BTHWC).split(self.engine.recipe.block, dim=1):
            commit(self.engine.network, memory, latents_BFCHW, self._prompt_keys)
            self._decode(latents_BFCHW)  # for the state that the next block goes on from
        self.blocks, self.pictures = memory.blocks, pictures_BTHWC.shape[1]

    @_in_turn
    def redirect(
        self, prompts: Sequence[str], *, over: int = 1, blend: Interpolation = "lerp",
        far: float = FAR_AFTER_REDIRECT, in_flight: PromptInFlight = "own",
    ) -> None:  # fmt: skip
        """Go on under other prompts, one a stream, from the next block, as `Stream.redirect`."""
        if in_flight not in ("own", "new"):
            raise ValueError(f"blocks in flight go on under their own prompt or the new one, got {in_flight!r}")
        require_blend(over, blend)
        memory = self._memory_for(prompts)
        text_BLE = self.engine.embedded(*prompts)
        begin = self.blocks if in_flight == "new" else begins_next(self._in_flight, memory)
        keys, blends = self.engine.keys_of(text_BLE), self._blends_to(text_BLE, begin, over, blend)
        with self._closed_unless_refused():
            memory.fade_far(far)
            self._go_over_to(keys, blends)
            # Once, under the first words of a blend: the blocks to come are committed under theirs, and memory follows.
            redirect(self.engine.network, memory, self._keys_at(begin))
            if in_flight == "new":
                self._in_flight[:] = [replace(one, prompt=self._keys_at(one.block)) for one in self._in_flight]
        self.prompts = list(prompts)
        self._note("redirect", far, in_flight, over, blend)

    @_in_turn
    def cut(self, prompts: Sequence[str], *, far: float = FAR_AFTER_CUT) -> None:
        """Begin a new shot in every stream, each under its own prompt, with the next block, as `Stream.cut`."""
        memory, keys = self._memory_for(prompts), self.engine.prompt_keys(*prompts)
        with self._closed_unless_refused():
            memory.cut(far)
        self._go_over_to(keys)
        self.prompts = list(prompts)
        self._note("cut", far)
        if not memory.frames:
            self._in_flight.clear()  # the schedule drops them too, but a state that is kept before it does has none
            self._codec_state = None  # a decoder that goes on shows the old shot through the new one for two pictures

    def _note(
        self, verb: Literal["redirect", "cut"], far: float, in_flight: PromptInFlight | None = None,
        over: int = 1, blend: Interpolation = "lerp",
    ) -> None:  # fmt: skip
        told = Told(
            verb=verb, prompts=tuple(self.prompts), block=self.blocks, picture=self.pictures,
            far=float(far), in_flight=in_flight, over=over, blend=blend,
        )  # fmt: skip
        self.history.append(told)
        del self.history[:-MOST_TOLD]

    def _memory_for(self, prompts: Sequence[str]) -> StreamMemory:
        """The memory, to be changed for other prompts."""
        memory = self._open_memory()
        if len(prompts) != len(self.seeds):
            raise ValueError(f"{len(self.seeds)} streams cannot go on under {len(prompts)} prompts")
        return memory

    @contextmanager
    def _closed_unless_refused(self) -> Iterator[None]:
        """A change of memory that fails half way, or is stopped by Ctrl-C, closes the streams."""
        try:
            yield
        except ValueError:  # refused before anything changed
            raise
        except BaseException:  # Ctrl-C too: half a recache is in no state to go on from
            self.close()
            raise

    # Prompts

    def prompts_of(self, block: int) -> tuple[str, ...]:
        """The prompts that blocks of that number are under, or go over to; the latest and those to come are known."""
        told = begins(self.history, self.engine.recipe.in_flight)
        return next((prompts for since, prompts in reversed(told) if since <= block), told[0][1])

    def _blends_to(self, text_BLE: Tensor, begin: int, over: int, by: Interpolation) -> Sequence[Blend]:
        """Those that go on until the block `begin`, and one from what the block before it is under.

        Words that change at once need none, unless they break off another.
        """
        if over == 1 and not self._blends:
            return []
        going_on = [blend for blend in self._blends if blend.begin < begin]
        return [*going_on, Blend(self._words_of(begin - 1), text_BLE, begin, over, by)]

    def _words_of(self, block: int) -> Tensor:
        """The embedding of the latest block or one to come; before a shot's first block, of what the shot began as."""
        blend = next((blend for blend in reversed(self._blends) if blend.begin <= block), None)
        if blend is not None:
            return blend.at(block)
        shot = next((told for told in reversed(self.history) if told.verb != "redirect"), self.history[0])
        return self.engine.embedded(*(shot.prompts if block < shot.block else self.prompts_of(block)))

    def _go_over_to(self, keys: PromptKeys, blends: Sequence[Blend] = ()) -> None:
        """Blocks that begin from now on are under a prompt, or on the way to it by the last blend.

        Those before it are what blocks in flight are under; they follow one another by the blocks in which they begin.
        """
        self._prompt_keys, self._blends = keys, list(blends)
        self._blended: tuple[int, PromptKeys] | None = None

    def _keys_at(self, block: int) -> PromptKeys:
        """The prompt that a block of that number begins under. The same again for the same block."""
        if not self._blends or block >= self._blends[-1].end - 1:
            return self._prompt_keys
        if self._blended is None or self._blended[0] != block:
            self._blended = block, self.engine.keys_of(self._blends[-1].at(block))
        return self._blended[1]

    def __iter__(self) -> Self:
        return self

    @_in_turn
    def __next__(self) -> Tensor:
        if self._latents is None:
            raise RuntimeError(_CLOSED)
        try:
            return self._next_pictures(self._latents)
        except BaseException:  # Ctrl-C too: half a block is in no state to go on from
            self.close()
            raise

    def _next_pictures(self, latents: Iterator[Tensor]) -> Tensor:
        self._stopwatch.start()
        latents_BFCHW, self._finished_BFCHW = self._finished_BFCHW, None
        if latents_BFCHW is None:
            latents_BFCHW = next(latents)
            self._draw_ahead()
        self._stopwatch.made()
        pictures_BTHWC = self._decode(latents_BFCHW, self._stopwatch.begin_decoding)
        self._count(pictures_BTHWC.shape[1], self._stopwatch.decoded())
        return pictures_BTHWC

    def _draw_ahead(self) -> None:
        """What the block that begins next starts from, while the device is still at the last one's commit."""
        assert self._memory is not None
        self._noise.draw(begins_next(self._in_flight, self._memory), 0)

    def _count(self, pictures: int, timings: Callable[[], Timings]) -> None:
        self._timings = timings
        self.blocks += 1
        self.pictures += pictures
        while len(self._blends) > 1 and self._blends[1].begin < self.blocks:
            del self._blends[0]
        if self._blends and self._blends[-1].end <= self.blocks:
            self._go_over_to(self._prompt_keys)

    def _open_memory(self) -> StreamMemory:
        """The memory, between two blocks; RuntimeError where there is none, or a block is not decoded."""
        if self._memory is None:
            raise RuntimeError(_CLOSED)
        if self._finished_BFCHW is not None:
            raise RuntimeError(_UNDECODED)
        return self._memory

    def _making(self) -> Making:
        return Making(self._open_memory(), self._keys_at, self._in_flight, self._noise)

    @property
    def timings(self) -> Timings | None:
        return None if self._timings is None else self._timings()

    @property
    def phase(self) -> Hashable:
        """What streams of one engine have in common that can be made together. RuntimeError for closed ones."""
        return self._making().phase(self.engine.recipe.block), self._codec_state is None

    @property
    def closed(self) -> bool:
        """Whether they make no more pictures, as they were closed or failed."""
        return self._memory is None

    @_in_turn
    def close(self) -> None:
        """Let go of memory and codec state; closed streams make no more pictures."""
        self._latents = self._memory = self._codec_state = self._finished_BFCHW = None  # the schedule holds memory too
        self._in_flight.clear()

    @torch.no_grad()
    def _decode(self, latents_BFCHW: Tensor, begins: Callable[[], None] = lambda: None) -> Tensor:
        given = self._codec_state and self._codec_state.given_up()
        self._codec_state = None  # it is large: what was before makes room for what comes
        with _for_codec(self.engine, latents_BFCHW) as latents_BFCHW:
            begins()
            frames, self._codec_state = self.engine.codec.decode(latents_BFCHW, given)
            return to_uint8(frames)


class Stream(_Closing):
    """One endless video being made: an iterator of chunks that never ends by itself; close it or leave its `with`."""

    def __init__(self, engine: Engine, prompt: str, seed: int, pictures_THWC: np.ndarray | None = None):
        self.engine = engine
        # However it is laid out: of pictures that were turned round (BGR to RGB, say) torch makes no tensors.
        given_BTHWC = None if pictures_THWC is None else torch.tensor(np.ascontiguousarray(pictures_THWC))[None]
        self._batch = StreamBatch(engine, [prompt], [seed], given_BTHWC)

    @classmethod
    def of_state(cls, engine: Engine, state: Mapping[str, Any]) -> Self:
        """A stream that goes on from the `state()` of another under an engine like its own."""
        made = cls.__new__(cls)
        made.engine = engine
        made._batch = StreamBatch.of_state(engine, state)
        return made

    def state(self) -> dict[str, Any]:
        """All that the next block is made from, as `StreamBatch.state`; `generation.take` keeps it."""
        return self._batch.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()` of this stream or of another with its seed, as `StreamBatch.restore`."""
        self._batch.restore(state)

    @property
    def lock(self) -> RLock:
        """Held by whoever makes a block or changes anything, so that other threads wait for the end of the block."""
        return self._batch.lock

    @property
    def seed(self) -> int:
        return self._batch.seeds[0]

    @property
    def prompt(self) -> str:
        return self._batch.prompts[0]

    @property
    def blocks(self) -> int:
        """How many blocks the video has so far, given ones included."""
        return self._batch.blocks

    @property
    def pictures(self) -> int:
        """How many pictures the video has so far, given ones included."""
        return self._batch.pictures

    @property
    def history(self) -> tuple[Told, ...]:
        """What the stream was told, from the beginning; of more than `MOST_TOLD` things, the latest."""
        return tuple(self._batch.history)

    @property
    def in_company(self) -> bool:
        """Whether any block was made together with other streams, see `Engine.next_together`."""
        return self._batch.in_company

    @property
    def since(self) -> int:
        """The number of the first block under the present prompt; blocks in flight may come before it."""
        return begins(self._batch.history, self.engine.recipe.in_flight)[-1][0]

    def prompt_of(self, block: int) -> str:
        """The prompt that a block of that number is under, or goes over to; the latest and those to come are known."""
        return self._batch.prompts_of(block)[0]

    @property
    def closed(self) -> bool:
        """Whether it makes no more pictures, as it was closed or failed."""
        return self._batch.closed

    @property
    def phase(self) -> Hashable:
        """What streams of one engine have in common that `Engine.next_together` takes. RuntimeError if it is closed."""
        return self._batch.phase

    def redirect(
        self, prompt: str, *, over: int = 1, blend: Interpolation = "lerp",
        far: float = FAR_AFTER_REDIRECT, in_flight: PromptInFlight = "own",
    ) -> None:  # fmt: skip
        """Go on under another prompt, from the next block. The window stays, so what is seen changes as it goes on;
        recipes with a rule of their own flush it, or commit its frames once more (docs/memory.md).

        over: blocks that the words go over in. The first of them is 1 / over of the way, the last wholly under the new
        prompt; 1 changes all at once. What goes over are the text embeddings, row by row; blend: along a straight line
        or a sphere, see `generation.blend.between`. A redirect that comes before the last of them goes on from where
        the words are then; a cut ends it. A rule of the recipe acts once, under the words of the first of them.
        Where a recipe has several blocks in flight, the next one is the next to enter: those in flight go on under
        their own prompt, the one that they began with, and are shown before it. in_flight: "new" puts them all under
        the new prompt at once, for the steps that they have left: it acts sooner, on blocks that are half made. Of
        words that go over, the oldest takes the first step. Without blocks in flight the two are the same.
        far: the share of the far state that weighs on, 0 (none) to 1 (all); recipes without one take any share and
        have nothing to fade. All of it by default: no difference shows (docs/hybrid_forcing.md, "Redirects").
        ValueError, for a prompt that cannot be read or what is out of range, changes nothing.
        """
        self._batch.redirect([prompt], over=over, blend=blend, far=far, in_flight=in_flight)

    def cut(self, prompt: str, *, far: float = FAR_AFTER_CUT) -> None:
        """Begin a new shot with the next block: the window is forgotten, and positions start over.

        Blocks, pictures and noise are counted on. The shot begins like a video: its first block becomes the sink, and
        has fewer pictures than others, since the codec makes one picture of a video's first latent frame. What was in
        flight is dropped. A recipe whose cuts jump (infinity_rope) keeps a few frames, and counts pictures on.
        far, ValueError: as for `redirect`, but that by default nothing of the far state weighs on.
        """
        self._batch.cut([prompt], far=far)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        started = time.perf_counter()
        with self.lock:
            index, start_seconds = self._batch.blocks, self._batch.pictures / self.engine.frame_rate
            pictures_THWC = next(self._batch)[0]
            frames, timings = to_host(pictures_THWC), self._batch._timings
        assert timings is not None

        def read() -> tuple[np.ndarray, Timings]:
            frames_THWC = frames()
            return frames_THWC, timings()._replace(total_seconds=time.perf_counter() - started)

        chunk = Chunk(read, len(pictures_THWC), index, start_seconds)
        return chunk if self.engine.works_ahead else chunk.wait()

    def close(self) -> None:
        """Let go of memory and codec state; a closed stream makes no more chunks."""
        self._batch.close()


def _next_together(engine: Engine, streams: Sequence[Stream]) -> list[Chunk]:
    if any(stream.engine is not engine for stream in streams) or len({stream.phase for stream in streams}) != 1:
        raise ValueError("streams are made together if they are of one engine and in one phase")
    if len({*map(id, streams)}) < len(streams):
        raise ValueError("a stream is not made together with itself: name each once")
    batches = [stream._batch for stream in streams]
    stopwatch = _Stopwatch(engine)
    latents_BFCHW = _latents_together(engine, batches, stopwatch.begin_commit)
    stopwatch.made()
    pictures, codec_states = _decoded_together(engine, batches, latents_BFCHW, stopwatch.begin_decoding)
    timings = stopwatch.decoded()
    chunks = []
    for batch, frames_THWC, codec_state in zip(batches, pictures, codec_states, strict=True):
        chunks.append(chunk_of(frames_THWC, timings(), batch.blocks, batch.pictures / engine.frame_rate))
        batch._codec_state, batch._finished_BFCHW = codec_state, None
        batch._count(len(frames_THWC), timings)
    return chunks


def _latents_together(engine: Engine, batches: Sequence[StreamBatch], commits: Callable[[], None]) -> Tensor:
    """The next block of each, [B, F, C, H, W], finished and committed; they are left with it to decode."""
    several = [batch._making() for batch in batches]
    blocks = [one.memory.blocks for one in several]
    try:
        latents_BFCHW = next_latents(
            engine.network, engine.recipe, engine.recipe.levels(engine.shift), several, commits
        )
    except BaseException:  # Ctrl-C too
        for batch, one, before in zip(batches, several, blocks, strict=True):
            if one.memory.blocks != before:
                batch.close()
        raise
    for row, (batch, one) in enumerate(zip(batches, several, strict=True)):
        batch._go_on_with(one.memory, one.in_flight)  # a schedule that rolls compares with its own last block
        batch._finished_BFCHW = latents_BFCHW[row : row + 1]
        batch.in_company = True
    for batch in batches:  # once all of them are whole: this takes time, and may be stopped
        batch._draw_ahead()
    return latents_BFCHW


@torch.no_grad()
def _decoded_together(
    engine: Engine, batches: Sequence[StreamBatch], latents_BFCHW: Tensor, begins: Callable[[], None]
) -> tuple[list[np.ndarray], Sequence[CodecState]]:
    """Pictures, uint8 [T, H, W, 3], and the codec state of each: nothing is changed, lest it fails half way."""
    states = [batch._codec_state for batch in batches]
    joined = CodecState.joined([state for state in states if state is not None])
    with _for_codec(engine, latents_BFCHW) as latents_BFCHW:
        begins()
        frames, after = engine.codec.decode(latents_BFCHW, joined)
        # A row would keep the others in memory.
        return [on_host(frames_THWC.clone()) for frames_THWC in to_uint8(frames)], after.rows()


@contextmanager
def _for_codec(engine: Engine, latents_BFCHW: Tensor) -> Iterator[Tensor]:
    """Latents in the precision and on the device of the codec, which in here is the current one, as its kernels want.

    Between two GPUs the host waits for neither, and the network's does not wait for what the codec's was told before:
    so they go through the host, since a copy from GPU to GPU may begin only when both have done what they were told.
    """
    latents_BFCHW, line = latents_BFCHW.to(engine.dtype), engine._to_codec
    if line is None:
        latents_BFCHW = latents_BFCHW.to(engine.codec_device)
    else:
        held, there = _page_locked(latents_BFCHW)
        decoding = torch.cuda.current_stream(line.device)
        with torch.cuda.stream(line):
            line.wait_event(there)
            latents_BFCHW = held.to(line.device, non_blocking=True)
        decoding.wait_stream(line)
        latents_BFCHW.record_stream(decoding)
    with torch.cuda.device_of(latents_BFCHW):
        yield latents_BFCHW


def to_uint8(frames_BFCHW: Tensor) -> Tensor:
    """Pictures in -1..1 (values beyond are cut) as uint8 [B, F, H, W, C]."""
    scaled = (frames_BFCHW.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).movedim(2, -1)


def on_host(pictures: Tensor) -> np.ndarray:
    """Pictures as an array of the host, as `to_host`."""
    return to_host(pictures)()


def to_host(pictures: Tensor) -> Callable[[], np.ndarray]:
    """Send pictures to the host; what is returned waits for them, and for nothing that the device is told later.

    Of a GPU they come in page-locked memory, which is the array's own until it is let go of, and then serves later
    ones. Fresh memory of any other kind takes many times as long.
    """
    if not pictures.is_cuda:
        return pictures.numpy
    held, there = _page_locked(pictures)

    def wait() -> np.ndarray:
        there.synchronize()
        return held.numpy()

    return wait


def _page_locked(x: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A GPU's tensor on its way to page-locked memory of the host, and when it is there."""
    held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    held.copy_(x, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(x.device))
    return held, there


def chunk_of(frames_THWC: np.ndarray, timings: Timings, index: int, start_seconds: float) -> Chunk:
    """A chunk whose pictures are there."""
    return Chunk(lambda: (frames_THWC, timings), len(frames_THWC), index, start_seconds)


def one_behind(engine: Engine, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The same chunks of a stream; of an engine that works ahead each once its frames are there and the next has begun,
    or was to begin and failed: while the codec decodes a block, the network makes the next.
    """
    if not engine.works_ahead:
        yield from chunks
        return
    last = next(chunks, None)
    while last is not None:
        following, failed = None, None
        try:
            following = next(chunks, None)
        except BaseException as error:  # Ctrl-C too: the chunk before it is whole
            failed = error
        yield last.wait()
        if failed is not None:
            raise failed
        last = following


def from_uint8(pictures_BFHWC: Tensor) -> Tensor:
    """The way back: pictures [B, F, C, H, W] in -1..1."""
    return pictures_BFHWC.movedim(-1, 2).float() / 127.5 - 1
