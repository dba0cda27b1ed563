# SPDX-License-Identifier: Apache-2.0
"""The train files of Recap-DataComp-1B on the Hub: what there is, and a download that resumes and checks itself.

A file grows as `.<name>.<sha256>.part` and takes its name only when its SHA-256 is the Hub's. `fetched.json` remembers
which files have passed, so that running again reads none of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from effsam3.checked_files import read_json
from effsam3.data.images.sa1b import write_atomic
from effsam3.errors import UserError
from effsam3.training.report import refuse_unwritable

REPO = "UCSC-VLAA/Recap-DataComp-1B"
FOLDER = "data/train_data"  # in the repository; preview rows are elsewhere
FETCHED = "fetched.json"
BLOCK = 8 << 20  # bytes per request, and what a kill can cost
ATTEMPTS = 2  # downloads of a file that arrives damaged
PAUSES = (1, 5)  # seconds before a block is asked for again


class HubError(UserError):
    """The Hub is out of reach, refuses, or does not have what is asked for."""


class RemoteFile(NamedTuple):
    """A file of the repository."""

    path: str  # in the repository
    size: int  # bytes
    sha256: str  # hex

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError that says what is needed."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
    )

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubError(f"the Hub is needed for {repo}, but HF_HUB_OFFLINE is set; unset it") from error
    except RemoteEntryNotFoundError as error:
        raise HubError(f"{repo} has no {FOLDER} with train-*.parquet; the captions are in {REPO}") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            raise HubError(
                f"the Hub at {constants.ENDPOINT} does not give {repo} (HTTP {error.response.status_code}): check the "
                "name, and log in (`hf auth login`, or a token that may read it in HF_TOKEN)"
            ) from error
        raise HubError(f"the Hub at {constants.ENDPOINT} failed ({error}); try again later") from error
    except (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError) as error:
        raise HubError(
            f"the Hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error}). Needed: network "
            "access to it (a proxy goes into HTTPS_PROXY) or a mirror in HF_ENDPOINT. Where there is none, fetch on "
            "another machine and copy the folder"
        ) from error
    except FileNotFoundError as error:  # HfFileSystem's word for 404
        raise HubError(f"the Hub at {constants.ENDPOINT} has no {error}") from error


def list_train_files(repo: str = REPO, revision: str | None = None) -> tuple[str, list[RemoteFile]]:
    """Return the commit and its train files in name order. Raises HubError."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(repo):
        commit = HfApi().dataset_info(repo, revision=revision).sha
        tree = list(HfApi().list_repo_tree(repo, FOLDER, revision=commit, repo_type="dataset"))
    found = [entry for entry in tree if isinstance(entry, RepoFile) and _is_train_file(entry.path)]
    unchecked = [entry.path for entry in found if entry.lfs is None]
    if unchecked:
        raise HubError(f"{repo} names no SHA-256 for {unchecked[0]}; it cannot be checked, so it is not fetched")
    if not found:
        raise HubError(f"{repo} has no train-*.parquet in {FOLDER}; the captions are in {REPO}")
    return commit, sorted(RemoteFile(entry.path, entry.size, entry.lfs.sha256) for entry in found)


