"""ZeroMQ's C interface in compiled loops without the interpreter's lock: what the library itself can send and receive.

The functions are those of the libzmq that pyzmq brings along; they are called by name, so that the compiled code can be
cached on disk. ``AVAILABLE`` is False where they cannot be found.
"""

from __future__ import annotations

import ctypes

import numba
import numpy as np
import zmq
from numba import types

from stream.intrinsics import add_loaded_symbols, add_symbols

_NAMES = ("zmq_msg_init", "zmq_msg_init_data", "zmq_msg_send", "zmq_msg_recv", "zmq_msg_close", "zmq_errno")

#: An idle receiver looks again after so long [µs]: a wake-up for each message would cost more than the message.
_IDLE_US = 200
#: ... and gives up after so many looks in a row (20 s).
_MOST_LOOKS = 100_000


def _find() -> bool:
    try:
        from zmq.backend.cython import _zmq

        add_symbols(ctypes.CDLL(None), "usleep")
    except (ImportError, OSError, TypeError, AttributeError):
        return False
    return add_loaded_symbols(_zmq.__file__, *_NAMES)


AVAILABLE = _find()

# Pointers as integers of their size: they come from NumPy and pyzmq as such.
_init = types.ExternalFunction("zmq_msg_init", types.int32(types.intp))
_init_data = types.ExternalFunction(
    "zmq_msg_init_data", types.int32(types.intp, types.intp, types.uintp, types.intp, types.intp)
)
_send = types.ExternalFunction("zmq_msg_send", types.int32(types.intp, types.intp, types.int32))
_recv = types.ExternalFunction("zmq_msg_recv", types.int32(types.intp, types.intp, types.int32))
_close = types.ExternalFunction("zmq_msg_close", types.int32(types.intp))
_errno = types.ExternalFunction("zmq_errno", types.int32())
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))

_compiled = numba.njit(nogil=True, cache=True)

_SNDMORE, _DONTWAIT, _EAGAIN = int(zmq.SNDMORE), int(zmq.DONTWAIT), int(zmq.EAGAIN)


@_compiled
def send_messages(socket, message, slab, offsets, lengths, numbers, turn, first, count, per_message):
    """Send messages ``first`` ... ``first + count - 1`` of a series, made from templates; returns how many went.

    ``socket``: its address; ``message``: see ``message_buffer``. ``slab`` uint8; ``offsets``, ``lengths`` int64
    (templates, parts): where the parts of each template are. ``numbers`` int64 (templates,): where the 4 bytes are that
    hold the number of a message's first frame, which is written there. ``turn``: how many messages went before. The
    slab is sent as it lies, without a copy: there must be more templates than messages under way.
    """
    base, here = slab.ctypes.data, message.ctypes.data
    templates, parts = offsets.shape
    for i in range(count):
        template = (turn + i) % templates
        number = (first + i) * per_message
        at = numbers[template]
        for byte in range(4):
            slab[at + byte] = number >> (24 - 8 * byte) & 255
        for part in range(parts):
            start = base + offsets[template, part]
            _init_data(here, start, np.uint64(lengths[template, part]), 0, 0)
            if _send(here, socket, _SNDMORE if part < parts - 1 else 0) < 0:
                _close(here)
                return i
    return count


@_compiled
def receive_parts(socket, message, count):
    """Receive ``count`` message parts and let go of them; returns how many came, fewer after a silence of 20 s."""
    here = message.ctypes.data
    _init(here)
    done = looks = 0
    while done < count and looks < _MOST_LOOKS:
        if _recv(here, socket, _DONTWAIT) >= 0:
            done += 1
            looks = 0
        elif _errno() == _EAGAIN:
            _usleep(_IDLE_US)
            looks += 1
        else:
            break
    _close(here)
    return done


def message_buffer() -> np.ndarray:
    """Room for a ``zmq_msg_t``, 64 bytes."""
    return np.zeros(8, np.int64)
