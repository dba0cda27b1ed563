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
from effsam3.data.captions.text_files import caption_files
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
    """The parquet files that have their names, by name."""
    return {path.name: path.read_bytes() for path in (tmp_path / "out/data/train_data").glob("[!.]*")}


def expected(hub, count):
    names = sorted(name for name in hub.files if "train-" in name)[:count]
    return {name.rsplit("/", 1)[-1]: hub.files[name] for name in names}


def test_the_first_part_then_more_of_it_then_nothing_to_do(tmp_path, hub):
    code, out, err = run(tmp_path, hub.url, "--fraction", "0.3")
    assert code == 0, err
    assert there(tmp_path) == expected(hub, 3)
    assert "3 of 10 train files" in out and "have     3 of 3 files" in out
    asked = len(hub.ranges)
    code, out, err = run(tmp_path, hub.url, "--fraction", "0.5")
    assert code == 0 and len(hub.ranges) == asked + 2 and there(tmp_path) == expected(hub, 5)
    # What a recipe of stage text opens is what was fetched, and nothing else in the folder.
    assert [Path(file).name for file in caption_files(str(tmp_path / "out"))] == list(expected(hub, 5))


def test_a_killed_download_keeps_whole_files(tmp_path, hub):
    hub.stall_after = 3
    process = start(tmp_path, hub.url, "--fraction", "1")
    waited = time.monotonic() + 60
    while len(there(tmp_path)) < 3:
        assert time.monotonic() < waited and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert there(tmp_path).items() <= expected(hub, 10).items(), "nothing half-done under a final name"
    hub.stall_after, asked = None, len(hub.ranges)
    assert run(tmp_path, hub.url, "--fraction", "1")[0] == 0
    assert there(tmp_path) == expected(hub, 10) and len(hub.ranges) - asked == 7


def test_a_connection_that_breaks_is_taken_up_again(tmp_path, hub):
    hub.cut = 1
    code, out, err = run(tmp_path, hub.url)
    assert code == 0, err
    assert len(hub.ranges) == 2 and there(tmp_path) == expected(hub, 1)


def test_damage_on_the_disk_is_found(tmp_path, hub):
    assert run(tmp_path, hub.url, "--fraction", "0.3")[0] == 0
    whole = there(tmp_path)
    first, second, _ = sorted((tmp_path / "out/data/train_data").glob("*.parquet"))
    times = second.stat()
    second.write_bytes(b"x" + second.read_bytes()[1:])
    os.utime(second, ns=(times.st_atime_ns, times.st_mtime_ns))
    first.write_bytes(first.read_bytes()[:-1])
    code, out, err = run(tmp_path, hub.url, "--fraction", "0.3", "--verify")
    assert code == 0 and "damaged  data/train_data/train-00001" in out and there(tmp_path) == whole


def test_out_of_reach_says_what_is_needed(tmp_path, hub):
    unreachable = ["http://127.0.0.1:9 cannot be reached", "HTTPS_PROXY", "HF_ENDPOINT", "another machine"]
    for url, more, wanted in (
        ("http://127.0.0.1:9", {}, unreachable),
        (hub.url, {"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE is set", "unset it"]),
    ):
        code, out, err = run(tmp_path, url, **more)
        assert code == 2 and "Traceback" not in err and all(word in err for word in wanted), err
    code, out, err = run(tmp_path, hub.url, "--repo", "no/body")
    assert code == 2 and "error: no/body: " in err and "answers 404" in err and "hf auth login" in err
    for fraction in (0.0, 1.5):
        with pytest.raises(UserError, match="must be above 0 and at most 1"):
            fetch.fetch(tmp_path, fraction)


def test_a_disk_that_is_too_small_is_named_before_anything_is_sent(tmp_path, hub):
    full = "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(9000, 9000, 100)\n"
    (tmp_path / "sitecustomize.py").write_text(full)
    code, out, err = run(tmp_path, hub.url, "--fraction", "0.3", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert code == 2 and "will take 9e-06 GB in" in err and "1e-07 GB are free" in err, err
    assert "make room, name another --out, or take a smaller --fraction" in err and not hub.ranges


def test_a_login_is_asked_for_and_used(tmp_path):
    with Hub(contents(2, 100), token="hf_secret").running() as hub:
        code, out, err = run(tmp_path, hub.url)
        assert code == 2 and "answers 401" in err and "HF_TOKEN" in err and "Traceback" not in err
        code, out, err = run(tmp_path, hub.url, HF_TOKEN="hf_secret")
        assert code == 0 and there(tmp_path) == expected(hub, 1)
