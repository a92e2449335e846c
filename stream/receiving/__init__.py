"""The receiver: from sockets to batches of message parts, without a Python object a frame.

common.py         slabs, leases, and how a consumer gets them; the same for every transport
zmq_receiver.py   ZeroMQ, which keeps messages apart
drain.py          what is in a ZeroMQ socket into a slab, in one compiled call
tcp_receiver.py   plain TCP, whose messages a protocol's ``framing`` finds
"""

from __future__ import annotations

from collections.abc import Sequence

from detectors.errors import ConfigurationError
from detectors.protocols.registry import StreamProtocol
from stream.receiving.common import Lease, Receiver
from stream.receiving.tcp_receiver import TcpReceiver
from stream.receiving.zmq_receiver import ZmqReceiver

__all__ = ["Lease", "Receiver", "open_receiver"]


def open_receiver(
    protocol: StreamProtocol, addresses: Sequence[str], *, bind: bool = False, pattern: str = "pull"
) -> Receiver:
    """The receiver for a protocol, to be used as an async context manager; then ``get`` batch by batch.

    ``addresses``: ``tcp://HOST:PORT``. They are connected to, or bound with ``bind`` (``tcp://127.0.0.1:*`` picks a
    port, see ``Receiver.endpoints``). ``pattern``: ``pull`` (from PUSH) or ``sub`` (from PUB). Raises
    ``ConfigurationError`` for what the protocol's transport does not know, and ``ConnectionFailed``, on entering, for
    an address that cannot be used.
    """
    if protocol.framing is None:
        return ZmqReceiver(addresses, bind=bind, pattern=pattern)
    if bind or pattern != "pull":
        raise ConfigurationError(
            f"{protocol.name} comes over plain TCP: the detector waits and this program connects to it; "
            + ("it cannot be bound" if bind else "there is nothing to subscribe to")
        )
    return TcpReceiver(addresses, protocol.framing, protocol.default_port)
