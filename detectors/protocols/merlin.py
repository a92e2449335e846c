"""Quantum Detectors' Merlin and MerlinEM: frames over TCP (data port), framed as ``MPX,<10 digits>,<payload>``.

    HDR  once an acquisition   MPX,0000002049,HDR,...      text, 2048 bytes
    MQ1  once a frame          MPX,<n>,MQ1,...<pixels>     a text header that says where the pixels begin

Nothing marks the end. Only a frame's own header says what its pixels are (region of interest, raw mode), so that a
series starts with the first frame after its HDR. Source: as in ``detectors.protocols.merlin_headers``.

Raw frames (R64) are words of 8 bytes, each read backwards: as a big-endian number its lowest 1, 8 or 16 bits are the
first pixel (of 1, 6 or 12 bits). One chip's rows follow each other. A quad's header says 4 columns by 1 row of chips;
each such row holds a row of Q4, Q3, Q2, Q1, and the image is Q1 Q2 above Q3 Q4, the lower two turned by 180 degrees.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from detectors.errors import ConfigurationError, ProtocolError
from detectors.messages import (
    Announced,
    Encoding,
    Message,
    OutgoingMessage,
    ReceivedBatch,
    SeriesEnd,
    SeriesId,
    SeriesStart,
    Undecodable,
)
from detectors.protocols import merlin_headers as headers
from detectors.protocols.gathering import Gathering
from detectors.protocols.merlin_framing import PREFIX_BYTES, framing, message, payload_of, prefix
from detectors.protocols.merlin_headers import AcquisitionHeader, FrameHeader

__all__ = ["ENCODINGS", "NAME", "PORT", "SUMMARY", "Decoder", "Encoder", "framing", "looks_like"]

NAME = "merlin"
SUMMARY = "Quantum Detectors Merlin, TCP"
PORT = 6342
ENCODINGS = {
    "binary": Encoding.RAW_BIG_ENDIAN,
    "raw-1bit": Encoding.MERLIN_1BIT,
    "raw-6bit": Encoding.MERLIN_6BIT,
    "raw-12bit": Encoding.MERLIN_12BIT,
    "quad-raw-1bit": Encoding.MERLIN_QUAD_1BIT,
    "quad-raw-6bit": Encoding.MERLIN_QUAD_6BIT,
    "quad-raw-12bit": Encoding.MERLIN_QUAD_12BIT,
}

#: What a decoded pixel is called in binary mode, and the counter depth that it is usual for.
_BINARY = {np.dtype("u1"): ("U08", 6), np.dtype("<u2"): ("U16", 12), np.dtype("<u4"): ("U32", 24)}


class Decoder:
    """Sans-IO decoder: see ``detectors.messages.StreamDecoder``. Takes messages with and without their prefix.

    Merlin has no series number: the series is the HDR's time stamp and how many acquisitions this decoder has seen. It
    says neither what an HDR is for nor when an acquisition is over, so that both are **concluded from the sequence
    numbers of the frames**. What is remembered between messages:

    ========================  =================================================================================
    ``_hdr``, ``_about``      the HDR in force; empty, if it was missed
    ``_announced``            the id of the series that it announced, until that has a frame
    ``_start``                the series under way, or ended last; None between an HDR and its first frame
    ``_highest``, ``_ended``  its largest sequence number; whether its end was told
    ``_repeated``             the HDR of ``_start`` came again, and no frame has yet told why
    ``_like``                 the last frame's header, for the quick way through the next one's
    ========================  =================================================================================

    ==================================  =======================================================================
    another HDR, or any after the end   ``Announced``; a series that is under way is over, without an end
    the same HDR, no frame so far       nothing
    the same HDR again, later           ``_repeated``: the next full header decides
    first frame of an HDR, or of none   ``SeriesStart`` (without HDR its length is unknown), then the frame
    frame after ``_repeated``           number above ``_highest``: the series **goes on**; else a new one begins
    frame number 1 after the end        a new series, its HDR was lost (unless all it had was one frame)
    other frames after the end          belong to the series that has ended
    end of a batch, or an HDR           ``SeriesEnd`` if ``_highest`` is the last number, frames lost or not
    ==================================  =======================================================================
    """

    def __init__(self) -> None:
        self._hdr = b""
        self._about = AcquisitionHeader({})
        self._acquisitions = 0
        self._announced: str | None = None
        self._start: SeriesStart | None = None
        self._repeated = self._ended = False
        self._highest = 0
        self._like: _Likeness | None = None

    def feed(self, batch: ReceivedBatch) -> list[Message]:
        found = Gathering(batch)
        # Plain integers: a NumPy scalar costs ten times as much to take out.
        slab, offsets, lengths = batch.slab.data, batch.offsets.tolist(), batch.lengths.tolist()
        for parts in batch.messages():
            offset, length = offsets[parts[0]], lengths[parts[0]]
            try:
                if len(parts) != 1:
                    raise ProtocolError(f"a Merlin message has 1 part, this one has {len(parts)}")
                like = self._like
                numbers = None if like is None else like.read(slab, offset, length)
                if like is not None and numbers is not None:
                    sequence, time_ns = numbers
                    if sequence > self._highest:
                        self._highest = sequence
                    size = like.payload_bytes
                    found.add(like.series, like.encoding, sequence - 1, offset + length - size, size, time_ns)
                else:
                    self._look(slab[offset : offset + length], offset + length, found)
            except ProtocolError as error:
                found.say(Undecodable(str(error)))
        self._end_if_complete(found)
        found.close()
        return found.messages

    def _look(self, data: memoryview, end: int, found: Gathering) -> None:
        """Take an HDR, or a frame whose header is not like the last one's; ``end``: where it ends in the slab."""
        payload = payload_of(data)
        if payload[:4] == b"HDR,":
            self._end_if_complete(found)
            self._take_hdr(bytes(payload), found)
            return
        header = headers.parse_frame_header(payload, self._about.counter_depth)
        size = payload.nbytes - header.data_offset
        if size != header.payload_bytes:
            raise ProtocolError(
                f"a Merlin frame of {header.width}x{header.height} {header.dtype_name} pixels has "
                f"{header.payload_bytes} bytes of them, this one {size}"
            )
        if self._begins(header):
            found.say(self._begin(header))
        start = self._start
        assert start is not None
        if (header.detector_shape, header.dtype) != (start.detector_shape, start.dtype):
            raise ProtocolError(
                f"a Merlin frame of {_described(header.detector_shape, header.dtype)} in a series of "
                f"{_described(start.detector_shape, start.dtype)}"
            )
        self._highest = max(self._highest, header.sequence)
        found.add(start.series, header.encoding, header.sequence - 1, end - size, size, header.timestamp_ns)
        self._like = None if self._ended else _Likeness.of(data, start.series, header.encoding, size)

    def _end_if_complete(self, found: Gathering) -> None:
        """Merlin does not say that an acquisition is over, but how many frames it has."""
        frames = None if self._start is None else self._start.frames
        if self._start is not None and frames is not None and self._highest >= frames and not self._ended:
            self._ended, self._like = True, None
            found.say(SeriesEnd(self._start.series))

    def _take_hdr(self, hdr: bytes, found: Gathering) -> None:
        about = headers.parse_acquisition_header(hdr)
        self._like = None  # what it means shows in the next frame
        if hdr == self._hdr and not self._ended:
            self._repeated = self._start is not None
            return
        self._hdr, self._about, self._start = hdr, about, None
        self._repeated = self._ended = False
        self._announced = self._new_id()
        found.say(Announced(self._announced))

    def _begins(self, header: FrameHeader) -> bool:
        """Whether a series begins with this frame."""
        if self._start is None:
            return True
        anew, self._repeated = self._repeated and header.sequence <= self._highest, False
        if self._ended and header.sequence == 1 < (self._start.frames or 1):  # a new acquisition, its HDR lost
            self._hdr, self._about, self._ended, anew = b"", AcquisitionHeader({}), False, True
        return anew

    def _begin(self, header: FrameHeader) -> SeriesStart:
        self._start = SeriesStart(
            self._announced or self._new_id(),
            header.detector_shape,
            header.dtype,
            self._about.scan_shape,
            self._about.frames,
            headers.settings_of(self._about, header),
            (message(self._hdr),) if self._hdr else (),
        )
        self._announced, self._highest = None, 0
        return self._start

    def _new_id(self) -> str:
        self._acquisitions += 1
        return f"{self._about.time_stamp or 'acquisition'} #{self._acquisitions}"


