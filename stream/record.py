"""Recording without reconstructing: the stream goes to disk as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from detectors.errors import ConnectionFailed, DataFileError
from detectors.messages import FrameBlock, SeriesEnd, SeriesStart, Undecodable
from detectors.protocols.registry import protocol_named
from stream.intake import Orphans, Silence, messages
from stream.receiving import open_receiver
from stream.recording import Recorder
from stream.threads import in_threads


@dataclass(frozen=True)
class Recorded:
    """How a recording went: ``frames`` written, ``incomplete`` says in words why it is not whole, or is empty."""

    frames: int
    incomplete: str = ""


#: Without --timeout, a series that has begun is given up after so long a silence [s].
SERIES_TIMEOUT_S = 30.0


async def record_stream(
    addresses: Sequence[str],
    path: Path,
    *,
    protocol: str = "native",
    bind: bool = False,
    pattern: str = "pull",
    timeout_s: float | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    ready: Callable[[list[str]], object] | None = None,
) -> Recorded:
    """Record one series from ``addresses`` into ``path`` (which must not exist), from its start to its end message.

    ``progress`` is called with (frames so far, frames announced or None); ``ready`` with the endpoints in use.
    ``timeout_s``: see ``SessionOptions``. When the disk is slower than the stream, the sender is slowed down: nothing
    is dropped. Raises ``ConnectionFailed`` when nobody sends, ``DataFileError`` when the file cannot be written.
    """
    if path.exists():  # noqa: ASYNC240 - once, before anything waits for this loop
        raise DataFileError(f"{path} exists already; recordings are never overwritten: choose another name or move it")
    recorder: Recorder | None = None
    start: SeriesStart | None = None
    orphans = Orphans()
    spoken = protocol_named(protocol)
    async with open_receiver(spoken, addresses, bind=bind, pattern=pattern) as receiver:
        if ready is not None:
            ready(receiver.endpoints)
        stream = messages(receiver, spoken)
        try:
            async for item in stream:
                if isinstance(item, SeriesStart) and recorder is None:
                    start = item
                    recorder = Recorder(path, start, protocol, version("liveptycho"))
                    for block in orphans.claim(start):
                        await in_threads(partial(recorder.write, block))
                elif isinstance(item, SeriesStart) and start is not None and item.series != start.series:
                    return Recorded(recorder.frames if recorder else 0, f"series {item.series} began before its end")
                elif isinstance(item, FrameBlock):
                    if recorder is None or start is None or item.series != start.series:
                        orphans.keep(item)
                        continue
                    await in_threads(partial(recorder.write, item))
                    if progress is not None:
                        progress(recorder.frames, start.frames)
                elif isinstance(item, Undecodable) and recorder is not None:
                    recorder.undecodable(1)
                elif (
                    isinstance(item, SeriesEnd)
                    and recorder is not None
                    and start is not None
                    and item.series == start.series
                ):
                    await in_threads(partial(recorder.end, item))
                    missing = 0 if start.frames is None else start.frames - recorder.frames
                    return Recorded(
                        recorder.frames, f"{missing} of {start.frames} frames did not come" if missing > 0 else ""
                    )
                elif isinstance(item, Silence):
                    limit = timeout_s if timeout_s is not None or recorder is None else SERIES_TIMEOUT_S
                    if limit is not None and item.seconds >= limit:
                        if recorder is None:
                            raise ConnectionFailed(f"nothing came from {', '.join(addresses)} within {limit:g} s")
                        return Recorded(recorder.frames, f"nothing came for {limit:g} s, and no end message")
        finally:
            await stream.aclose()
            if recorder is not None:
                recorder.close()
    raise AssertionError("the stream of messages does not end by itself")
