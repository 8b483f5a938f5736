"""A server as a process of its own, with the embedded model."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager


@contextmanager
def server(*options: str, key: str = "sesame"):
    """The process, and its address, once the model is warm; it is killed at the end. key: "" for none."""
    command = [sys.executable, "-m", "longtake.cli", "serve", "--port", "0", "--dtype", "float32", *options]
    environment = os.environ | {"LONGTAKE_API_KEY": key}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        try:
            address = process.stdout.readline().strip().removeprefix("http://")
            deadline = time.monotonic() + 60
            while not is_ready(address):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.1)
            yield process, address
        finally:
            process.kill()


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/readyz") as answer:
            return answer.status == 200
    except urllib.error.HTTPError as error:
        error.close()
        return False
