# SPDX-License-Identifier: Apache-2.0
"""What end-to-end tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import run_here


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
