"""DECTRIS Stream V1 ("legacy"): JSON and pixels in the parts of ZeroMQ multipart messages.

    header  dheader-1.0 | config | dflatfield-1.0 | array | dpixelmask-1.0 | array | dcountrate_table-1.0 | array
            (config: header_detail basic and all; arrays: all, and empty ones are legal)
    image   dimage-1.0 | dimage_d-1.0 | pixels | dconfig-1.0
    end     dseries_end-1.0

Headers and images may have an appendix behind them, the user's own text.

Source: DECTRIS SIMPLON API reference 1.8, section 5.4.3, and recordings. The decoder follows the parts, whatever
messages they come in: there are senders that split the header, or put the first image behind it. A part that fits
nowhere is dropped and told; ``dheader``, ``dimage`` and ``dseries_end`` begin anew wherever they come.

A series is announced with its first image, whose shape and type hold for all of it: the configuration may speak of the
whole detector where a region or binned pixels are read out. One that ends without an image is announced at its end, if
its configuration tells the shape. ``hash`` is not checked: it is not what the reference says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from detectors.codec import BLOCK_BYTES
from detectors.errors import ProtocolError
from detectors.messages import (
    Announced,
    Encoding,
    Message,
    ReceivedBatch,
    SeriesEnd,
    SeriesStart,
    Undecodable,
)
from detectors.protocols import dectris_v1_walk
from detectors.protocols.dectris import DTYPES, json_object
from detectors.protocols.dectris_v1_encoder import Encoder
from detectors.protocols.dectris_v1_parts import (
    LARGEST_INDEX,
    LARGEST_INT64,
    MAX_TEXT_BYTES,
    Header,
    Layout,
    integer,
    layout_of,
    series_of,
)
from detectors.protocols.gathering import Gathering

__all__ = ["ENCODINGS", "NAME", "PORT", "SUMMARY", "Decoder", "Encoder", "looks_like"]

NAME = "dectris-v1"
SUMMARY = "DECTRIS Stream V1 (legacy), JSON multipart over ZeroMQ"
PORT = 9999
ENCODINGS = {"bslz4": Encoding.BSLZ4, "lz4": Encoding.LZ4, "raw": Encoding.RAW}

_MAX_HEADER_PARTS = 16

#: What can be no appendix, and no array.
_KNOWN = ("dheader-1.0", "dimage-1.0", "dimage_d-1.0", "dconfig-1.0", "dseries_end-1.0")
#: The arrays of a header that are of use; the first two are one (the second is a simulator's).
_ARRAYS = {"dflatfield-1.0": "flat field", "flatfield-1.0": "flat field", "dpixelmask-1.0": "pixel mask"}
_ARRAY_TYPES = {**DTYPES, "float32": np.dtype("<f4")}


class Decoder:
    """Sans-IO decoder: see ``detectors.messages.StreamDecoder``. A state machine: ``_expect`` takes the next part.

    Each ``_take_...`` gets a part as its place and length in the slab, and hands on to :meth:`_other` what it did not
    expect. Whole images that the compiled walk has found in the batch take a short way, many at once
    (:meth:`_take_images`), wherever an image may begin. What is remembered between parts, and between batches:

    ============  ===============================================================================================
    ``_expect``   what has to come next: nothing in particular (``_other``, as between images), an image's layout, its
                  pixels, its times; a header's configuration, its next part, an array
    ``_header``   the header of a series **without an image so far**, else None
    ``_start``    the ``SeriesStart`` of the last series that **had an image**, whose other images must be like it
    image         ``_series`` to ``_own``, of the image under way; its pixels are copied where a batch ends before it
    tolerance     ``_may_append``, ``_told``, ``_owed``: what of strays is to be taken, and what has been told
    ============  ===============================================================================================

    =================================  ==========================================================================
    ``dheader``                        ``_header`` is made anew, ``_start`` forgotten
    configuration (or no such detail)  ``Announced``, unless the same parts have announced the same series
    array, appendix                    kept in ``_header``
    image complete                     of ``_header``'s series: it becomes ``_start`` and is told, **then** the
                                       frame; of any other: the frame alone
    ``dseries_end``                    as with an image, if the configuration tells shape and type; ``SeriesEnd``
    a part that does not fit           the image under way is lost (``Undecodable``), ``_header`` is not
    =================================  ==========================================================================
    """

    def __init__(self) -> None:
        dectris_v1_walk.prepare()
        self._expect: Callable[[int, int], None] = self._other
        self._header: Header | None = None
        self._announced: tuple[object, ...] = ()  # the last series, and the parts that announced it
        self._start: SeriesStart | None = None
        self._array: Mapping[str, Any] = {}
        # The image under way. ``_own``: its pixels, where they cannot stay in the slab.
        self._series = self._frame = self._size = self._offset = 0
        self._layout = Layout(Encoding.RAW, (1, 1), DTYPES["uint8"])
        self._own: bytes | None = None
        self._may_append = False  # an image is complete, and its appendix may follow
        self._told = False  # something did not fit, and nothing has fitted since
        self._owed = False  # ... in an image whose dimage_d may still come

    def feed(self, batch: ReceivedBatch) -> list[Message]:
        self._found, self._view = Gathering(batch), batch.slab.data
        images = dectris_v1_walk.walk(batch.slab, batch.offsets, batch.lengths)
        bounds = [*np.flatnonzero(images["same"] == 0).tolist(), len(images)]
        done = 0
        for first, stop in pairwise(bounds):
            for i in range(first, stop):
                begins = int(images["part"][i])
                self._take_parts(batch, done, begins)
                done = begins
                # Else these parts have to do with what came before them; the next image may be on its own.
                if self._expect in (self._other, self._take_header_part):
                    if self._take_images(images[i:stop]):
                        done = int(images["part"][stop - 1] + images["parts"][stop - 1])
                    break
        self._take_parts(batch, done, len(batch.offsets))
        if self._expect == self._take_times and self._own is None:
            self._own = self._bytes(self._offset, self._size)
        self._found.close()
        messages = self._found.messages
        del self._found, self._view  # the slab goes back
        return messages

    def _take_parts(self, batch: ReceivedBatch, first: int, stop: int) -> None:
        for part in range(first, stop):
            self._expect(int(batch.offsets[part]), int(batch.lengths[part]))

    # --- images ---

    def _take_images(self, images: np.ndarray) -> bool:
        """Whole images of one series and layout, one behind the other; whether there is nothing wrong with them."""
        image = images[0]
        series = int(image["series"])
        encoding, dtype = (
            self._bytes(image[f"{key}_at"], image[f"{key}_size"]).decode() for key in ("encoding", "type")
        )
        shape = dectris_v1_walk.shape_of(int(image["shape"]), int(image["dimensions"]))
        try:
            layout = layout_of({"shape": shape, "type": dtype, "encoding": encoding})
        except ProtocolError:
            return False
        if self._contradicts(series, layout):
            return False
        self._told = self._owed = False
        if self._header is not None and self._header.series == series:
            self._begin_series(self._header, layout.shape, layout.dtype)
        frames, places, sizes, times = (
            np.ascontiguousarray(images[name]) for name in ("frame", "offset", "size", "time_ns")
        )
        if image["unframed"]:
            columns = (each.tolist() for each in (frames, places, sizes, times))
            for frame, offset, size, time in zip(*columns, strict=True):
                time_ns = None if time == dectris_v1_walk.NO_TIME else time
                own = self._framed(layout, offset, size)
                self._found.add(series, layout.encoding, frame, offset, size, time_ns, own)
        else:
            timed = (times != dectris_v1_walk.NO_TIME).all()
            self._found.extend(series, layout.encoding, frames, places, sizes, times if timed else None)
        self._may_append = bool(images["parts"][-1] == 4)
        self._expect = self._other
        return True

    def _contradicts(self, series: int, layout: Layout) -> bool:
        """Whether other images of this series were of another shape or type."""
        start = self._start
        return start is not None and start.series == series and (start.detector_shape, start.dtype) != layout[1:]

    def _begin_image(self, series: int, frame: int) -> None:
        self._series, self._frame = series, frame
        self._may_append = self._told = self._owed = False
        self._expect = self._take_layout

    def _take_layout(self, offset: int, length: int) -> None:
        fields = self._json(offset, length)
        if fields is None or fields.get("htype") != "dimage_d-1.0":
            self._broken("no dimage_d part follows", offset, length)
            self._owed = self._told
            return
        try:
            layout, size = layout_of(fields), integer(fields, "size", 0, LARGEST_INT64)
        except ProtocolError as error:
            self._broken(str(error))
            return
        start = self._start
        if start is not None and self._contradicts(self._series, layout):
            here, there = f"{layout.shape} {layout.dtype.name}", f"{start.detector_shape} {start.dtype.name}"
            self._broken(f"{here} in a series of {there}")
            return
        self._layout, self._size = layout, size
        self._expect = self._take_pixels

    def _take_pixels(self, offset: int, length: int) -> None:
        if length != self._size:
            self._broken(f"{self._size} bytes of pixels announced, a part of {length} came", offset, length)
            return
        self._offset, self._own = offset, None
        packed = self._layout.encoding is Encoding.BSLZ4 and length >= 12
        if packed and not int.from_bytes(self._view[offset : offset + 12], "big"):
            self._own = self._framed(self._layout, offset, length)
        self._expect = self._take_times

    def _framed(self, layout: Layout, offset: int, length: int) -> bytes:
        """A payload whose framing's first two words a simulator (libertem-live) left empty: no decoder takes that."""
        rows, columns = layout.shape
        words = struct.pack(">QI", rows * columns * layout.dtype.itemsize, BLOCK_BYTES)
        return words + self._bytes(offset + 12, length - 12)

    def _take_times(self, offset: int, length: int) -> None:
        fields = self._json(offset, length)
        if fields is not None and fields.get("htype") == "dconfig-1.0":
            time = fields.get("start_time")
            # Simulators send zeros for what they do not know.
            known = type(time) is int and 0 <= time <= LARGEST_INT64 and bool(time or fields.get("stop_time"))
            self._finish_image(time if known else None)
        else:  # the pixels are all there
            self._finish_image(None)
            self._other(offset, length)

    def _finish_image(self, time_ns: int | None) -> None:
        if self._header is not None and self._header.series == self._series:
            self._begin_series(self._header, self._layout.shape, self._layout.dtype)
        self._found.add(self._series, self._layout.encoding, self._frame, self._offset, self._size, time_ns, self._own)
        self._may_append = True
        self._expect = self._other

    # --- headers ---

    def _begin_header(self, series: int, detail: Any, raw: bytes) -> None:
        self._header, self._start = Header(series, [raw]), None
        self._may_append = self._told = self._owed = False
        self._expect = self._take_config
        if detail == "none":
            self._header_read()

    def _take_config(self, offset: int, length: int) -> None:
        assert self._header is not None
        fields = self._json(offset, length)
        if fields is None or "htype" in fields:
            self._header_read()
            self._take_header_part(offset, length)
            return
        self._header.config = fields
        self._header.parts.append(self._bytes(offset, length))
        self._header_read()

    def _header_read(self) -> None:
        """What names the series is there, though arrays may follow."""
        assert self._header is not None
        self._expect = self._take_header_part
        announced = (self._header.series, *self._header.parts)
        if announced != self._announced:
            self._announced = announced
            self._found.say(Announced(self._header.series))

    def _take_header_part(self, offset: int, length: int) -> None:
        header = self._header
        assert header is not None
        fields = self._json(offset, length)
        htype = None if fields is None else fields.get("htype")
        room = len(header.parts) < _MAX_HEADER_PARTS and htype not in _KNOWN
        if room and fields is not None and isinstance(htype, str) and isinstance(fields.get("shape"), list):
            header.parts.append(self._bytes(offset, length))
            self._array = fields
            self._expect = self._take_array
        elif room and header.appendix is None and (text := self._text(offset, length)) is not None:
            header.parts.append(self._bytes(offset, length))
            header.appendix = text
        else:
            self._other(offset, length)

    def _take_array(self, offset: int, length: int) -> None:
        assert self._header is not None
        self._expect = self._take_header_part
        htype, shape = self._array["htype"], self._array["shape"]
        dtype = _ARRAY_TYPES.get(str(self._array.get("type")))
        sound = dtype is not None and len(shape) == 2 and all(type(n) is int and 1 <= n <= 65536 for n in shape)
        fits = sound and dtype is not None and length == shape[0] * shape[1] * dtype.itemsize
        if not fits and isinstance((self._json(offset, length) or {}).get("htype"), str):
            self._say(f"the array of {htype} did not come")
            self._take_header_part(offset, length)
            return
        part = self._bytes(offset, length)
        self._header.parts.append(part)
        if fits and htype in _ARRAYS:
            self._header.arrays[_ARRAYS[htype]] = np.frombuffer(part, dtype).reshape(shape[1], shape[0])
        elif length and not fits:
            self._say(f"{htype} of shape {shape!r} and type {self._array.get('type')!r} came with {length} bytes")

    def _begin_series(self, header: Header, shape: tuple[int, int], dtype: np.dtype) -> None:
        self._header, (self._start, notes) = None, header.start(shape, dtype)
        self._found.say(self._start)
        for note in notes:
            self._say(note)

    def _end(self, series: int, raw: bytes) -> None:
        header = self._header
        if header is not None and header.series == series:
            config = header.config
            dtype = DTYPES.get(f"uint{config.get('bit_depth_image')}")
            rows, columns = config.get("y_pixels_in_detector"), config.get("x_pixels_in_detector")
            if dtype is not None and all(type(n) is int and 1 <= n <= 65536 for n in (rows, columns)):
                self._begin_series(header, (rows, columns), dtype)  # type: ignore[arg-type]
            self._header = None
        if self._announced[:1] == (series,):
            self._announced = ()
        self._found.say(SeriesEnd(series, (raw,)))
        self._may_append = self._told = self._owed = False
        self._expect = self._other

    # --- whatever comes ---

    def _other(self, offset: int, length: int) -> None:
        """A part that begins something, or one that does not belong where it came."""
        fields = self._json(offset, length) or {}
        htype = fields.get("htype")
        try:
            if htype == "dimage-1.0":
                self._begin_image(series_of(fields), integer(fields, "frame", 0, LARGEST_INDEX))
            elif htype == "dheader-1.0":
                self._begin_header(series_of(fields), fields.get("header_detail"), self._bytes(offset, length))
            elif htype == "dseries_end-1.0":
                self._end(series_of(fields), self._bytes(offset, length))
            elif self._may_append and htype not in _KNOWN:
                self._may_append = False
            else:
                self._stray(htype, length)
        except ProtocolError as error:
            self._owed = htype == "dimage-1.0"
            self._say(f"{htype}: {error}", int(self._owed))
            self._expect, self._may_append, self._told = self._other, False, True

    def _stray(self, htype: Any, length: int) -> None:
        """A part that fits nowhere: told once, until one fits again. A ``dimage_d`` stands for an image."""
        lost = htype == "dimage_d-1.0" and not self._owed
        if lost or not self._told:
            what = f"{htype!r}" if isinstance(htype, str) else f"a part of {length} bytes"
            self._say(f"{what} belongs to nothing that came before", int(lost))
        self._may_append, self._told, self._owed = False, True, False

    def _broken(self, reason: str, offset: int = 0, length: int | None = None) -> None:
        """The image under way is lost; a part of ``length`` bytes, if given, was not its, and may begin another."""
        self._say(f"image {self._frame} of series {self._series}: {reason}", 1)
        self._expect, self._may_append, self._told, self._owed = self._other, False, True, length is not None
        if length is not None:
            self._other(offset, length)

    def _say(self, reason: str, frames: int = 0) -> None:
        self._found.say(Undecodable(reason if len(reason) <= 300 else f"{reason[:297]}...", frames))

    def _bytes(self, offset: int, length: int) -> bytes:
        return bytes(self._view[offset : offset + length])

    def _json(self, offset: int, length: int) -> dict[str, Any] | None:
        if not 2 <= length <= MAX_TEXT_BYTES or self._view[offset] not in b"{ \t\r\n":
            return None
        return json_object(self._bytes(offset, length))

    def _text(self, offset: int, length: int) -> str | None:
        try:
            return self._bytes(offset, length).decode() if 1 <= length <= MAX_TEXT_BYTES else None
        except UnicodeDecodeError:
            return None


def looks_like(part: bytes) -> bool:
    """Whether a message's first part is of this protocol: a JSON object whose ``htype`` begins with "d"."""
    if len(part) > MAX_TEXT_BYTES or not part.lstrip().startswith(b"{"):
        return False
    htype = (json_object(part) or {}).get("htype")
    return isinstance(htype, str) and htype.startswith("d")
