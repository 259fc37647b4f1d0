import numpy as np
import pytest
import torch

from depthmill.pipeline.errors import ConfigError
from depthmill.pipeline.geometry import axes_signs, from_network, padded_size, processed_size, rounded_size, to_network


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(576, 768, (576, 768)), (1080, 1920, (432, 768)), (768, 432, (768, 432)), (1, 5000, (1, 768)), (1, 1, (768, 768))],
)
def test_longer_side_takes_the_resolution_and_no_side_vanishes(height, width, expected):
    assert processed_size(height, width, 768) == expected


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (576, 768)),  # 3:4, 2:3, 1:1 and 1:2 stay as they are
        (427, 640, (512, 768)),
        (1000, 1000, (768, 768)),
        (1000, 500, (768, 384)),
        (1080, 1920, (448, 768)),  # 432
        (640, 425, (768, 512)),  # 510
        (100, 220, (352, 768)),  # thinner than 1:2, steps of 32
        (100, 600, (128, 768)),  # thinner than 1:4, steps of 16
        (1, 5000, (1, 768)),  # no step left: as it is
        (50, 1, (768, 15)),
    ],
)
def test_aspect_ratios_are_rounded_to_twelfths(height, width, expected):
    assert rounded_size(height, width, 768, 8) == expected
    assert rounded_size(width, height, 768, 8) == expected[::-1]


@pytest.mark.parametrize(("resolution", "multiple"), [(768, 8), (128, 4), (500, 8)])
def test_rounding_leaves_few_shapes_and_stretches_little(resolution, multiple):
    sizes = [(side, 5000) for side in range(500, 5001)]
    rounded = [rounded_size(*size, resolution, multiple) for size in sizes]
    assert len({padded_size(shape, multiple) for shape in rounded}) <= 7 + 3 * 6
    for size, shape in zip(sizes, rounded, strict=True):
        exact = size[0] / size[1] * resolution
        assert abs(shape[0] - exact) <= exact / 12 + multiple / 2 + 1e-9
        if resolution == 768:
            assert padded_size(shape, multiple) == shape


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


@pytest.mark.gpu
def test_a_gpu_shrinks_pictures_of_any_size():
    frame = torch.randint(0, 256, (300, 20_000, 3), dtype=torch.uint8)
    expected = to_network(frame, (2, 128), 1)
    torch.testing.assert_close(to_network(frame.cuda(), (2, 128), 1).cpu(), expected, rtol=0, atol=0.02)
