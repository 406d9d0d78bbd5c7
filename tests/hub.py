"""A local stand-in for the Hugging Face hub: the few requests of a download, and its errors."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

Repos = Mapping[str, Mapping[str, Mapping[str, bytes]]]
"""Repository → revision → file → content; a repository without revisions is gated."""


class Hub(BaseHTTPRequestHandler):
    repos: Repos

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(self.path.split("?")[0])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, file = found.groups()
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            (repo, revision), file = found.groups(), ""
        else:
            self.reply(404)
            return
        if repo not in self.repos:
            self.reply(404, error="RepoNotFound")
        elif not self.repos[repo]:
            self.reply(403, error="GatedRepo")
        elif revision not in self.repos[repo]:
            self.reply(404, error="RevisionNotFound")
        elif not file:
            listing = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in self.repos[repo][revision].items()
            ]
            self.reply(200, json.dumps(listing).encode())
        elif file not in self.repos[repo][revision]:
            self.reply(404, error="EntryNotFound")
        else:
            self.reply(200, self.repos[repo][revision][file], commit=hashlib.sha1(revision.encode()).hexdigest())

    def reply(self, status: int, content: bytes = b"", *, error: str = "", commit: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json" if not commit else "application/octet-stream")
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", error)
        if commit:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None: ...


@contextlib.contextmanager
def serve(repos: Repos) -> Iterator[str]:
    """Serve `repos` on a free port and yield the address."""
    handler = type("Handler", (Hub,), {"repos": repos})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
