"""The page of a demo, and its server."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import UserError
from pipelines.demo import drawing_tabs, image_tabs, latent_tabs
from pipelines.demo.limits import MEGABYTE, Desk, Limits, StoppedError
from pipelines.demo.model import Subject, save_samples, some_samples
from pipelines.demo.widgets import Page

KEPT = 3600  # seconds for which files of visitors are kept, and at the latest until the demo ends

CSS = """
.pixels img { image-rendering: pixelated; }
.picture .image-frame, .picture .image-container { height: 100%; width: 100%; }
.picture img { width: 100% !important; height: 100% !important; object-fit: contain !important; }
.beside { align-self: end; min-height: 46px; }
.facts table { width: 100%; border-collapse: collapse; border: 0 !important; }
.facts th, .facts td { border: 0 solid #88888866 !important; border-bottom-width: 1px !important; }
.facts th, .facts td { padding: 6px 8px; text-align: right; font-variant-numeric: tabular-nums; }
.facts th, .facts td { word-break: normal; overflow-wrap: normal; }
.facts th:first-child, .facts td:first-child { text-align: left; }
.facts th:empty { display: none; }
.facts tr { border: 0 !important; }
.grid-wrap { max-height: none !important; height: auto !important; padding-top: 28px !important; }
.grid-container .thumbnail-item { display: flex; flex-direction: column; height: auto; aspect-ratio: auto; }
.grid-container .thumbnail-item img { height: auto; aspect-ratio: 1; }
.grid-container .caption-label { position: static; max-width: 100%; white-space: normal; border: 0; border-radius: 0; }
.tab-container button { padding-inline: 12px; }
@media (max-width: 640px) {
  .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  .tab-container button { padding-inline: 6px; font-size: 14px; }
  .facts th, .facts td { padding: 6px 4px; }
  main.fillable { padding-inline: 12px !important; }
}
footer { display: none !important; }
"""


def gradio() -> Any:
    """The module. Raises UserError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"the demo needs gradio ({error}); install it by: pip install 'zellige[demo]'") from error
    return gradio


def build(gr: Any, subject: Subject, limits: Limits, folder: Path, samples: int) -> Any:
    """The page of a model, gr.Blocks with the tabs of all that it can do. samples: as many of its own, drawn now, are
    offered as examples, in `folder`."""
    desk = Desk(subject.networks, limits.seconds)
    examples: list[str] = []
    with suppress(UserError, StoppedError):  # a slow model's page is there without them
        with desk.serving(""):
            drawn = some_samples(subject, samples)
        examples = save_samples(drawn, folder / "samples")
    page = Page(gr, subject, limits, desk, examples)
    with gr.Blocks(
        title=f"Zellige: {Path(subject.name).name}", analytics_enabled=False, delete_cache=(60, KEPT)
    ) as demo:
        gr.Markdown(f"# Zellige\n\n`{subject.name}`: {subject.describe()}")
        with gr.Tabs():
            for title, tab in tabs_of(subject):
                with gr.Tab(title):
                    tab(page)
    demo.queue(max_size=limits.waiting, default_concurrency_limit=1)
    return demo


def tabs_of(subject: Subject) -> list[tuple[str, Callable[[Page], None]]]:
    """What the model can do."""
    reconstruct, compress = image_tabs.reconstruct_tab, image_tabs.compress_tab
    if subject.latent is not None:
        return [
            ("Generate", latent_tabs.generate_tab),
            ("Reconstruct", reconstruct),
            *([("Compress", compress)] if subject.lossless is not None else []),
            ("Interpolate", latent_tabs.interpolate_tab),
            ("Walk", latent_tabs.walk_tab),
        ]
    if subject.pipeline is None:
        return [("Reconstruct", reconstruct), ("Compress", compress)]
    return [
        ("Generate", drawing_tabs.generate_tab),
        ("Reconstruct", reconstruct),
        ("Compress", compress),
        ("Inpaint", drawing_tabs.inpaint_tab),
        ("Variations", drawing_tabs.vary_tab),
        ("Interpolate", drawing_tabs.interpolate_tab),
    ]


@contextmanager
def served(subject: Subject, limits: Limits, host: str, port: int, samples: int, share: bool = False) -> Iterator[str]:
    """The page of a model behind an address, which this yields, for as long as the block lasts. What visitors upload
    lies in a folder of its own, which is removed then. Raises UserError."""
    gr = gradio()
    check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="zellige-demo-") as folder, own_folder(folder), without_proxy(host):
        demo = build(gr, subject, limits, Path(folder), samples)
        try:
            _, local, public = demo.launch(
                server_name=host,
                server_port=port,
                share=share,
                prevent_thread_lock=True,
                inbrowser=False,
                inline=False,
                quiet=True,
                show_error=False,
                ssr_mode=False,
                run_history=False,
                enable_monitoring=False,
                mcp_server=False,
                pwa=False,
                max_file_size=int(limits.megabytes * MEGABYTE),
                footer_links=[],
                app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
                theme=theme(gr),
                css=CSS,
            )
        except OSError as error:
            raise UserError(f"the demo cannot be reached at {host}:{port} ({error}); choose another --port") from error
        try:
            yield public or local
        finally:
            demo.close(verbose=False)


def theme(gr: Any) -> Any:
    """Fonts of the visitor's own system: none is loaded from elsewhere."""
    sans, mono = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
    return gr.themes.Default(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=sans, font_mono=mono)


def check_port(host: str, port: int) -> None:
    """Raises UserError for a port that somebody else has, and for a host that is not this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.bind(address)
    except OSError as error:
        raise UserError(
            f"the address {host}:{port} cannot be used ({error.strerror or error}); choose another --port, or end what "
            "is there"
        ) from error


@contextmanager
def own_folder(folder: str) -> Iterator[None]:
    """Where gradio keeps files in the meantime; else in one folder for all its programs and users of the machine."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before


@contextmanager
def without_proxy(host: str) -> Iterator[None]:
    """gradio asks its own server whether it is there, and would ask a company's proxy for it."""
    names = ("NO_PROXY", "no_proxy")
    before = {name: os.environ.get(name) for name in names}
    for name in names:
        os.environ[name] = ",".join(filter(None, [before[name], host, "127.0.0.1", "localhost"]))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, and the system where it asks the program to end, in place of an exception."""
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
