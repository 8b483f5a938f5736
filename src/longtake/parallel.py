"""Many processes, layers compiled or checkpointed, calls recorded: applied from outside, so that no model or loss knows
of it."""

import gc
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

Job = TypeVar("Job")
Result = TypeVar("Result")


def join() -> tuple[int, int, torch.device]:
    """Rank, number of processes and device of this process; joins the others when started by torchrun."""
    if "RANK" not in os.environ:
        return 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return distributed.get_rank(), distributed.get_world_size(), device


def leave() -> None:
    """Part from the other processes; nothing to do when there are none."""
    if distributed.is_initialized():
        gc.collect()  # recorded graphs that exchange with the others must go before what they exchange by
        distributed.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one exchange.

    What a step did not use has no gradient, in any process (steps are alike in all), and keeps none.
    """
    if not distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def from_first(values: Sequence[float], device: torch.device) -> list[float]:
    """The first process's values, for decisions that all must take alike."""
    if not distributed.is_initialized():
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.broadcast(shared, 0)
    return shared.tolist()


def processes() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def gather(value: object) -> list[Any]:
    """Every process's value, in order of rank; tensors in it must be on the host."""
    if not distributed.is_initialized():
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def agree(work: Callable[[], Result]) -> list[Result]:
    """What every process gets from its work, in order of rank. Where one refuses, ValueError, all do, in its words."""
    if not distributed.is_initialized():
        return [work()]
    try:
        outcome: tuple[Result | None, str | None] = work(), None
    except ValueError as error:
        outcome = None, str(error)
    outcomes = gather(outcome)
    for _, refusal in outcomes:
        if refusal is not None:
            raise ValueError(refusal)
    return [result for result, _ in outcomes]


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def own_part(jobs: Sequence[Job]) -> Sequence[Job]:
    """Which of the jobs this process does."""
    return jobs[rank() :: processes()]


def share_out(jobs: Sequence[Job], work: Callable[[Job], Result]) -> list[Result]:
    """Do every job once, each process its part; every process gets all results, in the order of the jobs.

    Tensors in results must be on the host.
    """
    own = {number: work(jobs[number]) for number in own_part(range(len(jobs)))}
    done: dict[int, Result] = {number: result for part in gather(own) for number, result in part.items()}
    return [done[number] for number in range(len(jobs))]


