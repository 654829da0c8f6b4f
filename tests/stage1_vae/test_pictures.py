from __future__ import annotations

import numpy as np
import pytest
import torch

from stage1_vae.networks.dense import DenseConfig
from stage1_vae.networks.spatial import SpatialConfig
from stage1_vae.pictures import has_plane, latent_walks, moves_of, preview, reconstructions, straightened
from stage1_vae.priors import PRIORS
from stage1_vae.vae import VAE, VAEConfig
from training.task import Batch


class Grey:
    """Images of one grey value each."""

    groups = None

    def __len__(self) -> int:
        return 5

    def fetch(self, indices, draws) -> Batch:
        values = torch.tensor([40 * i for i in indices], dtype=torch.uint8)
        return {"images": values.view(-1, 1, 1, 1).expand(-1, 1, 4, 4)}


def vae(latents: int, **values: object) -> VAE:
    torch.manual_seed(0)
    dense = DenseConfig(hidden=())
    return VAE(VAEConfig(latents=latents, encoder=dense, decoder=dense, **values), (4, 4)).eval()


def test_a_model_of_two_latents_has_its_plane_in_previews():
    labels = np.full(5, -1)
    with_plane, without = preview(vae(2), Grey(), labels, None), preview(vae(3), Grey(), labels, None)
    assert with_plane.shape[1] > without.shape[1] + 500
    assert has_plane(vae(2))
    assert not has_plane(vae(2, prior=PRIORS["vamp"][1]()))


def test_walks_go_along_the_numbers_that_are_most_active():
    """Of a linear decoder each row goes from one image to its opposite about the first."""
    model = vae(4)
    with torch.no_grad():
        weight = model.decoder.network.layers.layers[0].weight  # 16 pixels, 4 latents
        weight.zero_()
        weight[:, 2] = 5.0
        model.decoder.network.layers.layers[0].bias.zero_()
    image = torch.zeros(1, 4, 4)
    walks = np.array(latent_walks(model, image, torch.tensor([0.1, 0.0, 3.0, 0.2])).convert("L"))
    rows = [row for row in np.split(walks, np.flatnonzero(np.diff((walks[:, 60:] < 250).any(1))) + 1) if len(row) > 50]
    assert len(rows) == 4
    spread = [row[5, 60:].astype(int) for row in rows]
    assert spread[0].min() < 5  # black at -3: the number that varies the most comes first
    assert [np.ptp(row[row < 250]) for row in spread[1:]] == [0, 0, 0]


@pytest.mark.parametrize("count", [1, 5])
def test_each_image_stands_above_its_reconstruction(count):
    sheet = reconstructions(vae(2), torch.zeros(count, 1, 4, 4), columns=3)
    assert sheet.height > (2 if count == 1 else 4) * 56


def test_straightened_images_are_those_without_angle_and_shift():
    torch.manual_seed(0)
    decoder = SpatialConfig(hidden=8, angle_scale=1.5)
    model = VAE(VAEConfig(latents=5, encoder=DenseConfig(hidden=()), decoder=decoder), (8, 8))
    assert moves_of(model) == 3
    assert moves_of(vae(2)) == 0
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    before = np.asarray(straightened(model, images))
    with torch.no_grad():
        model.encoder.layers.layers[0].bias[0] += 1.0  # every image is told to be turned further
    after = np.asarray(straightened(model, images))
    real, decoded, straight = (slice(row * len(before) // 3, (row + 1) * len(before) // 3) for row in range(3))
    assert np.array_equal(before[real], after[real])
    assert not np.array_equal(before[decoded], after[decoded])
    assert np.array_equal(before[straight], after[straight])
