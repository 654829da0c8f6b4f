"""Tabs of what goes through a model and back: reconstruct, compress."""

from __future__ import annotations

import html
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from common.errors import UserError
from common.wording import counted
from pipelines.demo import looking, packing
from pipelines.demo.limits import check_count, open_upload
from pipelines.demo.widgets import EASY_SAMPLES, Page, as_table

HEAD = ("file", "bytes", "bits per pixel", "PSNR")
OWN, MODEL = "its own size", "the model's size"


def reconstruct_tab(page: Page) -> None:
    gr, subject = page.gr, page.subject
    of_codes = subject.codec is not None
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            upload = page.upload()
            page.offer(upload, label=EASY_SAMPLES)
            size = size_choice(page) if of_codes else None
            button, stop = page.buttons("Reconstruct")
            facts = gr.Markdown(elem_classes=["facts"])
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                original = page.picture("As the model sees it")
                reconstruction = page.picture("Reconstruction")
            with gr.Row():
                error = page.picture(f"Error, yellow from {looking.WORST} levels on")
                between = page.gallery("Its codes") if of_codes else None
            numbers = page.command("Its codes as numbers" if of_codes else "Its latents", None)

    def work(path: str | None, chosen: str = MODEL) -> Any:
        picture = open_upload(path, subject.channels, page.limits)
        if subject.latent is not None:
            seen = looking.reconstruct_latent(subject.latent, picture)
        else:
            assert subject.codec is not None
            seen = looking.reconstruct(subject.codec, picture, page.limits.side if chosen == OWN else None)
        pictures = [seen.original, seen.reconstruction, seen.error]
        return [*pictures, *([seen.between] if of_codes else []), page.said(seen.numbers), as_table(seen.facts)]

    inputs = [upload, *([size] if size is not None else [])]
    outputs = [original, reconstruction, error, *([between] if between is not None else []), numbers, facts]
    page.on_click(button, stop, work, inputs, outputs)


def size_choice(page: Page) -> Any:
    height, width = page.subject.image_size
    choices = [(f"the model's, {height}×{width}", MODEL), (f"its own, at most {page.limits.side} pixels long", OWN)]
    return page.gr.Radio(choices, value=MODEL, label="Size of the image")


def compress_tab(page: Page) -> None:
    gr, subject = page.gr, page.subject
    lossless = subject.lossless is not None
    with gr.Row():
        with gr.Column(min_width=320):
            gr.Markdown("### Images to a file" if lossless else "### An image to a file")
            if lossless:
                upload = gr.File(
                    label="Images, which are cut to the model's size first", file_count="multiple", height=160
                )
                if page.examples:
                    gr.Examples(
                        [[list(page.examples)]],
                        [upload],
                        label=EASY_SAMPLES,
                        example_labels=[counted(len(page.examples), "sample")],
                        api_visibility="private",
                    )
                size = None
            else:
                upload = page.upload()
                page.offer(upload, label=EASY_SAMPLES)
                size = size_choice(page)
            button, stop = page.buttons("Compress")
            download = gr.DownloadButton("Download the .zlg file", interactive=False)
            sizes = gr.Markdown(elem_classes=["facts"])
            notes = gr.Markdown()
        with gr.Column(min_width=320):
            gr.Markdown("### A file to images")
            file = gr.File(label=".zlg file of this model", file_types=[".zlg"], height=160)
            open_button, open_stop = page.buttons("Decompress")
            line = gr.Markdown()
            gallery = page.gallery()

    def pack(chosen: Any, how: str = MODEL) -> Any:
        if subject.lossless is not None:
            assert subject.latent is not None
            if not chosen:
                raise UserError("there is no image yet; upload some, or take the examples")
            check_count(len(chosen), page.limits)
            opened = [open_upload(path, subject.channels, page.limits) for path in chosen]
            latent = subject.latent
            packed = packing.compress_losslessly(subject.lossless, [looking.as_taken(latent, one) for one in opened])
        else:
            assert subject.codec is not None
            picture = open_upload(chosen, subject.channels, page.limits)
            packed = packing.compress(subject.codec, picture, page.limits.side if how == OWN else None)
        name = "images" if lossless else Path(chosen).stem
        path = Path(mkdtemp(dir=gr.utils.get_upload_folder())) / f"{name}.zlg"
        path.write_bytes(packed.data)
        rows = [[one.what, f"{one.size:,}", f"{one.bits:.3f}", one.psnr] for one in packed.sizes]
        said = "\n".join(f"* {html.escape(note)}" for note in packed.notes)
        return gr.update(value=str(path), interactive=True), as_table(rows, HEAD), said

    def unpack(path: str | None) -> Any:
        codec = subject.lossless or subject.codec
        assert codec is not None
        found = packing.decompress(codec, path, page.limits)
        return found.line, list(zip(found.pictures, found.names, strict=True))

    page.on_click(button, stop, pack, [upload, *([size] if size is not None else [])], [download, sizes, notes])
    page.on_click(open_button, open_stop, unpack, [file], [line, gallery])
