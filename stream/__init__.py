"""liveptycho's streaming side: frames in, phase image out.

The names of ``stream.api`` can be taken from here. They are loaded when first asked for, so that a viewer, which needs
the message types only, does not wait for the whole engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stream.api import (
        METHODS as METHODS,
    )
    from stream.api import (
        Aberrations as Aberrations,
    )
    from stream.api import (
        AxesRelation as AxesRelation,
    )
    from stream.api import (
        Counters as Counters,
    )
    from stream.api import (
        Dataset4D as Dataset4D,
    )
    from stream.api import (
        DetectorGeometry as DetectorGeometry,
    )
    from stream.api import (
        OverlapMasks as OverlapMasks,
    )
    from stream.api import (
        Probe as Probe,
    )
    from stream.api import (
        Recording as Recording,
    )
    from stream.api import (
        Result as Result,
    )
    from stream.api import (
        Session as Session,
    )
    from stream.api import (
        SessionOptions as SessionOptions,
    )
    from stream.api import (
        Settings as Settings,
    )
    from stream.api import (
        Snapshot as Snapshot,
    )
    from stream.api import (
        open_dataset as open_dataset,
    )
    from stream.api import (
        open_recording as open_recording,
    )
    from stream.api import (
        open_session as open_session,
    )
    from stream.api import (
        overlap_function as overlap_function,
    )
    from stream.api import (
        overlap_masks as overlap_masks,
    )
    from stream.api import (
        reconstruct as reconstruct,
        spectrum_at as spectrum_at,
    )


def __getattr__(name: str) -> Any:
    # Not `from stream import api`: that asks here for `api` first.
    api = importlib.import_module("stream.api")
    if name in api.__all__:
        return getattr(api, name)
    raise AttributeError(f"module 'stream' has no attribute {name!r}")
