# SPDX-License-Identifier: Apache-2.0
"""What a run folder holds of its merged model: who fills the slots, how they learned, what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

from effsam3.checked_files import read_json
from effsam3.errors import UserError
from effsam3.models.chassis.card import CARD
from effsam3.models.merging.slots import first_chassis, read_card
from effsam3.models.registry import Sam3, is_made_up, named
from effsam3.recipe.common import Recipe, StageRecipe
from effsam3.recipe.reader import load_recipe

# What must be known of a model, and of a measurement, to tell which belongs to which.
CARD_FORM = {"chassis": str, "revision": (str, None), "weights": str}
RESULT_FORM = {"provenance": {"started": str, "weights?": str}}


class ReleaseError(UserError):
    """A run folder without a merged model, or a licence file that is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """A merged model and what is known of it.

    Attributes:
        folder: the run folder.
        merged: content of the model's effsam3.json.
        chassis: the SAM 3 at the bottom, where the model was merged into one that was merged itself.
        recipe_files: {slot, or name of changed tensors: recipe by which they learned}, as far as it is known.
        measured: those of eval/*.json that are of this merged model, which is known by its weights: merging the same
            ones again makes no other model.
        since: when the first of these was begun, in seconds since 1970; None: there are none.
        stale: those that are of another.
        license_file: a copy of the SAM License; None when there is none at hand, or none is needed.
    """

    folder: Path
    merged: dict
    chassis: str
    recipe_files: dict[str, Path]
    measured: tuple[Path, ...]
    since: float | None
    stale: tuple[Path, ...]
    license_file: Path | None

    @property
    def model(self) -> Path:
        """The merged model's folder."""
        return self.folder / "merged"

    @property
    def has_sam3(self) -> bool:
        """Whether weights of SAM 3 are in it: the made-up chassis have none, of any other it must be supposed."""
        return not is_made_up(self.chassis)

    @property
    def sam3(self) -> Sam3:
        """What is known of the chassis."""
        return named(self.chassis)

    @property
    def pictures(self) -> tuple[Path, ...]:
        """What was drawn since the first of these evaluations began."""
        files = sorted((self.folder / "pictures").glob("*.png"))
        return tuple(path for path in files if self.since is not None and path.stat().st_mtime >= self.since)

    @property
    def summary(self) -> Path | None:
        """The tables of the newest evaluation, None unless it is of this merged model and came to its end."""
        path = self.folder / "eval" / "summary.md"
        if not self.measured or not path.is_file():
            return None
        newest = max(result.stat().st_mtime for result in self.measured)
        return path if path.stat().st_mtime >= newest else None

    @cached_property
    def recipes(self) -> dict[str, StageRecipe]:
        """The recipes of `recipe_files`."""
        return {slot: load_recipe(file) for slot, file in self.recipe_files.items()}


def read_release(folder: Path, license_file: str | None = None) -> Release:
    """Read a run folder; `license_file` holds the SAM License, None to look for it next to the chassis.

    Raises:
        ReleaseError: there is no merged model, or the licence file is missing or another licence's.
    """
    if not (folder / "merged" / CARD).is_file():
        raise ReleaseError(f"{folder}/merged is not there; run `effsam3 merge` first")
    merged = read_card(folder / "merged", CARD_FORM)
    chassis, revision = first_chassis(merged)
    results = sorted((folder / "eval").glob("*.json"))
    remedy = "run `effsam3 evaluate` again"
    made_by = {path: read_json(path, RESULT_FORM, remedy, ReleaseError)["provenance"] for path in results}
    # By the weights themselves: file times survive no copy of a run folder.
    measured = tuple(path for path in results if made_by[path].get("weights") == merged["weights"])
    return Release(
        folder=folder,
        merged=merged,
        chassis=chassis,
        recipe_files=_recipe_files(folder),
        measured=measured,
        since=min((_began(made_by[path]) for path in measured), default=None),
        stale=tuple(path for path in results if path not in measured),
        license_file=None if is_made_up(chassis) else sam_license(chassis, revision, license_file, folder / "merged"),
    )


