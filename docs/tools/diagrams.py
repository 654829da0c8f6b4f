"""Draws the pictures of data flow on the pages of docs/systems: `python docs/tools/diagrams.py` writes docs/images/systems.

A picture is boxes on a grid of four columns, narrow enough for a phone, and arrows between them. Boxes have fills of their own
and arrows a grey that stands out from white and from black alike, so that one file serves pages of both kinds. The same
script writes the same bytes: a test compares them with the files.
"""

# ruff: noqa: E501 - a row of boxes is a line of a table
from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

OUT = Path(__file__).parents[1] / "images" / "systems"

PITCH, ROW, WIDTH, HEIGHT, MARGIN = 178, 88, 150, 54, 10
FILLS = {"data": "#cfe8ff", "network": "#bfe5d8", "choice": "#ffe0b3", "loss": "#f3cfd8"}
GREY = "#808890"

Box = tuple[int, int, str, str]  # column, row, lines of text parted by |, one of FILLS
Arrow = tuple[str, str] | tuple[str, str, str]  # from, to, and what stands beside it


def box(place: Box) -> list[str]:
    column, row, text, kind = place
    x, y = MARGIN + column * PITCH, MARGIN + row * ROW
    lines = text.split("|")
    corner = 6 if kind == "network" else 18
    parts = [f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="{corner}" fill="{FILLS[kind]}"/>']
    for number, line in enumerate(lines):
        baseline = y + HEIGHT / 2 + 5.5 + (number - (len(lines) - 1) / 2) * 19
        parts.append(f'<text x="{x + WIDTH / 2:g}" y="{baseline:g}" fill="#12262b">{escape(line)}</text>')
    return parts


def arrow(start: Box, end: Box, beside: str, free: bool) -> list[str]:
    """Straight where the boxes share a row or a column; else sideways first where the corner there is free, or sideways
    last."""
    x1, y1, x2, y2 = (
        MARGIN + place * pitch + size / 2
        for place, pitch, size in ((start[0], PITCH, WIDTH), (start[1], ROW, HEIGHT), (end[0], PITCH, WIDTH), (end[1], ROW, HEIGHT))
    )  # fmt: skip
    if start[1] == end[1]:
        side = 1 if x2 > x1 else -1
        points = [(x1 + side * WIDTH / 2, y1), (x2 - side * (WIDTH / 2 + 4), y2)]
    elif start[0] == end[0]:
        side = 1 if y2 > y1 else -1
        points = [(x1, y1 + side * HEIGHT / 2), (x2, y2 - side * (HEIGHT / 2 + 4))]
    elif free:
        down, side = (1 if y2 > y1 else -1), (1 if x2 > x1 else -1)
        points = [(x1 + side * WIDTH / 2, y1), (x2, y1), (x2, y2 - down * (HEIGHT / 2 + 4))]
    else:
        down, side = (1 if y2 > y1 else -1), (1 if x2 > x1 else -1)
        points = [(x1, y1 + down * HEIGHT / 2), (x1, y2), (x2 - side * (WIDTH / 2 + 4), y2)]
    path = " ".join(f"{'L' if number else 'M'}{x:g} {y:g}" for number, (x, y) in enumerate(points))
    parts = [f'<path d="{path}" fill="none" stroke="{GREY}" stroke-width="2" marker-end="url(#tip)"/>']
    if beside:
        (ax, ay), (bx, by) = points[-2:]
        where = (ax + bx) / 2, (ay + by) / 2 - 6
        anchor = "middle"
        if ax == bx:
            where, anchor = (ax + 6, (ay + by) / 2 + 5), "start"
        parts.append(
            f'<text x="{where[0]:g}" y="{where[1]:g}" fill="{GREY}" font-size="13" text-anchor="{anchor}">{escape(beside)}</text>'
        )
    return parts


def picture(title: str, boxes: dict[str, Box], arrows: list[Arrow]) -> str:
    columns = 1 + max(place[0] for place in boxes.values())
    rows = 1 + max(place[1] for place in boxes.values())
    width, height = 2 * MARGIN + (columns - 1) * PITCH + WIDTH, 2 * MARGIN + (rows - 1) * ROW + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="15" text-anchor="middle">',
        f"<title>{escape(title)}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{GREY}"/></marker></defs>',
    ]
    taken = {place[:2] for place in boxes.values()}
    for each in arrows:
        start, end = boxes[each[0]], boxes[each[1]]
        parts += arrow(start, end, each[2] if len(each) == 3 else "", free=(end[0], start[1]) not in taken)
    for place in boxes.values():
        parts += box(place)
    return "\n".join([*parts, "</svg>", ""])


