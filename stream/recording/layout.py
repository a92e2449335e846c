"""What a recording looks like: every received frame, in order of arrival, packed as it came, one HDF5 file a series.

    /                           format, version, protocol, program_version, series and settings (JSON texts), complete,
                                undecodable_messages, flushed_bytes (how long the file is at least); scan_shape and
                                frames_announced where they are known
    /frames                     (frames, rows, columns) of the stream's dtype, one chunk a frame
    /frame_index                int64 (frames,), the frames' numbers in their series, as received
    /arrival_time_ns            int64 (frames,), since the epoch; frames that arrived together have the same time
    /messages/start, end        uint8, the start and end message's parts, end to end; /messages/start_sizes, end_sizes
    /damaged/at                 int64, rows of /frames whose payload is not one whole frame; there /frames reads as 0
    /damaged/encoding, sizes    their encoding (detectors.messages.Encoding) and size in bytes
    /damaged/payloads           uint8, those payloads, end to end

A payload is written as a chunk without being unpacked: bslz4 is byte for byte a chunk of the bitshuffle filter (32008),
a bare lz4 block is one of the LZ4 filter (32004) behind 16 bytes of header. ``/frames`` names both filters, and each
chunk's filter mask skips those that do not apply: one file takes every encoding, and raw frames need no filter at all.
h5py with hdf5plugin reads it as it would any other dataset.

The file is in HDF5's SWMR mode while it is written: it can be read meanwhile, and a program that dies leaves a file
that opens (``h5py.File(path, swmr=True)``) and holds all but the last second. ``/frame_index`` is written last: its
length is the number of frames that are surely there, and ``/frames`` may be longer until the recording is closed.
"""

from __future__ import annotations

import struct

from detectors.messages import Encoding

FORMAT = "liveptycho-recording"
VERSION = 1

#: HDF5's registered numbers of the LZ4 and the bitshuffle filter, in the order of /frames' filter pipeline.
FILTERS = (32004, 32008)
#: The filters that a chunk skips, one bit each.
FILTER_MASKS = {Encoding.RAW: 0b11, Encoding.LZ4: 0b10, Encoding.BSLZ4: 0b01}

#: What the LZ4 filter puts before a bare LZ4 block: bytes in all, bytes in a block, bytes of the (only) packed block.
LZ4_HEADER = struct.Struct(">QII")
