import numpy as np
import pytest
import torch

from images.datasets import to_uint8
from images.sheets import to_pil, to_pils


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_picture_has_the_image_s_pixels(channels: int, layout: torch.memory_format):
    images = (torch.rand(2, channels, 5, 7, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2).contiguous(
        memory_format=layout
    )
    expected = to_uint8(images).permute(0, 2, 3, 1).numpy()  # b H W c
    for pictures in (to_pils(images), [to_pil(image) for image in images]):
        assert [picture.mode for picture in pictures] == ["L" if channels == 1 else "RGB"] * 2
        assert all(picture.size == (7, 5) for picture in pictures)
        shown = np.stack([np.asarray(picture).reshape(5, 7, channels) for picture in pictures])
        assert np.array_equal(shown, expected)


def test_levels_leave_the_images_as_they_are():
    images = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    assert to_uint8(images).tolist() == [0, 128, 191, 255]
    assert images.tolist() == [-1.0, 0.0, 0.5, 2.0]
