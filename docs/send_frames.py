"""Feed liveptycho from your own software: pyzmq, msgpack and numpy are all it takes. See protocol.md.

python send_frames.py &  liveptycho live tcp://127.0.0.1:31000 --bind --no-viewer --output result.h5
"""

import sys

import msgpack
import numpy as np
import zmq

scan_shape, detector_shape = (32, 32), (64, 64)
context = zmq.Context()
socket = context.socket(zmq.PUSH)
socket.connect(sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:31000")

optics = {"energy_kev": 200.0, "semiangle_mrad": 20.0, "scan_step_angstrom": 0.25, "detector_pixel_mrad": 1.5}
socket.send(
    msgpack.packb(
        {"type": "start", "series": 1, "detector_shape": detector_shape, "dtype": "uint16", "scan_shape": scan_shape}
        | {"frames": scan_shape[0] * scan_shape[1]}
        | optics
    )
)
row, column = np.indices(detector_shape) - 31.5
disk = np.hypot(row, column) * optics["detector_pixel_mrad"] < optics["semiangle_mrad"]
rng = np.random.default_rng(1)
for scan_row in range(scan_shape[0]):  # one message a scan row; here the "detector" only sees noise in the disk
    frames = rng.poisson(2.0 * disk, (scan_shape[1], *detector_shape)).astype("<u2")
    header = {"type": "frames", "series": 1, "first": scan_row * scan_shape[1], "count": len(frames), "encoding": "raw"}
    socket.send_multipart([msgpack.packb(header), frames], copy=False)
socket.send(msgpack.packb({"type": "end", "series": 1}))
socket.close()
context.term()  # waits until everything is delivered: without it, a short scan dies with this process
