"""Input fields that show the session's values without fighting the user who is typing into them."""

from __future__ import annotations

import time
from collections.abc import Callable

from PySide6 import QtCore, QtGui, QtWidgets

#: After an answer, snapshots from before it may still be on their way: do not show their old values.
SETTLE_S = 1.2


class NumberField(QtWidgets.QDoubleSpinBox):
    """A number with its unit. ``edited`` tells a value that the user has finished entering.

    It is *held*, and snapshots leave it alone, from the first key press until shortly after the session answered.
    """

    edited = QtCore.Signal()

    def __init__(
        self, unit: str, limit: float, step: float, decimals: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._clock = clock
        self._typing = False
        self._held_until_s = 0.0
        self.setRange(-limit, limit)
        self.setDecimals(decimals)
        self.setSingleStep(step)
        self.setSuffix(f" {unit}")
        self.setKeyboardTracking(False)
        self.setAlignment(QtCore.Qt.AlignmentFlag.AlignRight)
        # The wheel changes a value only where the user clicked first: scrolling past must not move the defocus.
        self.setFocusPolicy(QtCore.Qt.FocusPolicy.StrongFocus)
        self.lineEdit().textEdited.connect(self._start_typing)
        self.valueChanged.connect(self._finish)
        self.editingFinished.connect(self._stop_typing)

    @property
    def held(self) -> bool:
        return self._typing or self._clock() < self._held_until_s

    def follow(self, value: float | None) -> None:
        """The session's value; shown unless the field is held."""
        if value is not None and not self.held and round(value, self.decimals()) != self.value():
            blocked = self.blockSignals(True)
            self.setValue(value)
            self.blockSignals(blocked)

    def hold(self, seconds: float) -> None:
        """Leave the value alone for ``seconds``; 0 lets the session's value come back."""
        self._held_until_s = self._clock() + seconds

    def keyPressEvent(self, event: QtGui.QKeyEvent) -> None:  # noqa: N802
        if event.key() == QtCore.Qt.Key.Key_Escape:
            self._typing = False
            self.lineEdit().setText(self.textFromValue(self.value()) + self.suffix())
            self.clearFocus()
            return
        super().keyPressEvent(event)
        if event.key() in (QtCore.Qt.Key.Key_Return, QtCore.Qt.Key.Key_Enter):
            self.clearFocus()  # the keys are the window's again

    def wheelEvent(self, event: QtGui.QWheelEvent) -> None:  # noqa: N802
        if self.hasFocus():
            super().wheelEvent(event)
        else:
            event.ignore()

    def _start_typing(self, _text: str) -> None:
        self._typing = True

    def _stop_typing(self) -> None:
        self._typing = False

    def _finish(self, _value: float) -> None:
        self._typing = False
        self.hold(3600)  # until the answer
        self.edited.emit()


class ConfirmButton(QtWidgets.QPushButton):
    """A button for what cannot be undone: it asks, and a second click within three seconds confirms."""

    confirmed = QtCore.Signal()

    def __init__(self, text: str, question: str) -> None:
        super().__init__(text)
        self._text, self._question = text, question
        self._timer = QtCore.QTimer(self, singleShot=True, interval=3000)
        self._timer.timeout.connect(self._relax)
        self.clicked.connect(self._ask)

    def _ask(self) -> None:
        if self._timer.isActive():
            self._relax()
            self.confirmed.emit()
        else:
            self.setText(self._question)
            self._timer.start()

    def _relax(self) -> None:
        self._timer.stop()
        self.setText(self._text)
