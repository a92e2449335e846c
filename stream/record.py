"""Recording without reconstructing: the stream goes to disk as it comes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from detectors.errors import ConnectionFailed, DataFileError
from detectors.messages import FrameBlock, SeriesEnd, SeriesStart, Undecodable
from detectors.protocols.registry import protocol_named
from stream.intake import Orphans, Silence, messages
from stream.neighbours import GapPattern
from stream.receiving import open_receiver
from stream.recording import Recorder
from stream.session_options import aside, make_folder, unused_number
from stream.threads import in_threads

logger = logging.getLogger(__name__)


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

    A series that is cut off by the start of another one is kept beside it, as ``NAME-aborted-1``.

    ``progress`` is called with (frames so far, frames announced or None); ``ready`` with the endpoints in use.
    ``timeout_s``: see ``SessionOptions``. When the disk is slower than the stream, the sender is slowed down: nothing
    is dropped. Raises ``ConnectionFailed`` when nobody sends, ``DataFileError`` when the file cannot be written.
    """
    if path.exists():  # noqa: ASYNC240 - once, before anything waits for this loop
        raise DataFileError(f"{path} exists already; recordings are never overwritten: choose another name or move it")
    make_folder(path)
    recorder: Recorder | None = None
    start: SeriesStart | None = None
    orphans, gaps, strange = Orphans(), GapPattern(), ""
    spoken = protocol_named(protocol)
    async with open_receiver(spoken, addresses, bind=bind, pattern=pattern) as receiver:
        if ready is not None:
            ready(receiver.endpoints)
        stream = messages(receiver, spoken)
        try:
            async for item in stream:
                if isinstance(item, SeriesStart):
                    if start is not None and (item.series, item.header) == (start.series, start.header):
                        continue  # publishers repeat it
                    if recorder is not None:
                        # An aborted series, or the rest of an old one: the newest is the one that is wanted.
                        recorder.close()
                        await in_threads(partial(_set_aside, path, recorder, item))
                    start, gaps = item, GapPattern()
                    recorder = Recorder(path, start, protocol, version("liveptycho"))
                    for block in orphans.claim(start):
                        await in_threads(partial(recorder.write, block))
                elif isinstance(item, FrameBlock):
                    gaps.take(item.indices)
                    if recorder is None or start is None or item.series != start.series:
                        orphans.keep(item)
                        continue
                    await in_threads(partial(recorder.write, item))
                    if progress is not None:
                        progress(recorder.frames, start.frames)
                elif isinstance(item, Undecodable) and recorder is None:
                    strange = item.reason
                elif isinstance(item, Undecodable) and recorder is not None:
                    recorder.undecodable(item.frames)
                elif isinstance(item, SeriesEnd) and recorder is None:
                    orphans.forget(item.series)
                elif (
                    isinstance(item, SeriesEnd)
                    and recorder is not None
                    and start is not None
                    and item.series == start.series
                ):
                    await in_threads(partial(recorder.end, item))
                    return Recorded(recorder.frames, _missing(start, recorder.frames, gaps))
                elif isinstance(item, Silence):
                    limit = timeout_s if timeout_s is not None or recorder is None else SERIES_TIMEOUT_S
                    if limit is not None and item.seconds >= limit:
                        if recorder is None or start is None:
                            raise ConnectionFailed(
                                f"{'no series' if gaps.sentence or strange else 'nothing'} came from "
                                f"{', '.join(addresses)} within {limit:g} s"
                                + (f"; {gaps.sentence}" if gaps.sentence else "")
                                + (f"; what came could not be read: {strange}" if strange else "")
                            )
                        told = f"nothing came for {limit:g} s, and no end message"
                        lacking = _missing(start, recorder.frames, gaps)
                        return Recorded(recorder.frames, f"{told}; {lacking}" if lacking else told)
        finally:
            await stream.aclose()
            if recorder is not None:
                recorder.close()
    raise AssertionError("the stream of messages does not end by itself")


def _missing(start: SeriesStart, frames: int, gaps: GapPattern) -> str:
    """What did not come, in words; empty when everything did."""
    if start.frames is None or frames >= start.frames:
        return ""
    told = f"{start.frames - frames} of {start.frames} frames did not come"
    return f"{told}; {gaps.sentence}" if gaps.sentence else told


def _set_aside(path: Path, recorder: Recorder, newer: SeriesStart) -> None:
    kept = aside(path, unused_number(path))
    path.rename(kept)
    logger.warning(
        "series %s began before the end of series %s, of which %d frames are in %s",
        newer.series,
        recorder.start.series,
        recorder.frames,
        kept,
    )
