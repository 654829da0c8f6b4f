"""Classes by name and by number."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import UserError


def class_number(class_names: Sequence[str] | None, label: int | str | None) -> int | None:
    """The class that `label` names or numbers; names go first, as some are numbers. Raises UserError for neither."""
    names = class_names or ()
    if str(label) in names:
        return names.index(str(label))
    if isinstance(label, str):
        known = f"its classes are {', '.join(names)}" if names else "its classes have numbers only"
        raise UserError(f"this model has no class named {label!r}: {known}; choose one of them")
    return label
