"""What holds for every test: no display is needed, leaked tasks fail, GPU tests say why they are skipped."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator
from pathlib import Path

# Before anything imports Qt: tests never open windows on somebody's screen.
os.environ["QT_QPA_PLATFORM"] = "offscreen"

import pytest
import pytest_asyncio

from detectors.errors import ConfigurationError
from stream.array import choose_device

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.function):
            item.fixturenames.append("no_leaked_tasks")
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    try:
        choose_device("gpu")
    except ConfigurationError as error:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {error}"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the reference data sets, which do not travel with the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the reference data sets (../shared/data) are not on this machine")
    return SHARED_DATA


@pytest_asyncio.fixture
async def no_leaked_tasks() -> AsyncIterator[None]:
    """An asynchronous test must end every task that it began."""
    yield
    current = asyncio.current_task()
    # A task that has just been cancelled may need a turn to notice.
    for _ in range(5):
        leaked = [task for task in asyncio.all_tasks() if task is not current and not task.done()]
        if not leaked:
            return
        await asyncio.sleep(0)
    pytest.fail(f"tasks are still running: {leaked}")
