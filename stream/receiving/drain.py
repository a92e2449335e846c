"""Emptying a ZeroMQ socket into a slab: one call takes everything that is there, up to a limit, and never waits.

``drain_compiled`` goes to libzmq's C functions without holding the interpreter's lock; ``drain_plain`` says the same in
Python and takes over where pyzmq was built in a way that hides them. ``drain`` is the better one that there is.

libzmq is the very one that pyzmq has loaded, as a socket belongs to the library that made it. Its functions are called
by name, so that the compiled code can be cached on disk.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
import zmq
from numba import types

from stream.intrinsics import add_loaded_symbols
from stream.receiving import common
from stream.receiving.common import Slab

#: What is called. Addresses are passed as plain integers, which is the same to a C function.
_FUNCTIONS = (
    "zmq_msg_init",
    "zmq_msg_recv",
    "zmq_msg_size",
    "zmq_msg_data",
    "zmq_msg_more",
    "zmq_msg_close",
    "zmq_errno",
)

#: Words of C's ``zmq_msg_t``, 64 bytes by libzmq's promise of a stable interface.
_MESSAGE_WORDS = 8

_DONTWAIT = int(zmq.DONTWAIT)


class Drained(NamedTuple):
    """What a call found."""

    received: int
    """parts taken from the socket, those of lost messages among them"""
    too_large: int
    """messages that were taken and lost, see ``drain_plain``"""
    empty: bool
    """whether there is nothing more for now; otherwise a limit was reached"""


def _add_symbols() -> bool:
    """Make libzmq's functions known to the compiler by name; False where they cannot be reached."""
    try:
        from zmq.backend.cython import _zmq
    except ImportError:
        return False
    return add_loaded_symbols(_zmq.__file__, *_FUNCTIONS)


#: Whether ``drain_compiled`` can be used.
COMPILED = _add_symbols()

_int, _word = types.int32, types.intp
_msg_init = types.ExternalFunction("zmq_msg_init", _int(_word))
_msg_recv = types.ExternalFunction("zmq_msg_recv", _int(_word, _word, _int))
_msg_size = types.ExternalFunction("zmq_msg_size", _word(_word))
_msg_data = types.ExternalFunction("zmq_msg_data", _word(_word))
_msg_more = types.ExternalFunction("zmq_msg_more", _int(_word))
_msg_close = types.ExternalFunction("zmq_msg_close", _int(_word))
_errno = types.ExternalFunction("zmq_errno", _int())
_memcpy = types.ExternalFunction("memcpy", _word(_word, _word, _word))


def drain_plain(socket: zmq.Socket, slab: Slab, parts: int, size: int) -> Drained:
    """Receive into ``slab`` until nothing is there, it is full, or ``parts`` parts or ``size`` bytes have come.

    A message is taken whole, whatever the limits, as all its parts are there once the first one is. It is lost where
    it has a part beyond ``common.MAX_MESSAGE_BYTES``, more than ``common.MAX_MESSAGE_PARTS`` parts, or does not fit
    into an empty slab. Parts begin on 8-byte boundaries: pixels are read in place. Raises ``zmq.ZMQError``, if the
    socket or its context was closed; whole messages received before stay in the slab.
    """
    receive, option, view = socket.recv_into, socket.get, slab.view
    received = too_large = 0
    began = slab.end
    while received < parts and slab.end - began < size and not slab.full:
        count, end, fits, more = slab.count, slab.end, True, True
        while more:
            room = min(common.MAX_MESSAGE_BYTES, len(view) - end)
            try:
                length = receive(view[end : end + room], flags=zmq.DONTWAIT)
            except zmq.Again:
                return Drained(received, too_large, True)
            more = bool(option(zmq.RCVMORE))  # not as an attribute: its look-up costs more than the receiving
            received += 1
            fits = fits and length <= room and count - slab.count < common.MAX_MESSAGE_PARTS
            if fits:
                slab.offsets[count], slab.lengths[count], slab.last[count] = end, length, not more
                count += 1
                end += (length + 7) & ~7
        if fits:
            slab.count, slab.end = count, end
        else:
            too_large += 1
    return Drained(received, too_large, False)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _drain(
    socket: int,
    message_words: np.ndarray,
    memory: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    last: np.ndarray,
    filled: tuple[int, int],
    full: tuple[int, int],
    largest: tuple[int, int],
    most: tuple[int, int],
) -> tuple[int, int, int, int, int]:
    """``drain_plain`` on the C interface; pairs are (parts, bytes).

    Returns (parts received, messages too large, parts in the slab, bytes in the slab, error number or 0).
    """
    message, base = message_words.ctypes.data, memory.ctypes.data
    count, end = filled
    began = end
    received, too_large, error = 0, 0, 0
    _msg_init(message)
    while (
        received < most[0]
        and end - began < most[1]
        and not (count > 0 and (count >= full[0] or end >= full[1]))
        and error == 0
    ):
        at, place, fits, more = count, end, True, True
        while more:
            # It lets go of what the message held before.
            if _msg_recv(message, socket, _DONTWAIT) < 0:
                error = _errno()
                break
            received += 1
            length = _msg_size(message)
            more = _msg_more(message) != 0
            fits = fits and length <= min(largest[1], memory.size - place) and at - count < largest[0]
            if fits:
                _memcpy(base + place, _msg_data(message), length)
                offsets[at], lengths[at], last[at] = place, length, not more
                at += 1
                place += (length + 7) & ~7
        if error == 0:
            if fits:
                count, end = at, place
            else:
                too_large += 1
    _msg_close(message)
    return received, too_large, count, end, error


def drain_compiled(socket: zmq.Socket, slab: Slab, parts: int, size: int) -> Drained:
    """The same as ``drain_plain``, compiled; the interpreter's lock is free meanwhile. Needs ``COMPILED``."""
    received, too_large, slab.count, slab.end, error = _drain(
        socket.underlying,  # 0 once it is closed, which libzmq knows to be no socket
        np.empty(_MESSAGE_WORDS, np.uint64),
        slab.memory,
        slab.offsets,
        slab.lengths,
        slab.last,
        (slab.count, slab.end),
        (common.FULL_PARTS, common.FULL_BYTES),
        (common.MAX_MESSAGE_PARTS, common.MAX_MESSAGE_BYTES),
        (parts, size),
    )
    if error not in (0, errno.EAGAIN, errno.EINTR):
        raise zmq.ContextTerminated() if error == zmq.ETERM else zmq.ZMQError(error)
    return Drained(received, too_large, error == errno.EAGAIN)


drain: Callable[[zmq.Socket, Slab, int, int], Drained] = drain_compiled if COMPILED else drain_plain


@functools.cache
def prepare() -> None:
    """Compile, or load from disk, before anything is connected: the first start on a machine takes a second or two."""
    if COMPILED:
        nothing = np.zeros(0, np.int64)
        none = (0, 0)
        _drain(
            0, np.zeros(_MESSAGE_WORDS, np.uint64), np.zeros(0, np.uint8), nothing, nothing, np.zeros(0, bool),
            none, none, none, none,
        )  # fmt: skip
