"""A stand-in for the Hugging Face Hub on loopback: serves one folder as one dataset repository.

Just the endpoints that `datasets.load_dataset` asks for: a repository's description, its tree, and its files.
`python tests/standin_hub.py FOLDER ID` prints the address to set HF_ENDPOINT to, and serves until it is killed.
"""

import hashlib
import json
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Repository `repository`, at one commit, with the files of `folder`."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, repository: str, *args):
        self.folder, self.repository = folder, repository
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path == f"/api/datasets/{self.repository}/paths-info/{COMMIT}":
            paths = json.loads(asked)["paths"]
            self.send(json.dumps([entry for entry in self.tree("", True) if entry["path"] in paths]).encode())
        else:
            self.missing("EntryNotFound")

    def answer(self, head: bool = False) -> None:
        path = unquote(urlsplit(self.path).path)
        api, files = f"/api/datasets/{self.repository}", f"/datasets/{self.repository}/resolve/"
        if path == "/":
            self.send(b"", head)
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": entry["path"]} for entry in self.tree("", True) if entry["type"] == "file"]
            self.send(json.dumps({"id": self.repository, "sha": COMMIT, "private": False, "tags": [],
                                  "downloads": 0, "likes": 0, "siblings": siblings}).encode(), head)
        elif path.startswith((f"{api}/tree/main", f"{api}/tree/{COMMIT}")):
            inside = path.removeprefix(f"{api}/tree/").partition("/")[2]
            if inside and not (self.folder / inside).is_dir():
                return self.missing("EntryNotFound", head)
            self.send(json.dumps(self.tree(inside, "recursive=True" in self.path or "recursive=true" in self.path)
                                 ).encode(), head)
        elif path.startswith((f"{files}main/", f"{files}{COMMIT}/")):
            file = self.folder / path.removeprefix(files).partition("/")[2]
            if not file.is_file():
                return self.missing("EntryNotFound", head)
            self.send(file.read_bytes(), head)
        elif self.repository in path:
            self.missing("EntryNotFound", head)
        else:
            self.missing("RepoNotFound", head)

    def tree(self, inside: str, recursive: bool) -> list[dict]:
        entries = sorted((self.folder / inside).glob("**/*" if recursive else "*"))
        return [{"type": "directory" if path.is_dir() else "file", "path": str(path.relative_to(self.folder)),
                 "oid": hashlib.sha1(str(path).encode()).hexdigest(), "size": path.stat().st_size}
                for path in entries]

    def send(self, body: bytes, head: bool = False, status: int = 200, error: str = "") -> None:
        start, whole = 0, len(body)
        if asked := self.headers.get("Range", ""):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, body, status = int(first), body[int(first):int(last) + 1 if last else None], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{whole}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def missing(self, error: str, head: bool = False) -> None:
        self.send(b"{}", head, 404, error)

    def log_message(self, *_) -> None:
        pass


def serve(folder: Path, repository: str) -> ThreadingHTTPServer:
    """A server on a free port; start it with `serve_forever`, and set HF_ENDPOINT to its `address_of`."""
    return ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder, repository))


def address_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


if __name__ == "__main__":
    hub = serve(Path(sys.argv[1]), sys.argv[2])
    print(address_of(hub), flush=True)
    hub.serve_forever()
