# SPDX-License-Identifier: Apache-2.0
"""effsam3: distil SAM 3 into small students, one recipe at a time. Importing it costs nothing: no torch here.

docs/api.md describes the names below, which are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effsam3 import embed, evaluate, merge, train
    from effsam3.data.videos.files import open_video
    from effsam3.predictor import Predictor, load_model
    from effsam3.recipe.reader import load_recipe

__version__ = "0.1.0"
__all__ = ["Predictor", "embed", "evaluate", "load_model", "load_recipe", "merge", "open_video", "train"]

HOMES = {  # public name -> the module that has it; verbs are modules themselves
    "Predictor": "effsam3.predictor",
    "load_model": "effsam3.predictor",
    "load_recipe": "effsam3.recipe.reader",
    "open_video": "effsam3.data.videos.files",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'effsam3' has no attribute {name!r}")
    if name not in HOMES:
        return import_module(f"effsam3.{name}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
