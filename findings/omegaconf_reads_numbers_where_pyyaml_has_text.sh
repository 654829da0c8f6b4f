#!/usr/bin/env bash
# OmegaConf and PyYAML: one config, two types: 1e-4 and 1.0e5 are numbers for the first and text for the second.
#
# Guess: OmegaConf reads YAML with PyYAML, so both have the same values, and what has a decimal point is a number. Seen in
# OmegaConf 2.4.0 and PyYAML 6.0.4: PyYAML takes a number with an exponent for one only with a point and a sign (1.0e+5,
# 1.e-4); 1e-4, 1E5 and 1.0e5 are text. OmegaConf has a loader of its own, by which all are numbers. So the configs of
# taming-transformers, latent diffusion and their descendants, which are written for OmegaConf, come with text for a rate
# when PyYAML reads them; all else that was tried is read alike.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check omegaconf==2.4.0 PyYAML==6.0.4
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import omegaconf
import yaml

print(f"omegaconf {omegaconf.__version__}, PyYAML {yaml.__version__}")
apart = []
for text in ("1e-4", "1E5", "1.0e5", "1.0e+5", "1.e-4", "4.5e-6", ".5", "5.", "010", "0o10", "1_000", "12:30:00", "yes", "~"):
    plain, other = yaml.safe_load(f"x: {text}")["x"], omegaconf.OmegaConf.create(f"x: {text}").x
    if (type(plain), plain) != (type(other), other):
        apart.append(text)
        print(f"{text}: PyYAML {plain!r}, OmegaConf {other!r}")
assert apart == ["1e-4", "1E5", "1.0e5"], "this has changed"
PYTHON
