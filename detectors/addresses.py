"""Addresses of streams, ``tcp://HOST:PORT``, and what is wrong with one, in words."""

from __future__ import annotations

import errno
import socket
from urllib.parse import urlsplit

import zmq

from detectors.errors import ConnectionFailed

_NO_ADDRESS = "not an address; write tcp://HOST:PORT, for example tcp://127.0.0.1:31000"

_REASONS = {
    zmq.EADDRINUSE: "the port is in use by another program; choose another one or end that program",
    zmq.EPROTONOSUPPORT: "unknown transport; write tcp://HOST:PORT or ipc://PATH",
    zmq.EINVAL: _NO_ADDRESS,
    errno.ENODEV: "this machine has no such network interface or host name",
    zmq.EADDRNOTAVAIL: "this machine does not have that network address; tcp://*:PORT stands for all that it has",
    zmq.ECONNREFUSED: "nobody listens there",
    errno.ENETUNREACH: "there is no network that leads there",
    errno.EHOSTUNREACH: "no such machine answers",
    errno.ETIMEDOUT: "no such machine answers",
    errno.EACCES: "permission denied",
}


def why(error: zmq.ZMQError | OSError) -> str:
    """A socket's error in words that help."""
    if isinstance(error, socket.gaierror):
        return "there is no host of that name"
    return _REASONS.get(error.errno or 0, error.strerror or str(error))


def host_and_port(address: str, default_port: int | None = None) -> tuple[str, int]:
    """Host and port of ``tcp://HOST:PORT``; the host ``*`` is all interfaces (as ""), the port ``*`` any free one (0).

    Raises ``ConnectionFailed`` for anything else; without ``default_port`` also where the port is missing.
    """
    try:
        parts = urlsplit(f"{address[:-1]}0" if address.endswith(":*") else address)
        host, port = parts.hostname, default_port if parts.port is None else parts.port
        if parts.scheme == "tcp" and host and port is not None and not parts.path.strip("/"):
            return "" if host == "*" else host, port
    except ValueError:
        pass
    raise ConnectionFailed(f"cannot use {address!r}: {_NO_ADDRESS}")


def shown_address(host: str, port: int) -> str:
    """``tcp://HOST:PORT``; the host "" is all interfaces."""
    return f"tcp://{f'[{host}]' if ':' in host else host or '0.0.0.0'}:{port}"
