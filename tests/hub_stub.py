"""A Hub on this machine that serves one folder as a model or data set and records what is asked for."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


COMMIT = "a" * 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        headers |= {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path))
        files = {file.relative_to(self.server.folder).as_posix(): file for file in self.server.folder.rglob("*")}
        if match := re.fullmatch(r"/(?:datasets/)?[^/]+/[^/]+/resolve/[^/]+/(.*)", path):
            if (file := files.get(match[1])) is None or not file.is_file():
                return self.answer(404, b"", X_Error_Code="EntryNotFound")
            data = file.read_bytes()
            return self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"')
        if not path.startswith("/api/"):
            return self.answer(404, b"{}")
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0"} for name, file in files.items()
            ]
            return self.answer(200, json.dumps([entry for entry in entries]).encode(), Content_Type="application/json")
        if path.count("/") <= 4 or "/revision/" in path:
            siblings = [{"rfilename": name} for name in files]
            content = {"id": "some/name", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            return self.answer(200, json.dumps(content).encode(), Content_Type="application/json")
        return self.answer(404, b"{}", X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        self.server.asked.append((self.command, self.path))
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.answer(200, b"[]", Content_Type="application/json")

    def log_message(self, *args):
        pass


@contextmanager
def serve(folder: Path):
    """Yields the server, with its `url` and the (method, path) of every request in `asked`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.asked, server.folder = True, [], folder
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
