# SPDX-License-Identifier: Apache-2.0
"""What a recipe may say: one frozen dataclass per section, one line per key with its unit or meaning.

`effsam3/recipe/reader.py` reads YAML into these classes. A rule that concerns one key is part of its type; rules
between keys are `check` methods, which yield one sentence per mistake. A section named after a verb configures it.
"""

from __future__ import annotations

from effsam3.stages.image.facts import ImageRecipe
from effsam3.stages.memory.facts import MemoryRecipe
from effsam3.stages.release.facts import ReleaseRecipe
from effsam3.stages.text.facts import TextRecipe

# stage -> class of its recipes
STAGES = {"image": ImageRecipe, "text": TextRecipe, "memory": MemoryRecipe, "release": ReleaseRecipe}
