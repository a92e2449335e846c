"""A client of the SIMPLON interface, over which DECTRIS detectors are set up, armed and triggered.

Source: DECTRIS SIMPLON API reference 1.8.0. Every call is ``<module>/api/<version>/<config|status|command>/<key>``;
which keys there are differs between models and firmware, so ``find`` lets any be absent.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import aiohttp
import numpy as np
import yarl

from detectors.errors import ConfigurationError, ConnectionFailed, ProtocolError

#: Versions of the interface that are in the field, the newest first: the address contains it.
VERSIONS = ("1.8.0", "1.6.0")

#: How long an answer may take [s]. ``arm`` sets up the whole detector, ``initialize`` starts it.
_ANSWER_S = 10.0
_COMMAND_S = {"arm": 60.0, "initialize": 180.0, "disarm": 60.0, "cancel": 60.0, "abort": 60.0}

#: Replies beyond are none of a detector's. A pixel mask of 18 megapixels is 97 MB in base64.
_REPLY_BYTES = 1 << 20
_ARRAY_REPLY_BYTES = 256 << 20
_ARRAY_KEYS = ("pixel_mask", "flatfield")

_ARRAY_TYPES = ("<u1", "|u1", "<u2", "<u4", "<i4", "<f4", "<f8")
_LONGEST_SIDE = 1 << 20

#: How a ZeroMQ socket greets whoever connects.
_ZEROMQ_GREETING = b"\xff\x00\x00\x00\x00\x00\x00\x00"


class Refused(ConfigurationError):
    """The detector answered, and said no. ``status`` is HTTP's."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Entry:
    """A configuration or status key: its value, and what the detector says about it where it does."""

    value: Any
    allowed_values: tuple[Any, ...] | None = None
    access_mode: str | None = None
    unit: str | None = None
    minimum: float | None = None
    maximum: float | None = None


