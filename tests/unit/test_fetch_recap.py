# SPDX-License-Identifier: Apache-2.0
"""fetch_recap.py against a stand-in for the Hub's HTTP API: whole, interrupted, damaged, refused, out of reach."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from effsam3.data.captions import fetch
from effsam3.errors import UserError

ROOT = Path(__file__).parents[2]
REPO = "UCSC-VLAA/Recap-DataComp-1B"
COMMIT = "c0ffee" + "0" * 34
MEGABYTE = 1 << 20


class Hub:
    """A dataset repository that can be listed and read, over http, in Range requests, behind a redirect as LFS is."""

    def __init__(self, files, token=None):
        self.files, self.token = files, token
        self.ranges = []  # (name, first, last) of every request for content that was answered
        self.cut = 0  # so many answers break off half-way
        self.flip = 0  # so many answers have a wrong byte
        self.stall_after = None  # answers with content; later requests get none
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, body=b"", status=200, **headers):
                if not isinstance(body, bytes):
                    body = json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(body), **headers}.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = unquote(urlsplit(self.path).path)
                if path.startswith("/lfs/"):
                    return self.content(path.removeprefix("/lfs/"))
                if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self.answer({"error": "log in"}, 401, X_Error_Code="GatedRepo")
                if path in (f"/api/datasets/{REPO}", f"/api/datasets/{REPO}/revision/{COMMIT}"):
                    return self.answer({"id": REPO, "sha": COMMIT, "siblings": []})
                if path.startswith(f"/api/datasets/{REPO}/tree/{COMMIT}"):
                    folder = path.removeprefix(f"/api/datasets/{REPO}/tree/{COMMIT}").strip("/")
                    return self.answer([hub.entry(name) for name in hub.files if name.startswith(folder)])
                if path == f"/api/datasets/{REPO}/paths-info/{COMMIT}":
                    asked = json.loads(body)["paths"] if body.startswith(b"{") else re.findall(rb"paths=([^&]*)", body)
                    names = [unquote(name if isinstance(name, str) else name.decode()) for name in asked]
                    return self.answer([hub.entry(name) for name in names if name in hub.files])
                if match := re.fullmatch(rf"/datasets/{REPO}/resolve/{COMMIT}/(.+)", path):
                    name = match[1]
                    if name in hub.files:
                        linked = {"X_Linked_Size": len(hub.files[name]), "X_Linked_Etag": f'"{hub.sha256(name)}"'}
                        return self.answer(
                            status=302, Location=f"{hub.storage}/lfs/{name}", X_Repo_Commit=COMMIT, **linked
                        )
                return self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

            do_HEAD = do_POST = do_GET

            def content(self, name):
                data = hub.files[name]
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
                first, last = int(asked[1]), int(asked[2] or len(data) - 1)
                block = data[first : last + 1]
                if self.command == "GET":
                    if hub.stall_after is not None and len(hub.ranges) >= hub.stall_after:
                        time.sleep(60)
                    hub.ranges.append((name.rsplit("/", 1)[-1], first, last))
                    if hub.flip:
                        hub.flip -= 1
                        block = bytes([block[0] ^ 1]) + block[1:]
                    if hub.cut:
                        hub.cut -= 1
                        self.send_response(206)
                        self.send_header("Content-Length", str(len(block)))
                        self.end_headers()
                        self.wfile.write(block[: len(block) // 2])
                        self.close_connection = True
                        return
                self.answer(block, 206, Content_Range=f"bytes {first}-{last}/{len(data)}")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}"  # another host, as the real one is

    def sha256(self, name):
        return hashlib.sha256(self.files[name]).hexdigest()

    def entry(self, name):
        size = len(self.files[name])
        lfs = {"oid": self.sha256(name), "size": size, "pointerSize": 130}
        return {"type": "file", "path": name, "oid": "0" * 40, "size": size, "lfs": lfs}

    @contextlib.contextmanager
    def running(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        yield self
        self.server.shutdown()
        self.server.server_close()


def contents(count, size):
    """Train files of some bytes, and files that are not wanted."""
    files = {f"data/train_data/train-{n:05d}-of-{count:05d}.parquet": os.urandom(size) for n in range(count)}
    return files | {"data/preview_data/preview-00000-of-00001.parquet": b"preview", "README.md": b"readme"}


@pytest.fixture
def hub():
    """Ten small files."""
    with Hub(contents(10, 3000)).running() as hub:
        yield hub


def environment(tmp_path, url, **more):
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    home = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    return kept | home | more


def start(tmp_path, url, *arguments, **more):
    command = [sys.executable, str(ROOT / "scripts" / "fetch_recap.py"), "--out", str(tmp_path / "out"), *arguments]
    return subprocess.Popen(
        command, env=environment(tmp_path, url, **more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(tmp_path, url, *arguments, **more):
    process = start(tmp_path, url, *arguments, **more)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def there(tmp_path):
    """The folder's files by name, those that begin with a dot included."""
    return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def expected(hub, count):
    names = sorted(name for name in hub.files if "train-" in name)[:count]
    return {name.rsplit("/", 1)[-1]: hub.files[name] for name in names}


