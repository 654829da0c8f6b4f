"""Both stages chained: `TwoStagePipeline` from Python, `zellige` from the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.two_stage import TwoStagePipeline

__all__ = ["TwoStagePipeline"]


def __getattr__(name: str) -> Any:
    """Imports the pipeline, and torch with it, on first use only: `zellige --help` needs neither."""
    if name == "TwoStagePipeline":
        from pipelines.two_stage import TwoStagePipeline

        return TwoStagePipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
