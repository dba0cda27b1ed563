# SPDX-License-Identifier: Apache-2.0
"""The verb `push`: upload a merged model, its card, numbers and pictures to the Hugging Face Hub.

python scripts/push.py recipes/stage1/image/es_rv_m.yaml push.repo=OWNER/NAME
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import disable_progress_bars

from effsam3.errors import UserError
from effsam3.models.chassis.card import CARD
from effsam3.publish.card import model_card
from effsam3.publish.release import Release, license_notice, read_release, refuse_unlicensed
from effsam3.training.report import Report, write_text

# What a push writes, and what a later one takes away where it writes less: an old shard would be loaded.
# Other names, and other folders, are somebody's own and stay; eval, pictures and recipes mirror the run folder.
OURS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|sam3_original\.safetensors|(sam3|efficientsam3)\.pt"
    r"|(eval|pictures|recipes)/[^/]+"
)
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.onnx", "*.gguf")
PASSING = (408, 429, 500, 502, 503, 504)  # HTTP answers that another attempt may better
LONGEST_WAIT = 60  # seconds between two attempts


class PushError(UserError):
    """No repository, token or network; a refusal by the Hub; or an upload that did not get through."""


def run(recipe, dry_run: bool = False) -> str | None:
    """Upload the merged model of a run folder in one commit; returns its address, None after a dry run.

    A dry run writes the card, prints what would go where, and asks nobody. The run folder gets merged/README.md and
    merged/LICENSE; nothing else in it is changed, whatever happens.

    Raises:
        PushError: nothing can be sent, or not everything was: the same command goes on then.
        ReleaseError: there is no merged model, or no such licence file.
    """
    asked = recipe.push
    release = read_release(recipe.folder, asked.license)
    refuse_unlicensed(release.has_sam3, release.license_file, asked.private)
    repo = asked.repo or f"OWNER/{recipe.name}"
    report = Report(recipe.folder)
    if dry_run:
        files = prepare(release, repo, asked.revision)
        visibility = "private" if asked.private else "public"
        announce(report, release, f"{constants.ENDPOINT}/{repo}, branch {asked.revision}, {visibility} if made now")
        for name, path in files.items():
            report.say(f"  {megabytes(path):>12}  {name}")
        report.say(f"  {megabytes(*files.values()):>12}  in {len(files)} files; nothing was sent")
        report.say(f"The card is in {release.model / 'README.md'}; read it before you push.")
        if asked.repo is None:
            report.say("To push, say where to: push.repo=OWNER/NAME")
        return None
    hub = Hub(asked, report.say)
    hub.open()  # before gigabytes are read
    files = prepare(release, repo, asked.revision)
    visibility = "private" if hub.private else "public"
    announce(report, release, f"{hub.url}, branch {asked.revision}, {visibility}")
    started = time.monotonic()
    hub.upload(files, f"{recipe.name}: {' and '.join(release.merged['slots'])} of {release.chassis}")
    report.say(f"\n{len(files)} files, {megabytes(*files.values())}, {time.monotonic() - started:.0f} s: {hub.url}")
    source = f'"{repo}"' if asked.revision == "main" else f'"{repo}", revision="{asked.revision}"'
    report.say(f"  import effsam3, transformers\n  model = transformers.Sam3VideoModel.from_pretrained({source})")
    return hub.url


def announce(report: Report, release: Release, where: str) -> None:
    """Say what goes where, and which results stay at home."""
    report.say(f"\npush     {release.model} to {where}")
    for path in release.stale:
        report.say(f"left out {path}, which is of another merged model; `effsam3 evaluate` measures this one")


def prepare(release: Release, repo: str, revision: str) -> dict[str, Path]:
    """Write the card and the licence into the merged folder; returns {name in the repository: file}."""
    write_text(release.model / "README.md", model_card(release, repo, revision))
    if release.license_file is not None and release.license_file.resolve() != (release.model / "LICENSE").resolve():
        shutil.copyfile(release.license_file, release.model / "LICENSE")
    elif release.license_file is None and release.has_sam3:
        write_text(release.model / "LICENSE", license_notice())
    files = {path.name: path for path in sorted(release.model.iterdir()) if not path.name.startswith(".")}
    own = {name: release.folder / name for name in ("recipe.yaml", "provenance.json")}
    files |= {name: path for name, path in own.items() if path.is_file()}
    parts = {f"recipes/{slot}.yaml": path for slot, path in release.recipe_files.items()}
    files |= {name: path for name, path in parts.items() if path != own["recipe.yaml"]}
    files |= {f"eval/{path.name}": path for path in release.measured}
    files |= {f"pictures/{path.name}": path for path in release.pictures}
    if release.summary is not None:
        files["eval/summary.md"] = release.summary
    return files


def megabytes(*files: Path) -> str:
    """The size of files, in megabytes."""
    return f"{sum(path.stat().st_size for path in files) / 1e6:,.3f} MB"


class Hub:
    """One model repository on the Hub, spoken to with patience.

    Attributes:
        private: whether the repository is, known after `open`.
    """

    def __init__(self, push, say: Callable[[str], None]):
        if push.repo is None:
            raise PushError("push.repo is not set; say where to: push.repo=OWNER/NAME")
        if constants.HF_HUB_OFFLINE:
            raise PushError("HF_HUB_OFFLINE is set, so the Hub may not be asked; unset it, or use --dry-run")
        if get_token() is None:
            raise PushError(
                f"no token for {constants.ENDPOINT} is at hand; `hf auth login`, or set HF_TOKEN to one that may write"
            )
        self.push, self.say, self.api = push, say, HfApi()
        self.url = f"{constants.ENDPOINT}/{push.repo}"
        if not sys.stderr.isatty():
            disable_progress_bars()

    def open(self) -> None:
        """Make the repository and the branch where they are not there, and see that this token may write to them.

        Raises:
            PushError: it may not, the Hub cannot be reached, or the repository is public or holds something else.
        """
        push = self.push
        self._try("making the repository", self.api.create_repo, push.repo, private=push.private, exist_ok=True)
        self._try("asking for access", self.api.auth_check, push.repo, write=True)
        self.private = self._try("asking for access", self.api.repo_info, push.repo).private
        if push.private and not self.private:
            raise PushError(
                f"{self.url} is there already and public, but push.private is true; make it private in its settings, "
                "choose another push.repo, or set push.private=false"
            )
        if push.revision != "main":
            self._try("making the branch", self.api.create_branch, push.repo, branch=push.revision, exist_ok=True)
        names = self.names()
        if CARD not in names and any(fnmatch(name, pattern) for name in names for pattern in WEIGHTS):
            raise PushError(
                f"{self.url} holds a model that was not pushed from here (it has no {CARD}); choose another push.repo"
            )

    def names(self) -> list[str]:
        """The files that the branch has."""
        return self._try("listing files", self.api.list_repo_files, self.push.repo, revision=self.push.revision)

    def upload(self, files: dict[str, Path], message: str) -> None:
        """Send files, small ones first, then make them all visible in one commit.

        Raises:
            PushError: the Hub refuses, or fails `push.attempts` times.
        """
        repo, revision = self.push.repo, self.push.revision
        ordered = sorted(files.items(), key=lambda item: item[1].stat().st_size)
        additions = [CommitOperationAdd(name, path) for name, path in ordered]
        for number, (addition, (name, path)) in enumerate(zip(additions, ordered, strict=True), start=1):
            started = time.monotonic()
            self._try(name, self.api.preupload_lfs_files, repo, [addition], revision=revision, free_memory=False)
            taken = time.monotonic() - started
            self.say(f"  {number:>3}/{len(files)}  {megabytes(path):>12}  {taken:>6.1f} s  {name}")
        old = [name for name in self.names() if name not in files and OURS.fullmatch(name)]
        deletions = [CommitOperationDelete(name) for name in old]
        for name in old:
            self.say(f"  removed: {name}")
        self.say(f"  commit to {revision}: {message}")
        self._try(
            "commit", self.api.create_commit, repo, [*additions, *deletions], commit_message=message, revision=revision
        )

    def _try(self, what: str, call: Callable, *arguments, **options):
        """Call the Hub, again after a growing wait while the trouble is one that passes.

        Raises:
            PushError: it does not pass.
        """
        for attempt in range(1, self.push.attempts + 1):
            try:
                return call(*arguments, **options)
            except (HTTPError, OSError, RuntimeError) as error:
                cause = _cause(error)
                if not _passes(cause) or attempt == self.push.attempts:
                    raise PushError(f"{what}: {self._explain(cause)}") from error
                wait = min(2 ** (attempt - 1), LONGEST_WAIT)
                self.say(f"  {what}: {_short(cause)}; attempt {attempt + 1} of {self.push.attempts} in {wait} s")
                time.sleep(wait)

    def _explain(self, error: Exception) -> str:
        """Say what an error means for whoever pushes, and what to do."""
        repo, owner = self.push.repo, self.push.repo.split("/")[0]
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        meaning = {
            401: "the Hub does not accept this token; run `hf auth login`, or set HF_TOKEN to one that may write",
            403: f"this token may not write to {repo}; use one with write access to {owner}, or change push.repo",
            404: f"{repo} is not there for this token; check the owner in push.repo ({owner}) and the token's rights",
        }.get(status, "")
        if _passes(error):
            meaning = f"{constants.ENDPOINT} cannot be reached or fails; run the same command again, it goes on"
        return f"{meaning} ({_short(error)})" if meaning else _short(error)


def _cause(error: Exception) -> Exception:
    """What is behind the client's own `RuntimeError: Error while uploading`."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def _passes(error: Exception) -> bool:
    """Whether trouble may pass by itself: the Hub's, the network's, or what the xet client calls RuntimeError."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError, RuntimeError))


def _short(error: Exception) -> str:
    """One line."""
    if isinstance(error, HfHubHTTPError):
        return f"{error.response.status_code}: {error.server_message or error.response.reason_phrase}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
