"""liveptycho's streaming side: frames in, phase image out.

The names of ``stream.api`` can be taken from here. They are loaded when first asked for, so that a viewer, which needs
the message types only, does not wait for the whole engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stream.api import *  # noqa: F403 - exactly its __all__


def __dir__() -> list[str]:
    return importlib.import_module("stream.api").__all__


def __getattr__(name: str) -> Any:
    # Introspection asks for all kinds of dunder names, also while stream.api is being imported.
    if name.startswith("_"):
        raise AttributeError(f"module 'stream' has no attribute {name!r}")
    # Not `from stream import api`: that asks here for `api` first.
    api = importlib.import_module("stream.api")
    if name in api.__all__:
        return getattr(api, name)
    raise AttributeError(f"module 'stream' has no attribute {name!r}")
