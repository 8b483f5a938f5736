"""What this machine can do, found out by trying: packages, devices, attention, the embedded model, files, disk.

Everything of ours is imported inside the functions that try it, so that a machine without torch is told so.
"""

import hashlib
import math
import os
import platform
import re
import shutil
import tempfile
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

State = Literal["ok", "note", "problem"]
"""A note is what longtake works without, or slower; a problem is what it does not work with."""

PROMPT = "a red ball bounces over green hills"
SECONDS = 3.0  # of video in the trial of speed
_MODULES = {"pyyaml": "yaml"}  # where a package is imported by another name than its own
_REQUIREMENT = re.compile(r"""(?P<name>[\w.-]+)(>=(?P<least>[\d.]+))?.*?(extra == ["'](?P<extra>\w+)["'])?\s*$""")
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at. part: what kind of thing. advice: what to do, for all that is not ok.

    numbers: what was measured, for JSON.
    """

    part: str
    name: str
    about: str
    state: State = "ok"
    advice: str = ""
    numbers: dict[str, Any] | None = None

    def in_words(self) -> str:
        return f"{self.state:8} {self.name}: {self.about}" + (f"; {self.advice}" if self.advice else "")


def examine(say: Callable[[str], None]) -> Iterator[Finding]:
    """Look at one part after the other; without the packages of the core it ends with them.

    say: called with what is looked at next. What breaks off while it is tried is a problem, never an error.
    """
    broken = False
    for finding in _tried("package", _core, say):
        broken |= finding.state == "problem"
        yield finding
    if broken:
        return
    parts: dict[str, Callable[[], Iterable[Finding]]] = {
        "extra": _extras, "device": _devices, "attention": _attention, "weights": _weights, "file": _files,
        "speed": _speed, "disk": _disk,
    }  # fmt: skip
    for part, look in parts.items():
        yield from _tried(part, look, say)


def _tried(part: str, look: Callable[[], Iterable[Finding]], say: Callable[[str], None]) -> Iterator[Finding]:
    say(f"{part} ...")
    try:
        yield from look()
    except Exception as error:  # a machine can be broken in any way; this is the one place that says how
        said = next(iter(str(error).splitlines()), "")
        about = f"looking at it broke off with {type(error).__name__}" + (f": {said}" if said else "")
        advice = _named_attention(about) or "install longtake anew, or report it"
        yield Finding(part=part, name=part, state="problem", about=about, advice=advice)


# Packages


@dataclass(frozen=True)
class Requirement:
    """A package that longtake's own metadata names; extra: with which of the extras it comes, None for the core."""

    name: str
    least: str | None
    extra: str | None

    @property
    def there(self) -> str | None:
        """The version that is installed."""
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return None


def requirements() -> list[Requirement]:
    """What longtake asks for, core and extras, as its installation says."""
    found = [_REQUIREMENT.match(line) for line in metadata.requires("longtake") or ()]
    return [Requirement(one["name"], one["least"], one["extra"]) for one in found if one]


def _core() -> Iterator[Finding]:
    python = f"{platform.python_version()} on {platform.platform()}"
    yield Finding(part="package", name="longtake", about=f"{metadata.version('longtake')}, Python {python}")
    for one in requirements():
        if one.extra is None:
            yield _package(one)


def _package(one: Requirement) -> Finding:
    advice = f'pip install "{one.name}{f">={one.least}" if one.least else ""}"'
    if one.there is None:
        return Finding(part="package", name=one.name, state="problem", about="not installed", advice=advice)
    if one.least and _numbers(one.there) < _numbers(one.least):
        about = f"{one.there}, but {one.least} is needed"
        return Finding(part="package", name=one.name, state="problem", about=about, advice=advice)
    try:
        import_module(_MODULES.get(one.name, one.name))
    except Exception as error:  # of a package built for another machine
        about = f"{one.there} cannot be imported ({next(iter(str(error).splitlines()), '')})"
        return Finding(part="package", name=one.name, state="problem", about=about, advice="install it anew")
    return Finding(part="package", name=one.name, about=one.there, numbers={"version": one.there})


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3]]


def _extras() -> Iterator[Finding]:
    wanted: dict[str, list[Requirement]] = {}
    for one in requirements():
        if one.extra not in (None, "dev"):
            wanted.setdefault(str(one.extra), []).append(one)
    for extra, packages in wanted.items():
        versions = {one.name: one.there for one in packages}
        about = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
        whole = all(versions.values())
        yield Finding(
            part="extra", name=f"extra {extra}", state="ok" if whole else "note", about=about,
            advice="" if whole else f'pip install "longtake[{extra}]"', numbers=versions,
        )  # fmt: skip


