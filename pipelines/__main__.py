"""`python -m pipelines ...` is `zellige ...`: what torchrun and accelerate launch."""

from __future__ import annotations

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main())
