"""The one timer of the viewer: polls both sockets, feeds the model, lets the window follow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import zmq
from PySide6 import QtCore

from viewer.link import ControlClient, SnapshotLink, control_host, normalized
from viewer.model import Model
from viewer.window import Window

POLL_MS = 25


class Controller(QtCore.QObject):
    """A running viewer of the session at ``address``. Close the window, or call :meth:`close`, to free its sockets."""

    def __init__(self, address: str, folder: Path) -> None:
        """Raises ``ConfigurationError`` or ``ConnectionFailed`` for an address that cannot be used."""
        super().__init__()
        address = normalized(address)
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self.link = SnapshotLink(address, self._context)
        except Exception:
            self._context.term()
            raise
        self.control = ControlClient(control_host(address), self._context)
        self.model = Model(address)
        self.window = Window(self.model, folder)
        self.window.controls.requested.connect(self._request)
        # Single shot and started again after the work: a slow machine draws less often instead of falling behind.
        self._timer = QtCore.QTimer(self, singleShot=True)
        self._timer.timeout.connect(self.poll)
        self._timer.start(0)

    def poll(self) -> None:
        """One turn: newest snapshot, answers, screen."""
        started_s = time.monotonic()
        snapshot = self.link.poll()
        if snapshot is not None:
            if self.model.accept(snapshot):
                self.window.start_afresh()
            self.control.use_port(snapshot.control_port)
        for answer in self.control.poll():
            self.window.controls.show_answer(answer)
        self.window.refresh(self.link.damaged, self.link.damage)
        # Drawing never takes more than half of the time, so that mouse and keys are always answered.
        spent_ms = (time.monotonic() - started_s) * 1e3
        self._timer.start(round(max(POLL_MS, spent_ms)))

    def close(self) -> None:
        """Stop polling and free the sockets; safe to call twice."""
        self._timer.stop()
        self.link.close()
        self.control.close()
        self._context.term()

    def _request(self, command: str, values: dict[str, Any]) -> None:
        self.control.request(command, **values)
