"""A stand-in for the Hugging Face Hub on loopback: serves one folder as one dataset repository, and takes models.

Just the endpoints that `datasets.load_dataset` asks for: a repository's description, its tree, and its files; and those
of a model's upload (create, validate, preupload, LFS, commit) and of its download by `hf_hub_download`.
`python tests/helpers/standin_hub.py FOLDER ID` prints the address to set HF_ENDPOINT to, and serves until it is killed.
"""

import base64
import hashlib
import json
import sys
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """What was uploaded, and what to refuse."""

    def __init__(self, *args) -> None:
        self.models: dict[str, dict[str, bytes]] = {}  # by repository, then by path
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []                   # their messages
        self.large: dict[str, bytes] = {}              # LFS objects by SHA-256
        self.refuse: dict[str, int] = {}               # by a piece of an address: a status; 0: hang up; -1: no answer
        super().__init__(*args)


class Hub(BaseHTTPRequestHandler):
    """Repository `repository`, at one commit, with the files of `folder`."""

    protocol_version = "HTTP/1.1"
    server: Server

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
        elif not self.refused(path):
            self.take(path, asked)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.refused(self.path):
            self.server.large[hashlib.sha256(content).hexdigest()] = content
            self.send(b"")

    def refused(self, path: str) -> bool:
        """Whether the request was answered by what `refuse` says; without a token, 401."""
        login = 401 if "/validate-yaml" not in path and not path.startswith("/large/") else 200
        status = 200 if self.headers.get("Authorization", "").startswith("Bearer ") else login
        status = next((status for piece, status in self.server.refuse.items() if piece in path), status)
        if status <= 0:
            time.sleep(-10 * status)
            self.close_connection = True
        elif status != 200:
            self.send(b'{"error": "refused by the stand-in"}', status=status)
        return status != 200

    def take(self, path: str, asked: bytes) -> None:
        """The requests of an upload, in the order in which the client sends them."""
        here, model = f"http://{self.headers['Host']}", path.removeprefix("/api/models/").rpartition("/")[0]
        if path == "/api/repos/create":
            wanted = json.loads(asked)
            model = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
            self.server.models.setdefault(model, {})
            self.server.private[model] = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.send(json.dumps({"url": f"{here}/{model}"}).encode())
        elif path == "/api/validate-yaml":
            self.send(b'{"errors": [], "warnings": []}')
        elif path.endswith("/preupload/main"):
            self.send(json.dumps({"files": [
                {"path": one["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                for one in json.loads(asked)["files"]]}).encode())
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.send(json.dumps({"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{here}/large/{one['oid']}"}}}
                for one in json.loads(asked)["objects"]]}).encode())
        elif path.endswith("/commit/main"):
            model = model.removesuffix("/commit")
            for line in map(json.loads, asked.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.server.commits.append(value["summary"])
                else:
                    self.server.models[model][value["path"]] = (
                        base64.b64decode(value["content"]) if line["key"] == "file"
                        else self.server.large[value["oid"]])
            self.send(json.dumps({"commitUrl": f"{here}/{model}/commit/{COMMIT}", "commitOid": COMMIT}).encode())
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
        elif (model := "/".join(path.split("/")[1:3])) in self.server.models:
            content = self.server.models[model].get(path.removeprefix(f"/{model}/resolve/").partition("/")[2])
            self.missing("EntryNotFound", head) if content is None else self.send(content, head)
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


def serve(folder: Path, repository: str) -> Server:
    """A server on a free port; start it with `serve_forever`, and set HF_ENDPOINT to its `address_of`."""
    return Server(("127.0.0.1", 0), partial(Hub, folder, repository))


def address_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


if __name__ == "__main__":
    hub = serve(Path(sys.argv[1]), sys.argv[2])
    print(address_of(hub), flush=True)
    hub.serve_forever()
