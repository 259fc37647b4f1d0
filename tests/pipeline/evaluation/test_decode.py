"""Ground truth from bytes: bit-exact where it is whole, refused where it is not what the set says."""

from fractions import Fraction

import av
import numpy as np
import pytest

from depthmill.pipeline.evaluation import decode
from depthmill.tests.pipeline.evaluation import layouts


def normals():
    values = np.random.default_rng(0).normal(size=(40, 50, 3)).astype(np.float32)
    values[0] = 0
    values[1] = 0.2
    values[2, 2] = np.nan
    return values


def expected():
    values = normals()
    values[:2] = 0
    values[np.linalg.norm(values, axis=-1) <= 0.5] = 0
    return values


def test_exr_is_bit_exact():
    assert np.array_equal(decode.normals_exr(layouts.exr(normals())), expected(), equal_nan=True)


def test_exr_of_half_floats():
    found = decode.normals_exr(layouts.exr(normals(), kind="<f2"))
    assert np.nanmax(np.abs(found - expected())) < 2e-3


def test_exr_compressed_as_opencv_does():
    encoder = av.CodecContext.create("exr", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 50, 40, "gbrpf32le"
    encoder.time_base, encoder.options = Fraction(1, 25), {"compression": "zip16"}
    packets = encoder.encode(av.VideoFrame.from_ndarray(normals(), format="gbrpf32le")) or encoder.encode(None)
    data = bytes(packets[0])
    assert len(data) < normals().nbytes
    assert np.array_equal(decode.normals_exr(data), expected(), equal_nan=True)
    with pytest.raises(ValueError, match="cut short"):
        decode.normals_exr(data[:-1])


@pytest.mark.parametrize("keep", [0, 3, 100, 400, 2000, -1])
def test_exr_cut_short_is_refused(keep):
    with pytest.raises(ValueError, match="EXR"):
        decode.normals_exr(layouts.exr(normals())[:keep])


def test_black_in_a_png_is_no_normal():
    values = np.full((2, 2, 3), 128, np.uint8)
    values[0, 0] = 0
    values[0, 1] = (0, 0, 1)
    found = decode.normals_png(layouts.png(values))
    assert (found[0, 0] == 0).all()
    assert found[0, 1] == pytest.approx([-1, -1, -1 + 2 / 255])
    assert found[1, 1] == pytest.approx([1 / 255] * 3, abs=1e-6)


def test_infinity_is_no_depth_and_nan_stays():
    data = np.array([[1, np.inf], [np.nan, 2]], "<f4").tobytes()
    assert np.array_equal(decode.depth_raw(data, height=2, width=2), [[1, 0], [np.nan, 2]], equal_nan=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decode.depth_png(layouts.png(np.zeros((2, 2), np.uint8)), steps_per_m=1000), "16 bits"),
        (lambda: decode.depth_png(layouts.png(np.zeros((2, 2, 3), np.uint8)), steps_per_m=1000), "16 bits"),
        (lambda: decode.normals_png(layouts.png(np.zeros((2, 2), np.uint8))), "three channels"),
        (lambda: decode.depth_raw(b"1234", height=2, width=2), "4 bytes; expected 16"),
        (lambda: decode.array(layouts.npy(np.zeros((2, 2, 3)))), "one plane"),
        (lambda: decode.array(layouts.npy(np.array([["a"]]))), "one plane"),
    ],
)
def test_what_is_something_else_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