# Devices


def _devices() -> Iterator[Finding]:
    import torch

    from longtake.evaluation.speed import cpu_name

    whole, free = _host_memory()
    threads = torch.get_num_threads()
    about = f"{cpu_name()}, {os.cpu_count()} cores, torch uses {threads}, {_memory(whole, free)}"
    numbers = {"memory_bytes": whole, "free_bytes": free, "threads": threads}
    yield Finding(part="device", name="cpu", about=about, numbers=numbers)
    for number in range(torch.cuda.device_count()):
        yield _gpu(f"cuda:{number}")
    if torch.cuda.is_available():
        yield _triton()
    elif shutil.which("nvidia-smi"):
        about = f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it"
        advice = "install a torch built for CUDA, https://pytorch.org/get-started"
        yield Finding(part="device", name="cuda", state="note", about=about, advice=advice)


def _triton() -> Finding:
    version = Requirement("triton", None, None).there
    if version:
        return Finding(part="package", name="triton", about=version, numbers={"version": version})
    advice = "block-sparse attention is slow on a GPU without it: pip install triton"
    return Finding(part="package", name="triton", state="note", about="not installed", advice=advice)


def _gpu(name: str) -> Finding:
    import torch

    from longtake.recipes.devices import device_named

    try:
        device_named(name)
        free, whole = torch.cuda.mem_get_info(name)
    except (ValueError, RuntimeError) as error:
        about, advice = str(error).splitlines()[0], "check the driver with nvidia-smi, or choose --device cpu"
        return Finding(part="device", name=name, state="problem", about=about, advice=advice)
    about = f"{torch.cuda.get_device_name(name)}, {_memory(whole, free)}"
    return Finding(part="device", name=name, about=about, numbers={"memory_bytes": whole, "free_bytes": free})


