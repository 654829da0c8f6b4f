"""Classes by name and by number."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import UserError


def class_number(class_names: Sequence[str] | None, label: int | str | None) -> int | None:
    """The class that `label` names or numbers; names go first, as some are numbers. Raises UserError for neither."""
    if isinstance(label, str) or str(label) in (class_names or ()):
        return class_named(class_names, str(label))
    return label


def class_named(class_names: Sequence[str] | None, name: str) -> int:
    """The number of the class of this name. Raises UserError where there is none."""
    names = class_names or ()
    if name not in names:
        known = f"its classes are {', '.join(names)}" if names else "its classes have numbers only"
        raise UserError(f"this model has no class named {name!r}: {known}; choose one of them")
    return names.index(name)
