"""The window: panels in their places, notices across them, keys bound to actions. Receives no data by itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from PySide6 import QtCore, QtGui, QtWidgets

from detectors.errors import LiveptychoError
from stream.snapshot import Snapshot
from viewer.controls import Controls
from viewer.keys import KEYS, help_html
from viewer.model import Model, Presence
from viewer.save import save_pair
from viewer.screen import Screen
from viewer.status import StatusBar, Summary

SIZE_PX = (1400, 900)


class Window(QtWidgets.QMainWindow):
    """Shows a model. ``folder``: where saved files go."""

    def __init__(self, model: Model, folder: Path) -> None:
        super().__init__()
        self.setWindowTitle(f"liveptycho – {model.address}")
        self.model, self.folder = model, folder
        self.screen_ = Screen()
        self.summary, self.controls, self.status = Summary(), Controls(), StatusBar()
        self.help: QtWidgets.QDialog | None = None
        self._drawn: Snapshot | None = None
        self._fresh = True
        self.setStatusBar(self.status)
        self._arrange()
        self.notice = self._overlay("notice")
        self.frozen = self._overlay("frozen")
        self.frozen.setText("FROZEN")
        self.resize(*SIZE_PX)
        self.screen_.phase.canvas.setFocus()  # not the first number field, where keys would be typed
        for key in KEYS:
            action = getattr(self, f"action_{key.action}")
            for sequence in key.keys:
                shortcut = QtGui.QShortcut(QtGui.QKeySequence(sequence), self)
                shortcut.activated.connect(action if key.argument is None else partial(action, key.argument))

    def _arrange(self) -> None:
        left, right = QtWidgets.QWidget(), QtWidgets.QWidget()
        column = QtWidgets.QVBoxLayout(left)
        column.setContentsMargins(0, 0, 0, 0)
        column.addWidget(self.screen_.phase, 1)
        column.addWidget(self.summary)
        self._grid = QtWidgets.QGridLayout(right)
        self._grid.setContentsMargins(0, 0, 0, 0)
        self._grid.addWidget(self.screen_.second, 0, 0)
        self._grid.addWidget(self.screen_.pattern, 0, 1)
        self._grid.addWidget(self.screen_.spectrum, 1, 0)
        self._grid.addWidget(self.controls, 1, 1)
        for line in (0, 1):
            self._grid.setRowStretch(line, 1)
            self._grid.setColumnStretch(line, 1)
        splitter = QtWidgets.QSplitter(QtCore.Qt.Orientation.Horizontal)
        splitter.addWidget(left)
        splitter.addWidget(right)
        splitter.setChildrenCollapsible(False)
        splitter.setSizes([668, 717])
        splitter.setStretchFactor(0, 1)
        splitter.setStretchFactor(1, 1)
        frame = QtWidgets.QWidget()
        layout = QtWidgets.QVBoxLayout(frame)
        layout.setContentsMargins(6, 6, 6, 6)
        layout.addWidget(splitter)
        self.setCentralWidget(frame)

    # What the controller calls

    def start_afresh(self) -> None:
        """The next snapshot drawn is of another session or scan."""
        self._fresh = True

    def refresh(self, damaged: int = 0, damage: str = "") -> None:
        """Bring everything in line with the model. Images are drawn only where there is a new snapshot to show."""
        model = self.model
        shown, presence = model.shown, model.presence
        if shown is not None and shown is not self._drawn:
            fresh, self._fresh = self._fresh, False
            self._drawn = shown
            self.screen_.show_snapshot(shown, fresh)
            self.summary.show_snapshot(shown)
        self.screen_.set_dimmed(presence is Presence.GONE)
        self.status.show_snapshot(model.newest, presence)
        self.status.show_damaged(damaged, damage)
        self.controls.follow(model.newest, presence is Presence.LIVE)
        self._say(model.notice())

    def _say(self, text: str) -> None:
        if text != self.notice.text() or bool(text) != self.notice.isVisibleTo(self):
            self.notice.setText(text)
            self.notice.setVisible(bool(text))
            self._place_overlays()
        if (self.model.frozen is not None) != self.frozen.isVisibleTo(self):
            self.frozen.setVisible(self.model.frozen is not None)
            self._place_overlays()

    def _overlay(self, name: str) -> QtWidgets.QLabel:
        label = QtWidgets.QLabel(self.screen_.phase.canvas)
        label.setObjectName(name)
        label.setTextFormat(QtCore.Qt.TextFormat.PlainText)
        label.setAlignment(QtCore.Qt.AlignmentFlag.AlignCenter)
        label.setWordWrap(name == "notice")
        label.setAttribute(QtCore.Qt.WidgetAttribute.WA_TransparentForMouseEvents)
        label.hide()
        return label

    def _place_overlays(self) -> None:
        canvas = self.screen_.phase.canvas
        width = canvas.width() - 40
        self.notice.setFixedWidth(width)
        self.notice.setFixedHeight(max(self.notice.heightForWidth(width), 40))
        self.notice.move(20, (canvas.height() - self.notice.height()) // 2)
        self.frozen.adjustSize()
        self.frozen.move(canvas.width() - self.frozen.width() - 12, 12)

    def resizeEvent(self, event: QtGui.QResizeEvent) -> None:  # noqa: N802
        super().resizeEvent(event)
        # After the layouts have had their say.
        QtCore.QTimer.singleShot(0, self, self._place_overlays)

    def save_picture(self, path: Path) -> bool:
        """The window as PNG; whether it was written."""
        return self.grab().save(str(path), "PNG")

    # What the keys call, see viewer.keys

    def action_freeze(self) -> None:
        self.model.toggle_freeze()
        self.refresh()

    def action_save(self) -> None:
        snapshot = self.model.shown
        if snapshot is None:
            self.status.showMessage("nothing to save yet", 4000)
            return
        try:
            picture, data = save_pair(self.folder, snapshot, self.save_picture)
        except LiveptychoError as error:
            self.status.showMessage(str(error), 10000)
            return
        self.status.showMessage(f"saved {picture.name} and {data.name} in {self.folder.resolve()}", 6000)

    def action_controls(self) -> None:
        visible = not self.controls.isVisibleTo(self)
        self.controls.setVisible(visible)
        self._grid.addWidget(self.screen_.spectrum, 1, 0, 1, 1 if visible else 2)

    def action_full_screen(self) -> None:
        self.setWindowState(self.windowState() ^ QtCore.Qt.WindowState.WindowFullScreen)

    def action_help(self) -> None:
        if self.help is None:
            self.help = QtWidgets.QDialog(self)
            self.help.setWindowTitle("liveptycho viewer: keys and mouse")
            text = QtWidgets.QLabel(help_html(), textFormat=QtCore.Qt.TextFormat.RichText)
            QtWidgets.QVBoxLayout(self.help).addWidget(text)
        self.help.setVisible(not self.help.isVisible())

    def action_quit(self) -> None:
        self.close()

    def action_channel(self, index: int) -> None:
        self.screen_.set_channel(index)

    def action_next_channel(self, step: int) -> None:
        self.screen_.step_channel(step)

    def action_next_map(self) -> None:
        self.screen_.next_map()

    def action_next_scale(self) -> None:
        self.screen_.next_scale()

    def action_smooth(self) -> None:
        self.screen_.toggle_smooth()

    def action_lock_contrast(self) -> None:
        self.screen_.toggle_lock()

    def action_automatic_contrast(self) -> None:
        self.screen_.unlock()

    def action_fit(self) -> None:
        self.screen_.fit()

    def action_crosshair(self) -> None:
        self.screen_.toggle_crosshair()

    def action_row_line(self) -> None:
        self.screen_.toggle_row_line()
