"""The page, and what a browser makes of it."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from pipelines.cli import main
from pipelines.commands.report import ReportConfig, report
from pipelines.report.collect import Subject, subjects_of
from pipelines.report.models import load_models, put_together
from pipelines.report.page import groups_of
from pipelines.report.settings import commands_of
from stage1_vae.hierarchies.vdvae import VDVAE, VDVAEConfig
from stage1_vae.likelihoods import BernoulliConfig

CHROMIUM = Path("/usr/bin/chromium")
OF_CODES = [
    "summary",
    "settings",
    "curves",
    "evaluation",
    "reconstructions",
    "codebook",
    "usage",
    "positions",
    "samples",
]
OF_CODES += ["memorisation", "throughput", "commands"]
FEW: dict[str, Any] = {"num": 12, "samples": 6, "device": "cpu"}


@pytest.fixture(scope="module")
def page(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the quickstart in small and of another run."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    evaluation = {"psnr": 12.5, "protocol": {"reference": {"count": 12}}, "notes": ["few <images>"]}
    (folders / "other" / "evaluation.json").write_text(json.dumps(evaluation))
    line = report(ReportConfig(runs=(str(folders / "quick & <b>"), str(folders / "other")), out=str(out), **FEW))
    assert line.startswith(f"{out}: ")
    return out


def sections(text: str) -> dict[str, str]:
    return dict(re.findall(r'<section id="(\w+)">(.*?)</section>', text, re.DOTALL))


def test_every_section_is_there_and_nothing_of_a_user_is_markup(page: Path):
    text = page.read_text(encoding="utf-8")
    found = sections(text)
    assert list(found) == OF_CODES
    assert text.count("<script") == 2  # its own, and the values of charts
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in found["samples"]
    assert "quick &amp; &lt;b&gt;" in found["summary"]
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "style=" not in text  # the policy would forbid it
    assert "url(" not in text
    assert "few &lt;images&gt;" in found["evaluation"]
    assert "protocol" in found["evaluation"].lower()
    assert "zellige report" in found["commands"]
    assert "differs" in found["settings"]
    assert "Stage one alone draws nothing new" in found["samples"]  # of the other run
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


def test_the_values_of_charts_are_json_without_nan(page: Path):
    text = page.read_text(encoding="utf-8")
    (values,) = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', text, re.DOTALL)

    def refuse(token: str) -> None:
        raise AssertionError(token)

    charts = json.loads(values, parse_constant=refuse)
    assert set(re.findall(r'data-chart="([\w-]+)"', text)) == set(charts)
    assert any(None in series["values"] for chart in charts.values() for series in chart["series"])


def test_a_page_of_a_hierarchy_has_its_groups_and_levels(folders: Path, tmp_path: Path):
    torch.manual_seed(0)
    config = VDVAEConfig(
        channels=1,
        width=4,
        latents=1,
        encoder_layers="16d4,4d4,1x1",
        decoder_layers="1x1,4m1,16m4",
        bottleneck_multiple=0.5,
        likelihood=BernoulliConfig(),
    )
    shutil.copytree(folders / "vae", tmp_path / "vdvae")
    shutil.rmtree(tmp_path / "vdvae" / "model")
    VDVAE(config, (16, 16)).save_pretrained(tmp_path / "vdvae" / "model")
    out = tmp_path / "report.html"
    report(ReportConfig(runs=(str(tmp_path / "vdvae"),), out=str(out), **FEW))
    page = out.read_text(encoding="utf-8")
    assert "KL of 3 groups, the top one first: " in page
    assert "<h4>Levels</h4>" in page


def test_a_page_of_a_vae_has_its_latents(folders: Path, tmp_path: Path):
    out = tmp_path / "report.html"
    report(ReportConfig(runs=(str(folders / "vae"),), out=str(out), **FEW))
    found = sections(out.read_text(encoding="utf-8"))
    wanted = [name for name in OF_CODES if name not in ("codebook", "usage", "positions")]
    wanted.insert(wanted.index("samples"), "latents")
    assert list(found) == wanted
    assert "binarised: white from half on" in found["latents"]  # by the run: the model does not say
    assert "of 2</b> numbers are active" in found["latents"]
    assert found["latents"].count("Walk along z") == 2 * 2  # alt and title
    assert "Plane" in found["latents"]
    assert "5,000" not in found["memorisation"]
    assert "48 training images of" in found["memorisation"]


def test_what_cannot_be_made_says_what_to_give(folders: Path, tmp_path: Path):
    out = tmp_path / "report.html"
    prior, model = folders / "quick & <b>" / "stage2", folders / "quick & <b>" / "model"
    report(ReportConfig(runs=(str(prior),), out=str(out), **FEW))
    found = sections(out.read_text(encoding="utf-8"))
    assert "A prior alone makes no images: name the assembled model" in found["reconstructions"]
    assert "of 16 codes" in found["usage"]  # the shards that the run names
    report(ReportConfig(runs=(str(model),), out=str(out), **FEW))
    found = sections(out.read_text(encoding="utf-8"))
    assert "Give test images: --data.path IMAGES." in found["reconstructions"]
    assert "--codes SHARDS" in found["usage"]
    assert "name the run folder, which holds config.yaml" in found["settings"]
    assert "name the run folder, which holds metrics.jsonl" in found["curves"]
    assert "Give the codes that it was trained on: --codes SHARDS." in found["memorisation"]


def test_the_parts_of_one_system_that_are_named_beside_each_other_are_one(folders: Path, tmp_path: Path):
    out, quick = tmp_path / "report.html", folders / "quick & <b>"
    report(ReportConfig(runs=(str(quick / "stage2"), str(quick / "stage1")), out=str(out), **FEW))
    found = sections(out.read_text(encoding="utf-8"))
    assert "6 samples of seed 0" in found["samples"]
    assert "means over 12 held-out images of" in found["reconstructions"]
    assert "Stage one</h3>" in found["curves"]
    assert "Stage two</h3>" in found["curves"]
    assert 'class="who"' not in found["samples"]  # one subject
    assert f"--stage2 {shlex.quote(str(quick / 'stage2'))} --out model" in html.unescape(found["commands"])


def test_the_command_of_evaluate_writes_where_the_next_report_looks(tmp_path: Path):
    subject = Subject(str(tmp_path), "model", "a model of stage one", model=str(tmp_path))
    *_, evaluate = commands_of(subject, seed=0, drawn=None, measured="images")
    assert shlex.split(evaluate.line)[-2:] == ["--out", str(tmp_path / "evaluation.json")]
    subject.model = "owner/name"  # a hub id is no folder
    assert commands_of(subject, seed=0, drawn=None, measured="images")[-1].line.endswith("--out evaluation.json")


def test_subjects_are_put_together_by_their_fingerprints_only(folders: Path):
    def of(*names: str) -> list[tuple[str, int, int]]:
        subjects = subjects_of([str(folders / name) for name in names])
        pairs = put_together([(subject, load_models(subject, torch.device("cpu"))) for subject in subjects])
        return [(subject.name, len(subject.runs), subject.number) for subject, _ in pairs]

    quick = "quick & <b>"
    assert of(f"{quick}/stage1", f"{quick}/stage2", f"{quick}/model", "other") == [("model", 2, 0), ("other", 1, 1)]
    assert of("other", f"{quick}/stage2", "vae") == [("other", 1, 0), ("stage2", 1, 1), ("vae", 1, 2)]
    # Two priors over one autoencoder: it stays a subject of its own.
    assert of(f"{quick}/stage1", quick, f"{quick}/model") == [("stage1", 1, 0), (quick, 2, 1), ("model", 0, 2)]


def test_a_run_that_was_damaged_has_a_page(folders: Path, tmp_path: Path):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    whole = folders / "other"
    for name in ("config.yaml", "run.json", "timing.jsonl", "model/config.json"):
        (run / name).write_bytes((whole / name).read_bytes())
    (run / "metrics.jsonl").write_bytes((whole / "metrics.jsonl").read_bytes()[:-20])
    weights = (whole / "model" / "model.safetensors").read_bytes()
    (run / "model" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    out = tmp_path / "report.html"
    report(ReportConfig(runs=(str(run),), out=str(out), **FEW))
    found = sections(out.read_text(encoding="utf-8"))
    assert "1 of the lines of" in found["summary"]
    assert "model.safetensors is damaged" in found["reconstructions"]
    assert "<svg" in found["curves"]


def test_test_images_and_codes_that_are_given_are_used_or_refused(folders: Path, digits: Path, tmp_path: Path, capsys):
    out, quick = tmp_path / "report.html", folders / "quick & <b>"
    arguments = ["report", str(quick / "model"), "--out", str(out), "--data.path", str(digits), "--data.split", "train"]
    few = ["--num", "9", "--samples", "0", "--device", "cpu"]
    assert main([*arguments, "--codes", str(quick / "codes"), *few]) == 0
    found = sections(out.read_text(encoding="utf-8"))
    assert f"means over 9 images of {digits}" in found["reconstructions"]
    assert "training images of" in found["usage"]
    assert "leave --samples 0 out" in found["samples"]
    assert main(["report", str(folders / "other"), "--codes", str(quick / "codes"), "--out", str(out), *few]) == 2
    assert "expected those of" in capsys.readouterr().err
    assert main(["report", "--out", str(out)]) == 2
    assert "report got no runs, expected run folders, models" in capsys.readouterr().err
    with pytest.raises(UserError, match="is a folder, expected a file"):
        report(ReportConfig(runs=(str(quick),), out=str(tmp_path)))


def test_an_evaluation_is_shown_whatever_its_parts_are():
    groups = dict(
        groups_of(
            {
                "fid": 12.25,
                "n": 5,
                "labels": {"fid": "of 5 images only"},
                "protocol": {"crop": "center", "set": {"count": 3}},
                "notes": ["a"],
            }
        )
    )
    assert groups == {
        "Figures": [("fid", "12.2500 (of 5 images only)"), ("n", "5")],
        "Protocol": [("crop", "center"), ("set.count", "3")],
        "Notes": [("", "a")],
    }


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Any]:
    """The page at 1280 pixels; nothing may be said on the console or asked of the network."""
    said: list[str] = []
    shown = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url)
    )
    shown.goto(page.as_uri())
    yield shown
    shown.close()
    assert said == []


def test_tabs_and_sliders_go_by_keyboard(opened: Any):
    tab = opened.locator("#samples [role=tab]").first
    tab.focus()
    assert opened.locator("#samples-0-panel-0").is_visible()
    assert opened.locator("#samples-0-panel-1").is_hidden()
    opened.keyboard.press("ArrowRight")
    assert opened.locator("#samples-0-panel-1").is_visible()
    assert opened.locator("#samples-0-panel-0").is_hidden()
    assert opened.evaluate("document.activeElement.id") == "samples-0-tab-1"
    opened.keyboard.press("Home")
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.type") == "range"
    panel = opened.locator("#samples-0-panel-0")
    before = panel.locator("figure:visible").get_attribute("data-label")
    opened.keyboard.press("ArrowRight")
    assert panel.locator("figure:visible").count() == 1
    after = panel.locator("figure:visible").get_attribute("data-label")
    assert before.startswith("1,")
    assert after == "1.15" == panel.locator("output").text_content()
    outline = opened.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"  # what has the focus is seen


def test_a_chart_tells_its_values_by_keyboard_and_pointer(opened: Any):
    chart = opened.locator("#curves svg[data-chart]").first
    opened.keyboard.press("Tab")
    chart.focus()
    opened.keyboard.press("Home")
    values = opened.locator("#curves .values").first
    assert values.text_content().startswith("step 10\n")
    assert "other, validation 24" in values.text_content()
    opened.keyboard.press("End")
    assert values.text_content().startswith("step 30\n")
    chart.hover(position={"x": 60, "y": 60})
    assert values.text_content().startswith("step 10\n")
    assert opened.locator("svg[role=img]:not([aria-label])").count() == 0
    assert opened.locator("img:not([alt])").count() == 0


def test_light_and_dark_by_preference_and_by_the_button(opened: Any):
    colour = "getComputedStyle(document.body).backgroundColor"
    light = opened.evaluate(colour)
    opened.emulate_media(color_scheme="dark")
    dark = opened.evaluate(colour)
    assert light != dark
    opened.locator(".theme").focus()
    opened.keyboard.press("Enter")
    assert opened.evaluate(colour) == light
    opened.emulate_media(color_scheme="light")
    opened.keyboard.press("Enter")
    assert opened.evaluate(colour) == dark


def test_on_a_phone_no_page_scrolls_sideways(opened: Any, folders: Path, tmp_path: Path):
    opened.set_viewport_size({"width": 390, "height": 800})
    of_vae = tmp_path / "vae.html"  # rows of eight samples, wider than a phone
    report(ReportConfig(runs=(str(folders / "vae"),), out=str(of_vae), **{**FEW, "samples": 8}))
    for address in (opened.url, of_vae.as_uri()):
        opened.goto(address)
        assert opened.evaluate("document.documentElement.scrollWidth") == 390
        opened.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert opened.evaluate("document.documentElement.scrollWidth") == 390
    assert opened.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