def autoencoder(title: str, encoder: str, z: str, quantizer: str, codes: str, decoder: str, loss: str) -> str:
    """Of one quantizer between an encoder and a decoder: there along the upper row, and back along the lower one."""
    boxes: dict[str, Box] = {
        "images": (0, 0, "images|b c H W", "data"),
        "encoder": (1, 0, encoder, "network"),
        "z": (2, 0, z, "data"),
        "quantizer": (3, 0, quantizer, "choice"),
        "codes": (3, 1, codes, "data"),
        "z_q": (2, 1, "z_q|b d h w", "data"),
        "decoder": (1, 1, decoder, "network"),
        "again": (0, 1, loss, "loss"),
    }
    chain = ["images", "encoder", "z", "quantizer", "codes", "z_q", "decoder", "again"]
    return picture(title, boxes, [*pairwise(chain), ("images", "again")])


PICTURES = {
    "vqvae": autoencoder(
        "VQ-VAE: images to codes and back", "encoder|stride 4", "z|b d h w", "quantizer|nearest of k", "codes|b h w", "decoder",
        "images again|squared error",
    ),
    "dvae": autoencoder(
        "dVAE: a posterior over codes, sampled with noise", "DalleEncoder|stride 8", "z, logits|b k h w", "softmax with|Gumbel noise",
        "codes|arg max", "DalleDecoder", "mean, scale|log likelihood",
    ),
    "vqgan": picture(
        "VQ-GAN: a VQ-VAE with a perceptual and an adversarial loss",
        {
            "images": (0, 0, "images|b c H W", "data"), "encoder": (1, 0, "ResnetEncoder", "network"),
            "z": (2, 0, "z|b d h w", "data"), "quantizer": (3, 0, "quantizer|nearest of k", "choice"),
            "z_q": (3, 1, "z_q|b d h w", "data"), "decoder": (2, 1, "ResnetDecoder", "network"),
            "again": (1, 1, "images again", "data"), "error": (0, 1, "absolute error,|perceptual", "loss"),
            "discriminator": (1, 2, "PatchGAN", "network"), "adversarial": (0, 2, "adversarial", "loss"),
        },
        [("images", "encoder"), ("encoder", "z"), ("z", "quantizer"), ("quantizer", "z_q"), ("z_q", "decoder"),
         ("decoder", "again"), ("again", "error"), ("images", "error"), ("again", "discriminator"), ("discriminator", "adversarial")],
    ),
    "vit_vqgan": autoencoder(
        "ViT-VQGAN: transformers over patches", "patches, ViT|tanh MLP", "z|b d h w", "nearest of k|32-d, length 1", "codes|b h w",
        "ViT, tanh MLP|patches", "images again|4 losses",
    ),
    "titok": autoencoder(
        "TiTok: learned tokens gather the image, mask tokens become it", "patches + tokens|ViT", "z of tokens|b d 1 n", "quantizer|any of rows",
        "codes|b 1 n", "tokens + masks|ViT, patches", "images again|squared error",
    ),
    "flextok": picture(
        "FlexTok: registers gather the image, of the first of them it is drawn from noise",
        {
            "images": (0, 0, "images|b c H W", "data"), "encoder": (1, 0, "patches, registers|blocks", "network"),
            "z": (2, 0, "z of registers|b d 1 n", "data"), "quantizer": (3, 0, "quantizer|any of rows", "choice"),
            "codes": (3, 1, "codes|b 1 n", "data"), "kept": (3, 2, "first m of z_q|nested dropout", "choice"),
            "noise": (2, 1, "noise|of the first code", "data"), "decoder": (2, 2, "noise, tokens|timed blocks", "network"),
            "velocity": (1, 2, "velocity|guidance", "data"), "again": (0, 2, "image after|n steps", "loss"),
        },
        [("images", "encoder"), ("encoder", "z"), ("z", "quantizer"), ("quantizer", "codes"), ("codes", "kept"),
         ("codes", "noise"), ("noise", "decoder"), ("kept", "decoder"), ("decoder", "velocity"), ("velocity", "again"),
         ("images", "again")],
    ),
    "flow_decoder": picture(
        "Flow decoder: from noise to an image, given the codes of a model that stays as it is",
        {
            "images": (0, 0, "images|b c H W", "data"), "encoder": (1, 0, "encoder,|quantizer", "choice"), "z_q": (2, 0, "z_q|b d h w", "data"),
            "noise": (3, 1, "noise|of the codes", "data"), "network": (2, 1, "U-Net with|transformer", "network"),
            "velocity": (1, 1, "velocity", "data"), "again": (0, 1, "image after|n steps", "loss"),
        },
        [("images", "encoder"), ("encoder", "z_q"), ("z_q", "network"), ("noise", "network"), ("network", "velocity"),
         ("velocity", "again"), ("images", "again")],
    ),
    "binary": autoencoder(
        "Binary autoencoder: a bit for each number", "encoder|stride 4", "z|b d h w", "z > 0", "codes|b h w, d bits", "decoder",
        "images again|squared error",
    ),
    "vqvae2": picture(
        "VQ-VAE-2: a coarse level and a fine one given it",
        {
            "images": (0, 0, "images", "data"), "encoder1": (0, 1, "encoder 1", "network"), "encoder0": (0, 2, "encoder 0", "network"),
            "q0": (1, 2, "quantizer 0|level0", "choice"), "c0": (2, 2, "z_q0", "data"), "conditioner": (1, 1, "conditioner|to z", "network"),
            "q1": (2, 1, "quantizer 1|level1", "choice"), "join": (3, 1, "[up(z_q0), z_q1]", "data"),
            "up": (3, 2, "up", "network"), "decoder": (3, 0, "decoder", "network"), "again": (2, 0, "images again", "loss"),
        },
        [("images", "encoder1"), ("encoder1", "encoder0"), ("encoder0", "q0"), ("q0", "c0"), ("q0", "conditioner"),
         ("encoder1", "conditioner"), ("conditioner", "q1"), ("q1", "join"), ("c0", "up"), ("up", "join"), ("join", "decoder"),
         ("decoder", "again")],
    ),
    "multiscale": picture(
        "Multi-scale quantizer: each grid describes what the coarser ones left",
        {
            "z": (0, 0, "z|b d h w", "data"), "rest": (1, 0, "rest =|z - sum", "data"), "shrink": (2, 0, "average on|grid of scale s", "network"),
            "codes": (3, 0, "codes_s|nearest of k", "choice"), "grow": (3, 1, "up-sample|bicubic", "network"),
            "phi": (2, 1, "phi_s|3x3 convolution", "network"), "sum": (1, 1, "sum += phi_s", "data"), "z_q": (0, 1, "z_q|last sum", "data"),
        },
        [("z", "rest"), ("rest", "shrink"), ("shrink", "codes"), ("codes", "grow"), ("grow", "phi"), ("phi", "sum"),
         ("sum", "rest", "next scale"), ("sum", "z_q")],
    ),
    "residual": picture(
        "Residual quantizer: a latent as a sum of code vectors",
        {
            "z": (0, 0, "z|b d h w", "data"), "r": (1, 0, "residual r_i", "data"), "q": (2, 0, "nearest of k", "choice"),
            "codes": (3, 0, "codes of depth i|b h w", "data"), "e": (2, 1, "e_i", "data"), "sum": (1, 1, "z_q =|e_1 + ... + e_D", "data"),
            "decoder": (0, 1, "decoder", "network"),
        },
        [("z", "r"), ("r", "q"), ("q", "codes"), ("q", "e"), ("e", "sum"), ("sum", "r", "less e_i"), ("sum", "decoder")],
    ),
    "quantizers": picture(
        "Nineteen quantizers: three ways to choose a code",
        {
            "z": (0, 1, "z|b d h w", "data"), "nearest": (1, 0, "nearest vector", "choice"), "names0": (2, 0, "nearest simvq fvq|diveq ibq gumbel", "network"),
            "round": (1, 1, "rounding, signs", "choice"), "names1": (2, 1, "fsq fsp lfq bsq|binary, mapper", "network"),
            "several": (1, 2, "several codes", "choice"), "names2": (2, 2, "residual, qinco|grouped, scales", "network"), "z_q": (3, 1, "z_q, codes", "data"),
        },
        [("z", "nearest"), ("z", "round"), ("z", "several"), ("nearest", "names0"), ("round", "names1"), ("several", "names2"),
         ("names1", "z_q"), ("names0", "z_q"), ("names2", "z_q")],
    ),
    "likelihood_vae": picture(
        "Likelihood VAE: what the objective is made of",
        {
            "images": (0, 0, "images x|b c H W", "data"), "encoder": (1, 0, "encoder", "network"), "q": (2, 0, "posterior q", "choice"),
            "z": (3, 0, "draws z|k b *shape", "data"), "prior": (1, 1, "prior p(z)", "choice"), "kl": (2, 1, "KL of q and p", "loss"),
            "decoder": (3, 1, "decoder,|likelihood", "network"), "log": (3, 2, "log p(x given z)", "loss"), "elbo": (2, 2, "ELBO", "loss"),
        },
        [("images", "encoder"), ("encoder", "q"), ("q", "z"), ("q", "kl"), ("prior", "kl"), ("z", "decoder"), ("decoder", "log"),
         ("log", "elbo"), ("kl", "elbo")],
    ),
    "nvae": picture(
        "NVAE: one group of latents on the way down",
        {
            "images": (0, 0, "images|b c H W", "data"), "encoder": (1, 0, "encoder cells,|features kept", "network"),
            "delta": (2, 0, "d_mu, d_s", "network"), "above": (0, 1, "decoded|above", "data"), "prior": (1, 1, "mu, s", "network"),
            "q": (2, 1, "q: the sums|p: mu, s", "choice"), "z": (3, 1, "z, and flows|if any", "data"), "kl": (2, 2, "KL of q and p", "loss"),
            "combine": (3, 2, "combined,|decoder cells", "network"),
        },
        [("images", "encoder"), ("encoder", "delta"), ("delta", "q"), ("above", "prior"), ("prior", "q"), ("q", "z"),
         ("q", "kl"), ("z", "combine")],
    ),
    "m2": picture(
        "M2: what the bounds of images with and without a label are made of",
        {
            "images": (0, 0, "images x|b c H W", "data"), "encoder": (1, 0, "encoder,|told the class", "network"), "z": (2, 0, "class y and|its style z", "data"),
            "decoder": (3, 0, "decoder,|likelihood", "network"), "classifier": (0, 1, "classifier", "network"), "q": (1, 1, "q(y given x)", "choice"),
            "label": (2, 1, "the label, or|every class", "data"), "bound": (3, 1, "-L(x, y)|of each class", "loss"), "whole": (3, 2, "-U(x): mean by|q, and entropy", "loss"),
        },
        [("images", "encoder"), ("encoder", "z"), ("z", "decoder"), ("images", "classifier"), ("classifier", "q"), ("label", "z"),
         ("decoder", "bound"), ("bound", "whole"), ("q", "whole")],
    ),
    "latent_hierarchies": picture(
        "Two layers of latents: bottom-up inference, and the ladder's",
        {
            "x": (0, 0, "images x|b c H W", "data"), "q1": (1, 0, "bottom-up:|q of z_1 given x", "choice"), "z1": (2, 0, "draw z_1", "data"),
            "q2": (3, 0, "q of z_2|given z_1", "choice"),
            "d1": (0, 1, "ladder: path up|without noise", "network"), "d2": (1, 1, "path up,|second layer", "network"),
            "upper": (2, 1, "q of z_2|given x", "choice"), "z2": (3, 1, "draw z_2", "data"),
            "lower": (0, 2, "what x says|of z_1", "choice"), "product": (1, 2, "q of z_1:|their product", "choice"),
            "p1": (2, 2, "p of z_1|given z_2", "choice"), "path": (3, 2, "path down", "network"),
            "drawn": (1, 3, "draw z_1", "data"), "image": (2, 3, "p of x|given z_1", "network"),
        },
        [("x", "q1"), ("q1", "z1"), ("z1", "q2"), ("x", "d1"), ("d1", "d2"), ("d1", "lower"), ("d2", "upper"), ("upper", "z2"),
         ("z2", "path"), ("path", "p1"), ("p1", "product"), ("lower", "product"), ("product", "drawn"), ("drawn", "image")],
    ),
    "transformer": picture(
        "Transformer: each code from those before it",
        {
            "codes": (0, 0, "codes|one sequence", "data"), "start": (0, 1, "class, caption,|given codes", "data"),
            "embed": (1, 0, "embedding,|moved by one", "network"), "blocks": (2, 0, "causal blocks", "network"),
            "logits": (3, 0, "logits|b n k", "choice"), "places": (2, 1, "row and column|turn q and k", "data"), "nll": (3, 1, "nll", "loss"),
        },
        [("codes", "embed"), ("embed", "blocks"), ("blocks", "logits"), ("start", "embed"), ("places", "blocks"), ("logits", "nll")],
    ),
    "pixelcnn": picture(
        "Gated PixelCNN: two stacks without a blind spot",
        {
            "codes": (0, 0, "codes|b h w", "data"), "down": (1, 0, "moved down|by a row", "network"), "vertical": (2, 0, "vertical stack|rows above", "network"),
            "right": (1, 1, "moved right|by a column", "network"), "horizontal": (2, 1, "horizontal stack|left of it", "network"),
            "gates": (2, 2, "class, given codes|shift the gates", "data"), "logits": (3, 1, "logits|b n k", "choice"),
        },
        [("codes", "down"), ("codes", "right"), ("down", "vertical"), ("right", "horizontal"), ("vertical", "horizontal"),
         ("gates", "horizontal"), ("horizontal", "logits")],
    ),
    "pixelsnail": picture(
        "PixelSNAIL: what is near by convolution, what is far by attention",
        {
            "codes": (0, 0, "codes|b h w", "data"), "near": (1, 0, "gated residual|blocks, causal", "network"), "far": (2, 0, "attention to all|codes before", "network"),
            "logits": (3, 0, "logits|b n k", "choice"), "bias": (1, 1, "class, given codes", "data"), "places": (2, 1, "row and column", "data"),
        },
        [("codes", "near"), ("near", "far"), ("far", "logits"), ("bias", "near"), ("places", "far")],
    ),
    "hierarchical": picture(
        "Hierarchical prior: a prior for each level",
        {
            "class": (0, 0, "class", "data"), "top": (1, 0, "prior of level 0", "network"), "level0": (2, 0, "codes level0", "data"),
            "bottom": (2, 1, "prior of level 1", "network"), "level1": (3, 1, "codes level1", "data"),
        },
        [("class", "top"), ("top", "level0"), ("level0", "bottom", "given"), ("bottom", "level1")],
    ),
    "rq_transformer": picture(
        "RQ-Transformer: a walk over places, and one over depths at each",
        {
            "sums": (0, 0, "sum of a place's|embeddings", "data"), "spatial": (1, 0, "spatial|transformer", "network"), "known": (2, 0, "known before|place i", "data"),
            "depth": (2, 1, "depth|transformer", "network"), "logits": (3, 1, "logits of depth|1, 2, ... D", "choice"), "parts": (1, 1, "sums of the|codes so far", "data"),
        },
        [("sums", "spatial"), ("spatial", "known"), ("known", "depth"), ("parts", "depth"), ("depth", "logits")],
    ),
    "random_orders": picture(
        "RAR and RandAR: a token says which code comes next",
        {
            "order": (0, 0, "an order|of the places", "data"), "known": (0, 1, "codes known,|where they are", "data"), "asked": (1, 0, "which place|comes next", "choice"),
            "network": (1, 1, "causal blocks,|a cache", "network"), "logits": (2, 1, "logits of|that place", "choice"), "codes": (3, 1, "its code", "data"),
        },
        [("order", "asked"), ("asked", "network"), ("known", "network"), ("network", "logits"), ("logits", "codes"), ("codes", "known", "next place")],
    ),
    "maskgit": picture(
        "MaskGIT: hidden codes from all others, the surest kept",
        {
            "codes": (0, 0, "codes, some|hidden", "data"), "network": (1, 0, "blocks, all|see all", "network"), "logits": (2, 0, "logits of|hidden codes", "choice"),
            "draw": (3, 0, "draw all", "choice"), "keep": (3, 1, "keep the surest|cosine schedule", "choice"), "back": (0, 1, "fewer hidden", "data"),
        },
        [("codes", "network"), ("network", "logits"), ("logits", "draw"), ("draw", "keep"), ("keep", "back"), ("back", "codes", "12 times")],
    ),
    "diffusion": picture(
        "Absorbing diffusion: codes revealed in a random order",
        {
            "codes": (0, 0, "codes, a share|t hidden", "data"), "network": (1, 0, "blocks, all|see all", "network"), "logits": (2, 0, "logits; in training|nll / t", "choice"),
            "draw": (3, 0, "draw some,|by chance which", "choice"), "back": (0, 1, "smaller t", "data"),
        },
        [("codes", "network"), ("network", "logits"), ("logits", "draw"), ("draw", "back"), ("back", "codes", "64 times")],
    ),
    "var": picture(
        "VAR: a whole scale at each step",
        {
            "class": (0, 0, "class", "data"), "sums": (1, 1, "sum of scales|so far", "data"), "blocks": (1, 0, "blocks, AdaLN|by the class", "network"),
            "logits": (2, 0, "logits of all|codes of scale s", "choice"), "codes": (3, 0, "codes of|scale s", "data"), "grow": (3, 1, "up-sample, phi_s", "network"),
        },
        [("class", "blocks"), ("blocks", "logits"), ("logits", "codes"), ("codes", "grow"), ("grow", "sums", "next scale"), ("sums", "blocks")],
    ),
    "infinity": picture(
        "Infinity: the bits of a whole scale at each step",
        {
            "words": (0, 0, "words of text|or class", "data"), "blocks": (1, 0, "blocks: scales|so far, words", "network"),
            "logits": (2, 0, "two logits of|each bit", "choice"), "bits": (3, 0, "bits of|scale s", "data"),
            "sums": (1, 1, "sum of scales|so far", "data"), "grow": (3, 1, "±1/√d,|up-sampled", "network"),
        },
        [("words", "blocks"), ("blocks", "logits"), ("logits", "bits"), ("bits", "grow"), ("grow", "sums", "next scale"), ("sums", "blocks")],
    ),
    "spatial": picture(
        "Space: places that are turned and shifted",
        {
            "image": (0, 0, "image", "data"), "encoder": (1, 0, "encoder:|q of z", "network"), "moves": (2, 0, "angle, shift", "choice"),
            "places": (3, 0, "places, turned|and shifted", "data"), "content": (2, 1, "content", "data"), "pixel": (3, 1, "a pixel for|each place", "network"),
        },
        [("image", "encoder"), ("encoder", "moves"), ("moves", "places"), ("places", "pixel"), ("content", "pixel")],
    ),
    "sequences": picture(
        "Sequences: latents beside the steps before",
        {
            "steps": (0, 0, "steps", "data"), "encoder": (1, 0, "LSTM, both|ways: q of z", "network"), "z": (2, 0, "z", "data"),
            "before": (1, 1, "steps before", "data"), "decoder": (2, 1, "LSTM or|transformer", "network"), "output": (3, 1, "token, or move|and pen", "choice"),
        },
        [("steps", "encoder"), ("encoder", "z"), ("z", "decoder"), ("before", "decoder"), ("decoder", "output")],
    ),
    "vdvae": picture(
        "VD-VAE: one group of latents on the way down",
        {
            "images": (0, 0, "images", "data"), "encoder": (1, 0, "encoder", "network"), "activation": (2, 0, "activation of|the resolution", "data"),
            "posterior": (3, 0, "posterior", "network"), "above": (0, 1, "stream from|groups above", "data"), "prior": (1, 1, "prior, and|what it adds", "network"),
            "z": (2, 1, "z of the group", "choice"), "block": (3, 1, "projection,|residual block", "network"),
        },
        [("images", "encoder"), ("encoder", "activation"), ("activation", "posterior"), ("above", "prior"), ("prior", "z"), ("posterior", "z"), ("z", "block")],
    ),
    "modalities": picture(
        "Modalities: an expert for each, one posterior",
        {
            "image": (0, 0, "image", "data"), "other": (0, 1, "class, text,|half, copy", "data"), "first": (1, 0, "expert of|the image", "network"),
            "second": (1, 1, "expert of|the other", "network"), "joint": (2, 0, "product with p(z),|or mixture: z", "choice"), "decoder": (3, 0, "a decoder|of each", "network"),
        },
        [("image", "first"), ("other", "second"), ("first", "joint"), ("second", "joint"), ("joint", "decoder")],
    ),
    "clusters": picture(
        "Clusters: a prior of K Gaussians over latents",
        {
            "images": (0, 0, "images", "data"), "encoder": (1, 0, "encoder:|q of z", "network"), "z": (2, 0, "z", "data"),
            "which": (3, 0, "cluster y of z:|Bayes or network", "choice"), "decoder": (2, 1, "decoder:|p of the image", "network"), "prior": (3, 1, "K Gaussians:|p of z, by y", "network"),
        },
        [("images", "encoder"), ("encoder", "z"), ("z", "which"), ("z", "decoder"), ("prior", "which")],
    ),
    "missing": picture(
        "Missing numbers and pixels: weights of draws",
        {
            "seen": (0, 0, "seen numbers,|zeros for others", "data"), "encoder": (1, 0, "encoder:|q of z", "network"), "z": (2, 0, "K draws z", "data"),
            "decoder": (3, 0, "decoder:|p of x given z", "network"), "mask": (3, 1, "mask model:|p of s given x", "network"),
            "weights": (2, 1, "K weights:|p of seen, p/q of z", "choice"), "filled": (1, 1, "mean, or draws,|of the missing", "data"),
        },
        [("seen", "encoder"), ("encoder", "z"), ("z", "decoder"), ("decoder", "weights"), ("mask", "weights"), ("weights", "filled")],
    ),
    "counts": picture(
        "Counts: a state, a size and a batch",
        {
            "counts": (0, 0, "counts x", "data"), "encoder": (1, 0, "encoder:|q of z", "network"), "z": (2, 0, "state z", "data"),
            "batch": (0, 1, "batch s", "data"), "size": (1, 1, "encoder:|q of size l", "network"), "decoder": (3, 0, "decoder:|shares, zeros", "network"),
            "zinb": (3, 1, "ZINB of|l times share", "choice"),
        },
        [("counts", "encoder"), ("encoder", "z"), ("z", "decoder"), ("decoder", "zinb"), ("size", "zinb"), ("counts", "size"), ("batch", "size")],
    ),
    "latent_priors": picture(
        "Priors over latents: p(z) fitted on encoded images",
        {
            "images": (0, 0, "images", "data"), "vae": (1, 0, "VAE's encoder", "network"), "latents": (2, 0, "latent shards|mean, log_scale", "data"),
            "prior": (3, 0, "learned p(z)", "choice"), "again": (0, 1, "new images", "data"), "decoder": (1, 1, "VAE's decoder", "network"), "z": (2, 1, "z", "data"),
        },
        [("images", "vae"), ("vae", "latents"), ("latents", "prior"), ("prior", "z"), ("z", "decoder"), ("decoder", "again")],
    ),
}  # fmt: skip


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name, drawn in PICTURES.items():
        (OUT / f"{name}.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
