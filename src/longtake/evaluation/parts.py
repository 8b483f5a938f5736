"""Where a block's time goes: parts of a stream are marked from outside, by what is called in it.

The same marks count arithmetic, where the stream runs on torch's meta device. Each part has what is spent in it and not
in another part inside it. A pass that runs as a recorded graph is one call, and parts inside it are not seen.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from longtake.attention.block_sparse import block_sparse, share_of_window
from longtake.attention.dense import dense
from longtake.attention.reference import kept_blocks
from longtake.generation import stream as streams
from longtake.generation.stream import Engine
from longtake.memory.far import FarState
from longtake.memory.stream_memory import StreamMemory
from longtake.memory.view import Attend, FarView
from longtake.models import fp8
from longtake.models.standins import Fused, RandomText, network_without_numbers, without_numbers

PASS = "network pass"  # those of a block are numbered
META = torch.device("meta")
Mark = Any
"""A moment: a number of seconds, an event on a GPU's own line, or a `Work` so far."""


class Work(NamedTuple):
    """Arithmetic of matrix products, attention and convolutions (a multiplication and an addition are two), and bytes
    that all operations read and write, each by itself. eight_bit: of the operations those on eight-bit numbers."""

    operations: float
    bytes: float
    eight_bit: float = 0.0


@dataclass(frozen=True)
class Span:
    """One call of a part, within the call of that number or in none."""

    part: str
    begun: Mark
    ended: Mark
    within: int | None


class Marks:
    """Notes when parts begin and end. mark: the present moment, or None where there is none to be had."""

    def __init__(self, mark: Callable[[], Mark | None]) -> None:
        self._mark = mark
        self._spans: list[Span | None] = []
        self._open: int | None = None

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose calls are noted."""

        def marked(*given: Any, **named: Any) -> Any:
            begun = self._mark()
            number, within = len(self._spans), self._open
            self._spans.append(None)
            self._open = number
            try:
                made = function(*given, **named)
            finally:
                self._open = within
            ended = self._mark()
            if begun is not None and ended is not None:
                self._spans[number] = Span(part, begun, ended, within)
            return made

        return marked

    def take(self, between: Callable[[Mark, Mark], Sequence[float]]) -> dict[str, list[float]]:
        """What lies between the marks of each part since the last time, without that of parts inside it."""
        found: dict[str, list[float]] = {}
        passes = 0
        names: dict[int, str] = {}
        for number, span in enumerate(self._spans):
            if span is None:
                continue
            passes += span.part == PASS
            names[number] = f"{PASS} {passes}" if span.part == PASS else span.part
            spent = between(span.begun, span.ended)
            _add(found, names[number], spent, 1)
            if span.within in names:
                _add(found, names[span.within], spent, -1)
        self._spans = []
        return found


def _add(found: dict[str, list[float]], name: str, spent: Sequence[float], sign: int) -> None:
    before = found.get(name, [0.0] * len(spent))
    found[name] = [old + sign * new for old, new in zip(before, spent, strict=True)]


@contextmanager
def marked(engine: Engine, marks: Marks, *, reading: bool = True) -> Iterator[None]:
    """Streams of this engine are noted in here: passes, commits, what memory and far state take, and decoding.

    reading: whether to tell the reading of a far state from the pass that it is in.
    """
    calls: list[tuple[Any, str, str]] = [
        (engine.network, "forward", PASS),  # this network's own, which may be a recorded graph
        (engine.network, "keys_to_commit", "commit"),
        (engine.network, "memory_view", "memory"),
        (StreamMemory, "commit", "memory"),
        (FarState, "absorb", "far state"),
        *([(FarView, "add_to", "far state")] if reading else []),
        (type(engine.codec), "decode", "decode"),
        (streams, "to_uint8", "decode"),
    ]
    with ExitStack() as restored:
        for owner, name, part in calls:
            restored.enter_context(_replaced(owner, name, marks.around(part, getattr(owner, name))))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def seconds_by_part(engine: Engine, stream: streams.Stream, blocks: int) -> dict[str, float]:
    """Mean seconds of a block of a stream that is under way, by part; "other" is what is in none, with gaps.

    Marks cost some time of their own, so speed is measured without them.
    """
    on_gpu = engine.device.type == "cuda"
    marks = Marks(_event if on_gpu else perf_counter)
    total: dict[str, list[float]] = {}
    with marked(engine, marks):
        for chunk in islice(stream, blocks):
            denoised, committed, decoded, all_of_it = chunk.timings
            parts = marks.take(_elapsed if on_gpu else lambda begun, ended: [ended - begun])
            parts["copy to host"] = [all_of_it - denoised - committed - decoded]
            parts["other"] = [all_of_it - sum(spent[0] for spent in parts.values())]
            for name, spent in parts.items():
                _add(total, name, spent, 1)
    return {name: spent[0] / blocks for name, spent in total.items()}


def _event() -> torch.cuda.Event | None:
    """A mark on the GPU's own line; none inside a graph that is being recorded, where it would not be a moment."""
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(begun: torch.cuda.Event, ended: torch.cuda.Event) -> list[float]:
    return [begun.elapsed_time(ended) / 1000]


