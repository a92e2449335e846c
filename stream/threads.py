"""Work in threads that is never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

#: More than a session ever uses at a time: decoding, recording, images and control never wait for each other.
_POOL = ThreadPoolExecutor(16, thread_name_prefix="session")


async def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Run the calls in a thread each, all at the same time, and wait for every one of them, also when cancelled.

    A thread cannot be cancelled: memory and files that it works on belong to it until it returns. Returns the results
    in order; the first exception is raised once all have ended.
    """
    loop = asyncio.get_running_loop()
    work = asyncio.gather(*(loop.run_in_executor(_POOL, call) for call in calls), return_exceptions=True)
    try:
        outcomes = await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes
