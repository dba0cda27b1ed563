# SPDX-License-Identifier: Apache-2.0
"""What end-to-end tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import run_here
from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """A folder with drawn images and the teacher's features for them, and the overrides that use them."""
    folder = tmp_path_factory.mktemp("shared")
    overrides = (
        "data.synthetic_images=48",
        f"data.index={folder}/data/index.parquet",
        f"embed.to={folder}/teacher",
        "train.eval_samples=8",
        "train.loggers=[]",
        "evaluate.max_images=4",
        "evaluate.pictures=1",
    )
    run_here(folder, "embed", *overrides)
    return folder, overrides


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"none of {', '.join(BROWSERS)} is here; `bash scripts/setup.sh dev` installs one with apt-get"
    with sync_playwright() as playwright:
        # Containers run tests as root, for whom Chromium has no sandbox.
        yield playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