def share_parameters(module: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    if distributed.is_initialized():
        for tensor in module.state_dict().values():
            distributed.broadcast(tensor, 0)


def compile_layers(layers: Iterable[nn.Module], methods: Iterable[str]) -> None:
    """Compile the named methods of each layer; layers of one class share the compiled code.

    A student, its teacher and its critic together meet more shapes than torch allows one function by default.
    """
    torch._dynamo.config.recompile_limit = 64
    for layer in layers:
        for method in methods:
            setattr(layer, method, torch.compile(getattr(layer, method), dynamic=False))


def checkpoint_layers(layers: Iterable[nn.Module], methods: Iterable[str]) -> None:
    """Keep only the inputs of the named methods for backward, and compute the rest again there (arXiv 1604.06174).

    layers: or whole networks, where one pass of several is worth it.

    Gradients stay the same and calls without gradients are untouched. A method must be a function of its arguments
    and parameters: what it reads elsewhere may have changed by the time it is called again. Goes around compiled
    methods: compile first.
    """
    for layer, method in product(layers, tuple(methods)):
        setattr(layer, method, partial(checkpoint, getattr(layer, method), use_reentrant=False))


def record_calls(
    modules: Iterable[nn.Module], methods: Iterable[str], *,
    chosen: Callable[..., bool] | None = None, lends: bool = False,
) -> None:  # fmt: skip
    """Replay calls of the named methods without gradients as recorded kernels, see `Recorded`.

    Parameters must keep their storage. Goes around compiled methods: compile first.
    """
    for module, method in product(modules, tuple(methods)):
        setattr(module, method, Recorded(getattr(module, method), chosen=chosen, lends=lends))


@dataclass(frozen=True)
class _Record:
    """Kernels that read `inputs` and write `output`, which the next replay writes again."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Any


class Recorded:
    """A function whose calls on a GPU in no_grad are recorded as a graph of kernels (CUDA graphs) and then replayed.

    Small networks keep the host busier than the device; a replay costs it one call. Each kind of arguments (in order,
    none by name) is recorded once, and its record kept for good, with a copy of the tensors: their tree, and the shapes
    of the tensors in it. The function must do the same for all arguments of a kind, without a look at values on the
    host; it may draw random numbers on the device. What it reads beside its arguments must live as long as the records
    (see `rope.lasting`). Elsewhere, and with gradients, calls are as they were.

    chosen: tells of arguments whether their kind is worth a record; by default all are. lends: whether a call gives the
    record's own tensors, and no copies of them: good until the next replay of any record, for all work in one memory.
    """

    def __init__(self, call: Callable[..., Any], *, chosen: Callable[..., bool] | None = None, lends: bool = False):
        self._call, self._chosen, self._lends = call, chosen, lends
        self._records: dict[Hashable, _Record] = {}

    def __call__(self, *arguments: Any) -> Any:
        tensors: list[Tensor] = []
        mapped_tensors(arguments, tensors.append)
        if torch.is_grad_enabled() or not tensors or not all(x.is_cuda for x in tensors):
            return self._call(*arguments)
        if self._chosen and not self._chosen(*arguments):
            return self._call(*arguments)
        kind = kind_of(arguments)
        if kind not in self._records:
            self._records[kind] = self._record(arguments)
        record = self._records[kind]
        for dtype in {x.dtype for x in tensors}:  # of one type a kernel copies many
            held, given = ([x for x in some if x.dtype == dtype] for some in (record.inputs, tensors))
            torch._foreach_copy_(held, given)
        record.graph.replay()
        return record.output if self._lends else mapped_tensors(record.output, Tensor.clone)

    def _record(self, arguments: tuple[Any, ...]) -> _Record:
        inputs: list[Tensor] = []

        def held(x: Tensor) -> Tensor:
            inputs.append(x.clone())
            return inputs[-1]

        own = mapped_tensors(arguments, held)
        dice = torch.cuda.get_rng_state()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is compiled or chosen at a first call must not be recorded
            for _ in range(2):
                self._call(*own)
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.set_rng_state(dice)
        graph = torch.cuda.CUDAGraph()
        with _recording(graph, _common().pool()):
            output = self._call(*own)
        return _Record(graph, inputs, output)


@cache
def _common() -> torch.cuda.CUDAGraph:
    """A graph whose memory all records work in: they are replayed one after the other, and what one gives is copied, or
    used up before the next.

    It lives for good, since memory that no graph uses any more cannot be taken up again.
    """
    graph = torch.cuda.CUDAGraph()
    with _recording(graph):
        torch.zeros(1, device="cuda")
    return graph


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """Record what is done within, while other threads (NCCL's) may ask the device for news, and nothing is collected:
    graphs of networks that nobody has any more would go, and the device ends a recording when it frees one.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            yield
    finally:
        if collects:
            gc.enable()


def mapped_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same tree of tuples, lists, mappings and dataclasses with every tensor changed, in a fixed order."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped_tensors(part, change) for part in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(mapped_tensors(part, change) for part in tree)
    if isinstance(tree, Mapping):
        return {key: mapped_tensors(part, change) for key, part in tree.items()}
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: mapped_tensors(getattr(tree, f.name), change) for f in fields(tree)})
    return tree


def kind_of(tree: Any) -> Hashable:
    """Equal for trees that differ in the values of their tensors alone. What is no tree is compared as it is."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.dtype, tree.device
    if isinstance(tree, list | tuple):
        return type(tree), *map(kind_of, tree)
    if isinstance(tree, Mapping):
        return tuple((key, kind_of(part)) for key, part in tree.items())
    if is_dataclass(tree) and not isinstance(tree, type):
        return type(tree), *(kind_of(getattr(tree, f.name)) for f in fields(tree))
    hashed: Hashable = tree
    return hashed


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a scalar over the processes."""
    if distributed.is_initialized():
        value = value.detach().clone()
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return value
