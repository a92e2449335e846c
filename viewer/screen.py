"""From a snapshot to the four panels: which image goes where, in which plane, with which marks."""

from __future__ import annotations

import time

import numpy as np
from PySide6 import QtCore, QtGui, QtWidgets

from stream.snapshot import IMAGE_UNITS, Snapshot, channels_without
from viewer import geometry, theme
from viewer.channels import PHASE, SECOND, Channel, VectorChannel, first_channel, second_channel
from viewer.contrast import SCALES, LogScale
from viewer.labels import title_label
from viewer.panels import PATTERN_CONTRAST, SPECTRUM_CONTRAST, ImagePanel
from viewer.spectrum import power_spectrum
from viewer.text import value_text

#: The spectrum needs a Fourier transform, and changes slowly: a few times a second are enough.
SPECTRUM_EVERY_S = 0.25


class Screen(QtCore.QObject):
    """Owns the four image panels and what links them: crosshair, zoom, second channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Channel = PHASE
        """what the large panel shows"""
        self.channel: Channel = SECOND[0]
        self._left_out: tuple[str, ...] = ()
        self.channels = QtWidgets.QComboBox()
        self._items = QtGui.QStandardItemModel()
        self.channels.setModel(self._items)
        self.channels.addItems([channel.title for channel in SECOND])
        self.channels.setFocusPolicy(QtCore.Qt.FocusPolicy.NoFocus)  # its keys are the window's
        self._first_title, self._spectrum_title = title_label(PHASE.title), title_label("Phase spectrum")
        self.phase = ImagePanel(self._first_title, PHASE.contrast, PHASE.colors)
        self.second = ImagePanel(self.channels, self.channel.contrast, self.channel.colors)
        self.pattern = ImagePanel(title_label("Mean pattern"), PATTERN_CONTRAST, "inferno", LogScale())
        self.spectrum = ImagePanel(self._spectrum_title, SPECTRUM_CONTRAST, "inferno", LogScale(decades=6))
        self.panels = (self.phase, self.second, self.pattern, self.spectrum)
        self._snapshot: Snapshot | None = None
        self._pinned = False
        self._crosshair_on = True
        self._row_line_on = True
        self._spectrum_of: Snapshot | None = None
        self._spectrum_due_s = 0.0
        self.channels.activated.connect(self.set_channel)
        for panel, other in ((self.phase, self.second), (self.second, self.phase)):
            panel.hovered.connect(self._hover)
            panel.clicked.connect(self._pin)
            panel.view_moved.connect(other.look_at)
        for panel in (self.pattern, self.spectrum):
            panel.hovered.connect(panel.set_cursor)
            panel.hovered.connect(self._show_values)

    # Drawing

    def show_snapshot(self, snapshot: Snapshot, fresh: bool) -> None:
        """Draw ``snapshot``; ``fresh``: it is of another session or scan, so views and locks start over."""
        self._snapshot = snapshot
        if snapshot.left_out != self._left_out:
            self._leave_out(snapshot.left_out)
        if fresh:
            self._pinned = False
            for panel in self.panels:
                panel.contrast = panel.automatic
                panel.set_cursor(None)
        self._show_phase(snapshot)
        self._show_second(snapshot)
        self._show_pattern(snapshot)
        if fresh or time.monotonic() >= self._spectrum_due_s:
            self._show_spectrum(snapshot)
        if fresh:
            self.fit()
        self._show_values()

    def _leave_out(self, left_out: tuple[str, ...]) -> None:
        """The session does not make the images of these channels: say so in their places, offer what there is."""
        self._left_out = left_out
        first, second = first_channel(left_out), second_channel(left_out, self.channel)
        if first is not self.first:
            self.first = first
            self._first_title.setText(first.title)
            self._spectrum_title.setText(f"{first.title} spectrum")
            self.phase.set_contrast(first.contrast)
            self.phase.set_colors(first.colors)
            self.spectrum.unlock()
            self._spectrum_of = None
        for index, channel in enumerate(SECOND):
            item = self._items.item(index)
            item.setEnabled(not channel.is_left_out(left_out))
            item.setToolTip(self._absence(channel.is_left_out(left_out)))
        if second is not self.channel:
            self._take_second(SECOND.index(second))

    def _absence(self, absent: bool) -> str:
        """What a panel says in the place of an image that is left out."""
        return f"left out (--channels {','.join(channels_without(self._left_out))})" if absent else ""

    def _show_phase(self, snapshot: Snapshot) -> None:
        images = self.first.images(snapshot.images)
        shape = images[0].shape if images else snapshot.scan_shape
        plane = geometry.scan_plane(snapshot, shape) if shape else None
        self.phase.show_image(images, plane, self.first.unit)
        self.phase.say_absent(self._absence(self.first.is_left_out(self._left_out)))
        y = None
        if plane and snapshot.scan_row is not None and snapshot.state == "scanning" and self._row_line_on:
            y = plane.point(snapshot.scan_row + 0.5, 0)[1]
        left, _, width, _ = plane.rect if plane else (0.0, 0.0, 0.0, 0.0)
        self.phase.row_line.set_row(y, left, left + width)
        self.second.row_line.set_row(y, left, left + width)

    def _show_second(self, snapshot: Snapshot) -> None:
        images = self.channel.images(snapshot.images)
        shape = images[0].shape if images else snapshot.scan_shape
        plane = geometry.scan_plane(snapshot, shape) if shape else None
        self.second.show_image(images, plane, self.channel.unit)
        self.second.say_absent(self._absence(self.channel.is_left_out(self._left_out)))

    def _show_pattern(self, snapshot: Snapshot) -> None:
        image = snapshot.images.get("mean_pattern")
        shape = image.shape if image is not None else snapshot.detector_shape
        if shape is None:
            return
        before, plane = self.pattern.plane, geometry.pattern_plane(snapshot, shape)
        self.pattern.show_image(None if image is None else (image,), plane, IMAGE_UNITS["mean_pattern"])
        self.pattern.say_absent(self._absence("pattern" in self._left_out))
        self.pattern.circle.set_radius(None if self.pattern.absence.text() else geometry.bf_circle(snapshot))
        if before is None or before.shape != plane.shape or before.unit != plane.unit:
            self.pattern.fit()

    def _show_spectrum(self, snapshot: Snapshot) -> None:
        self._spectrum_due_s = time.monotonic() + SPECTRUM_EVERY_S
        self.spectrum.say_absent(self._absence(self.first.is_left_out(self._left_out)))
        phase = snapshot.images.get(self.first.name)
        shape = phase.shape if phase is not None else snapshot.scan_shape
        if shape is None or snapshot is self._spectrum_of:
            return
        self._spectrum_of = snapshot
        before, plane = self.spectrum.plane, geometry.spectrum_plane(snapshot, shape)
        power = None if phase is None else power_spectrum(phase)
        self.spectrum.show_image(None if power is None else (power,), plane, f"{self.first.unit}²")
        limit = geometry.cutoff(snapshot)
        absent = bool(self.spectrum.absence.text())
        self.spectrum.circle.set_radius(None if limit is None or absent else (limit, limit))
        if limit is not None:
            # Oversampled scans have an empty rim: show the transferred part, up to what was sampled.
            _, _, width, height = plane.rect
            reach = min(1.25 * limit, max(width, height) / 2)
            self.spectrum.set_home(QtCore.QRectF(-reach, -reach, 2 * reach, 2 * reach))
        else:
            self.spectrum.set_home(None)
        if before != plane:
            self.spectrum.fit()

    def redraw(self) -> None:
        """Draw the same snapshot again, e.g. after a change of channel."""
        if self._snapshot is not None:
            self.show_snapshot(self._snapshot, fresh=False)

    # What the keys do

    def set_channel(self, index: int) -> None:
        """Show SECOND[index] in the second panel, with its own colours and contrast."""
        self._take_second(index)
        self.redraw()

    def _take_second(self, index: int) -> None:
        self.channel = SECOND[index]
        self.channels.setCurrentIndex(index)
        self.second.set_contrast(self.channel.contrast)
        self.second.set_colors(None if isinstance(self.channel, VectorChannel) else self.channel.colors)

    def step_channel(self, step: int) -> None:
        """The next channel of those that are there."""
        here = SECOND.index(self.channel)
        steps = [(here + n * step) % len(SECOND) for n in range(1, len(SECOND) + 1)]
        self.set_channel(next((i for i in steps if not SECOND[i].is_left_out(self._left_out)), here))

    def next_map(self) -> None:
        maps = theme.PHASE_MAPS
        self.phase.set_colors(maps[(maps.index(self.phase.colors) + 1) % len(maps)])
        self.phase.redraw()

    def next_scale(self) -> None:
        names = [scale.name for scale in SCALES]
        self.pattern.scale = SCALES[(names.index(self.pattern.scale.name) + 1) % len(SCALES)]
        self.pattern.redraw()
        self._show_values()

    def toggle_lock(self) -> None:
        """Lock all if any is free."""
        lock = not all(panel.locked for panel in self.panels if panel.limits is not None)
        for panel in self.panels:
            panel.lock() if lock else panel.unlock()

    def unlock(self) -> None:
        for panel in self.panels:
            panel.unlock()

    def fit(self) -> None:
        for panel in self.panels:
            panel.fit()

    def toggle_smooth(self) -> None:
        smooth = not self.phase.picture.smooth
        for panel in self.panels:
            panel.set_smooth(smooth)

    def toggle_crosshair(self) -> None:
        self._crosshair_on = not self._crosshair_on
        self._pinned = False
        self._hover(None)

    def toggle_row_line(self) -> None:
        self._row_line_on = not self._row_line_on
        self.redraw()

    def set_dimmed(self, dimmed: bool) -> None:
        for panel in self.panels:
            panel.set_dimmed(dimmed)

    # Crosshair and values

    def _pin(self, pixel: tuple[int, int]) -> None:
        """A click holds the crosshair at ``pixel``; the next one lets it follow the mouse again."""
        held, self._pinned = self._pinned, False
        self._hover(pixel)
        self._pinned = self._crosshair_on and not held

    def _hover(self, pixel: tuple[int, int] | None) -> None:
        if self._pinned:
            return
        for panel in (self.phase, self.second):
            panel.set_cursor(pixel if self._crosshair_on else None)
        self._show_values()

    def _show_values(self, *_: object) -> None:
        """The values under the crosshairs; called at each snapshot too, for they change below a resting mouse."""
        self.phase.readout.setText(_joined(_place(self.phase), _values(self.phase)))
        there = self.second.images or not self._has_images() or self.second.absence.text()
        missing = "" if there else "not in this session"
        self.second.readout.setText(missing or _values(self.second))
        self.pattern.readout.setText(_joined(_place(self.pattern), _values(self.pattern)) or self._disk_text())
        self.spectrum.readout.setText(_frequency(self.spectrum) or self._limit_text())
        for panel in (self.pattern, self.spectrum):
            if panel.absence.text():
                panel.readout.setText("")

    def _has_images(self) -> bool:
        return self._snapshot is not None and bool(self._snapshot.images)

    def _disk_text(self) -> str:
        snapshot = self._snapshot
        if snapshot is None or (circle := geometry.bf_circle(snapshot)) is None:
            return ""
        return f"BF radius {np.mean(circle):.3g} {self.pattern.plane_unit},  {self.pattern.scale.name} scale"

    def _limit_text(self) -> str:
        limit = geometry.cutoff(self._snapshot) if self._snapshot else None
        return "" if limit is None else f"2α/λ = {limit:.3g} Å⁻¹ ({1 / limit:.3g} Å)"


def _joined(*parts: str) -> str:
    return "    ".join(part for part in parts if part)


def _place(panel: ImagePanel) -> str:
    """Row and column in pixels and in the plane's unit: ``row 12, col 7 px = 2.4, 1.4 Å``."""
    if panel.crosshair_at is None or panel.plane is None:
        return ""
    x, y = panel.plane.point(*panel.crosshair_at)
    pixel = f"row {panel.crosshair_at[0]}, col {panel.crosshair_at[1]}"
    if panel.plane.unit == geometry.PIXELS:
        return pixel
    if panel.plane.unit == geometry.ANGSTROM and max(abs(x), abs(y)) >= 1000:
        return f"{pixel}  ({y / 10:.1f}, {x / 10:.1f} nm)"
    return f"{pixel}  ({y:.1f}, {x:.1f} {panel.plane.unit})".replace("-", "−")


def _values(panel: ImagePanel) -> str:
    values = panel.values()
    if not values:
        return ""
    if len(values) == 2:
        angle = np.degrees(np.arctan2(values[1], values[0]))
        return f"{value_text(float(np.hypot(*values)), panel.unit)} at {angle:.0f}°".replace("-", "−")
    return value_text(values[0], panel.unit)


def _frequency(panel: ImagePanel) -> str:
    """Frequency and spacing under the crosshair of a spectrum."""
    if panel.crosshair_at is None or panel.plane is None:
        return ""
    q = float(np.hypot(*panel.plane.point(*panel.crosshair_at)))
    spacing = f"  d = {1 / q:.3g} Å" if q > 0 and panel.plane.unit == geometry.PER_ANGSTROM else ""
    return f"q = {q:.3g} {panel.plane.unit}{spacing}"
