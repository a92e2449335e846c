"""libertem-live with SSB_UDF on the simulated DECTRIS stream. Runs in the environment ``.peers/libertem``.

Masks are made before the detector is armed, and the workers have compiled their code on an array.
"""

from __future__ import annotations

import time
import warnings

import numpy as np
from libertem_live.api import LiveContext
from libertem_ssb import VERSIONS, Masks
from measuring import Job, answer, arguments, session_cpu_seconds


def main() -> None:
    asked = arguments()
    warnings.simplefilter("ignore")
    scan, detector, optics = tuple(asked["scan"]), tuple(asked["detector"]), asked["optics"]
    with Job() as setup:
        masks = Masks(scan, detector, optics)
    with LiveContext() as context:
        warm = context.load("npy", path=asked["small"], sig_dims=2)
        context.run_udf(dataset=warm, udf=Masks(tuple(asked["small_scan"]), detector, optics).udf())
        opened = context.make_connection("dectris").open(
            api_host="127.0.0.1",
            api_port=asked["api_port"],
            data_host="127.0.0.1",
            data_port=asked["stream_port"],
            bytes_per_frame=asked["largest_frame"],
        )
        with opened as connection:
            # Subscribed before it is armed, so that neither program waits for the connection.
            if connection.wait_for_acquisition(timeout=1.0) is not None:
                raise RuntimeError("the simulator was armed already")
            seconds = []
            first_image_s = 0.0
            cpu = session_cpu_seconds()
            for every_image in (False, True):
                began = time.perf_counter()
                connection.get_api_client().sendDetectorCommand("arm")
                pending = connection.wait_for_acquisition(timeout=30.0)
                if pending is None:
                    raise RuntimeError("no acquisition came within 30 s of the arm command")
                acquisition = context.make_acquisition(conn=connection, nav_shape=scan, pending_aq=pending)
                if every_image:
                    images = context.run_udf_iter(dataset=acquisition, udf=masks.udf())
                    next(iter(images))
                    first_image_s = time.perf_counter() - began
                    answer(
                        versions=VERSIONS,
                        setup_s=setup.seconds,
                        run_s=seconds[0],
                        first_image_s=first_image_s,
                        cpu_s=cpu,
                    )
                    time.sleep(600)  # ended from outside: it cannot stop in the middle of a scan
                result = context.run_udf(dataset=acquisition, udf=masks.udf())
                seconds.append(time.perf_counter() - began)
                cpu = session_cpu_seconds() - cpu
                np.save(asked["out"], result["fourier"].data)


if __name__ == "__main__":
    main()
