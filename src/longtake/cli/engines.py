"""The engine that a verb works with, and the device it is on."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

from longtake.cli.terminal import say

if TYPE_CHECKING:
    import torch

    from longtake.generation.stream import Engine


def load_engine(
    model: str, recipe: str | None, levels: int | None, device: "str | torch.device | None", dtype: str,
    codec: str | None = None, compile: bool = False, codec_device: str | None = None,
    base: str | None = None,
) -> "Engine":  # fmt: skip
    """The engine that options name, by default under its model's recipe. ValueError or OSError where there is none."""
    from longtake.recipes import load
    from longtake.recipes.methods import recipe_for

    precision = precision_named(dtype)
    made = load(
        model, recipe=recipe or recipe_for(model), levels=levels, device=device, dtype=precision, codec=codec,
        base=base, codec_device=codec_device, compile=compile,
    )  # fmt: skip
    tell_of_kernels(made)
    return in_precision(made, dtype)


def tell_of_kernels(engine: "Engine") -> None:
    """If an engine's first blocks wait for kernels to be compiled say so, and from then on how far that has come."""
    from longtake import parallel

    if engine.fused and parallel.rank() == 0:
        from triton import knobs

        say("the first blocks wait for kernels to be compiled, unless an earlier start has left them on disk")
        knobs.compilation.listener = KernelsTold()


class KernelsTold:
    """Called by Triton with each kernel that it has made, or found on disk: tells of the former, now and then."""

    _EVERY_SECONDS = 2.0

    def __init__(self) -> None:
        self._count = 0
        self._spent = 0.0
        self._next = 0.0

    def __call__(self, *, src: Any, times: Any, cache_hit: bool, **others: Any) -> None:
        if cache_hit:
            return
        self._count += 1
        self._spent += times.total / 1e6
        if perf_counter() >= self._next:
            self._next = perf_counter() + self._EVERY_SECONDS
            say(f"kernels compiled so far: {self._count}, in {self._spent:.0f} s, the last {src.name}")


def in_precision(engine: "Engine", name: str) -> "Engine":
    """The engine, its large products of eight bits if --dtype says fp8."""
    from longtake.models.fp8 import into_eight_bits

    if name == "fp8":
        into_eight_bits(engine.network)
    return engine


def load_again(said: dict[str, Any], levels: int, device: str | None) -> "Engine":
    """The engine of a take or a record, by default on its kind of device. ValueError if there is none such here."""
    from longtake.generation.stream import UNTOLD

    if said["dtype"] not in ("float32", "bfloat16", "fp8"):
        raise ValueError(f"precision is float32, bfloat16 or fp8, not {said['dtype']}")
    place = device or said.get("device", "").partition(" ")[0] or None
    fused = (UNTOLD | said)["passes"] == "fused"
    return load_engine(
        said["model"], said["recipe"], levels, place, said["dtype"], said.get("codec"), fused, base=said.get("base")
    )


def precision_named(name: str) -> "torch.dtype | None":
    """What --dtype says; None leaves the choice to the device."""
    import torch

    return {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16}[name]


@contextmanager
def together(device: str | None, codec_device: str | None = None) -> "Iterator[tuple[bool, torch.device]]":
    """Whether this process is the first of those that torchrun started, and the device to use; one alone is."""
    from longtake import parallel
    from longtake.recipes.devices import device_named

    rank, processes, own = parallel.join()
    try:
        if processes > 1 and (device or codec_device) is not None:
            name = "--device" if codec_device is None else "--codec-device"
            raise ValueError(f"each of several processes takes a device of its own: leave {name} out")
        yield rank == 0, own if processes > 1 else device_named(device)
    finally:
        parallel.leave()
