# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hugging Face Hub's HTTP API, in this process: repositories, large files, commits, downloads.

    with FakeHub() as hub:
        hub.fail("/commit/", 503)            # the next request for such a path is answered 503
        hub.fail("/blobs/", "break", "break")  # the next two connections break off in the middle of the body
        ...  # HF_ENDPOINT=hub.url HF_TOKEN=hf_write HF_HUB_DISABLE_XET=1 in the environment of a child

It knows what `huggingface_hub` asks for when it pushes and loads models; anything else is answered 404 `NoRoute`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_write": "write", "hf_read": "read"}
LARGE = re.compile(r"\.(safetensors|pt|png|bin)$")  # what goes through large file storage, as in .gitattributes


@dataclass
class Repository:
    """Branches of files, and the commits that made them."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: list[dict] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return self.commits[-1]["sha"] if self.commits else "0" * 40


class Answer(Exception):
    """Ends a request: status, body, headers."""

    def __init__(self, status: int = 200, body: bytes | dict | list = b"", **headers: str):
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def refusal(status: int, code: str, message: str) -> Answer:
    return Answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)


class FakeHub:
    """The Hub of one owner. `part_bytes`: large files above this size are sent in parts of it."""

    def __init__(self, owner: str = "tester", part_bytes: int = 5_000_000):
        self.owner, self.part_bytes = owner, part_bytes
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[tuple[str, list]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self) -> dict[str, str]:
        """What a child process needs to take this for the Hub."""
        # Large files go to the real Hub by xet, a storage with a protocol of its own, which is not imitated here.
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_write", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def fail(self, path: str, *faults: int | str) -> None:
        """Answer the next requests whose path matches with these statuses, or `break` the connection."""
        self.faults.append((path, list(faults)))

    def sent(self, pattern: str) -> list[str]:
        """Method and path of the requests that match, in order."""
        return [text for text in map(" ".join, self.requests) if re.search(pattern, text)]

    # ---- what is asked: each raises its Answer

    def create(self, request) -> None:
        asked = request.json()
        name = f"{asked.get('organization') or self.owner}/{asked['name']}"
        if not name.startswith(f"{self.owner}/") or request.role != "write":
            raise refusal(403, "Forbidden", f"You don't have the rights to create a model under {name}")
        private = asked.get("visibility") == "private" or asked.get("private", False)
        if name in self.repositories:
            raise Answer(409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"})
        self.repositories[name] = Repository(private=bool(private))
        raise Answer(200, {"url": f"{self.url}/{name}", "name": name})

    def access(self, request, name: str, write: str | None) -> None:
        self.repository(name)
        if write and not (name.startswith(f"{self.owner}/") and request.role == "write"):
            raise refusal(403, "Forbidden", "You have read access but not the required permissions for this operation")
        raise Answer()

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise refusal(404, "RepoNotFound", "Repository not found")
        return self.repositories[name]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repository(name)
        if revision == repository.sha:  # downloads ask by commit, of which there is the newest alone
            revision = repository.commits[-1]["branch"] if repository.commits else "main"
        if revision not in repository.branches:
            raise refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository.branches[revision]

    def branch(self, request, name: str, branch: str) -> None:
        branches = self.repository(name).branches
        if branch in branches:
            raise Answer(409, {"error": "Reference already exists"})
        branches[branch] = dict(branches["main"])
        raise Answer(201, {})

    def info(self, request, name: str, revision: str | None) -> None:
        repository, files = self.repository(name), self.files(name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        raise Answer(
            200, {"_id": "1", "id": name, "sha": repository.sha, "private": repository.private, "siblings": siblings}
        )

    def tree(self, request, name: str, revision: str) -> None:
        files = self.files(name, revision).items()
        raise Answer(200, [{"type": "file", "path": p, "size": len(b), "oid": git_oid(b)} for p, b in files])

    def preupload(self, request, name: str, revision: str) -> None:
        present = self.files(name, revision)
        answers = []
        for file in request.json()["files"]:
            large = file["size"] > 5_000_000 or LARGE.search(file["path"]) is not None
            content = present.get(file["path"])
            oid = None if content is None else hashlib.sha256(content).hexdigest() if large else git_oid(content)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise Answer(200, {"files": answers})

    def batch(self, request, name: str) -> None:
        objects = []
        for wanted in request.json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            objects.append({"oid": oid, "size": size})
            if oid not in self.blobs:
                upload = {"href": f"{self.url}/blobs/{oid}"}
                if size > self.part_bytes:
                    count = -(-size // self.part_bytes)
                    parts = {f"{part:05d}": f"{self.url}/blobs/{oid}/{part}" for part in range(1, count + 1)}
                    upload["header"] = {"chunk_size": str(self.part_bytes), **parts}
                verify = {"href": f"{self.url}/verify"}
                objects[-1]["actions"] = {"upload": upload, "verify": verify}
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def put(self, request, oid: str, part: str | None) -> None:
        if part is None:
            self.blobs[oid] = request.body
        else:
            self.parts.setdefault(oid, {})[int(part)] = request.body
        raise Answer(200, ETag=f'"{hashlib.md5(request.body).hexdigest()}"')

    def complete(self, request, oid: str) -> None:
        self.blobs[oid] = b"".join(content for _, content in sorted(self.parts.pop(oid).items()))
        raise Answer(200, {})

    def verify(self, request) -> None:
        asked = request.json()
        blob = self.blobs.get(asked["oid"], b"")
        if len(blob) != asked["size"] or hashlib.sha256(blob).hexdigest() != asked["oid"]:
            raise refusal(422, "VerifyFailed", f"{asked['oid']} did not arrive as it was sent")
        raise Answer(200, {})

    def commit(self, request, name: str, revision: str) -> None:
        header, *operations = (json.loads(line) for line in request.body.splitlines() if line.strip())
        files = dict(self.files(name, revision))
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise refusal(422, "BlobMissing", f"{value['path']} was not uploaded")
                files[value["path"]] = self.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        sha = hashlib.sha1(request.body).hexdigest()
        repository = self.repository(name)
        repository.branches[revision] = files
        repository.commits.append({"sha": sha, "branch": revision, "summary": header["value"]["summary"]})
        raise Answer(
            200, {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}", "hookOutput": ""}
        )

    def resolve(self, request, name: str, revision: str, path: str) -> None:
        files = self.files(name, revision)
        if path not in files:
            raise refusal(404, "EntryNotFound", f"{path} is not there")
        content = files[path]
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X_Repo_Commit": self.repositories[name].sha,
            "Accept_Ranges": "bytes",
        }
        if asked := re.match(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            raise Answer(206, content[first : last + 1], **headers)
        raise Answer(200, content, **headers)


NAME = r"([^/]+/[^/]+?)"
ROUTES = [  # method, path, what answers, whether a token is needed
    ("POST", r"/api/repos/create", FakeHub.create, True),
    ("POST", r"/api/validate-yaml", None, True),
    ("GET", rf"/api/models/{NAME}/auth-check(/write)?", FakeHub.access, True),
    ("POST", rf"/api/models/{NAME}/branch/([^/]+)", FakeHub.branch, True),
    ("GET", rf"/api/models/{NAME}(?:/revision/([^/]+))?", FakeHub.info, True),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)", FakeHub.tree, True),
    ("POST", rf"/api/models/{NAME}/preupload/([^/]+)", FakeHub.preupload, True),
    ("POST", rf"/api/models/{NAME}/commit/([^/]+)", FakeHub.commit, True),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", FakeHub.batch, True),
    ("PUT", r"/blobs/(\w+)(?:/(\d+))?", FakeHub.put, False),  # like a signed address: no token comes along
    ("POST", r"/blobs/(\w+)", FakeHub.complete, False),
    ("POST", r"/verify", FakeHub.verify, True),
    ("GET|HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", FakeHub.resolve, True),
]


def git_oid(content: bytes) -> str:
    """The name git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet: two would wait for each other

    def log_message(self, *arguments) -> None:
        """Nothing: tests read `hub.requests`."""

    def json(self):
        return json.loads(self.body)

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        try:
            self._fault(path)
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._route(path)
        except Answer as answer:
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)
        except ConnectionResetError:  # closing with half of the body unread resets the connection
            self.close_connection = True

    def _fault(self, path: str) -> None:
        for pattern, faults in self.hub.faults:
            if faults and re.search(pattern, path):
                fault = faults.pop(0)
                size = int(self.headers.get("Content-Length") or 0)
                if fault == "break":
                    self.rfile.read(size // 2)
                    raise ConnectionResetError
                self.rfile.read(size)
                raise refusal(fault, "Injected", "made to fail")

    def _route(self, path: str) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.role = TOKENS.get(token)
        for method, pattern, function, guarded in ROUTES:
            if (found := re.fullmatch(pattern, path)) and re.fullmatch(method, self.command):
                if guarded and self.role is None:
                    raise refusal(401, "Unauthorized", "Invalid credentials in Authorization header")
                if function is None:
                    raise Answer(200, {"errors": [], "warnings": []})
                function(self.hub, self, *(text and unquote(text) for text in found.groups()))
        raise refusal(404, "NoRoute", f"the stand-in has no route {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815  names that http.server calls
