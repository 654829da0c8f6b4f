"""Tabs of a VAE: generate, interpolate, walks through its latents."""

from __future__ import annotations

from typing import Any, get_args

from pipelines.demo import walking
from pipelines.demo.drawing import checked_seed
from pipelines.demo.limits import check_count, open_upload
from pipelines.demo.recipes import latent_command, latent_python
from pipelines.demo.widgets import Page
from stage1_vae.model import Pixels

ACTIVE = 10  # numbers of the latents that are walked along together


def generate_tab(page: Page) -> None:
    gr, pipeline = page.gr, page.subject.latent
    assert pipeline is not None
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            seed = page.seed()
            pixels = gr.Radio(
                list(get_args(Pixels)),
                value="mean",
                label="What is shown of the images of a latent",
            )
            count = page.count("Images", 8)
            button, stop = page.buttons("Generate")
        with gr.Column(scale=3, min_width=320):
            gallery = page.gallery()
            with gr.Accordion("Make the same images again", open=True):
                line = page.command("Command: the same files, byte for byte, on the same kind of machine")
                code = page.command("Python: the same latents, pixels up to rounding", "python")

    def work(number: float, chosen: float, shown_as: Pixels) -> Any:
        asked, images, name = checked_seed(chosen), check_count(int(number), page.limits), page.subject.name
        shown = walking.generate(pipeline, asked, images, shown_as)
        lines = (page.said(make(name, asked, images, shown_as)) for make in (latent_command, latent_python))
        return shown.pairs(), *lines

    page.on_click(button, stop, work, [count, seed, pixels], [gallery, line, code])


def interpolate_tab(page: Page) -> None:
    gr, pipeline = page.gr, page.subject.latent
    assert pipeline is not None
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                first, second = page.upload("From"), page.upload("To")
            page.offer(first, second)
            steps = page.count("Images", 8, 2)
            button, stop = page.buttons("Interpolate")
        with gr.Column(scale=3, min_width=320):
            gallery = page.gallery()

    def work(one: str | None, other: str | None, number: float) -> Any:
        start, end = (open_upload(path, page.subject.channels, page.limits) for path in (one, other))
        images = check_count(int(number), page.limits)
        return walking.interpolate(pipeline, start, end, images).pairs()

    page.on_click(button, stop, work, [first, second, steps], [gallery])


def walk_tab(page: Page) -> None:
    gr, pipeline = page.gr, page.subject.latent
    assert pipeline is not None
    variances = walking.activity(pipeline)
    order = variances.argsort(descending=True).tolist()
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            upload = page.upload()
            page.offer(upload)
            number = gr.Dropdown(
                [(f"z{i}" + (", the most active" if i == order[0] else ""), i) for i in order],
                value=order[0],
                label="Number of the latents, the most active first",
            )
            reach = gr.Slider(0.5, 6, 3, step=0.5, label="From minus this to this")
            steps = page.count("Images", 8, 2)
            button, stop = page.buttons("Walk")
        with gr.Column(scale=3, min_width=320):
            gallery = page.gallery()
            sheet = page.sheet(f"The {ACTIVE} most active numbers, from -3 to 3")

    def work(path: str | None, chosen: int, far: float, images: float) -> Any:
        picture = open_upload(path, page.subject.channels, page.limits)
        shown = walking.walk(pipeline, picture, chosen, far, check_count(int(images), page.limits))
        return shown.pairs(), walking.all_walks(pipeline, picture, variances)

    page.on_click(button, stop, work, [upload, number, reach, steps], [gallery, sheet])
