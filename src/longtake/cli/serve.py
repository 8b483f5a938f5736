"""`longtake serve`: live streams behind one page."""

import math
import os
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from longtake.cli.engines import load_engine
from longtake.cli.options import Base, Codec, Compile, Device, Levels, Method, StreamPrecision, Switch

if TYPE_CHECKING:
    from collections.abc import Callable

    from longtake.generation.stream import Engine
    from longtake.serving.admission import Memory


def serve(
    host: str = "127.0.0.1",
    port: int = 8000,
    model: str = "toy",
    recipe: Method = None,
    base: Base = None,
    codec: Codec = None,
    levels: Levels = None,
    sessions: int = 4,
    api_key: Annotated[str | None, arg(metavar="KEY")] = None,
    insecure: Switch = False,
    origin: Annotated[tuple[str, ...], arg(metavar="HOST")] = (),
    exact: Switch = False,
    keep: Annotated[Path | None, arg(metavar="DIR")] = None,
    keep_gib: float = 4.0,
    log_prompts: Switch = False,
    device: Device = None,
    dtype: StreamPrecision = "auto",
    compile: Compile = False,
) -> int:
    """Serve a page that plays at once, and live streams over a socket, until Ctrl-C. See docs/serve.md.

    Args:
        host: Where to listen; others than this machine reach it only if you say so, and then a key is needed.
        port: Where to listen; 0 takes a free one.
        model: The weights that make the streams; `longtake models` lists them.
        codec: What makes pictures of a Wan model's latents in place of its VAE.
        sessions: Streams at most; fewer are taken where the device is too slow or too small for so many.
        api_key: What clients must send; better set as LONGTAKE_API_KEY, since others can see command lines.
        insecure: Listen for others without a key.
        origin: Hosts whose pages may use this server, such as the name of a proxy in front of it.
        exact: Make no blocks of several streams in one pass, which changes their bits: then every recording is made
            again to the bit.
        keep: Where snapshots and recordings are kept, to outlive the server; unless given, they go with it.
        keep_gib: GiB that snapshots and recordings take together at most.
        log_prompts: Write prompts to stderr as they are taken; else they are logged nowhere.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise ValueError("serving needs more than is installed: pip install 'longtake[serve]'")

    import torch

    from longtake.models.hub import registry
    from longtake.serving.access import Access, require_host, require_key
    from longtake.serving.admission import Limits
    from longtake.serving.app import Served, create_app
    from longtake.serving.server import is_loopback, listen, require_safe, run
    from longtake.serving.store import Store
    from longtake.serving.worker import Worker

    key = api_key or os.environ.get("LONGTAKE_API_KEY") or None
    require_safe(host, key and require_key(key), insecure)
    if sessions < 1:
        raise ValueError(f"a server has 1 session or more, got {sessions}")
    if not 0 < keep_gib * 2**30 < math.inf:
        raise ValueError(f"what is kept takes more than 0 GiB and has an end, got {keep_gib:g}")
    origins = tuple(map(require_host, origin))
    if log_prompts:
        _to_stderr("longtake.serving.prompts")
    with listen(host, port) as listening, closing(Store(keep, most_bytes=int(keep_gib * 2**30))) as store:
        threads = torch.get_num_threads()
        # They are the device's thread's alone. With a team in this thread too, blocks took nearly twice as long:
        # more of OpenMP's threads than cores are likely to be sent to sleep at every turn.
        torch.set_num_threads(1)
        engine = load_engine(model, recipe, levels, device, dtype, codec, compile, base=base)
        known = registry().get(model)
        served = Served(
            licence=known.licence if known else "Apache-2.0" if model == "toy" else "unknown",
            version=engine.circumstances["longtake"],
            weights=engine.weights,
            examples=_words_to_try(engine),
        )
        access = Access(key=key, origins=origins, loopback=is_loopback(host))
        limits = Limits(sessions=sessions)
        worker = Worker(
            engine, limits, memory=lambda wait: _memory_for(engine, sessions, wait), exact=exact, threads=threads
        )  # fmt: skip
        where = listening.getsockname()
        print(f"http://{f'[{where[0]}]' if ':' in where[0] else where[0]}:{where[1]}", flush=True)
        run(create_app(worker, access, served, store, log_prompts=log_prompts), listening)
    return 0


def _memory_for(engine: "Engine", sessions: int, wait: "Callable[[], object]") -> "Memory | None":
    """What streams take of the device, and how much there is; None where nobody tells, or would ask."""
    import torch

    from longtake.doctor import free_memory
    from longtake.plan import bytes_of_stream
    from longtake.serving.admission import Memory

    torch.set_num_threads(1)  # no team for this thread either, though it idles ever after
    if free_memory(engine.device) is None or sessions == 1:  # a first stream is always taken
        return None
    stream, block, prompt = bytes_of_stream(engine, wait)
    return Memory(stream=stream, block=block, prompt=prompt, free=lambda: free_memory(engine.device) or 0)


def _to_stderr(name: str) -> None:
    """What is logged under that name, as it is."""
    import logging

    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler())


def _words_to_try(engine: "Engine") -> tuple[str, ...]:
    from longtake.models.text import WordText
    from longtake.toy.captions import EXAMPLES

    if isinstance(engine.text, WordText):
        return EXAMPLES
    return "a red fox walks through fresh snow", "waves roll in at sunset", "a city street at night in the rain"
