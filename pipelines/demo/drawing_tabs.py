"""Tabs of a model with a prior over codes: generate, inpaint, vary, interpolate."""

from __future__ import annotations

from typing import Any

from pipelines.demo import drawing
from pipelines.demo.limits import check_count, open_upload
from pipelines.demo.recipes import edit_command, generate_command, generate_python, walk_command
from pipelines.demo.widgets import Page
from pipelines.editing import check_share
from pipelines.masks import PARTS


def generate_tab(page: Page) -> None:
    gr, pipeline = page.gr, page.subject.pipeline
    assert pipeline is not None
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            settings = page.settings()
            count = page.count("Images", 8)
            button, stop = page.buttons("Generate")
        with gr.Column(scale=3, min_width=320):
            gallery = page.gallery()
            with gr.Accordion("Make the same images again", open=True):
                line = page.command("Command: the same files, byte for byte, on the same kind of machine")
                code = page.command("Python: the same codes, pixels up to rounding", "python")

    def work(number: float, *values: Any) -> Any:
        asked, images = settings.asked(values), check_count(int(number), page.limits)
        shown = drawing.generate(pipeline, asked, images)
        name = page.subject.name
        return (
            shown.pairs(),
            page.said(generate_command(name, pipeline, asked, images)),
            page.said(generate_python(name, pipeline, asked, images)),
        )

    page.on_click(button, stop, work, [count, *settings.inputs], [gallery, line, code])


def inpaint_tab(page: Page) -> None:
    gr, pipeline, channels = page.gr, page.subject.pipeline, page.subject.channels
    assert pipeline is not None
    height, width = page.subject.image_size
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            upload = page.upload()
            page.offer(upload)
            part = gr.Dropdown(
                [("all but what I paint below", drawing.PAINTED), *((f"the {part}", part) for part in PARTS)],
                value=drawing.PAINTED,
                label="What stays",
            )
            canvas = gr.ImageEditor(
                type="pil",
                image_mode="RGBA",
                label="Paint here",
                sources=[],
                transforms=[],
                layers=False,
                brush=gr.Brush(default_size=48, colors=["#ff2d92"], default_color="#ff2d92", color_mode="fixed"),
                eraser=gr.Eraser(default_size=48),
                format="png",
                canvas_size=(width * zoom_of(height, width), height * zoom_of(height, width)),
                buttons=[],
                elem_id="canvas",
                elem_classes=page.classes,
            )
        with gr.Column(scale=3, min_width=320):
            count = page.count("Completions", 4)
            settings = page.settings(of_parts=True)
            button, stop = page.buttons("Inpaint")
            gallery = page.gallery()
            line = page.command("Command, where a named part stays")

    def prepare(path: str | None) -> Any:
        if path is None:
            return None
        background = drawing.canvas_of(open_upload(path, channels, page.limits), height, width)
        return {"background": background, "layers": [], "composite": background}

    def work(path: str | None, painted: Any, stays: str, number: float, *values: Any) -> Any:
        picture = open_upload(path, channels, page.limits)
        keep = drawing.keep_of(stays, (painted or {}).get("layers") or [], height, width)
        asked, images = settings.asked(values), check_count(int(number), page.limits)
        shown = drawing.inpaint(pipeline, asked, picture, keep, images)
        if stays == drawing.PAINTED:  # a command line cannot say what was painted
            return shown.pairs(), page.said("")
        options = {"keep": stays, "variants": images}
        return shown.pairs(), page.said(edit_command("inpaint", page.subject.name, pipeline, asked, str(path), options))

    upload.change(page.answer(prepare), upload, canvas, show_progress="hidden", api_visibility="private")
    part.change(
        lambda stays: gr.update(visible=stays == drawing.PAINTED), part, canvas, queue=False, api_visibility="private"
    )
    page.on_click(button, stop, work, [upload, canvas, part, count, *settings.inputs], [gallery, line])


def zoom_of(height: int, width: int) -> int:
    return max(1, -(-drawing.CANVAS // max(height, width)))


def vary_tab(page: Page) -> None:
    gr, pipeline = page.gr, page.subject.pipeline
    assert pipeline is not None
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            upload = page.upload()
            page.offer(upload)
            share = gr.Slider(
                0, 1, 0.3, step=0.05, label="Share drawn anew", info="small: other details; 1: another image"
            )
            count = page.count("Variations", 7)
            settings = page.settings(of_parts=True)
            button, stop = page.buttons("Vary")
        with gr.Column(scale=3, min_width=320):
            gallery = page.gallery()
            line = page.command("Command")

    def work(path: str | None, part: float, number: float, *values: Any) -> Any:
        picture = open_upload(path, page.subject.channels, page.limits)
        asked, images = settings.asked(values), check_count(int(number), page.limits)
        check_share("share", part)
        shown = drawing.vary(pipeline, asked, picture, part, images)
        options = {"share": part, "variants": images}
        return shown.pairs(), page.said(edit_command("vary", page.subject.name, pipeline, asked, str(path), options))

    page.on_click(button, stop, work, [upload, share, count, *settings.inputs], [gallery, line])


def interpolate_tab(page: Page) -> None:
    gr, pipeline, channels = page.gr, page.subject.pipeline, page.subject.channels
    assert pipeline is not None
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                first, second = page.upload("From"), page.upload("To")
            page.offer(first, second)
            steps = page.count("Images", 8, 2)
            redrawn = gr.Slider(0, 1, 0.2, step=0.05, label="Share drawn anew between them", info="so that both mix")
            settings = page.settings(of_parts=True)
            button, stop = page.buttons("Interpolate")
        with gr.Column(scale=3, min_width=320):
            gallery = page.gallery()
            line = page.command("Command")

    def work(one: str | None, other: str | None, number: float, part: float, *values: Any) -> Any:
        start, end = (open_upload(path, channels, page.limits) for path in (one, other))
        asked, images = settings.asked(values), check_count(int(number), page.limits)
        check_share("redrawn", part)
        shown = drawing.interpolate(pipeline, asked, start, end, images, part)
        files = (str(one), str(other))
        return shown.pairs(), page.said(walk_command(page.subject.name, pipeline, asked, files, images, part))

    page.on_click(button, stop, work, [first, second, steps, redrawn, *settings.inputs], [gallery, line])
