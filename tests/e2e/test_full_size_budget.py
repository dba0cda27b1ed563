# SPDX-License-Identifier: Apache-2.0
"""What training concepts takes at SAM 3's own sizes, by a dry run: no weights, no download, about a minute."""

from __future__ import annotations

from effsam3.hardware.budget.estimates import GIB, estimate, fits, measure
from effsam3.recipe.reader import load_recipe


def test_concepts_fit_24_gib_one_image_at_a_time(tmp_path, monkeypatch):
    """With recomputation, which the recipe has; its student is still to be trained."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("concepts/concepts_es_rv_m", ["hardware=gpu", "train.micro_batch_size=1"])
    assert recipe.train.recompute and recipe.data.phrases == 4
    sizes = measure(recipe)
    found = estimate(recipe, sizes)
    # SAM 3's detector, and the student's without the trunk, float32.
    assert found.device["frozen parts"] > 4 * GIB
    assert fits(found.total, 24 * GIB)
