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
    Encoding,
    FrameBlock,
    Message,
    OutgoingMessage,
    ReceivedBatch,
    SeriesEnd,
    SeriesId,
    SeriesStart,
    Undecodable,
)
from detectors.protocols import merlin_headers as headers
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

    Merlin has no series number: the series is the HDR's time stamp and how many acquisitions this decoder has seen. The
    same HDR again while its acquisition goes on changes nothing; where the sequence numbers begin anew after it, it is
    a new acquisition. Frames without HDR (connected in the middle) are a series of unknown length. A series ends with
    the batch in which its last sequence number came, whether or not frames were lost before.
    """

    def __init__(self) -> None:
        self._hdr = b""
        self._about = AcquisitionHeader({})
        self._acquisitions = 0
        self._start: SeriesStart | None = None
        self._repeated = self._ended = False
        self._highest = 0
        self._like: _Likeness | None = None

    def feed(self, batch: ReceivedBatch) -> list[Message]:
        run = _Run(batch, self._highest)
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
                    run.add(like.kind, *numbers, offset + length)
                else:
                    self._look(slab[offset : offset + length], offset + length, run)
            except ProtocolError as error:
                run.close()
                run.messages.append(Undecodable(str(error)))
        self._end_if_complete(run)
        self._highest = run.highest
        return run.messages

    def _look(self, data: memoryview, end: int, run: _Run) -> None:
        """Take an HDR, or a frame whose header is not like the last one's; ``end``: where it ends in the slab."""
        payload = payload_of(data)
        if payload[:4] == b"HDR,":
            self._end_if_complete(run)
            self._announced(bytes(payload))
            return
        header = headers.parse_frame_header(payload, self._about.counter_depth)
        size = payload.nbytes - header.data_offset
        if size != header.payload_bytes:
            raise ProtocolError(
                f"a Merlin frame of {header.width}x{header.height} {header.dtype_name} pixels has "
                f"{header.payload_bytes} bytes of them, this one {size}"
            )
        if self._begins(header, run.highest):
            run.close()
            run.highest = 0
            self._start = self._new_series(header)
            run.messages.append(self._start)
        start = self._start
        assert start is not None
        if (header.detector_shape, header.dtype) != (start.detector_shape, start.dtype):
            raise ProtocolError(
                f"a Merlin frame of {_described(header.detector_shape, header.dtype)} in a series of "
                f"{_described(start.detector_shape, start.dtype)}"
            )
        kind = start.series, header.encoding, size
        run.add(kind, header.sequence, header.timestamp_ns, end)
        self._like = None if self._ended else _Likeness.of(data, kind)

    def _end_if_complete(self, run: _Run) -> None:
        """Merlin does not say that an acquisition is over, but how many frames it has."""
        run.close()
        frames = None if self._start is None else self._start.frames
        if self._start is not None and frames is not None and run.highest >= frames and not self._ended:
            self._ended, self._like = True, None
            run.messages.append(SeriesEnd(self._start.series))

    def _announced(self, hdr: bytes) -> None:
        about = headers.parse_acquisition_header(hdr)
        self._like = None  # what it means shows in the next frame
        if hdr == self._hdr and not self._ended:
            self._repeated = self._start is not None
            return
        self._hdr, self._about, self._start = hdr, about, None
        self._repeated = self._ended = False

    def _begins(self, header: FrameHeader, highest: int) -> bool:
        """Whether a series begins with this frame."""
        if self._start is None:
            return True
        anew, self._repeated = self._repeated and header.sequence <= highest, False
        if self._ended and header.sequence == 1 < (self._start.frames or 1):  # a new acquisition, its HDR lost
            self._hdr, self._about, self._ended, anew = b"", AcquisitionHeader({}), False, True
        return anew

    def _new_series(self, header: FrameHeader) -> SeriesStart:
        self._acquisitions += 1
        about = self._about
        known = {
            "detector": "Merlin",
            "detector_number": about.text("Chip ID"),
            "software_version": about.text("Software Version"),
            "began": about.time_stamp,
            "trigger_start": about.text("Trigger Start"),
            "trigger_stop": about.text("Trigger Stop"),
            "counter_depth": header.counter_depth or about.counter_depth,
            "thresholds_kev": about.thresholds_kev or [energy for energy in header.thresholds_kev if energy],
            "count_time_s": header.shutter_ns * 1e-9,
            "frames_per_trigger": about.frames_per_trigger if (about.frames_per_trigger or 1) > 1 else None,
        }
        return SeriesStart(
            f"{about.time_stamp or 'acquisition'} #{self._acquisitions}",
            header.detector_shape,
            header.dtype,
            about.scan_shape,
            about.frames,
            {key: value for key, value in known.items() if value},
            (message(self._hdr),) if self._hdr else (),
        )