def test_the_first_part_then_more_of_it_then_nothing_to_do(tmp_path, hub):
    code, out, err = run(tmp_path, hub.url, "--fraction", "0.3")
    assert code == 0, err
    files = there(tmp_path)
    remembered = json.loads(files.pop("fetched.json"))
    assert files == expected(hub, 3)
    assert remembered["commit"] == COMMIT and remembered["repo"] == REPO
    assert remembered["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert "3 of 10 train files" in out and out.count("missing  train-") == 3 and "have     3 of 3 files" in out
    assert "train-00002" in err and "100%" in err, "a progress bar"
    asked = len(hub.ranges)

    code, out, err = run(tmp_path, hub.url, "--fraction", "0.5")
    assert code == 0 and len(hub.ranges) == asked + 2
    assert out.count("have     train-") == 3 and out.count("missing  train-") == 2
    files = there(tmp_path)
    files.pop("fetched.json")
    assert files == expected(hub, 5)

    # Nothing to do for the first, and the second is another one now.
    first, second, *_ = sorted(hub.files)[2:]
    hub.files[second] = hub.files[first]
    code, out, err = run(tmp_path, hub.url, "--fraction", "0.2")
    assert code == 0 and "2 of 10" in out and hub.ranges[asked + 2 :] == [(second.rsplit("/", 1)[-1], 0, 2999)]
    assert expected(hub, 5).items() <= there(tmp_path).items()


def test_a_killed_download_goes_on_where_it_was(tmp_path):
    with Hub(contents(1, 20 * MEGABYTE)).running() as hub:
        hub.stall_after = 2  # blocks
        process = start(tmp_path, hub.url)
        part = f".train-00000-of-00001.parquet.{hub.sha256('data/train_data/train-00000-of-00001.parquet')[:16]}.part"
        waited = time.monotonic() + 60
        while not (
            (tmp_path / "out" / part).is_file() and (tmp_path / "out" / part).stat().st_size == 2 * fetch.BLOCK
        ):
            assert time.monotonic() < waited and process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
        assert set(there(tmp_path)) == {part}, "nothing under the final name"
        hub.stall_after = None
        code, out, err = run(tmp_path, hub.url)
        assert code == 0, err
        assert [first for _, first, _ in hub.ranges] == [0, fetch.BLOCK, 2 * fetch.BLOCK]
        assert there(tmp_path)["train-00000-of-00001.parquet"] == hub.files[f"data/train_data/{part[1:29]}"]
        assert part not in there(tmp_path)


def test_a_connection_that_breaks_is_taken_up_again(tmp_path, hub):
    hub.cut = 1
    code, out, err = run(tmp_path, hub.url)
    assert code == 0, err
    assert len(hub.ranges) == 2 and expected(hub, 1).items() <= there(tmp_path).items()


def test_a_damaged_file_is_fetched_again_and_in_the_end_refused(tmp_path, hub):
    hub.flip = 1
    code, out, err = run(tmp_path, hub.url)
    assert code == 0 and len(hub.ranges) == 2 and expected(hub, 1).items() <= there(tmp_path).items(), err
    hub.flip = 10
    code, out, err = run(tmp_path, hub.url, "--fraction", "0.2")
    wanted = expected(hub, 2)["train-00001-of-00010.parquet"]
    assert code == 2 and "train-00001-of-00010.parquet arrived damaged 2 times" in err
    assert hashlib.sha256(wanted).hexdigest() in err and "Traceback" not in err
    assert set(there(tmp_path)) == {"train-00000-of-00010.parquet", "fetched.json"}


def test_damage_on_the_disk_is_found(tmp_path, hub):
    assert run(tmp_path, hub.url, "--fraction", "0.3")[0] == 0
    whole = there(tmp_path)
    short, altered, unknown = (tmp_path / "out" / f"train-{n:05d}-of-00010.parquet" for n in range(3))
    altered.write_bytes(b"x" + altered.read_bytes()[1:])
    code, out, err = run(tmp_path, hub.url, "--fraction", "0.3", "--verify")
    assert code == 0 and "missing  train-00001" in out and out.count("missing  train-") == 1
    # Without what is remembered everything is read: copied files are as good as fetched ones.
    (tmp_path / "out" / "fetched.json").unlink()
    short.write_bytes(short.read_bytes()[:-1])
    unknown.write_bytes(b"x" + unknown.read_bytes()[1:])
    code, out, err = run(tmp_path, hub.url, "--fraction", "0.3")
    assert code == 0 and all(f"missing  train-0000{n}" in out for n in (0, 2)) and "have     train-00001" in out
    assert there(tmp_path) == whole


def test_out_of_reach_says_what_is_needed(tmp_path, hub):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fetched.json").write_text(json.dumps({"files": {"train-00000-of-00010.parquet": "00"}}))
    for url, more, wanted in (
        (
            "http://127.0.0.1:9",
            {},
            ["http://127.0.0.1:9 cannot be reached", "HTTPS_PROXY", "HF_ENDPOINT", "another mach"],
        ),
        (hub.url, {"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE is set; unset it"]),
    ):
        code, out, err = run(tmp_path, url, **more)
        assert code == 2 and "Traceback" not in err and all(word in err for word in wanted), err
        assert "out has 1 whole files" in err
    code, out, err = run(tmp_path, hub.url, "--repo", "no/body")
    assert code == 2 and "does not give no/body (HTTP 404)" in err and "hf auth login" in err
    for fraction in (0.0, 1.5):
        with pytest.raises(UserError, match="must be above 0 and at most 1"):
            fetch.Fetch(tmp_path, fraction)


def test_a_login_is_asked_for_and_used(tmp_path):
    with Hub(contents(2, 100), token="hf_secret").running() as hub:
        code, out, err = run(tmp_path, hub.url)
        assert code == 2 and "HTTP 401" in err and "HF_TOKEN" in err and "Traceback" not in err
        code, out, err = run(tmp_path, hub.url, HF_TOKEN="hf_secret")
        assert code == 0 and expected(hub, 1).items() <= there(tmp_path).items()
