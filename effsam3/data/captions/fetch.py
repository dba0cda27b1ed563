# SPDX-License-Identifier: Apache-2.0
"""The train files of Recap-DataComp-1B, or the first of them, downloaded by huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from effsam3.errors import UserError
from effsam3.files import refuse_full_disk, refuse_unwritable
from effsam3.hub import hub_errors

REPO = "UCSC-VLAA/Recap-DataComp-1B"
FOLDER = "data/train_data"  # in the repository, and so below `out`; preview rows are elsewhere


class HubError(UserError):
    """The Hub is out of reach, refuses, or does not have what is asked for."""


def fetch(
    out: Path, fraction: float = 0.01, repo: str | None = None, revision: str | None = None, verify: bool = False
) -> None:
    """Download the first `fraction` of a repository's train files into a folder; whole files are kept.

    Args:
        fraction: above 0 and at most 1, at least one file. In name order, so that a larger one adds to what is there.
        repo: a dataset on the Hub; None: Recap-DataComp-1B.
        revision: commit, branch or tag; None: the newest.
        verify: compare the SHA-256 of files that are there, too; damaged ones are downloaded again.

    Raises:
        HubError: the Hub does not answer, refuses, or has no such files.
        UserError: another fraction, or a folder that cannot be written or has too little room.
    """
    from huggingface_hub import HfApi, RepoFile, snapshot_download

    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction} must be above 0 and at most 1; 0.01 is 1 %")
    repo = repo or REPO
    refuse_unwritable(out, "--out")
    with hub_errors(repo, "or fetch on another machine and copy the folder", HubError):
        commit = str(HfApi().dataset_info(repo, revision=revision).sha)
        found = HfApi().list_repo_tree(repo, FOLDER, revision=commit, repo_type="dataset")
        files = [one for one in found if isinstance(one, RepoFile) and Path(one.path).match("train*.parquet")]
        # By name, so that a larger fraction contains the smaller one.
        files.sort(key=lambda one: one.path)
        wanted = files[: max(1, round(fraction * len(files)))]
        if not wanted:
            raise HubError(f"{repo} has no train*.parquet in {FOLDER}; the captions are in {REPO}")
        size = sum(file.size for file in wanted)
        print(f"wanted   {len(wanted)} of {len(files)} train files of {repo} at {commit[:12]}, {size / 1e9:.2f} GB")
        if verify and out.is_dir():
            checked = HfApi().verify_repo_checksums(repo, repo_type="dataset", revision=commit, local_dir=out)
            for bad in checked.mismatches:
                print(f"damaged  {bad['path']}")
                (out / bad["path"]).unlink()
        size = sum(file.size for file in _missing(out, wanted))
        refuse_full_disk(out, size, "what is missing", "make room, name another --out, or take a smaller --fraction")
        paths = [file.path for file in wanted]
        snapshot_download(repo, repo_type="dataset", revision=commit, local_dir=out, allow_patterns=paths)
    if missing := _missing(out, wanted):  # huggingface_hub takes what is there where the Hub has gone meanwhile
        raise HubError(f"{len(missing)} files have not arrived (first: {missing[0].path}); run the same command again")
    print(f"have     {len(wanted)} of {len(wanted)} files in {out}")
    print(f"next     data.captions={out} in a recipe of stage text")


def _missing(out: Path, files: list) -> list:
    """Return those of the Hub's files that are not in a folder, or not of their size."""
    return [file for file in files if not (out / file.path).is_file() or (out / file.path).stat().st_size != file.size]
