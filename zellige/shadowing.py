"""`import zellige` in a folder that has a `pipelines/`, a `training/` or a `common/` of its own.

Zellige's packages have plain names, and so have the folders of many a project. Python looks into the folder of a script
first, finds the project's package there, and would give it to Zellige's own imports. Where that is so, Zellige stands
aside: its packages are loaded as `zellige.pipelines`, `zellige.training` and so on, and the plain names are the
project's. In all other places nothing of this happens.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = (
    "codes",
    "common",
    "configs",
    "images",
    "metrics",
    "pipelines",
    "stage1_vae",
    "stage1_vq",
    "stage2_prior",
    "training",
)
ROOT = Path(__file__).resolve().parent.parent  # where they lie, side by side with this one


def stand_aside() -> bool:
    """Whether one of the plain names is another's; then from now on `zellige.NAME` is ours."""
    if not any(is_another(name) for name in PACKAGES):
        return False
    if not any(isinstance(finder, OwnFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, OwnFinder())
    return True


def is_another(name: str) -> bool:
    """Whether `import NAME` would give a package that is not ours."""
    try:
        spec = find_spec(name)
    except ValueError:  # a module that was made by hand and has no spec
        return True
    return spec is None or spec.origin is None or Path(spec.origin).resolve().parent != ROOT / name


class OwnFinder(MetaPathFinder):
    """Finds `zellige.pipelines` and all below it in the folder `pipelines` beside this package; the others alike."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "zellige" or name.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, [str(ROOT)] if name in PACKAGES else path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = OwnLoader(spec.loader.name, spec.loader.path)
        return spec


class OwnLoader(SourceFileLoader):
    """Runs a module so that its imports of our packages, wherever in it they stand, find ours."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_own}
        super().exec_module(module)


def import_own(
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """What an import statement of ours calls, as `builtins.__import__`."""
    package = name.partition(".")[0]
    if level or package not in PACKAGES:
        return builtins.__import__(name, globals, locals, fromlist or (), level)
    if fromlist:
        return builtins.__import__(f"zellige.{name}", globals, locals, fromlist, 0)
    import_module(f"zellige.{name}")
    return sys.modules[f"zellige.{package}"]
