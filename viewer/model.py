"""What the viewer knows: the newest snapshot, the one on the screen, and how alive the link is. No Qt, no sockets."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum

from stream.snapshot import Snapshot

#: A session publishes at least once a second; after this long it is gone.
SILENCE_S = 2.5


class Presence(Enum):
    """Whether a session publishes at the address."""

    NEVER = "no snapshot came yet"
    LIVE = "snapshots are coming"
    GONE = "they have stopped"


class Model:
    """Takes in snapshots and says what is to be drawn. ``clock`` gives seconds and never goes back."""

    def __init__(self, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = address
        self.newest: Snapshot | None = None
        self.frozen: Snapshot | None = None
        """the snapshot that stays on the screen while others keep coming; None when live"""
        self._clock = clock
        self._arrived_s = clock()

    def accept(self, snapshot: Snapshot) -> bool:
        """Take in a received snapshot. True if it is of another session or scan than the last: views start afresh."""
        last, self.newest = self.newest, snapshot
        self._arrived_s = self._clock()
        return last is None or (last.session, last.scan_shape) != (snapshot.session, snapshot.scan_shape)

    @property
    def shown(self) -> Snapshot | None:
        """The snapshot that belongs on the screen, and into a saved file."""
        return self.frozen or self.newest

    def toggle_freeze(self) -> bool:
        """Hold what is shown, or let go of it. Returns whether it is held now; nothing to hold, nothing held."""
        self.frozen = None if self.frozen else self.newest
        return self.frozen is not None

    @property
    def silence_s(self) -> float:
        """Seconds since the last snapshot, or since the start."""
        return self._clock() - self._arrived_s

    @property
    def presence(self) -> Presence:
        if self.newest is None:
            return Presence.NEVER
        return Presence.GONE if self.silence_s > SILENCE_S else Presence.LIVE

    def notice(self) -> str:
        """What must be said across the images; empty while all is well."""
        if self.presence is Presence.NEVER:
            return f"no session at {self.address}: waiting"
        assert self.newest is not None
        if self.presence is Presence.GONE:
            how = {"finished": "It had finished. ", "stopped": "It was stopped. ", "failed": "It had failed. "}
            return (
                f"no session at {self.address}: waiting\n"
                f"{how.get(self.newest.state, '')}Last snapshot {self.silence_s:.0f} s ago"
            )
        if self.newest.state == "failed":
            return f"the session failed\n{self.newest.message}"
        if not self.newest.images:
            return self.newest.message or f"the session is {self.newest.state}: no images yet"
        return ""
