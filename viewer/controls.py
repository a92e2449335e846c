"""The optics panel: aberrations, axes and method of the running session, as control requests."""

from __future__ import annotations

from collections.abc import Iterable

from PySide6 import QtCore, QtWidgets

from stream.snapshot import Snapshot
from viewer import theme
from viewer.fields import SETTLE_S, ConfirmButton, NumberField
from viewer.labels import title_label
from viewer.link import Answer
from viewer.text import value_text

METHODS: tuple[tuple[str, str], ...] = (("ssb", "SSB, both sidebands"), ("ssb-single", "SSB, one sideband"))

#: The aberrations that have a field; whatever else the session has is sent back unchanged.
FIELDS: tuple[tuple[str, str, float, float, int, str], ...] = (
    # name, unit, limit, step, decimals, explanation
    ("C10", "Å", 1e6, 10, 1, "C10 = −defocus: an underfocused lens has a negative C10"),
    ("C12", "Å", 1e6, 5, 1, "two-fold astigmatism, magnitude"),
    ("phi12", "°", 360, 5, 1, "two-fold astigmatism, azimuth"),
)
LABELS = {"C10": "C10", "C12": "Astigm. C12", "phi12": "Azimuth φ12"}


class Controls(QtWidgets.QFrame):
    """Emits ``requested(command, values)`` for each change by the user; shows what the session answers."""

    requested = QtCore.Signal(str, dict)

    def __init__(self) -> None:
        super().__init__()
        self.setObjectName("panel")
        self._session_aberrations: dict[str, float] = {}
        self.numbers = {name: NumberField(unit, limit, step, digits) for name, unit, limit, step, digits, _ in FIELDS}
        for name, *_, explanation in FIELDS:
            self.numbers[name].setToolTip(explanation)
            self.numbers[name].edited.connect(self._send_aberrations)
        self.rotation = NumberField("°", 360, 0.5, 2)
        self.rotation.setToolTip("from the scan's row axis to the detector's")
        self.rotation.edited.connect(self._send_rotation)
        self.transpose = QtWidgets.QCheckBox("transposed axes")
        self.transpose.clicked.connect(self._send_rotation)
        self.method = QtWidgets.QComboBox()
        for name, text in METHODS:
            self.method.addItem(text, name)
        self.method.activated.connect(self._send_method)
        self.defocus = QtWidgets.QLabel()
        self.defocus.setObjectName("quiet")
        self.reset = ConfirmButton("Reset", "Really forget all?")
        self.reset.setToolTip("forget what was acquired so far")
        self.reset.confirmed.connect(self._send_reset)
        self.stop = ConfirmButton("End session", "Really end it?")
        self.stop.confirmed.connect(self._send_stop)
        self.answer = QtWidgets.QLabel()
        self.answer.setWordWrap(True)
        self.answer.setTextFormat(QtCore.Qt.TextFormat.PlainText)
        self.answer.setAlignment(QtCore.Qt.AlignmentFlag.AlignTop)
        self._form = QtWidgets.QWidget()
        self._arrange()
        self.follow(None, live=False)

    def _arrange(self) -> None:
        form = QtWidgets.QFormLayout(self._form)
        form.setContentsMargins(0, 0, 0, 0)
        form.setVerticalSpacing(6)
        form.setFieldGrowthPolicy(QtWidgets.QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
        for name, number in self.numbers.items():
            form.addRow(LABELS[name], number)
            if name == "C10":
                form.addRow("Defocus", self.defocus)
        form.addRow("Rotation", self.rotation)
        form.addRow("", self.transpose)
        form.addRow("Method", self.method)
        buttons = QtWidgets.QHBoxLayout()
        buttons.addWidget(self.reset, 1)
        buttons.addWidget(self.stop, 1)
        form.addRow(buttons)
        layout = QtWidgets.QVBoxLayout(self)
        layout.setContentsMargins(10, 6, 10, 6)
        layout.addWidget(title_label("Optics"))
        layout.addWidget(self._form)
        layout.addWidget(self.answer, 1)
        hint = QtWidgets.QLabel("F1: keys and mouse")
        hint.setObjectName("quiet")
        layout.addWidget(hint)

    def follow(self, snapshot: Snapshot | None, live: bool) -> None:
        """Show the session's values in every field that is not being edited; grey when nobody would answer."""
        able = live and snapshot is not None and snapshot.control_port is not None
        if able != self._form.isEnabled():
            self._form.setEnabled(able)
        if snapshot is None:
            return
        for widget in (*self.numbers.values(), self.method):
            widget.setEnabled("phase" not in snapshot.left_out)  # they would change nothing
        self._session_aberrations = dict(snapshot.aberrations)
        for name, number in self.numbers.items():
            number.follow(snapshot.aberrations.get(name, 0.0))
        self.rotation.follow(snapshot.rotation_deg)
        text = value_text(0.0 - self.numbers["C10"].value() / 10, "nm")
        if text != self.defocus.text():
            self.defocus.setText(text)
        if self.rotation.held:
            return
        self.transpose.setChecked(bool(snapshot.transpose))
        index = self.method.findData(snapshot.method)
        if index < 0:  # a newer session may know more methods than this viewer
            self.method.addItem(snapshot.method, snapshot.method)
            index = self.method.count() - 1
        if not self.method.view().isVisible() and self._form.isEnabled():
            self.method.setCurrentIndex(index)

    def show_answer(self, answer: Answer) -> None:
        """What became of a request; an error stays until the next answer."""
        for number in self._held_by(answer.command):
            number.hold(SETTLE_S if answer.ok else 0)
        text = f"{answer.command}: done" if answer.ok else f"{answer.command}: {answer.error}"
        self.say(text, theme.GOOD if answer.ok else theme.BAD)

    def say(self, text: str, color: str = theme.QUIET) -> None:
        self.answer.setText(text)
        self.answer.setStyleSheet(f"color: {color}")

    def _held_by(self, command: str) -> Iterable[NumberField]:
        return {"aberrations": tuple(self.numbers.values())}.get(command, (self.rotation,))

    def _request(self, command: str, **values: object) -> None:
        for number in self._held_by(command):
            number.hold(3600)
        self.say(f"{command}: sent, waiting for the answer")
        self.requested.emit(command, values)

    def _send_aberrations(self) -> None:
        fields = {name: number.value() for name, number in self.numbers.items()}
        self._request("aberrations", values=self._session_aberrations | fields)

    def _send_rotation(self) -> None:
        self._request("rotation", rotation_deg=self.rotation.value(), transpose=self.transpose.isChecked())

    def _send_method(self) -> None:
        self._request("method", method=self.method.currentData())

    def _send_reset(self) -> None:
        self._request("reset")

    def _send_stop(self) -> None:
        self._request("stop")
