"""The errors that liveptycho shows to its user.

    LiveptychoError            a user's mistake or the outside world's: one clear sentence, never a traceback
    ├── ConfigurationError     a setting is missing, unknown, contradictory or out of range
    ├── DataFileError          a file is missing, damaged or not what it should be
    ├── ProtocolError          a message does not follow the stream protocol
    ├── ConnectionFailed       an address cannot be used, or nobody is there
    └── DoesNotFit             the work needs more memory than there is

They live with the detectors because that is the lowest layer: everything above may raise them.
"""

from __future__ import annotations


class LiveptychoError(Exception):
    """Base of every error that a user can cause and mend. Its text says what was expected, what came, what to do."""


class ConfigurationError(LiveptychoError):
    """A setting is missing, unknown, contradictory or out of range."""


class DataFileError(LiveptychoError):
    """A file is missing, damaged, or holds something other than what was asked for."""


class ProtocolError(LiveptychoError):
    """A received message does not follow its stream protocol."""


class ConnectionFailed(LiveptychoError):
    """An address cannot be bound or reached, or nothing came from it in time."""


class DoesNotFit(LiveptychoError):
    """The requested reconstruction needs more memory than the device has."""
