"""A server on this machine that answers like Google Cloud Storage, for the clients that training uses there.

Objects, not files: each appears whole when its upload ends, none can be appended to, and a folder is only the beginning
of names, so it cannot be renamed. What is written is kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Bucket(ThreadingHTTPServer):
    """The server, with one bucket.

    Attributes:
        objects: Content by name.
        written: Names in the order in which their uploads ended.
        full: Whether uploads are refused, as by a quota.
        refused: What a request may not have in its path and query, such as a part of an object's name.
        refusal: Status of the answer to one that has.
    """

    daemon_threads = True

    def __init__(self, name: str = "bucket"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name = name
        self.objects: dict[str, bytes] = {}
        self.written: list[str] = []
        self.full = False
        self.refused: str | None = None
        self.refusal = 403
        self.generations: dict[str, int] = {}
        self.sessions: dict[str, tuple[str, bytearray]] = {}
        self.lock = threading.Lock()

    def handle_error(self, request, client_address) -> None:
        pass  # clients end without saying so

    def put(self, name: str, content: bytes) -> None:
        with self.lock:
            self.objects[name] = content
            self.written.append(name)
            self.generations[name] = len(self.written)

    def below(self, prefix: str) -> list[str]:
        """Names of objects that begin so, without the prefix."""
        return sorted(name.removeprefix(prefix) for name in list(self.objects) if name.startswith(prefix))

    def environment(self) -> dict[str, str]:
        """Variables by which gcsfs and tensorstore find the server."""
        address = f"http://127.0.0.1:{self.server_address[1]}"
        return {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "EPATH_USE_TF": "false",
        }


@contextmanager
def serve() -> Iterator[Bucket]:
    """Runs a server with an empty bucket."""
    with Bucket() as bucket:
        thread = threading.Thread(target=bucket.serve_forever, daemon=True)
        thread.start()
        try:
            yield bucket
        finally:
            bucket.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Bucket

    def log_message(self, *args) -> None:
        pass

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        if isinstance(body, dict):
            self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self) -> bool:
        """Answers a request that is refused."""
        refused = self.server.refused
        if refused is None or refused not in f"{self.command} {unquote(self.path)}":
            return False
        self._answer(self.server.refusal, {"error": {"code": self.server.refusal, "message": "no access to this"}})
        return True

    def _missing(self, what: str) -> None:
        self._answer(404, {"error": {"code": 404, "message": f"{what}: not found"}})

    def _describe(self, name: str) -> dict:
        content = self.server.objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": self.server.name,
            "size": str(len(content)),
            "generation": str(self.server.generations[name]),
            "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "etag": str(zlib.crc32(content)),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def _route(self) -> tuple[str, str | None, dict[str, str]]:
        """What is asked for: kind of path, object and query."""
        parts = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        path = re.sub("^/download", "", parts.path)
        upload, path = path.startswith("/upload"), re.sub("^(/upload)?/storage/v1/", "", path)
        match = re.fullmatch(r"b/([^/]+)(/o(?:/(.*))?)?", path)
        if match is None or match[1] != self.server.name:
            return "", None, query
        kind = "upload" if upload else "object" if match[3] else "list" if match[2] else "bucket"
        return kind, match[3], query

    def do_GET(self) -> None:
        if self._refuse():
            return
        kind, name, query = self._route()
        if kind == "bucket":
            self._answer(200, {"kind": "storage#bucket", "name": self.server.name, "location": "US", "etag": "0"})
        elif kind == "list":
            self._list(query)
        elif kind == "object" and name is not None:
            name = unquote(name)
            if name not in self.server.objects:
                self._missing(name)
            elif query.get("alt") == "media":
                self._send(name)
            else:
                self._answer(200, self._describe(name))
        else:
            self._missing(self.path)

    def _send(self, name: str) -> None:
        content = self.server.objects[name]
        headers = {"X-Goog-Generation": str(self.server.generations[name])}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._answer(200, content, **headers)
        first = int(wanted[1]) if wanted[1] else max(0, len(content) - int(wanted[2]))
        last = min(int(wanted[2]) if wanted[1] and wanted[2] else len(content) - 1, len(content) - 1)
        if first >= len(content):
            return self._answer(416, Content_Range=f"bytes */{len(content)}")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._answer(206, content[first : last + 1], **headers)

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, folders = [], []
        with self.server.lock:
            for name in sorted(self.server.objects):
                if not name.startswith(prefix) or name < query.get("startOffset", ""):
                    continue
                if query.get("endOffset") and name >= query["endOffset"]:
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    folders.append(prefix + rest.partition(delimiter)[0] + delimiter)
                else:
                    items.append(self._describe(name))
        answer = {"kind": "storage#objects", "items": items}
        self._answer(200, answer | {"prefixes": list(dict.fromkeys(folders))})

    def do_POST(self) -> None:
        kind, name, query = self._route()
        if "upload_id" in query:
            return self.do_PUT()
        body = self._read()
        if self._refuse():
            return None
        if kind == "upload" and self.server.full:
            self._answer(403, {"error": {"code": 403, "message": "quota of the project exceeded"}})
        elif kind == "upload" and query.get("uploadType") == "media":
            self._written(query["name"], body)
        elif kind == "upload" and query.get("uploadType") == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\"]+)", self.headers["Content-Type"])[1].encode()
            description, content = _parts(body, boundary)
            self._written(json.loads(description)["name"], content)
        elif kind == "upload" and query.get("uploadType") == "resumable":
            target = query.get("name") or json.loads(body)["name"]
            session = str(len(self.server.sessions))
            self.server.sessions[session] = (target, bytearray())
            host = f"http://{self.headers['Host']}/upload/storage/v1/b/{self.server.name}/o"
            self._answer(200, Location=f"{host}?uploadType=resumable&upload_id={session}")
        elif kind == "object" and "/rewriteTo/" in (name or ""):
            source, target = (unquote(part) for part in re.fullmatch(r"(.*)/rewriteTo/b/[^/]+/o/(.*)", name).groups())
            if source not in self.server.objects:
                return self._missing(source)
            self.server.put(target, self.server.objects[source])
            self._answer(200, {"done": True, "resource": self._describe(target)})
        elif kind == "object" and "/moveTo/" in (name or ""):  # of one object; folders have nothing like it
            source, target = (unquote(part) for part in name.split("/moveTo/o/"))
            if source not in self.server.objects:
                return self._missing(source)
            self.server.put(target, self.server.objects.pop(source))
            self._answer(200, self._describe(target))
        else:
            self._missing(self.path)
        return None

    def do_PUT(self) -> None:
        _, _, query = self._route()
        name, content = self.server.sessions[query["upload_id"]]
        content += self._read()
        if self.headers.get("Content-Range", "/1").endswith("/*"):
            self._answer(308, Range=f"bytes=0-{len(content) - 1}")
        else:
            self._written(name, bytes(content))

    def do_DELETE(self) -> None:
        if self._refuse():
            return
        _, name, _ = self._route()
        with self.server.lock:
            found = self.server.objects.pop(unquote(name or ""), None)
        if found is None:
            self._missing(name or "")
        else:
            self._answer(204)

    def _written(self, name: str, content: bytes) -> None:
        self.server.put(name, content)
        self._answer(200, self._describe(name))


def _parts(body: bytes, boundary: bytes) -> tuple[bytes, bytes]:
    """The two contents of an upload, description and object, as gcsfs puts them together."""
    _, first, second = body.split(b"--" + boundary, 2)
    description, content = first.partition(b"\n\n")[2], second.partition(b"\n\n")[2]
    return description, content[: content.rindex(b"\n--" + boundary + b"--")]
