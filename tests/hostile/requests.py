"""What comes to an open port that is no honest request: none may be answered with a page."""

from __future__ import annotations

import random
from collections.abc import Iterator

HOST = b"Host: localhost\r\n"


def corpus() -> Iterator[tuple[str, bytes]]:
    """Names and bytes, always the same."""
    for maker in (_methods, _paths, _heads, _lines, _bodies, _noise):
        for number, request in enumerate(maker()):
            yield f"{maker.__name__[1:]} {number}", request


def _methods() -> Iterator[bytes]:
    for method in (
        *(
            "POST",
            "PUT",
            "DELETE",
            "PATCH",
            "OPTIONS",
            "TRACE",
            "CONNECT",
            "PROPFIND",
            "DEBUG",
            "get",
            "G",
            "X" * 5_000,
        ),
        *("\0GET", "GET\0", "GE T", "GET/", "%47ET", "{}", "-"),
    ):
        yield method.encode() + b" /status HTTP/1.1\r\n" + HOST + b"\r\n"


def _paths() -> Iterator[bytes]:
    for path in (
        *(
            "/",
            "/..",
            "/../etc/passwd",
            "/status/..",
            "/status/../status",
            "/./status",
            "//status",
            "/status/",
            "/STATUS",
        ),
        *(
            "/%2e%2e/etc/passwd",
            "/..%2fetc%2fpasswd",
            "/%00",
            "/status%00",
            "/metrics%0d%0aX:1",
            "/metrics;x",
            "/status/x",
        ),
        *("/static/../../policy.yaml", "/policy.yaml", "/state/LOCK", "/debug", "/-/reload", "/-/quit", "/shutdown"),
        *(
            "/metrics/../../..",
            "\\status",
            "status",
            "*",
            "/" + "a" * 60_000,
            "/" + "../" * 500,
            "/\u00e9",
            "/?/status",
        ),
        *("/docs", "/openapi.json", "/.git/config", "/favicon.ico"),
    ):
        yield b"GET " + path.encode("latin-1") + b" HTTP/1.1\r\n" + HOST + b"\r\n"


def _heads() -> Iterator[bytes]:
    for head in (
        b"X: " + b"a" * 200_000 + b"\r\n",
        b"X: a\r\n" * 20_000,
        b"X" * 100_000 + b": a\r\n",
        b": a\r\n",
        b"X a\r\n",
        b"X\0: a\r\n",
        b"X: a\0b\r\n",
        b"X : a\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\nTransfer-Encoding: x\r\n",
        b"Transfer-Encoding: evil\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 1\r\nContent-Length: 2\r\n",
        b"Content-Length: 9999999999999999999999999\r\n",
        b"Content-Length: 0x10\r\n",
        b"Host: other\r\n",
        b"(: a\r\n",
    ):
        yield b"GET /status HTTP/1.1\r\n" + HOST + head + b"\r\n"


def _lines() -> Iterator[bytes]:
    for line in (
        *(
            b"GET /status",
            b"GET /status HTTP/9.9",
            b"GET /status HTTP/1.1 x",
            b"GET  HTTP/1.1",
            b"HTTP/1.1 200 OK",
            b"",
        ),
        *(
            b"GET /status HTTP/2.0",
            b"PRI * HTTP/2.0",
            b"GET\t/status\tHTTP/1.1",
            b" GET /status HTTP/1.1",
            b"\0",
            b"\xff" * 50,
        ),
        *(
            b"GET /sta tus HTTP/1.1",
            b"GET /status FTP/1.1",
            b"GET /status http/1.1",
            b"GET /status HTTP/",
            b"QUIT",
            b"EHLO x",
        ),
    ):
        yield line + b"\r\n" + HOST + b"\r\n"
    yield b"GET /status HTTP/1.1\r\n\r\n"


def _bodies() -> Iterator[bytes]:
    start = b"POST /status HTTP/1.1\r\n" + HOST
    yield start + b"Content-Length: 1000000000000\r\n\r\n" + b"x" * 100_000
    yield start + b"Transfer-Encoding: chunked\r\n\r\n" + b"FFFFFFFFFFFFFFFF\r\n" + b"x" * 1_000
    yield start + b"Transfer-Encoding: chunked\r\n\r\n-1\r\nx\r\n"
    yield start + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 5_000
    yield start + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    yield start + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n"


def _noise() -> Iterator[bytes]:
    source = random.Random(0)
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + source.randbytes(500)  # a client that speaks TLS
    for size in (1, 10, 100, 1_000, 10_000, 100_000):
        yield source.randbytes(size)
        yield b"GET " + source.randbytes(size) + b"\r\n\r\n"
