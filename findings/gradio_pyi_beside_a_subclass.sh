#!/usr/bin/env bash
# gradio 6.31.0: a class derived from a component writes a file into the source folder, at import.
# Guess before running: `class Upload(gr.Image)` in a module changes nothing on the disk.
# Seen: beside the module stands a .pyi file of the same name, a copy of the source with the methods of events added, in
# which a class that stands inside a function is indented and no valid Python: linters and type checkers that find it
# take it for the module. Setting a method of an instance (`image.preprocess = ...`) writes nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "gradio==6.31.0"
mkdir "$work/a" "$work/b"
cat > "$work/a/uploads.py" <<'PY'
def upload_class():
    import gradio as gr

    class Upload(gr.Image):
        is_template = True

    return Upload
PY
cat > "$work/b/uploads.py" <<'PY'
def upload():
    import gradio as gr

    image = gr.Image(type="filepath")
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image
PY
export GRADIO_ANALYTICS_ENABLED=False
(cd "$work/a" && "$work/venv/bin/python" -c "import uploads; uploads.upload_class()" && ls)
(cd "$work/b" && "$work/venv/bin/python" -c "import uploads; uploads.upload()" && ls)
test -f "$work/a/uploads.pyi"
! "$work/venv/bin/python" -c "import ast; ast.parse(open('$work/a/uploads.pyi').read())" 2> "$work/error"
tail -1 "$work/error"
test ! -f "$work/b/uploads.pyi"
