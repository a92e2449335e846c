"""The texts around the images: the status bar and the summary of the acquisition."""

from __future__ import annotations

from PySide6 import QtWidgets

from stream.optics import electron_wavelength
from stream.snapshot import Snapshot, left_out_sentence
from viewer import theme
from viewer.labels import ElidedLabel, title_label
from viewer.model import Presence
from viewer.text import NOTHING, rate_text

#: Losses by name of the counter, how the status bar calls them, what they mean.
LOSSES: tuple[tuple[str, str, str], ...] = (
    ("missing", "missing", "positions that no frame came for; filled with their row's mean pattern"),
    ("duplicate", "duplicate", "frames that came twice; the second was dropped"),
    ("late", "late", "frames of a pass that a newer one had already replaced"),
    ("undecodable", "undecodable", "frames that could not be decoded"),
)

LINK_COLORS = {"receiving": theme.GOOD, "waiting": theme.QUIET, "silent": theme.WARN}


class StatusBar(QtWidgets.QStatusBar):
    """Link, rates, losses, latency, state. Losses light up when they are not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.setSizeGripEnabled(False)
        self.link, self.rates, self.latency = (QtWidgets.QLabel() for _ in range(3))
        # The message is cut where there is no room; the numbers never are.
        self.state = ElidedLabel()
        self.losses = {name: QtWidgets.QLabel() for name, _, _ in LOSSES}
        for name, _, meaning in LOSSES:
            self.losses[name].setToolTip(meaning)
        self.damaged = QtWidgets.QLabel()
        self.addWidget(self.link)
        self.addWidget(self.state, 1)
        for label in (self.damaged, self.rates, *self.losses.values(), self.latency):
            label.setContentsMargins(6, 0, 6, 0)
            self.addPermanentWidget(label)
        self.link.setContentsMargins(8, 0, 8, 0)

    def show_snapshot(self, snapshot: Snapshot | None, presence: Presence) -> None:
        live = snapshot is not None and presence is Presence.LIVE
        link = snapshot.link if live and snapshot else "no session"
        color = LINK_COLORS.get(link, theme.WARN) if live else theme.BAD
        _say(self.link, f"<span style='color: {color}'>●</span> {link}")
        counters = snapshot.counters.as_dict() if snapshot else {}
        for name, word, _ in LOSSES:
            count = counters.get(name, 0)
            _say(self.losses[name], f"{word} {count:,}", theme.WARN if count else theme.QUIET)
        if snapshot is None:
            return
        # Rates of a session that is gone are not rates.
        rates = (snapshot.frames_per_s, snapshot.megabytes_per_s) if live else (None, None)
        _say(self.rates, f"{rate_text(rates[0], 'frames/s')}   {rate_text(rates[1], 'MB/s')}")
        latency = NOTHING if snapshot.latency_ms is None or not live else f"{snapshot.latency_ms:.0f}"
        _say(self.latency, f"latency {latency} ms")
        message = snapshot.message.replace("\n", " ")
        redundant = message.lower().startswith(snapshot.state)
        _say(self.state, message if redundant else f"{snapshot.state}{': ' if message else ''}{message}")

    def show_damaged(self, count: int, last: str) -> None:
        """Snapshots that could not be understood."""
        _say(self.damaged, f"damaged snapshots {count:,}" if count else "", theme.BAD)
        self.damaged.setToolTip(last)


class Summary(QtWidgets.QFrame):
    """Scan, pass, beam and detector in words and numbers."""

    ROWS = ("Scan", "Pass", "Beam", "Detector", "Images")

    def __init__(self) -> None:
        super().__init__()
        self.setObjectName("panel")
        self.progress = QtWidgets.QProgressBar()
        self.progress.setFormat("%v / %m rows")
        self.values = {name: ElidedLabel(NOTHING) for name in self.ROWS}
        self.words: dict[str, QtWidgets.QLabel] = {}
        grid = QtWidgets.QGridLayout(self)
        grid.setContentsMargins(10, 6, 10, 8)
        grid.setVerticalSpacing(3)
        grid.setHorizontalSpacing(14)
        grid.addWidget(title_label("Acquisition"), 0, 0)
        grid.addWidget(self.progress, 0, 1)
        for line, (name, label) in enumerate(self.values.items(), start=1):
            word = QtWidgets.QLabel(name)
            word.setObjectName("quiet")
            grid.addWidget(word, line, 0)
            grid.addWidget(label, line, 1)
            self.words[name] = word
        grid.setColumnStretch(1, 1)
        self._show_left_out(())

    def _show_left_out(self, left_out: tuple[str, ...]) -> None:
        """Only where there is something to say."""
        for label in (self.words["Images"], self.values["Images"]):
            label.setVisible(bool(left_out))
        _say(self.values["Images"], left_out_sentence(left_out), theme.WARN)

    def show_snapshot(self, snapshot: Snapshot) -> None:
        rows = snapshot.scan_shape[0] if snapshot.scan_shape else 0
        self.progress.setRange(0, max(rows, 1))
        self.progress.setTextVisible(rows > 0)
        self.progress.setValue(min(snapshot.rows_acquired, rows))
        for name, text in zip(self.ROWS, (_scan, _pass, _beam, _detector), strict=False):
            _say(self.values[name], text(snapshot))
        self._show_left_out(snapshot.left_out)


def _scan(s: Snapshot) -> str:
    parts = []
    if s.scan_shape:
        parts.append(f"{s.scan_shape[0]} × {s.scan_shape[1]}")
    if s.scan_step_angstrom:
        dy, dx = s.scan_step_angstrom
        parts.append(f"step {dy:.4g} Å" if dy == dx else f"step {dy:.4g} × {dx:.4g} Å")
        if s.scan_shape:
            parts.append(f"field {s.scan_shape[0] * dy / 10:.3g} × {s.scan_shape[1] * dx / 10:.3g} nm")
    return ",  ".join(parts) or NOTHING


def _pass(s: Snapshot) -> str:
    parts = [f"{s.passes_done} done" if s.state == "finished" else f"{s.passes_done + 1}"]
    if s.scan_row is not None and s.scan_shape:
        parts.append(f"row {s.scan_row + 1} of {s.scan_shape[0]} complete")
    if s.series is not None:
        parts.append(f"series {s.series}")
    return ",  ".join(parts) if s.scan_shape else NOTHING


def _beam(s: Snapshot) -> str:
    parts = []
    if s.energy_kev is not None:
        parts.append(f"{s.energy_kev:g} keV,  λ {electron_wavelength(s.energy_kev * 1e3) * 100:.4g} pm")
    if s.semiangle_mrad is not None:
        parts.append(f"semi-angle {s.semiangle_mrad:.4g} mrad")
    return ",  ".join(parts) or NOTHING


def _detector(s: Snapshot) -> str:
    parts = []
    if s.detector_shape:
        parts.append(f"{s.detector_shape[0]} × {s.detector_shape[1]}")
    if s.detector_pixel_mrad:
        parts.append(f"{s.detector_pixel_mrad[0]:.3g} mrad/px")
    if s.bf_radius_px is not None:
        parts.append(f"BF radius {s.bf_radius_px:.1f} px")
    parts += [f"{s.bad_pixels} masked"] if s.bad_pixels else []
    return ",  ".join(parts) or NOTHING


def _say(label: QtWidgets.QLabel, text: str, color: str | None = None) -> None:
    """Set text and colour where they changed: setting a style sheet again costs a layout."""
    if label.text() != text:
        label.setText(text)
    sheet = f"color: {color}" if color else ""
    if label.styleSheet() != sheet:
        label.setStyleSheet(sheet)
