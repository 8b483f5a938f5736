"""Works that go on beside each other until one of them ends."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any


async def until_one_ends(*works: Coroutine[Any, Any, None]) -> Sequence[asyncio.Task[None]]:
    """The tasks of them all, once one has ended and the others were stopped."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    return tasks


def ended_well(task: asyncio.Task[None]) -> bool:
    return not task.cancelled() and task.exception() is None


def raise_first(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
