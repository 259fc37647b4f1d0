import numpy as np
import pytest
import torch

from depthmill.pipeline.errors import ConfigError
from depthmill.pipeline.geometry import axes_signs, from_network, processed_size, to_network


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(576, 768, (576, 768)), (1080, 1920, (432, 768)), (768, 432, (768, 432)), (1, 5000, (1, 768)), (1, 1, (768, 768))],
)
def test_longer_side_takes_the_resolution_and_no_side_vanishes(height, width, expected):
    assert processed_size(height, width, 768) == expected


def test_a_frame_is_padded_by_its_edge_and_comes_back_at_its_size():
    frame = torch.arange(10 * 14, dtype=torch.uint8).reshape(10, 14, 1).expand(-1, -1, 3)
    picture = to_network(frame, (10, 14), 8)
    assert picture.shape == (3, 16, 16)
    assert torch.equal(picture[:, :10, :14], frame.permute(2, 0, 1).float() / 255 * 2 - 1)
    assert (picture[:, 10:, :14] == picture[:, 9:10, :14]).all()
    assert (picture[:, :, 14:] == picture[:, :, 13:14]).all()
    assert torch.equal(from_network(picture, (10, 14), (10, 14)), picture[:, :10, :14])


def test_signs_of_axes():
    assert axes_signs("right-up-towards") == (1, 1, 1)
    assert axes_signs("left-down-away") == (-1, -1, -1)


@pytest.mark.parametrize("axes", ["", "left-up", "up-left-towards", "x-y-z", "left-up-towards-away"])
def test_axes_that_name_no_direction(axes):
    with pytest.raises(ConfigError, match="right-up-towards"):
        axes_signs(axes)


def test_resizing_back_keeps_a_plane_a_plane():
    ramp = torch.linspace(0, 1, 32).repeat(24, 1)[None]
    back = from_network(ramp, (24, 32), (96, 128))[0].numpy()
    inner = back[:, 4:-4]
    assert np.allclose(np.diff(inner, axis=1), np.diff(inner, axis=1).mean(), atol=1e-5)