def _described(shape: tuple[int, int], dtype: np.dtype) -> str:
    return f"{shape[0]}x{shape[1]} {dtype.name}"


_CHANGING = re.compile(
    rb"MQ1,(\d+)((?:,[^,]*){6},).*?(,MQ1A,)(\d{4}-\d\d-\d\dT\d\d:\d\d:)(\d\d)\.(\d{9})(Z,[^,]*,[^,]*,)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class _Likeness:
    """The quick way through a header: most differ from the one before in number, seconds and DACs alone.

    ``fixed``: where (start, stop) it must hold which bytes; the other places are those of its number, of the seconds,
    and of their nine decimals. ``minute_ns`` is what the seconds count from.
    """

    series: SeriesId
    encoding: Encoding
    payload_bytes: int
    message_bytes: int
    header_bytes: int
    fixed: tuple[tuple[slice, bytes], ...]
    number: slice
    seconds: slice
    fraction: slice
    minute_ns: int

    @classmethod
    def of(cls, data: memoryview, series: SeriesId, encoding: Encoding, payload_bytes: int) -> _Likeness | None:
        """From a message that was read in full; None where its header has no time in ns (old software)."""
        head = bytes(data[: data.nbytes - payload_bytes])
        match = _CHANGING.match(head, head.startswith(b"MPX,") * PREFIX_BYTES)
        minute_ns = None if match is None else headers.nanoseconds(match[4] + b"00")
        if match is None or minute_ns is None:
            return None
        number, layout, clock, minute, seconds, fraction, rest = (slice(*match.span(group)) for group in range(1, 8))
        fixed = slice(0, number.start), layout, slice(clock.start, minute.stop), rest
        held = tuple((place, head[place]) for place in fixed)
        return cls(
            *(series, encoding, payload_bytes, data.nbytes, match.end()),
            *(held, number, seconds, fraction, minute_ns),
        )

    def read(self, slab: memoryview, offset: int, length: int) -> tuple[int, int] | None:
        """Sequence number and time [ns] of a message, if it is of this likeness."""
        if length != self.message_bytes:
            return None
        head = slab[offset : offset + self.header_bytes].tobytes()
        for place, expected in self.fixed:
            if head[place] != expected:
                return None
        number, seconds, fraction = head[self.number], head[self.seconds], head[self.fraction]
        if not (number + seconds + fraction).isdigit() or (sequence := int(number)) == 0:
            return None
        return sequence, self.minute_ns + int(seconds) * 10**9 + int(fraction)


class Encoder:
    """The sending half: see ``detectors.messages.StreamEncoder``. ``clock`` tells the time in ns since 1970.

    Merlin knows nothing of the microscope's optics: of a start message, only shape, type, scan, number of frames, and
    of the settings ``count_time_s``, ``counter_depth``, ``frames_per_trigger`` and ``thresholds_kev`` are sent.
    Frames without a time are one ``count_time_s`` apart.
    """

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._header: FrameHeader | None = None

    def start(self, start: SeriesStart) -> list[OutgoingMessage]:
        if start.dtype not in _BINARY or start.channels:
            raise ConfigurationError(
                f"Merlin frames have one channel of uint8, uint16 or uint32, not {len(start.channels) or 1} of "
                f"{start.dtype.name}; choose another protocol or dtype"
            )
        name, depth = _BINARY[start.dtype]
        quad = start.detector_shape == (512, 512)
        self._header = like = FrameHeader(
            sequence=1,
            data_offset=768 if quad else 384,
            chips=4 if quad else 1,
            width=start.detector_shape[1],
            height=start.detector_shape[0],
            dtype_name=name,
            layout="2x2" if quad else "1x1",
            timestamp_ns=self._clock(),
            shutter_ns=round(start.settings.get("count_time_s", 1e-3) * 1e9),
            counter_depth=start.settings.get("counter_depth", depth),
            thresholds_kev=tuple(start.settings.get("thresholds_kev", ())),
        )
        hdr = headers.acquisition_header(
            like, start.frames, start.settings.get("frames_per_trigger", 1), start.scan_shape
        )
        return [[message(hdr)]]

    def frames(
        self,
        series: SeriesId,
        first: int,
        payloads: Sequence[bytes | memoryview],
        encoding: Encoding,
        *,
        others: Sequence[tuple[Encoding, Sequence[bytes | memoryview]]] = (),
        exposed_ns: Sequence[int] | None = None,
    ) -> list[OutgoingMessage]:
        """One message a frame, of two parts that follow each other on the wire: header and pixels."""
        assert self._header is not None, "frames come after their start"
        like = _packed_as(self._header, encoding)
        began_ns, period_ns = like.timestamp_ns or 0, like.shutter_ns
        messages: list[OutgoingMessage] = []
        for i, payload in enumerate(payloads):
            time_ns = began_ns + (first + i) * period_ns if exposed_ns is None else exposed_ns[i]
            header = headers.frame_header(replace(like, sequence=first + i + 1, timestamp_ns=time_ns))
            size = len(header) + memoryview(payload).nbytes
            messages.append([prefix(size) + header, payload])
        return messages

    def end(self, series: SeriesId) -> list[OutgoingMessage]:
        return []


def _packed_as(header: FrameHeader, encoding: Encoding) -> FrameHeader:
    """The header of the same frames, packed so. Raises ``ConfigurationError`` where Merlin cannot."""
    if encoding is Encoding.RAW_BIG_ENDIAN or (encoding is Encoding.RAW and header.dtype.itemsize == 1):
        return header
    rows, columns = shape = header.detector_shape
    for depth, (single, quad, dtype, _) in headers.RAW_MODES.items():
        raw = replace(header, dtype_name="R64", counter_depth=depth, data_offset=384, chips=1, layout="1x1")
        if encoding is quad:
            raw = replace(raw, width=2 * columns, height=rows // 2, data_offset=768, chips=4, layout="2x2")
        try:
            if encoding in (single, quad) and (raw.detector_shape, dtype) == (shape, header.dtype):
                return raw
        except ProtocolError:  # the pixels do not fill words
            break
    raise ConfigurationError(
        f"Merlin cannot send frames of {_described(shape, header.dtype)} as {encoding.name}; it has big-endian binary "
        "ones, and raw ones of 1 and 6 bits (uint8) and 12 bits (uint16), where a chip's rows fill words of 8 bytes"
    )


def looks_like(part: bytes) -> bool:
    """Whether a message's first bytes are of this protocol."""
    return part.startswith((b"MPX,", b"MQ1,"))