def free_memory(device: "torch.device") -> int | None:
    """Bytes that are free on a device, with what torch holds there and does not use; None where nobody tells."""
    import torch

    if device.type != "cuda":
        return _host_memory()[1]
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def _host_memory() -> tuple[int | None, int | None]:
    """Bytes of memory, all and free, where the system tells."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        whole, free = (page * os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    except (ValueError, OSError):
        return None, None
    table = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", table.read_text()) if table.exists() else None
    return whole, int(found[1]) * 1024 if found else free  # caches, which make room, count as free in the table alone


def _memory(whole: int | None, free: int | None) -> str:
    if whole is None or free is None:
        return "memory unknown"
    return f"{free / _GIB:.1f} of {whole / _GIB:.1f} GiB of memory free"


# What is tried


def _attention() -> Iterator[Finding]:
    import torch

    from longtake.evaluation.kernels import attention_checks

    asked = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    asked += [(f"cuda:{number}", torch.bfloat16) for number in range(torch.cuda.device_count())]
    for device, dtype in asked:
        for check in attention_checks(torch.device(device), dtype):
            off = f"{check.number:.1g} from its definition, at most {check.most:.1g} is right"
            about = off if math.isfinite(check.number) else check.about
            wrong = _named_attention(about) or "pictures made here are wrong: install another torch or driver"
            yield Finding(
                part="attention",
                name=f"{check.name}, {device}, {str(dtype).removeprefix('torch.')}",
                state="ok" if check.passed else "problem",
                about=about,
                advice="" if check.passed else wrong,
                numbers=check.table(),
            )
    for device in dict.fromkeys(device for device, _ in asked):
        yield _chosen_attention(device)


def _chosen_attention(device: str) -> Finding:
    """Which kernel answers dense attention, and how it came to that."""
    import torch

    from longtake.evaluation.kernels import attention_choice

    part, name = "attention", f"dense attention, {device}"
    try:
        choice = attention_choice(torch.device(device))
    except ValueError as error:  # of a backend that was named
        about = str(error)
        return Finding(part=part, name=name, state="problem", about=about, advice=_named_attention(about))
    if choice is None:
        about = "whichever kernel torch takes, but plain products for many keys in bfloat16"
        return Finding(part=part, name=name, about=about)
    tried = ", ".join(f"{other} {1000 * taken:.2f} ms" for other, taken in choice.seconds.items())
    others = ", ".join(f"{other} ({reason})" for other, reason in choice.refused.items())
    return Finding(
        part=part, name=name, about=f"{choice.name}; tried: {tried or 'none'}; not tried: {others or 'none'}",
        numbers={"chosen": choice.name, "seconds": dict(choice.seconds), "refused": dict(choice.refused)},
    )  # fmt: skip


def _named_attention(about: str) -> str:
    """What to do where a backend was named that cannot be taken; nothing where that is not what is said."""
    return "name another, or none" if "LONGTAKE_ATTENTION: " in about else ""


def _weights() -> Iterator[Finding]:
    from longtake.recipes import MODELS
    from longtake.recipes.weight_files import CODEC_FILE, packaged

    for name in dict.fromkeys([*MODELS.values(), CODEC_FILE]):
        try:
            path = packaged(name)
            about = _content(path)
        except (ValueError, OSError) as error:
            advice = "pip install --force-reinstall longtake"
            yield Finding(part="weights", name=name, state="problem", about=str(error), advice=advice)
        else:
            yield Finding(part="weights", name=name, about=about)


def _content(path: Path) -> str:
    """What a file of the embedded model holds, a delta with its base. ValueError unless it is whole."""
    from longtake.recipes.weight_files import load_tensors

    tensors, description = load_tensors(path)
    if odd := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path} holds numbers that are not finite, in {odd[0]}")
    recorded = _recorded_sha256(path)
    if recorded and recorded != _sha256(path):
        raise ValueError(f"{path} is not the file that was installed: its SHA-256 is another")
    count = sum(tensor.numel() for tensor in tensors.values())
    sure = "as installed" if recorded else "whole"  # a checkout has no record of its files
    return f"{description.get('role', 'codec')}, {count / 1e6:.1f} million numbers, {sure}"


def _recorded_sha256(path: Path) -> str | None:
    """What the installation wrote down of a file, if it came with a wheel."""
    for file in metadata.files("longtake") or ():
        if file.name == path.name and file.hash and Path(str(file.locate())).resolve() == path.resolve():
            return file.hash.value
    return None


def _sha256(path: Path) -> str:
    """As wheels write it."""
    return urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()


def _files() -> Iterator[Finding]:
    import numpy as np

    from longtake.media.mp4 import Mp4Writer, read_frames

    grey_FHWC = np.full((4, 64, 96, 3), 128, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        with Mp4Writer(Path(folder) / "grey.mp4", 96, 64, 16) as writer:
            writer.write(grey_FHWC)
        read_FHWC = read_frames(Path(folder) / "grey.mp4")
    right = read_FHWC.shape == grey_FHWC.shape and abs(read_FHWC.astype(int) - grey_FHWC).max() <= 8
    yield Finding(
        part="file", name="H.264 in mp4", state="ok" if right else "problem",
        about="written and read back" if right else "what is read back is not what was written",
        advice="" if right else "pip install --force-reinstall av",
    )  # fmt: skip


def _speed() -> Iterator[Finding]:
    from longtake.evaluation.speed import bench_stream
    from longtake.recipes import load

    measured = bench_stream(load("toy", recipe="self_forcing_sink"), PROMPT, SECONDS, repeats=1)
    rate, factor = measured["frames_per_second"], measured["real_time_factor"]
    live = factor >= 1
    yield Finding(
        part="speed",
        name="embedded model",
        state="ok" if live else "note",
        about=f"{rate:.1f} pictures a second on {measured['device']} in {measured['precision']}, "
        f"{factor:.1f} times real time, first picture after {measured['first_frame_seconds']:.1f} s",
        advice="" if live else "too slow to watch live: stop other programs, or take fewer steps with --levels 2",
        numbers=measured,
    )


def _disk() -> Iterator[Finding]:
    from longtake.models.hub import cache_space, registry

    try:
        folder, free = cache_space()
    except ValueError as error:
        yield Finding(part="disk", name="hub cache", state="note", about="unknown", advice=str(error))
        return
    largest = max(one.gigabytes for one in registry().values() if isinstance(one.gigabytes, float | int))
    short = free < largest * 1e9
    yield Finding(
        part="disk", name=f"hub cache {folder}", state="note" if short else "ok", about=f"{free / 1e9:.1f} GB free",
        advice=f"a published model takes up to {largest:g} GB: make room, or set HF_HOME" if short else "",
        numbers={"free_bytes": free},
    )  # fmt: skip
