"""Options that name a function, MODULE:FUNCTION, whose module is imported and so runs: a person gives them on the
command line or in a script, and no file can, wherever it came from."""

from __future__ import annotations

from common.errors import UserError


def names_code(value: object) -> bool:
    """Whether an option's value is MODULE:FUNCTION: neither a word such as `inception` nor a network of timm."""
    return isinstance(value, str) and ":" in value and not value.startswith("timm:")


def refuse_code(value: object, option: str, file: str) -> None:
    """Raises UserError for the value of an option that would run code and stands in a file."""
    if names_code(value):
        raise UserError(
            f"{file} sets {option} to {value}, which would import a Python module and run it: a file cannot have that "
            f"done; if the module is yours, give --{option} {value} on the command line"
        )
