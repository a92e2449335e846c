"""What a recording looks like: every received frame, in order of arrival, packed as it came, one HDF5 file a series.

    /                           format, version, protocol, program_version, series, settings and channels (JSON texts),
                                complete, maximum_is_masked, undecodable_messages, flushed_bytes (how long the file is
                                at least); scan_shape and frames_announced where they are known
    /frames                     (frames, rows, columns) of the stream's dtype, one chunk a frame
    /encoding                   uint8 (frames,), how each payload came (detectors.messages.Encoding)
    /damaged/at                 int64, rows of /frames whose payload is not one whole frame; there /frames reads as 0
    /damaged/sizes, payloads    int64, their sizes in bytes; uint8, those payloads, end to end
    /channels/1, 2, ...         the same of the further channels: frames, encoding, damaged
    /frame_index                int64 (frames,), the frames' numbers in their series, as received
    /arrival_time_ns            int64 (frames,), since the epoch; frames that arrived together have the same time
    /exposed_ns                 int64, when each exposure began by the detector's clock; ``NO_TIME`` where the stream
                                did not say, as it did not for frames beyond the end of this array
    /pixel_mask, flatfield      bool and float32 (rows, columns), where the stream brought them
    /messages/start, end        uint8, the start and end message's parts, end to end; /messages/start_sizes, end_sizes

A payload is written as a chunk without being unpacked: bslz4 is byte for byte a chunk of the bitshuffle filter (32008),
DECTRIS' lz4 one of the LZ4 filter (32004), and a bare lz4 block is one behind 16 bytes of header. ``/frames`` names
both filters, and each chunk's filter mask skips those that do not apply: one file takes every encoding, and raw frames
need no filter at all. HDF5 has no filter for other orders of pixels or bits (big-endian ones, Merlin's raw modes): such
frames are stored in the usual order, and put back into theirs when they are read as payloads, which loses nothing.
h5py with hdf5plugin reads the frames as it would any other dataset.

The file is in HDF5's SWMR mode while it is written: it can be read meanwhile, and a program that dies leaves a file
that opens (``h5py.File(path, swmr=True)``) and holds all but the last second. ``/frame_index`` is written last: its
length is the number of frames that are surely there, and ``/frames`` may be longer until the recording is closed.
"""

from __future__ import annotations

import struct

import numpy as np

from detectors.codec import MERLIN_BITS
from detectors.messages import Encoding

FORMAT = "liveptycho-recording"
VERSION = 2

#: HDF5's registered numbers of the LZ4 and the bitshuffle filter, in the order of /frames' filter pipeline.
FILTERS = (32004, 32008)
#: The filters that a chunk skips, one bit each.
FILTER_MASKS = {Encoding.RAW: 0b11, Encoding.LZ4: 0b10, Encoding.LZ4_BLOCKS: 0b10, Encoding.BSLZ4: 0b01}

#: What a chunk is packed as where HDF5 does not know the payload's own encoding; single bits are worth packing.
STORED_AS = {encoding: Encoding.BSLZ4 if bits == 1 else Encoding.RAW for encoding, bits in MERLIN_BITS.items()}
STORED_AS[Encoding.RAW_BIG_ENDIAN] = Encoding.RAW

#: What the LZ4 filter puts before a bare LZ4 block: bytes in all, bytes in a block, bytes of the (only) packed block.
LZ4_HEADER = struct.Struct(">QII")

#: Of a frame whose exposure time the stream did not tell.
NO_TIME = int(np.iinfo(np.int64).min)


def channel_group(number: int) -> str:
    """Where the frames of a channel are, by its place among the channels."""
    return "/" if number == 0 else f"/channels/{number}"