def _described(shape: tuple[int, int], dtype: np.dtype) -> str:
    return f"{shape[0]}x{shape[1]} {dtype.name}"


#: What the frames of a block have in common: series, encoding, bytes of pixels.
_Kind = tuple[SeriesId, Encoding, int]


class _Run:
    """Consecutive frames of one kind, gathered into one block."""

    def __init__(self, batch: ReceivedBatch, highest: int) -> None:
        self.batch = batch
        self.messages: list[Message] = []
        self.highest = highest
        """the series' largest sequence number"""
        self._kind: _Kind | None = None
        self._sequence: list[int] = []
        self._times: list[int | None] = []
        self._ends: list[int] = []

    def add(self, kind: _Kind, sequence: int, time_ns: int | None, end: int) -> None:
        """A frame whose pixels end at ``end`` in the slab."""
        if kind != self._kind:
            self.close()
            self._kind = kind
        if sequence > self.highest:
            self.highest = sequence
        self._sequence.append(sequence)
        self._times.append(time_ns)
        self._ends.append(end)

    def close(self) -> None:
        if self._kind is None or not self._sequence:
            return
        series, encoding, size = self._kind
        block = FrameBlock(
            series,
            encoding,
            np.array(self._sequence, np.int64) - 1,
            np.array(self._ends, np.int64) - size,
            np.full(len(self._ends), size, np.int64),
            self.batch.slab,
            self.batch.time_ns,
            None if None in self._times else np.array(self._times, np.int64),
        )
        self.messages.append(block)
        self._sequence, self._times, self._ends = [], [], []


_CHANGING = re.compile(
    rb"MQ1,(\d+)((?:,[^,]*){6},).*?(,MQ1A,)(\d{4}-\d\d-\d\dT\d\d:\d\d:)(\d\d)\.(\d{9})(Z,[^,]*,[^,]*,)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class _Likeness:
    """The quick way through a header: most differ from the one before in number, seconds and DACs alone.

    ``fixed``: where (start, stop) it must hold which bytes; the other places are those of its number, of the seconds,
    and of their nine decimals. ``minute_ns`` is what the seconds count from.
    """

    kind: _Kind
    message_bytes: int
    header_bytes: int
    fixed: tuple[tuple[slice, bytes], ...]
    number: slice
    seconds: slice
    fraction: slice
    minute_ns: int

    @classmethod
    def of(cls, data: memoryview, kind: _Kind) -> _Likeness | None:
        """From a message that was read in full; None where its header has no time in ns (old software)."""
        head = bytes(data[: data.nbytes - kind[2]])
        match = _CHANGING.match(head, head.startswith(b"MPX,") * PREFIX_BYTES)
        minute_ns = None if match is None else headers.nanoseconds(match[4] + b"00")
        if match is None or minute_ns is None:
            return None
        number, layout, clock, minute, seconds, fraction, rest = (slice(*match.span(group)) for group in range(1, 8))
        fixed = slice(0, number.start), layout, slice(clock.start, minute.stop), rest
        held = tuple((place, head[place]) for place in fixed)
        return cls(kind, data.nbytes, match.end(), held, number, seconds, fraction, minute_ns)

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
