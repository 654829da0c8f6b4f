#!/usr/bin/env bash
# gradio 6.31.0: "concurrency limit 1" is one request at a time of each function, not of the page.
# Guess before running: with queue(default_concurrency_limit=1) requests of one page run one after the other.
# Seen: two buttons with a function each run at the same time; with one function, or with one concurrency_id, they run
# one after the other. A demo of one model needs the same concurrency_id at every button.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "gradio==6.31.0"
cat > "$work/try.py" <<'PY'
import time
import gradio as gr
from gradio_client import Client


def most_at_once(functions, **queue):
    inside, most = [0], [0]

    def work():
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(1)
        inside[0] -= 1

    with gr.Blocks(analytics_enabled=False) as page:
        own = {"a": work, "b": work if functions == 1 else lambda: work()}
        for name, function in own.items():
            gr.Button(name).click(function, api_name=name, **queue)
    page.queue(default_concurrency_limit=1)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    client = Client(address, verbose=False)
    jobs = [client.submit(api_name=f"/{name}") for name in ("a", "b")]
    for job in jobs:
        job.result()
    page.close(verbose=False)
    return most[0]


seen = most_at_once(2), most_at_once(1), most_at_once(2, concurrency_id="model", concurrency_limit=1)
print("at once: two functions", seen[0], "- one function", seen[1], "- two functions with one name", seen[2])
assert seen == (2, 1, 1)
PY
GRADIO_ANALYTICS_ENABLED=False "$work/venv/bin/python" "$work/try.py"
