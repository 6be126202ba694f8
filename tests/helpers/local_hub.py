"""A hub on this machine that speaks as much of the real one's protocol as a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_of_the_tests"


@dataclass
class LocalHub:
    """Repositories by name, each with the folder of each of its revisions, and what was asked for."""

    repositories: dict[str, dict[str, Path]]
    private: frozenset[str] = frozenset()
    gated: frozenset[str] = frozenset()
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def commit_of(self, name: str, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit stands for."""
        for branch in self.repositories[name]:
            commit = hashlib.sha1(f"{name}{branch}".encode(), usedforsecurity=False).hexdigest()
            if revision in (branch, commit):
                return commit
        return None

    def folder_of(self, name: str, commit: str) -> Path:
        return next(
            folder for branch, folder in self.repositories[name].items() if self.commit_of(name, branch) == commit
        )


@contextmanager
def serve(hub: LocalHub) -> Iterator[LocalHub]:
    """Serve a hub until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, *, with_body: bool) -> None:
            hub.asked.append(self.path)
            api = re.match(r"/api/models/([^/]+/[^/]+)/(?:revision|tree)/([^/?]+)", self.path)
            plain = re.match(r"/api/models/([^/?]+/[^/?]+)", self.path)
            file = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)", self.path)
            found = file or api or plain
            name = found[1] if found else ""
            revision = (file or api)[2] if file or api else "main"  # type: ignore[index]
            is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if name in hub.gated and not is_known:
                return self.refuse(403, "GatedRepo")
            if name not in hub.repositories or (name in hub.private and not is_known):
                return self.refuse(401, "RepoNotFound")
            commit = hub.commit_of(name, revision)
            if commit is None:
                return self.refuse(404, "RevisionNotFound")
            folder = hub.folder_of(name, commit)
            if file is None:
                return self.describe(name, commit, folder)
            path = folder / file[3]
            if not path.is_file():
                return self.refuse(404, "EntryNotFound")
            content = path.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self.send(content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, with_body=with_body)

        def describe(self, name: str, commit: str, folder: Path) -> None:
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            if "/tree/" in self.path:
                tree = [
                    {"type": "file", "path": path, "size": (folder / path).stat().st_size, "oid": "0" * 40}
                    for path in files
                ]
                return self.send(json.dumps(tree).encode(), {"Content-Type": "application/json"})
            info = {"_id": "1", "id": name, "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0}
            info["siblings"] = [{"rfilename": path} for path in files]
            return self.send(json.dumps(info).encode(), {"Content-Type": "application/json"})

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, content: bytes, headers: dict[str, str], *, with_body: bool = True) -> None:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
