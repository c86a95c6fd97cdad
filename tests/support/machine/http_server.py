"""A local HTTP server of files that counts what it sends and can misbehave as servers do."""

from __future__ import annotations

import re
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Served:
    """What a server holds and has done.

    Attributes:
        files: Content by path, such as "/a.mp4".
        faults: By path, what the next requests for its content meet: a status such as 503, "cut" for an answer that
            ends after half of its bytes, "slow" for one that does not begin before `slow_s` are over, or "trickle" for
            one of a byte every `slow_s`. The last entry stays.
        slow_s: Seconds.
        latency_s: Seconds that every answer takes to begin.
        ranges: Whether the server honours requests for ranges.
        tags: Whether it states an ETag.
        sent: Bytes of content by path.
        requests: Requests for content by path.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files, self.faults, self.ranges, self.tags = dict(files), {}, True, True
        self.slow_s, self.latency_s = 1.0, 0.0
        self.sent: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.url = ""


@contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[Served]:
    """Yields a server of `files` on a free port of this machine."""
    served = Served(files)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_content=False)

        def do_GET(self) -> None:
            self._answer(with_content=True)

        def _answer(self, with_content: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            faults = served.faults.get(path, [])
            fault = (faults.pop(0) if len(faults) > 1 else faults[0]) if faults and with_content else None
            time.sleep(served.slow_s if fault == "slow" else served.latency_s)
            refused = 403 if 403 in faults else None
            data = served.files.get(path)
            status = refused or (fault if isinstance(fault, int) else 200 if data is not None else 404)
            served.requests[path] += with_content
            if status != 200:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if served.ranges else None
            part = data[int(found[1]) : int(found[2]) + 1] if found else data
            self.send_response(206 if found else 200)
            self.send_header("Content-Length", str(len(part)))
            if served.tags:
                self.send_header("ETag", f'"{zlib.crc32(data):x}"')
            if found:
                self.send_header("Content-Range", f"bytes {found[1]}-{int(found[1]) + len(part) - 1}/{len(data)}")
            self.end_headers()
            if with_content:
                part = part[: len(part) // 2] if fault == "cut" else part
                served.sent[path] += len(part)
                with suppress(ConnectionError):  # the client has seen that it is no range
                    for byte in part if fault == "trickle" else b"":
                        self.wfile.write(bytes([byte]))
                        time.sleep(served.slow_s)
                    self.wfile.write(b"" if fault == "trickle" else part)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
