# SPDX-License-Identifier: Apache-2.0
"""The verb `push`: upload a merged model, its card, numbers and pictures to the Hugging Face Hub.

python scripts/push.py recipes/stage1/image/es_rv_m.yaml push.repo=OWNER/NAME
"""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.utils import disable_progress_bars

from effsam3.errors import UserError
from effsam3.files import write_bytes, write_text
from effsam3.hub import hub_errors
from effsam3.models.chassis.card import CARD
from effsam3.publish.card import model_card
from effsam3.publish.release import Release, license_notice, read_release, refuse_unlicensed
from effsam3.recipe.common import Recipe
from effsam3.recipe.push import Push
from effsam3.training.report import Report

# What a push writes, and what a later one takes away where it writes less: an old shard would be loaded.
# Other names, and other folders, are somebody's own and stay; eval, pictures and recipes mirror the run folder.
OURS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|sam3_original\.safetensors|(sam3|efficientsam3)\.pt"
    r"|(eval|pictures|recipes)/[^/]+"
)
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.onnx", "*.gguf")


class PushError(UserError):
    """No repository, token or network; a refusal by the Hub; or an upload that did not get through."""


def run(recipe: Recipe, dry_run: bool = False) -> str | None:
    """Upload the merged model of a run folder in one commit; return its address, None after a dry run.

    A dry run writes the card, prints what would go where, and asks nobody. The run folder gets merged/README.md and
    merged/LICENSE; nothing else in it is changed, whatever happens.

    Raises:
        PushError: nothing can be sent, or not everything was: the same command sends the rest.
        ReleaseError: there is no merged model, or no such licence file.
    """
    asked = recipe.push
    release = read_release(recipe.folder, asked.license)
    refuse_unlicensed(release.chassis, release.license_file, asked.private)
    private = asked.private if dry_run else open_repository(asked)  # before gigabytes are read
    repo = asked.repo or f"OWNER/{recipe.name}"
    url = f"{constants.ENDPOINT}/{repo}"
    files = prepare(release, repo, asked.revision)
    report = Report(recipe.folder)
    visibility = f"{'private' if private else 'public'}{' if made now' if dry_run else ''}"
    report.say(f"\npush     {release.model} to {url}, branch {asked.revision}, {visibility}")
    for path in release.stale:
        report.say(f"left out {path}, which is of another merged model; `effsam3 evaluate` measures this one")
    for name, path in files.items():
        report.say(f"  {megabytes(path):>12}  {name}")
    total = f"  {megabytes(*files.values()):>12}  in {len(files)} files"
    if dry_run:
        report.say(f"{total}; nothing was sent")
        report.say(f"The card is in {release.model / 'README.md'}; read it before you push.")
        if asked.repo is None:
            report.say("To push, name where to: push.repo=OWNER/NAME")
        return None
    report.say(total)
    for name in upload(asked, files, f"{recipe.name}: {' and '.join(release.merged['slots'])} of {release.chassis}"):
        report.say(f"  removed: {name}")
    source = f'"{repo}"' if asked.revision == "main" else f'"{repo}", revision="{asked.revision}"'
    report.say(f"\n{url}\n  from effsam3 import Predictor\n  predictor = Predictor({source})")
    return url


def prepare(release: Release, repo: str, revision: str) -> dict[str, Path]:
    """Write the card and the licence into the merged folder; return {name in the repository: file}."""
    write_text(release.model / "README.md", model_card(release, repo, revision))
    if release.license_file is not None and release.license_file.resolve() != (release.model / "LICENSE").resolve():
        write_bytes(release.model / "LICENSE", release.license_file.read_bytes())
    elif release.license_file is None and release.has_sam3:
        write_text(release.model / "LICENSE", license_notice(release.sam3))
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
    """Return the size of files, in megabytes."""
    return f"{sum(path.stat().st_size for path in files) / 1e6:,.3f} MB"


# ---- the Hub


def open_repository(push: Push) -> bool:
    """Make repository and branch if needed, check that this token may write; return whether it is private.

    Raises:
        PushError: it may not, the Hub cannot be reached, or the repository is public or holds something else.
    """
    if push.repo is None:
        raise PushError("push.repo is not set; name where to: push.repo=OWNER/NAME")
    if get_token() is None and not constants.HF_HUB_OFFLINE:
        raise PushError(
            f"no token for {constants.ENDPOINT} is at hand; `hf auth login`, or set HF_TOKEN to one that may write"
        )
    api = HfApi()
    with _errors(push):
        api.create_repo(push.repo, private=push.private, exist_ok=True)
        api.auth_check(push.repo, write=True)
        private = bool(api.repo_info(push.repo).private)
        if push.private and not private:
            raise PushError(
                f"{push.repo} is there already and public, but push.private is true; make it private in its settings, "
                "choose another push.repo, or set push.private=false"
            )
        if push.revision != "main":
            api.create_branch(push.repo, branch=push.revision, exist_ok=True)
        names = api.list_repo_files(push.repo, revision=push.revision)
    # A mistyped name must not mix two models' weights in one repository.
    if CARD not in names and any(fnmatch(name, pattern) for name in names for pattern in WEIGHTS):
        raise PushError(
            f"{push.repo} holds a model that was not pushed from here (it has no {CARD}); choose another push.repo"
        )
    return private


def upload(push: Push, files: dict[str, Path], message: str) -> list[str]:
    """Send {name in the repository: file}, large ones first, visible in one commit; returns the names it removes.

    Raises:
        PushError: the Hub refuses, or cannot be reached.
    """
    api, repo = HfApi(), str(push.repo)  # open_repository has asked for it
    if not sys.stderr.isatty():
        disable_progress_bars()
    with _errors(push):
        names = api.list_repo_files(repo, revision=push.revision)
        # Only what an earlier push has written: other files are their owner's.
        old = [name for name in names if name not in files and OURS.fullmatch(name)]
        # In one commit: nobody ever loads new weights with an old config.
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, path) for name, path in files.items()),
            *(CommitOperationDelete(name) for name in old),
        ]
        api.create_commit(repo, [*operations], commit_message=message, revision=push.revision)
    return old


def _errors(push: Push):
    """Return what the Hub's refusals and failures mean for whoever pushes."""
    owner = str(push.repo).split("/")[0]
    return hub_errors(
        f"push to {push.repo}", f"a push takes a token with write access to {owner} (push.repo)", PushError
    )
