"""What a session looks like at one moment, as the snapshot that viewers get."""

from __future__ import annotations

import time
from dataclasses import replace

from stream.acquisition import Acquisition
from stream.snapshot import Counters, Snapshot


def fill_snapshot(blank: Snapshot, acquisition: Acquisition) -> Snapshot:
    """``blank`` with the state, the settings and the newest images of ``acquisition``. Takes milliseconds."""
    snapshot = replace(blank, state=acquisition.state, message=acquisition.told, link=acquisition.link)
    run = acquisition.run
    if run is None:
        return replace(snapshot, counters=Counters(unclaimed=acquisition.unclaimed))
    frames_per_s, bytes_per_s = acquisition.rate.now()
    snapshot = replace(
        snapshot,
        series=run.start.series,
        detector_shape=run.start.detector_shape,
        counters=replace(run.counters, unclaimed=acquisition.unclaimed),
        frames_per_s=frames_per_s,
        megabytes_per_s=bytes_per_s / 1e6,
    )
    engine, parameters = run.engine, run.parameters
    if engine is None or parameters is None:
        return snapshot
    value = parameters.values
    view = engine.view()
    now = time.time()
    latency = None
    if view.last_row is not None and acquisition.state == "scanning" and not engine.preparing:
        latency = max(0.0, now * 1e3 - view.last_row.time_ns * 1e-6)
    return replace(
        snapshot,
        time_s=now,
        passes_done=engine.passes_done,
        scan_row=None if view.last_row is None else view.last_row.row,
        rows_acquired=view.rows_acquired,
        counters=replace(view.counters, unclaimed=acquisition.unclaimed),
        scan_shape=engine.setup.scan.shape,
        scan_step_angstrom=engine.setup.scan_step,
        detector_pixel_mrad=value["detector_pixel_mrad"],
        bf_centre_px=value["bf_centre_px"],
        bf_radius_px=value["bf_radius_px"],
        bad_pixels=int((~engine.setup.geometry.good).sum()),
        energy_kev=value["energy_kev"],
        semiangle_mrad=value["semiangle_mrad"],
        rotation_deg=value["rotation_deg"],
        transpose=value["transpose"],
        aberrations=value["aberrations"],
        method=value["method"],
        latency_ms=latency,
        left_out=engine.setup.left_out,
        images=view.images,
    )
