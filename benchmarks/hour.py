"""A live stream at full speed, as the server makes and codes it, steered as it goes: host memory against time.

python benchmarks/hour.py [MINUTES]   # of video, by default 60; needs Linux; prints a line of JSON for each minute

The words change every 20 seconds of video, and each minute the stream goes back to a snapshot of the minute before.
"""

import argparse
import json
import re
import threading
import time
from itertools import cycle
from pathlib import Path

import longtake
from longtake.media.fragments import FragmentWriter
from longtake.serving.admission import Limits
from longtake.serving.worker import Worker

WORDS = cycle(("a clear night", "a blue cat walks left in the city", "at dusk in the rain", "a red ball bounces"))
EVERY = 20  # seconds of video


def resident_mib() -> int:
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", nargs="?", type=float, default=60.0)
    minutes = parser.parse_args().minutes
    engine, news = longtake.load("toy", recipe="self_forcing_sink"), threading.Event()
    worker = Worker(engine, Limits(ahead=1e9, lead=1e9 - 1, stall=1e9))  # nobody waits for a clock
    writer = FragmentWriter(engine.width, engine.height, engine.frame_rate)
    worker.start()
    session = worker.begin(worker.admit("a red ball bounces over green hills", changed=news.set)).result()
    take, began, changes, told = worker.snapshot(session).result(), time.monotonic(), 0, 0
    while (seconds := session.sent / engine.frame_rate) < 60 * minutes:
        news.wait(10)
        news.clear()
        while (piece := worker.read(session)) is not None:
            writer.fragment(piece.frames)
        if seconds >= EVERY * (changes + 1):
            changes += 1
            worker.redirect(session, next(WORDS), f"{changes}").result()
        if seconds >= 60 * told:
            worker.rewind(session, take, f"back {told}").result()
            take, told = worker.snapshot(session).result(), told + 1
            line = {"video_seconds": round(seconds), "seconds": round(time.monotonic() - began)}
            print(json.dumps(line | {"resident_mib": resident_mib()}), flush=True)
    worker.stop()


if __name__ == "__main__":
    main()
