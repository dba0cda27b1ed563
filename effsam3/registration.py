# SPDX-License-Identifier: Apache-2.0
"""Makes transformers' Auto classes know the students after `import effsam3`, without importing anything heavy for it.

The modules in `REGISTERING` register their classes when they are imported, which takes transformers and torch. If
transformers is there already, `import effsam3` imports them. If not, a watch on the import system does it as soon as
somebody imports transformers; a process that never does pays nothing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTERING = ("effsam3.models.image.student", "effsam3.models.text.padding", "effsam3.models.memory.tracker")


def register_students() -> None:
    """Register now if transformers is imported already, else right after it will have been."""
    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    for name in REGISTERING:
        importlib.import_module(name)


class _Watch(MetaPathFinder):
    """Lets others find transformers and the modules of this package, and notices when they have been executed.

    The import of transformers may come from inside one of our modules, and `REGISTERING` may need that very module. So
    it waits until the outermost module is whole. transformers' own modules need no watching: they are imported on
    demand, after transformers itself. An error of our modules fails the import that led to them, as it should.
    """

    def __init__(self):
        self.depth = 0  # watched modules that are being executed, one inside the other

    def find_spec(self, name: str, path, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "transformers" and not name.startswith("effsam3."):
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None:
            spec.loader.exec_module = partial(self._execute, spec.loader.exec_module)
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        self.depth += 1
        try:
            execute(module)
            if self.depth == 1 and self in sys.meta_path and "transformers" in sys.modules:
                _register()
                sys.meta_path.remove(self)
        finally:
            self.depth -= 1
