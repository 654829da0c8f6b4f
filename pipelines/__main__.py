"""`python -m pipelines ...` is `zellige ...`: what torchrun and accelerate launch."""

from __future__ import annotations

from pipelines.cli import main

if __name__ == "__main__":
    code = main()

    from common.processes import leave  # imports torch, which `--help` does without

    leave(code)