def _began(provenance: dict) -> float:
    """When a verb began, in seconds since 1970."""
    try:
        return datetime.strptime(provenance["started"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError as error:
        raise ReleaseError(f"provenance.started is not a time ({error}); evaluate again") from error


def unmeasured(recipe: Recipe) -> list[str]:
    """Return a line for every part without a recipe to measure it by."""
    learned = recipe.learned()
    lines = [
        f"parts.{slot}: {part} has no recipe.yaml with the data to measure it on; run `effsam3 evaluate` on a recipe "
        f"of stage {slot} with name={recipe.name}"
        for slot, part in recipe.sources().items()
        if slot not in learned
    ]
    return lines + [
        f"parts.adapted: {folder} has no recipe.yaml with data to measure its tensors on; a run that changed them has"
        for folder in recipe.adapted()
        if folder.name not in learned
    ]


def _recipe_files(folder: Path) -> dict[str, Path]:
    """Return {slot, or name of changed tensors: file} of the recipes by which they learned: the run's own, or the
    parts' of a release."""
    recipe = load_recipe(folder)
    folders = recipe.sources() | {adapted.name: adapted for adapted in recipe.adapted()}
    files = {owner: source / "recipe.yaml" for owner, source in folders.items()}
    return {owner: file for owner, file in files.items() if file.is_file()}


def sam_license(chassis: str, revision: str | None, license_file: str | None, model: Path) -> Path | None:
    """Return a file with the licence of a SAM 3: the given one, else the model's or one next to the chassis, or None.

    Raises:
        ReleaseError: the given file is not there, or does not call itself that licence.
    """
    sam3 = named(chassis)
    if license_file is None:
        places = [model / "LICENSE", *_license_files(chassis, revision)]
        return next((path for path in places if _is_license(path, sam3.license.title)), None)
    if not _is_license(Path(license_file), sam3.license.title):
        there = Path(license_file).is_file()
        problem = f"does not call itself the {sam3.license.title}" if there else "is not there"
        raise ReleaseError(
            f"push.license: {license_file} {problem}; give the LICENSE of {sam3.hub_id} ({sam3.license.url})"
        )
    return Path(license_file)


def _is_license(path: Path, title: str) -> bool:
    """Return whether a file begins with the licence's title; `license_notice` does not."""
    return path.is_file() and title in path.read_text(encoding="utf-8", errors="replace").strip().split("\n")[0]


def _license_files(chassis: str, revision: str | None) -> list[Path]:
    """Where a chassis may have its licence: next to a local folder's or file's weights, or in the Hub's cache."""
    local = Path(chassis)
    if local.exists():
        folder = local if local.is_dir() else local.parent
        return [folder / name for name in ("LICENSE", "LICENSE.txt", "LICENSE.md")]
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(chassis, "LICENSE", revision=revision)
    except HFValidationError:  # a file that has been moved since
        return []
    return [Path(cached)] if isinstance(cached, str) else []


def refuse_unlicensed(chassis: str, license_file: Path | None, private: bool) -> None:
    """Refuse to publish a SAM 3's weights without their licence.

    Raises:
        ReleaseError: the repository would be public and no copy of the licence is at hand.
    """
    if license_file is None and not private and not is_made_up(chassis):
        sam3 = named(chassis)
        raise ReleaseError(
            f"push.private is false, and there is no copy of the {sam3.license.title}, which must accompany "
            f"{sam3.label}'s weights; save the LICENSE of {sam3.hub_id} ({sam3.license.url}) and name it: "
            "push.license=FILE"
        )


def license_notice(sam3: Sam3) -> str:
    """Return what replaces a SAM 3's licence while no copy of it is at hand."""
    return (
        f"The weights in this repository contain weights of {sam3.label}. They may be used and passed on under the\n"
        f"{sam3.license.title} only, and a copy of it must accompany them. None was at hand when this file was "
        "written.\n\n"
        f"Read it at {sam3.license.url}\n"
        "and put its full text in the place of this notice before you pass the weights on.\n"
    )
