"""`python -m zellige ...` is `zellige ...`: what torchrun and accelerate launch."""

from __future__ import annotations

import os
from importlib import import_module

from zellige import stood_aside

OWN = "zellige." if stood_aside else ""


def main() -> int:
    """The program `zellige`, also in a folder with a `pipelines/` of its own. Returns the exit code."""
    return import_module(f"{OWN}pipelines.cli").main()


if __name__ == "__main__":
    code = main()
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit(code)
    import_module(f"{OWN}common.processes").leave(code)  # imports torch, which `--help` does without
