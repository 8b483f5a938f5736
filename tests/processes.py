"""Processes of their own that begin at once: forks of one that has imported torch and longtake and run nothing.

For what needs a process: to be killed, to be one of two, to have limits or variables of its own. How a fresh
interpreter starts is another thing, and tested with one.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["torch._dynamo", "longtake.training", "longtake.batch", "longtake.media.mp4", "pytest"]  # optimizers import dynamo
)


class Started:
    """A process that does `work(*arguments)`, which may return an exit code, with `folder` as its current one.

    limit: called in the process before the work. variables: of its environment, beside those of this process.
    """

    def __init__(
        self,
        work: Callable[..., int | None],
        *arguments: Any,
        folder: Path | None = None,
        limit: Callable[[], None] | None = None,
        **variables: str,
    ) -> None:
        self._said = tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self._said.name, name) for name in ("out", "err"))
        for path in (self.out, self.err):
            path.touch()
        environment, pipes = dict(os.environ) | variables, (str(self.out), str(self.err))
        given = (work, arguments, str(folder or Path.cwd()), environment, pipes, limit)
        self._process = _FORKS.Process(target=_do, args=given)
        self._process.start()
        self.pid = self._process.pid

    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """By SIGKILL, which nothing can catch."""
        self._process.kill()
        self._process.join()
        self._said.cleanup()

    def finished(self, timeout: float = 200) -> "CompletedProcess[str]":
        """Its exit code and what it has written, once it is through; AssertionError if it is not in so many seconds."""
        self._process.join(timeout)
        if self.running():
            said = self.err.read_text()
            self.kill()
            raise AssertionError(f"still running after {timeout} seconds: {said}")
        code = self._process.exitcode
        assert code is not None
        done = CompletedProcess([], code, self.out.read_text(), self.err.read_text())
        self._said.cleanup()
        return done


def run(work: Callable[..., int | None], *arguments: Any, **more: Any) -> "CompletedProcess[str]":
    """What becomes of one process."""
    return Started(work, *arguments, **more).finished()


def run_ranks(work: Callable[..., None], *arguments: Any, count: int = 2) -> list[int]:
    """Exit codes of processes side by side, each with its rank as the first argument."""
    processes = [Started(work, rank, *arguments) for rank in range(count)]
    return [process.finished().returncode for process in processes]


def free_port() -> str:
    """A port of this machine that nobody listens on, for ranks to meet at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def _do(
    work: Callable[..., int | None],
    arguments: Sequence[Any],
    folder: str,
    environment: dict[str, str],
    pipes: Sequence[str],
    limit: Callable[[], None] | None,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in zip((1, 2), pipes, strict=True):
        os.dup2(os.open(path, os.O_WRONLY), number)
    if limit is not None:
        limit()
    sys.exit(work(*arguments))
