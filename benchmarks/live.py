"""Two viewers of `longtake serve` for some minutes, by their own clocks: underruns, redirects, the server's memory.

python benchmarks/live.py MINUTES   # needs the extra `serve` and Linux; prints JSON

The first viewer changes the words every 20 seconds, the second has a stream of its own and looks on. A viewer plays in
real time from the first picture on, and waits where the next chunk is late.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

from websockets.asyncio.client import connect

WORDS = (
    "a red ball bounces in the snow",
    "a clear night",
    "a blue cat walks left in the city",
    "at dusk in the rain",
    "a yellow duck bounces on the beach by day",
)
EVERY, RATE = 20, 16


async def view(address: str, seed: int, seconds: float, steers: bool) -> dict[str, Any]:
    words, asked, redirects, underruns = cycle(WORDS), {}, [], []
    first, sent, stats, number = None, 0.0, {}, 0
    async with connect(f"ws://{address}/v1/realtime/video", max_size=None, origin=f"http://{address}") as socket:
        began = time.monotonic()
        start = {"type": "session.start", "prompt": "a red ball bounces over green hills", "seed": seed}
        await socket.send(json.dumps(start))
        while (now := time.monotonic()) < began + seconds:
            told = await asyncio.wait_for(socket.recv(), 10)
            if isinstance(told, bytes):
                first = first or time.monotonic()
                continue
            told = json.loads(told)
            now = time.monotonic()
            if told["type"] == "error":
                raise SystemExit(f"{told['code']}: {told['message']}")
            if told["type"] == "stats":
                stats = told
            if told["type"] == "video.chunk_metadata":
                late = now - first - sum(underruns) - sent if first else 0.0
                if late > 0:
                    underruns.append(late)
                for event in told["started_event_ids"]:  # of the pictures that were asked for when `asked` was shown
                    at, shown = asked.pop(event)
                    redirects.append({"seconds": now - at, "video_seconds": sent - shown})
                sent += told["num_frames"] / RATE
            if steers and first and now - began > EVERY * (number + 1):
                number += 1
                asked[f"{number}"] = now, now - first - sum(underruns)
                event = {"event_id": f"{number}", "event": {"prompt": next(words)}}
                await socket.send(json.dumps({"type": "session.interaction", "interaction": event}))
    return {
        "first_picture_seconds": first - began if first else None,
        "video_seconds": sent,
        "underruns": len(underruns),
        "underrun_seconds": sum(underruns),
        "redirects": redirects,
        "server": stats,
    }


def resident_mib(pid: int) -> int:
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) // 1024


async def watched(address: str, pid: int, minutes: float) -> dict[str, Any]:
    memory = [resident_mib(pid)]

    async def look() -> None:
        while True:
            await asyncio.sleep(60)
            memory.append(resident_mib(pid))

    looking = asyncio.create_task(look())
    viewers = await asyncio.gather(*(view(address, seed, 60 * minutes, seed == 7) for seed in (7, 8)))
    looking.cancel()
    return {"minutes": minutes, "viewers": viewers, "resident_mib": [*memory, resident_mib(pid)]}


def wait_until_ready(address: str) -> None:
    while True:
        with suppress(urllib.error.HTTPError), urllib.request.urlopen(f"http://{address}/readyz"):
            return
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float)
    minutes = parser.parse_args().minutes
    command = [sys.executable, "-m", "longtake.cli", "serve", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "LONGTAKE_API_KEY"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            address = server.stdout.readline().strip().removeprefix("http://")
            wait_until_ready(address)
            time.sleep(10)  # for it to foresee what streams take of memory, and to try passes over several
            print(json.dumps(asyncio.run(watched(address, server.pid, minutes)), indent=1))
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
