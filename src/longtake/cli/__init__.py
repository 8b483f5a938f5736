"""The command line, `longtake VERB`: a module for each verb, which joins the parts that may not know each other.

Verbs import the parts of longtake that they use when they run: torch takes seconds to import, and `longtake --help`
should not wait for it.
"""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from tyro.extras import SubcommandApp

from longtake.cli import bench, doctor, evaluate, explain, generate, models, plan, replay, serve, take, train, verify
from longtake.cli.terminal import BAD_INPUT, INTERRUPTED, UNREAD, in_one_line, is_out_of_memory, leave_unread, say

app = SubcommandApp()
app.command(generate.generate)
app.command(replay.replay)
app.command(take.app, name="take", help="Go on with streams that were kept: generate --take keeps one.")
app.command(serve.serve)
app.command(bench.app, name="bench", help="Measure speed on this machine.")
app.command(evaluate.app, name="evaluate", help="Score what a recipe makes.")
app.command(train.app, name="train", help="Train the embedded model's parts, one stage a call.")
app.command(models.app, name="models", help="List, fetch, convert and shrink weights; alone, it lists them.")
app.command(verify.verify)
app.command(plan.plan)
app.command(explain.explain)
app.command(doctor.doctor)


_NARROWEST = 50  # columns, in which help can be read; in fewer than 8 laying it out never ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 1 a check failed (`verify`, `doctor`, `replay`), 2 bad input (one
    line on stderr), 130 stopped by Ctrl-C, SIGTERM or SIGHUP, 141 stopped as nobody reads what it prints, as by
    `| head`.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # as in a service that closed them
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if shutil.get_terminal_size().columns < _NARROWEST:
        os.environ["COLUMNS"] = str(_NARROWEST)
    exit_code = 0
    try:
        try:
            with _ended_as_by_ctrl_c():
                exit_code = _run(arguments)
                return exit_code
        finally:
            print(end="", flush=True)  # else what is left fails when Python ends, where nobody can catch it
    except BrokenPipeError:
        leave_unread(sys.stdout, sys.stderr)
        return UNREAD
    except OSError as error:
        if not exit_code:  # else it is told
            say(f"cannot print: {in_one_line(error)}")
        leave_unread(sys.stdout)
        return exit_code or BAD_INPUT


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, of a scheduler, and SIGHUP, of a terminal that was closed, do what Ctrl-C would: a video is kept.

    Not of one of many processes, which may be waiting for the others, nor where they are ignored (nohup).
    """

    def stop(number: int, frame: FrameType | None) -> None:
        asked = signal.getsignal(signal.SIGINT)
        (asked if callable(asked) else signal.default_int_handler)(number, frame)

    alone = threading.current_thread() is threading.main_thread() and int(os.environ.get("WORLD_SIZE", "1")) == 1
    heard = [one for one in (signal.SIGTERM, signal.SIGHUP) if alone and signal.getsignal(one) is signal.SIG_DFL]
    for one in heard:
        signal.signal(one, stop)
    try:
        yield
    finally:
        for one in heard:
            signal.signal(one, signal.SIG_DFL)


def _run(arguments: Sequence[str] | None) -> int:
    # Before torch is imported: by default its threads spin long for work, which beside one other busy process makes a
    # block take minutes; not spinning at all costs an idle machine almost half its speed.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        exit_code: int = app.cli(
            prog="longtake",
            description="Endless, live, steerable video from text.",
            args=_with_default_verb(sys.argv[1:] if arguments is None else arguments),
        )
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        say(in_one_line(error))
        return BAD_INPUT
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        say(f"{in_one_line(error)} (`longtake plan --vram SIZE` tells what would fit)")
        return BAD_INPUT
    except KeyboardInterrupt as stopped:
        if str(stopped):
            say(str(stopped))
        return INTERRUPTED
    return exit_code


def _with_default_verb(arguments: Sequence[str]) -> Sequence[str]:
    """`longtake models`, with or without options, is short for `longtake models list`."""
    verb, *rest = arguments or ("",)
    if verb == "models" and (not rest or (rest[0].startswith("-") and rest[0] not in ("-h", "--help"))):
        return [verb, "list", *rest]
    return arguments
