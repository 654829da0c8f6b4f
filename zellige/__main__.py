"""`python -m zellige ...` is `zellige ...`: what torchrun and accelerate launch."""

from __future__ import annotations

from importlib import import_module

from zellige import stood_aside

if __name__ == "__main__":
    own = "zellige." if stood_aside else ""
    code = import_module(f"{own}pipelines.cli").main()
    import_module(f"{own}common.processes").leave(code)
