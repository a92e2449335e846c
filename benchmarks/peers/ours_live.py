"""A live session of liveptycho on the simulated DECTRIS stream, or on Stream V2 messages of the same frames."""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import time
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq

from benchmarks.peers.measuring import answer, arguments, peak_bytes
from benchmarks.peers.streams import packed, series
from detectors.messages import Encoding
from detectors.protocols.registry import protocol_named
from stream.config import Layer
from stream.result import Result
from stream.session import Session
from stream.session_options import SessionOptions

_PATIENCE_S = 60.0


def _send_v2(pipe: Connection, path: str) -> None:
    data = np.load(path, mmap_mode="r")
    encoder = protocol_named("dectris-v2").encoder()
    messages = [
        *encoder.start(series(data)), *encoder.frames(1, 0, packed(data), Encoding.BSLZ4), *encoder.end(1)
    ]  # fmt: skip
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        pipe.send(f"tcp://127.0.0.1:{port}")
        pipe.recv()
        for parts in messages:
            socket.send_multipart(parts)
        pipe.recv()
        socket.close(linger=0)


class V2Sender(AbstractContextManager):  # type: ignore[type-arg]
    """Sends the frames of a ``.npy`` file as Stream V2 from a process of its own; everything is packed beforehand."""

    def __init__(self, path: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_send_v2, args=(other, path), daemon=True)
        self._process.start()
        self.address: str = self._pipe.recv()

    async def go(self) -> None:
        self._pipe.send("go")

    def __exit__(self, *error: object) -> None:
        self._pipe.send("end")
        self._process.join(5)
        self._process.kill()


async def arm(api_port: int) -> None:
    """Tell the simulator to send: it sends header and frames at once."""
    url = f"http://127.0.0.1:{api_port}/detector/api/1.8.0/command/arm"
    request = urllib.request.Request(url, data=b"{}", method="PUT", headers={"Content-Type": "application/json"})
    await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=10).read())


async def received(
    address: str, protocol: str, settings: dict[str, Any], go: Callable[[], Awaitable[None]]
) -> tuple[Result, dict[str, Any]]:
    """One scan's result, and the times from the command to send."""
    options = SessionOptions([address], protocol, layers=[Layer.of("flag", settings)], series_timeout_s=_PATIENCE_S)
    first_image_s = None
    async with Session(options) as session:
        await asyncio.sleep(1.0)  # connected
        cpu = resource.getrusage(resource.RUSAGE_SELF)
        began = time.perf_counter()
        await go()
        async for snapshot in session:
            if first_image_s is None and snapshot.rows_acquired:
                first_image_s = time.perf_counter() - began
                if not np.isfinite(snapshot.images["phase"]).any():
                    raise RuntimeError("the first image is empty")
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_SELF)
    result = session.result
    assert result is not None
    return result, {
        "run_s": seconds,
        "first_image_s": first_image_s,
        "cpu_s": after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime,
        "peak_bytes": peak_bytes(),
        "counters": result.counters.as_dict(),
    }


async def received_v2(path: str, settings: dict[str, Any]) -> tuple[Result, dict[str, Any]]:
    """The same with our own sender."""
    with V2Sender(path) as sender:
        return await received(sender.address, "dectris-v2", settings, sender.go)


async def main() -> None:
    asked = arguments()
    settings = {**asked["optics"], "scan_shape": tuple(asked["scan"])}
    # What is compiled at the first start on a machine is compiled here.
    await received_v2(asked["small"], {**settings, "scan_shape": tuple(asked["small_scan"])})
    if "api_port" in asked:
        address = f"tcp://127.0.0.1:{asked['stream_port']}"
        result, figures = await received(address, "dectris-v1", settings, lambda: arm(asked["api_port"]))
    else:
        result, figures = await received_v2(asked["data"], settings)
    np.save(asked["out"], result.object)
    answer(**figures)


if __name__ == "__main__":
    asyncio.run(main())