# Arithmetic


@torch.no_grad()
def work_by_part(engine: Engine, prompt: str, blocks: int = 1) -> dict[str, Work]:
    """The work of a block when all that is remembered is full, the mean of so many, by part.

    Counted on the meta device, where the stream's own code runs in plain torch without numbers: so fused kernels do the
    same operations, but move fewer bytes than are counted here. Attention counts as fused, a block-sparse window as the
    chosen blocks alone, whose choice is left out. Reading what is far counts as part of passes that are recorded, as it
    does in their time.
    """
    rows, far = engine.text.encode([prompt]).shape[1], engine.recipe.far and engine.recipe.far.plain()
    twin = replace(
        engine,
        network=network_without_numbers(engine.network),
        codec=without_numbers(engine.codec),
        text=RandomText(rows, engine.network.config.text_dim, META),
        recipe=replace(engine.recipe, near=_counted(engine.recipe.near), far=far),
    )
    before = engine.blocks_until_full + 1  # one more than it takes: its rotations are made anew, and then kept
    counting = Counting()
    if fp8.is_eight_bit(engine.network):
        counting.in_eight_bits(owner.get_submodule(name) for owner, name in fp8.large_layers(twin.network))
    marks = Marks(counting.so_far)
    with Fused(counting.attended), marked(twin, marks, reading=not engine.fused):
        stream = twin.stream_batch([prompt], seeds=[0])
        for _ in islice(stream, before):
            marks.take(_difference)
        with counting:
            for _ in islice(stream, blocks):
                pass
    return {name: Work(*(amount / blocks for amount in spent)) for name, spent in marks.take(_difference).items()}


def _difference(begun: Work, ended: Work) -> list[float]:
    return [after - before for before, after in zip(begun, ended, strict=True)]


class Counting(TorchDispatchMode):
    """Counts the work of what runs while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self._operations = self._bytes = self._eight_bit = 0
        self._is_eight_bit = False

    def so_far(self) -> Work:
        return Work(self._operations, self._bytes, self._eight_bit)

    def in_eight_bits(self, layers: Iterable[nn.Module]) -> None:
        """Products of these layers count as those of eight-bit numbers."""

        def within(now: bool) -> Callable[..., None]:
            return lambda *given: setattr(self, "_is_eight_bit", now)

        for layer in layers:
            layer.register_forward_pre_hook(within(True))
            layer.register_forward_hook(within(False))

    def attended(self, q_BNTD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, answer_BNTD: Tensor) -> None:
        """Count a fused attention, which no operation of torch's stands for on the meta device."""
        pairs = q_BNTD.shape[:-1].numel() * k_BNSD.shape[-2]
        self._operations += 2 * pairs * (q_BNTD.shape[-1] + v_BNSD.shape[-1])
        self._bytes += sum(tensor.nbytes for tensor in (q_BNTD, k_BNSD, v_BNSD, answer_BNTD))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            operations = formula(*args, **(kwargs or {}), out_val=made)
            self._operations += operations
            self._eight_bit += operations if self._is_eight_bit else 0
        given, out = ([x for x in tree_leaves(some) if isinstance(x, Tensor)] for some in ((args, kwargs), made))
        if not _moves_nothing(function, given, out):
            self._bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in given + out)
        return made


def _moves_nothing(function: Any, given: Sequence[Tensor], out: Sequence[Tensor]) -> bool:
    """Whether an operation only makes room, or another view of what is there."""
    if "empty" in function.__name__:
        return True
    known = {x.untyped_storage()._cdata for x in given}
    return not function._schema.is_mutable and all(x.untyped_storage()._cdata in known for x in out)


def _counted(near: Attend) -> Attend:
    """Attention that counts as block-sparse attention does: over as many keys as are chosen, whichever they are."""
    if not isinstance(near, partial) or near.func is not block_sparse:
        return near
    given, block_k = near.keywords, near.keywords["block_k"]

    def over_chosen(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
        share = share_of_window(given["share"], given.get("full_window", 0.0) * q_BTND.shape[1], k_BSND.shape[1])
        keys = kept_blocks(share, -(-k_BSND.shape[1] // block_k)) * block_k
        return dense(q_BTND, k_BSND[:, :keys], v_BSND[:, :keys])

    return over_chosen
