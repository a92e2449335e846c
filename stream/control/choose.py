"""Which control interface a user means."""

from __future__ import annotations

from detectors.errors import ConfigurationError
from stream.control.active_scan import DetectorControl
from stream.control.merlin import MerlinControl
from stream.control.simplon import SimplonControl


def detector_control(protocol: str, simplon: str | None, control: str | None) -> DetectorControl | None:
    """The control interface at one of these addresses, if any.

    ``simplon``: http://HOST:PORT of a DECTRIS detector; ``control``: tcp://HOST:PORT of a Merlin. Raises
    ``ConfigurationError`` for one that does not fit the protocol.
    """
    if simplon is not None and control is not None:
        raise ConfigurationError("--simplon is for DECTRIS detectors, --control for Merlin: give one of them")
    if simplon is not None:
        return SimplonControl(simplon, protocol)
    if control is not None:
        if protocol != "merlin":
            raise ConfigurationError(f"--control is Merlin's control port; {protocol} has none (--simplon for DECTRIS)")
        return MerlinControl(control)
    return None
