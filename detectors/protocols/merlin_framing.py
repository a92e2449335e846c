"""How Merlin keeps messages apart on its two TCP sockets: ``MPX,<10 digits>,<payload>``."""

from __future__ import annotations

import re

from detectors.messages import Framed

#: A length beyond is damage: the largest frame of four chips has 1 MB.
MAX_MESSAGE_BYTES = 16 << 20

_PREFIX = re.compile(rb"MPX,(\d{10}),")
PREFIX_BYTES = 15
#: A prefix, or the beginning of one where the bytes end.
_BEGINNING = re.compile(rb"M(?:PX,\d{10},|(?:PX,\d{0,10}|PX|P|)\Z)")
_DATA_MESSAGE = re.compile(rb"MPX,\d{10},(?:MQ1|HDR),")


def prefix(payload_bytes: int) -> bytes:
    """What comes before a payload; the number in it counts the comma that follows it, too."""
    return b"MPX,%010d," % (payload_bytes + 1)


def message(payload: bytes) -> bytes:
    """A payload with its prefix."""
    return prefix(len(payload)) + payload


def payload_of(data: memoryview) -> memoryview:
    """What a message holds, without the prefix that it may have."""
    return data[PREFIX_BYTES:] if _PREFIX.match(data) else data


def framing(data: memoryview, *, replies: bool = False) -> Framed:
    """The messages in ``data``, each with its prefix, for data and control socket: see ``detectors.messages.Framing``.

    What is no message is passed over as stray. So is a message that is cut short by the next one: it is recognised
    by what follows its supposed end. ``replies``: the replies of a control socket, of which LiberTEM's simulator counts
    one byte too few, so that the return code would be missing.
    """
    bounds: list[tuple[int, int]] = []
    at, end, stray = 0, len(data), 0
    while at < end:
        match = _PREFIX.match(data, at)
        length = PREFIX_BYTES - 1 + int(match[1]) if match else 0
        if PREFIX_BYTES <= length <= MAX_MESSAGE_BYTES:
            stop = at + length
            if replies and stop <= end and data[stop - 1] == ord(","):
                stop += 1
            if stop > end:
                break
            cut = None
            if stop < end and not _BEGINNING.match(data, stop):
                cut = _DATA_MESSAGE.search(data, at + 1, stop)
            if cut is None:
                bounds.append((at, stop))
                at = stop
                continue
            next_at = cut.start()
        else:
            beginning = _BEGINNING.search(data, at if match is None else at + 1)
            next_at = end if beginning is None else beginning.start()
            if next_at == at:  # a prefix that has not come in full
                break
        stray += next_at - at
        at = next_at
    return Framed(bounds, at, stray)