class Simplon:
    """The detector control unit (DCU) at ``url``, for example ``http://192.168.1.10``. An async context manager.

    Entering finds out which version of the interface the DCU speaks. Every call raises ``ConnectionFailed`` when nobody
    answers (in time), ``Refused`` when the answer is an error, and ``ConfigurationError`` when it is not SIMPLON's.
    ``timeout_s`` is how long an answer may take.
    """

    def __init__(self, url: str, *, timeout_s: float = _ANSWER_S) -> None:
        self.url = _base(url)
        self.timeout_s = timeout_s
        self.version = VERSIONS[0]

    async def __aenter__(self) -> Simplon:
        self._http = aiohttp.ClientSession(
            # A connection for each call: a kept one may have died, and no command must be sent twice.
            connector=aiohttp.TCPConnector(force_close=True, limit=8),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        try:
            self.version = await self._spoken()
        except BaseException:
            await self._http.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def entry(self, module: str, kind: str, key: str) -> Entry:
        """Key ``key`` of ``module`` (detector, stream, monitor, filewriter), ``kind`` config or status."""
        reply = await self._call("GET", module, kind, key, None, self.timeout_s)
        if not isinstance(reply, dict) or "value" not in reply:
            raise ConfigurationError(
                f"{self._address(module, kind, key)} answered {_short(reply)}; a SIMPLON detector answers with a map "
                "that has a value"
            )
        allowed = reply.get("allowed_values")
        return Entry(
            _decoded(reply["value"]),
            tuple(allowed) if isinstance(allowed, list) and allowed else None,
            *(reply[name] if isinstance(reply.get(name), str) else None for name in ("access_mode", "unit")),
            *(_number_or_none(reply.get(name)) for name in ("min", "max")),
        )

    async def find(self, module: str, kind: str, key: str) -> Entry | None:
        """The same; None where the detector has no such key, or does not tell it in its present state."""
        try:
            return await self.entry(module, kind, key)
        except Refused:
            return None

    async def get(self, module: str, kind: str, key: str) -> Any:
        """The value of a key; a 2-D one as array (rows, columns)."""
        return (await self.entry(module, kind, key)).value

    async def put(self, module: str, key: str, value: Any) -> list[str]:
        """Set a configuration key; the keys that changed with it, itself included."""
        reply = await self._call("PUT", module, "config", key, {"value": value}, self.timeout_s)
        return [item for item in reply if isinstance(item, str)] if isinstance(reply, list) else []

    async def command(self, name: str, value: Any = None, *, module: str = "detector") -> Any:
        """Give a command; its reply, None where there is none. ``trigger`` may take as long as the series."""
        timeout_s = None if name == "trigger" else max(self.timeout_s, _COMMAND_S.get(name, 0.0))
        body = None if value is None else {"value": value}
        return await self._call("PUT", module, "command", name, body, timeout_s)

    async def arm(self) -> int:
        """Arm the detector: the number of the series that begins, by which its stream is known."""
        reply = await self.command("arm")
        sequence = reply.get("sequence id") if isinstance(reply, dict) else None
        if type(sequence) is not int:
            raise ConfigurationError(
                f"{self.url} took the command arm, but answered {_short(reply)} and not with the series' number; is it "
                "a SIMPLON detector?"
            )
        return sequence

    async def state(self) -> str | None:
        """The detector's state: na, initialize, idle, configure, ready, acquire, error, ...; None where not told."""
        entry = await self.find("detector", "status", "state")
        return entry.value if entry is not None and isinstance(entry.value, str) else None

    # below

    async def _spoken(self) -> str:
        for version in VERSIONS:
            self.version = version
            # Before it is initialised, a detector tells its state only; simulators may not tell that.
            for kind, key in (("status", "state"), ("config", "x_pixels_in_detector")):
                if await self.find("detector", kind, key) is not None:
                    return version
        raise ConfigurationError(
            f"{self.url} answers, but has no SIMPLON interface of version {' or '.join(VERSIONS)}: is it the address "
            f"of the DCU? Look at {self.url}/docs/ in a browser"
        )

    def _address(self, module: str, kind: str, key: str) -> str:
        return f"{self.url}/{module}/api/{self.version}/{kind}/{key}"

    async def _call(self, method: str, module: str, kind: str, key: str, body: Any, timeout_s: float | None) -> Any:
        """One request; ``timeout_s`` None for as long as it takes."""
        address = self._address(module, kind, key)
        limit = _ARRAY_REPLY_BYTES if method == "GET" and key.rpartition("/")[2] in _ARRAY_KEYS else _REPLY_BYTES
        try:
            async with self._http.request(
                method,
                address,
                json=body,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=self.timeout_s),
            ) as response:
                data = await _read(response, limit)
        except aiohttp.ClientConnectorError as error:
            raise ConnectionFailed(
                f"nobody answers at {self.url} ({error.os_error.strerror or error.os_error}): is the DCU switched on, "
                "on this network, and the address right?"
            ) from None
        except TimeoutError:
            raise ConnectionFailed(
                f"{address} did not answer within {timeout_s or self.timeout_s:g} s: is the DCU switched on, on this "
                "network, and the address right?"
            ) from None
        except aiohttp.ClientResponseError as error:
            raise ConfigurationError(await self._no_http(error)) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            why = str(error) or type(error).__name__
            raise ConnectionFailed(f"the connection broke off during {method} {address}: {why}") from None
        if data is None:
            raise ConfigurationError(f"{address} answered with more than {limit >> 20} MB; is it a SIMPLON detector?")
        if 300 <= response.status < 400:
            raise ConfigurationError(
                f"{address} sends its callers elsewhere ({response.headers.get('Location', '?')[:200]}); give the "
                "address of the DCU itself"
            )
        if response.status != 200:
            text = " ".join(data[:2000].decode("utf-8", "replace").split())[:300]
            raise Refused(
                f"{method} {address}{'' if body is None else f' with {_short(body)}'} was refused with HTTP status "
                f"{response.status}{f': {text}' if text else ''}",
                response.status,
            )
        if method == "PUT" and not data.strip():
            return None
        try:
            return await asyncio.to_thread(json.loads, data) if len(data) > _REPLY_BYTES else json.loads(data)
        except (ValueError, RecursionError):
            raise ConfigurationError(
                f"{address} answered with {response.content_type}, not JSON: {_short(data[:80])}; it is no SIMPLON "
                "detector: is the address that of the DCU?"
            ) from None

    async def _no_http(self, error: aiohttp.ClientResponseError) -> str:
        """What there is at a port that does not speak HTTP."""
        url, said = yarl.URL(self.url), b""
        try:
            async with asyncio.timeout(2.0):
                reader, writer = await asyncio.open_connection(url.host, url.port)
                try:
                    said = await reader.read(16)
                finally:
                    writer.close()
        except OSError:  # TimeoutError is one
            pass
        if said.startswith(_ZEROMQ_GREETING[:1]) and b"\x7f" in said[:10]:
            return (
                f"{self.url} is a ZeroMQ port, as the image stream has it (9999 or 31001), not the SIMPLON interface: "
                f"try http://{url.host} (port 80)"
            )
        answer = " ".join(error.message.split())[:200]
        return f"{self.url} does not speak HTTP ({answer}): is the address that of the DCU?"


