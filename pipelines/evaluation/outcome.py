"""What an evaluation found: figures in groups, what a person should know of them, and the protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Outcome:
    """Filled part by part."""

    protocol: dict[str, Any]
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)  # figures by the title of their group
    notes: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)  # of figures: what must stand beside the number
    says: list[str] = field(default_factory=list)  # phrases of the one line that sums up
    unread: str = ""  # of images that cannot be read

    def add(self, title: str, figures: dict[str, Any], notes: list[str]) -> None:
        self.groups.setdefault(title, {}).update(figures)
        self.notes += notes

    @property
    def figures(self) -> dict[str, Any]:
        """Of all groups."""
        return {name: value for group in self.groups.values() for name, value in group.items()}
