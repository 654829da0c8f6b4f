#!/usr/bin/env bash
# gradio 6.31.0: gr.Image(type="filepath") opens an upload before the program sees its path.
# Guess before running: "filepath" hands over the uploaded file as it is, and what is wrong with it is the program's to
# say.
# Seen: a file that is no image never reaches the function: Pillow's error, which names the path on the server, ends the
# request. An image of another mode than image_mode (RGB unless said) reaches it as a converted copy: 16-bit grey comes
# as RGB of 8 bits, and all its values above 255 are white. With image_mode=None an image comes as it is; for what is
# none, `preprocess` has to be replaced.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "gradio==6.31.0"
cat > "$work/try.py" <<'PY'
import sys
import numpy as np
import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image

folder = sys.argv[1]
open(f"{folder}/text.png", "w").write("no image")
Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save(f"{folder}/deep.png")


def seen(name, **options):
    with gr.Blocks(analytics_enabled=False):
        image = gr.Image(type="filepath", **options)
    try:
        path = image.preprocess(ImageData(path=f"{folder}/{name}", orig_name=name))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    opened = Image.open(path)
    return opened.mode, path == f"{folder}/{name}", len(np.unique(np.asarray(opened)))


refused, converted, as_it_is = seen("text.png"), seen("deep.png"), seen("deep.png", image_mode=None)
print(refused, converted, as_it_is, sep="\n")
assert refused.startswith("UnidentifiedImageError") and folder in refused
assert converted[:2] == ("RGB", False) and converted[2] <= 3
assert as_it_is == ("I;16", True, 64)
PY
GRADIO_ANALYTICS_ENABLED=False "$work/venv/bin/python" "$work/try.py" "$work"
