"""The page in a browser: Debian's Chromium, without a window."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.errors import UserError
from pipelines.commands.demo import DemoConfig, demo
from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.demo.limits import Limits
from pipelines.demo.model import Subject, open_subject
from pipelines.demo.page import build, check_port, gradio, served, tabs_of
from tests.pipelines.conftest import make_autoencoder
from tests.stage1_vae.exact.tiny import tiny_vae

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
SECONDS = 60_000  # milliseconds that a browser on a busy machine may take for a step


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def test_without_gradio_one_sentence_says_how_to_install_it(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"the demo needs gradio .*; install it by: pip install 'zellige\[demo\]'"):
        demo(DemoConfig(model=str(model), device="cpu"))


def test_a_port_that_is_taken_is_one_sentence():
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.listen()
        port = own.getsockname()[1]
        with pytest.raises(UserError, match=f"the address 127.0.0.1:{port} cannot be used .*; choose another --port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_model_has_the_tabs_of_what_it_can_do(tmp_path: Path):
    make_autoencoder().save_pretrained(tmp_path / "stage1")
    subjects: list[Subject] = [open_subject(str(tmp_path / "stage1"), "cpu")]
    for kind in ("dense_bernoulli", "dense_skip"):
        tiny_vae(kind).save_pretrained(tmp_path / kind)
        subjects.append(open_subject(str(tmp_path / kind), "cpu"))
    names = [[name for name, _ in tabs_of(subject)] for subject in subjects]
    of_vae = ["Generate", "Reconstruct", "Compress", "Interpolate", "Walk"]
    assert names == [["Reconstruct", "Compress"], of_vae, of_vae]
    assert "Compress" not in [name for name, _ in tabs_of(Subject("a", latent=subjects[1].latent))]


def test_all_that_asks_the_model_waits_in_one_queue(model: Path, tmp_path: Path):
    page = build(gradio(), open_subject(str(model), "cpu"), Limits(), tmp_path, 0)
    asking = [fn for fn in page.fns.values() if fn.concurrency_id == "model"]
    primary = [block for block in page.blocks.values() if getattr(block, "variant", None) == "primary"]
    assert len(asking) == len(primary) == 7  # a button in each tab, and Decompress
    assert {fn.concurrency_limit for fn in asking} == {1}
    assert not [fn for fn in page.fns.values() if fn.api_visibility == "public"]  # no way round the page


def test_the_page_of_a_vae_is_made(tmp_path: Path):
    """With every tab that such a model can have."""
    tiny_vae("dense_skip").save_pretrained(tmp_path / "vae")
    page = build(gradio(), open_subject(str(tmp_path / "vae"), "cpu"), Limits(images=2), tmp_path / "files", 2)
    assert len([fn for fn in page.fns.values() if fn.concurrency_id == "model"]) == 6
    assert sorted(path.name for path in (tmp_path / "files" / "samples").iterdir()) == ["sample_0.png", "sample_1.png"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"port": 0}, "port=0, expected 1 to 65535"),
        ({"max_images": 65}, "max_images=65, expected 2 to 64"),
        ({"max_seconds": 0.0}, "max_seconds=0.0, expected more than 0"),
        ({"max_waiting": 0}, "max_waiting=0, expected at least 1"),
        ({"examples": -1}, "examples=-1, expected 0 or more"),
    ],
)
def test_limits_that_are_none_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        DemoConfig(model="a", **options)


# ---- in the browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("gradio")
    if not Path(CHROMIUM).exists():
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visit:
    """A page that notes what it should not do."""

    def __init__(self, browser: Any, address: str, width: int) -> None:
        self.wrong: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, accept_downloads=True)
        self.page.set_default_timeout(SECONDS)
        self.page.on("console", lambda said: self.note(said.type == "error", f"console: {said.text}"))
        self.page.on("pageerror", lambda error: self.note(True, f"error: {error}"))
        own = (address, "data:", "blob:")
        self.page.on("request", lambda asked: self.note(not asked.url.startswith(own), f"asked {asked.url}"))
        self.page.goto(address, timeout=SECONDS)
        self.page.get_by_role("tab").first.wait_for()

    def note(self, wrong: bool, what: str) -> None:
        if wrong:
            self.wrong.append(what)

    def open(self, tab: str) -> Any:
        """The part of the page below a tab."""
        self.page.get_by_role("tab", name=tab, exact=True).first.click()
        return self.page.locator("[role=tabpanel]:visible")

    def pictures(self, panel: Any, count: int) -> list[bytes]:
        """The pixels of those of a gallery, as soon as there are so many."""
        shown = panel.locator(".grid-container img")
        shown.nth(count - 1).wait_for()
        assert shown.count() == count
        files = [self.page.request.get(image.get_attribute("src")).body() for image in shown.all()]
        assert all(file.startswith(b"\x89PNG") for file in files)
        return [Image.open(io.BytesIO(file)).tobytes() for file in files]


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    subject = open_subject(str(model), "cpu")
    port = free_port()
    with served(subject, Limits(images=8, megabytes=0.2), "127.0.0.1", port, 4) as found:
        yield found
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert not [thread for thread in threading.enumerate() if "(run)" in thread.name]  # the server's


def test_a_visitor_generates_reconstructs_compresses_and_inpaints(browser, address, model, pictures, tmp_path):
    visit = Visit(browser, address, 1280)
    page = visit.page

    panel = visit.open("Generate")
    panel.get_by_label("Seed").fill("5")
    panel.get_by_role("button", name="Generate").click()
    made = visit.pictures(panel, 8)
    generate_files(GenerateConfig(model=str(model), out=str(tmp_path / "new"), num=8, seed=5, device="cpu"))
    assert made == [Image.open(tmp_path / "new" / f"{i:06d}.png").tobytes() for i in range(8)]

    panel = visit.open("Reconstruct")
    panel.locator("input[type=file]").first.set_input_files(pictures / "0.png")
    panel.get_by_role("button", name="Reconstruct").focus()
    page.keyboard.press("Enter")
    panel.get_by_text("PSNR").wait_for()
    assert "bits by the transformer prior" in panel.inner_text()

    panel = visit.open("Compress")
    panel.locator("input[type=file]").first.set_input_files(pictures / "0.png")
    panel.get_by_role("button", name="Compress", exact=True).click()
    panel.get_by_text("WebP without loss").wait_for()
    with page.expect_download() as download:
        panel.get_by_text("Download the .zlg file").click()
    download.value.save_as(tmp_path / "0.zlg")
    panel.locator("input[type=file]").last.set_input_files(tmp_path / "0.zlg")
    panel.get_by_role("button", name="Decompress").click()
    visit.pictures(panel, 1)

    panel = visit.open("Inpaint")
    panel.locator("input[type=file]").first.set_input_files(pictures / "0.png")
    panel.get_by_role("button", name="Inpaint").click()
    page.get_by_text("nothing is painted; paint over what should be drawn anew").wait_for()
    canvas = panel.locator("canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.55 * box["width"], box["y"] + 0.6 * box["height"], steps=4)
    page.mouse.up()
    page.wait_for_timeout(300)
    panel.get_by_role("button", name="Inpaint").click()
    kept, *completions = visit.pictures(panel, 5)
    original = Image.open(pictures / "0.png").tobytes()
    stays = [a == b for a, b in zip(kept, original, strict=True)]
    assert 16 <= sum(stays) < 256
    for completion in completions:
        assert all(a == b for a, b, stay in zip(completion, original, stays, strict=True) if stay)
    assert visit.wrong == []
    page.close()


def test_what_is_wrong_is_told_in_a_sentence_and_tabs_go_by_the_keyboard(browser, address, tmp_path):
    visit = Visit(browser, address, 390)
    page = visit.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_label("Seed").first.fill("-5")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_text("seed=-5, expected a whole number from 0 to").wait_for()
    page.get_by_role("tab", name="Generate").first.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    panel = page.locator("[role=tabpanel]:visible")
    panel.get_by_role("button", name="Reconstruct").wait_for()
    (tmp_path / "photo.png").write_text("no photo")
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "photo.png")
    panel.get_by_role("button", name="Reconstruct").click()
    page.get_by_text("this file cannot be read as an image").wait_for()
    assert str(tmp_path) not in page.inner_text("body")
    page.close()


def test_ctrl_c_ends_the_command(model: Path, tmp_path: Path):
    """And leaves nothing of what visitors uploaded."""
    command = [sys.executable, "-m", "pipelines", "demo", str(model), "--port", str(free_port()), "--examples", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stdout is not None
        assert running.stdout.readline().startswith(f"{model} at http://127.0.0.1:")
        assert list(tmp_path.glob("zellige-demo-*"))
        running.send_signal(signal.SIGINT)
        rest = running.communicate(timeout=60)[0]
    assert (running.returncode, rest) == (0, f"the demo of {model} has ended\n")
    assert not list(tmp_path.glob("zellige-demo-*"))