def _is_train_file(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return name.startswith("train") and name.endswith(".parquet")


class Fetch:
    """The first `fraction` of a repository's train files, at least one, and a folder to have them in.

    `revision` is a commit, branch or tag; None takes the newest.
    Raises HubError, and UserError for a fraction outside 0..1.
    """

    def __init__(self, folder: str | Path, fraction: float, repo: str = REPO, revision: str | None = None):
        if not 0 < fraction <= 1:
            raise UserError(f"--fraction {fraction} must be above 0 and at most 1; 0.01 is 1 %")
        self.folder, self.repo = Path(folder), repo
        self.commit, self.available = list_train_files(repo, revision)
        # In name order, so that a larger fraction later adds to what is there.
        self.wanted = self.available[: max(1, round(fraction * len(self.available)))]
        self._checked = fetched_files(self.folder)

    def missing(self, verify: bool = False) -> list[RemoteFile]:
        """Return the wanted files that are not there whole.

        Files of the right size that have passed before are believed, or with `verify` read again.
        """
        return [file for file in self.wanted if not self._have(file, verify)]

    def _have(self, file: RemoteFile, verify: bool) -> bool:
        path = self.folder / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        if verify or self._checked.get(file.name) != file.sha256:
            if _sha256(path) != file.sha256:
                return False
            self._remember(file)
        return True

    def download(self, files: list[RemoteFile], progress: bool = True) -> None:
        """Fetch files, going on where an interrupted run stopped.

        Raises HubError when the Hub stops answering, UserError when the disk is too small or a file arrives damaged.
        """
        from tqdm import tqdm

        refuse_unwritable(self.folder, "--out")
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = sum(self._part(file).stat().st_size for file in files if self._part(file).is_file())
        total = sum(file.size for file in files)
        free = shutil.disk_usage(self.folder).free
        if total - kept > free:
            raise UserError(
                f"{(total - kept) / 1e9:.2f} GB are missing and {self.folder} has {free / 1e9:.2f} GB free; "
                "make room, name another --out, or take a smaller --fraction"
            )
        bar = tqdm(total=total, initial=kept, unit="B", unit_scale=True, unit_divisor=1000, disable=not progress)
        with bar:
            for file in files:
                bar.set_description(file.name)
                self._download(file, bar)

    def _download(self, file: RemoteFile, bar) -> None:
        part = self._part(file)
        for _ in range(ATTEMPTS):
            self._receive(file, part, bar)
            found = _sha256(part)
            if found == file.sha256:
                os.replace(part, self.folder / file.name)
                self._remember(file)
                return
            bar.update(-part.stat().st_size)
            part.unlink()
        raise UserError(
            f"{file.name} arrived damaged {ATTEMPTS} times: SHA-256 {found}, the Hub says {file.sha256}; something "
            "between here and the Hub (a proxy, a mirror in HF_ENDPOINT) alters it"
        )

    def _receive(self, file: RemoteFile, part: Path, bar) -> None:
        """Append to `part` until it has the file's size, a block at a time."""
        from huggingface_hub import HfFileSystem

        with hub_errors(self.repo):
            remote = HfFileSystem().open(
                f"datasets/{self.repo}@{self.commit}/{file.path}", "rb", block_size=BLOCK, cache_type="none"
            )
        with remote, open(part, "ab") as local:
            remote.seek(local.tell())
            while (wanted := min(BLOCK, file.size - local.tell())) > 0:
                with hub_errors(self.repo):
                    block = _read(remote, wanted)
                if len(block) != wanted:
                    raise HubError(
                        f"{wanted} bytes of {file.name} asked for, {len(block)} received; a mirror or proxy that does "
                        "not know Range requests cannot be used"
                    )
                local.write(block)
                local.flush()
                bar.update(wanted)
            os.fsync(local.fileno())

    def _part(self, file: RemoteFile) -> Path:
        return self.folder / f".{file.name}.{file.sha256[:16]}.part"

    def _remember(self, file: RemoteFile) -> None:
        self._checked[file.name] = file.sha256
        content = {"repo": self.repo, "commit": self.commit, "files": dict(sorted(self._checked.items()))}
        write_atomic(self.folder / FETCHED, json.dumps(content, indent=1).encode())


def _read(remote, wanted: int) -> bytes:
    """Read from where `remote` stands. Not every huggingface_hub tries again when a connection breaks half-way."""
    from huggingface_hub.errors import HTTPError

    for pause in PAUSES:
        try:
            return remote.read(wanted)
        except HTTPError:
            time.sleep(pause)
    return remote.read(wanted)


def fetched_files(folder: Path) -> dict[str, str]:
    """Return name: SHA-256 of the files that have passed in a folder; needs no Hub."""
    path = folder / FETCHED
    return read_json(path, {"files": {str: str}}, "delete it, and fetch again")["files"] if path.is_file() else {}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