def decode_array(value: Mapping[str, Any]) -> np.ndarray:
    """A ``__darray__`` map as array (rows, columns); its shape is written [width, height]. Raises ``ProtocolError``."""
    dtype, shape, data = value.get("type"), value.get("shape"), value.get("data")
    if dtype not in _ARRAY_TYPES or value.get("filters") != ["base64"] or not isinstance(data, str):
        raise ProtocolError(f"unknown kind of array: type {_short(dtype)}, filters {_short(value.get('filters'))}")
    if not (
        isinstance(shape, list)
        and len(shape) in (1, 2)
        and all(type(n) is int and 0 <= n <= _LONGEST_SIDE for n in shape)
    ):
        raise ProtocolError(f"an array's shape is [width, height], got {_short(shape)}")
    try:
        flat = np.frombuffer(base64.b64decode(data, validate=True), dtype)
    except (binascii.Error, ValueError) as error:
        raise ProtocolError(f"an array's data is no base64 of {dtype}: {error}") from None
    if len(flat) != math.prod(shape):
        raise ProtocolError(f"an array of the shape {shape} came with {len(flat)} elements")
    return flat.reshape(shape[::-1])


def encode_array(array: np.ndarray) -> dict[str, Any]:
    """The opposite of ``decode_array``."""
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {
        "__darray__": [1, 0, 0],
        "type": data.dtype.str,
        "shape": list(array.shape[::-1]),
        "filters": ["base64"],
        "data": base64.b64encode(data.tobytes()).decode("ascii"),
    }


def _decoded(value: Any) -> Any:
    return decode_array(value) if isinstance(value, dict) and "__darray__" in value else value


def _base(url: str) -> str:
    """The address without path. Raises ``ConfigurationError`` for what is none."""
    expected = "expected something like http://192.168.1.10 or http://localhost:8080"
    try:
        parsed = yarl.URL(url if "://" in url else f"http://{url}")
        if parsed.scheme == "tcp":
            raise ConfigurationError(f"{url!r} is the address of a stream, not of the SIMPLON interface; {expected}")
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.user is not None:
            raise ConfigurationError(f"{url!r} is not the address of a SIMPLON interface; {expected}")
        return str(parsed.origin())
    except ValueError as error:
        raise ConfigurationError(f"{url!r} is not an address ({error}); {expected}") from None


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes | None:
    """The body; None when it is longer than ``limit`` bytes."""
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > limit:
            return None
        chunks.append(chunk)
    return b"".join(chunks)


def _number_or_none(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
