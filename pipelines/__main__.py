"""`python -m pipelines ...` is `zellige ...`: what torchrun and accelerate launch."""

from __future__ import annotations

import os
import sys

from pipelines.cli import main

if __name__ == "__main__":
    code = main()
    if "LOCAL_RANK" in os.environ:
        from common.processes import leave  # imports torch, which `--help` does without

        leave(code)
    sys.exit(code)
