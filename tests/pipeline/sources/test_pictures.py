from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import PIL
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from depthmill.pipeline.errors import SourceChangedError, SourceError
from depthmill.pipeline.sources import open_source, pictures
from depthmill.pipeline.sources.pictures import Encoded, decode_ahead, decode_image, read_header
from depthmill.tests import media as make

LIMIT = 1 << 27
SIDE = 11_000  # of pictures that lie about it
TIFFS = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "lzma", "zstd", "group3", "group4")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".text.png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, suffix: str, tmp_path: Path) -> None:
    upright = Image.fromarray(make.paint(0b01001101))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"picture{suffix}"
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n", zip=True)
    stored.save(path, **({"pnginfo": text} if suffix == ".text.png" else {"exif": exif}))
    probed = open_source(path).probe()
    assert (probed.height, probed.width) == (48, 64)
    picture = decode_image(path, LIMIT)
    assert picture.shape == (48, 64, 3)
    assert make.read_index(picture) == 0b01001101


def grey_ramp() -> np.ndarray:
    return np.tile(np.arange(256, dtype=np.uint8), (4, 1))


def write(image: Image.Image, path: Path, **options: object) -> np.ndarray:
    image.save(path, **options)  # type: ignore[arg-type]
    return decode_image(path, LIMIT)


def test_grey_one_bit_and_palette(tmp_path: Path) -> None:
    ramp = Image.fromarray(grey_ramp())
    np.testing.assert_array_equal(write(ramp, tmp_path / "grey.png")[..., 1], grey_ramp())
    bits = write(ramp.convert("1", dither=Image.Dither.NONE), tmp_path / "bits.png")
    np.testing.assert_array_equal(bits[..., 0], np.where(grey_ramp() > 127, 255, 0))
    colours = Image.fromarray(make.paint(77)).quantize(4)
    assert make.read_index(write(colours, tmp_path / "palette.png")) == 77


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled(suffix: str, tmp_path: Path) -> None:
    ramp = grey_ramp()
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    np.testing.assert_array_equal(write(deep, tmp_path / f"deep{suffix}")[..., 2], ramp)
    np.testing.assert_array_equal(
        write(Image.fromarray(ramp.astype(np.int32) * 257), tmp_path / "int.tif")[..., 0], ramp
    )
    np.testing.assert_array_equal(
        write(Image.fromarray(ramp.astype(np.float32) / 255), tmp_path / "float.tif")[..., 0], ramp
    )


def tiff(
    values: np.ndarray,
    bits: int,
    *,
    photometric: int = 1,
    sample_format: int = 1,
    samples: int = 1,
    planes: int = 1,
    extra: int | None = None,
) -> io.BytesIO:
    """A TIFF of (H, W * samples) whole numbers, each in so many bits; or whatever the tags make of them."""
    if bits == 12:
        digits = "".join(f"{value:012b}" for value in values.flat)
        data = int(digits, 2).to_bytes(len(digits) // 8, "big")
    else:
        data = values.astype(f"<u{bits // 8}").tobytes()
    height, width = values.shape[0], values.shape[1] // samples
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: samples, 278: height}
    tags |= {279: len(data), 284: planes, 339: sample_format}
    tags |= {} if extra is None else {338: extra}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return io.BytesIO(head + data + struct.pack("<H", len(tags)) + entries + bytes(4))


def test_white_is_what_the_bits_can_say() -> None:
    ramp = grey_ramp()
    deep = np.rint(ramp * (4095 / 255)).astype(int)
    np.testing.assert_array_equal(decode_image(tiff(deep, 12), LIMIT)[..., 0], ramp)
    np.testing.assert_array_equal(
        decode_image(tiff(ramp.astype(int) * 257, 16, photometric=0), LIMIT)[..., 0], 255 - ramp
    )
    np.testing.assert_array_equal(decode_image(tiff(ramp.astype(int) * 16843009, 32), LIMIT)[..., 0], ramp)
    signed = np.rint(ramp * (32767 / 255)).astype(int)
    np.testing.assert_array_equal(decode_image(tiff(signed, 16, sample_format=2), LIMIT)[..., 0], ramp)


def test_a_float_brighter_than_white_darkens_nothing(tmp_path: Path) -> None:
    ramp = grey_ramp().astype(np.float32) / 255
    ramp[0, 0], ramp[1, 0], ramp[2, 0] = 1.3, np.nan, np.inf
    expected = grey_ramp()
    expected[0, 0] = 255
    np.testing.assert_array_equal(write(Image.fromarray(ramp), tmp_path / "float.tif")[..., 0], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_floats_that_are_no_numbers_are_no_black_picture(value: float, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no pixel of it is a finite number"):
        write(Image.fromarray(np.full((4, 4), value, np.float32)), tmp_path / "float.tif")


def test_floats_in_colour_are_said_to_be_what_they_are() -> None:
    with pytest.raises(SourceError, match=r"a TIFF .* of a kind that is not read \(as RGB in floats\); expected"):
        decode_image(tiff(np.zeros((2, 6), int), 32, photometric=2, sample_format=3, samples=3), LIMIT)


def test_planes_that_pillow_takes_for_others_are_refused() -> None:
    ramp = np.tile(grey_ramp(), 3)
    assert decode_image(tiff(ramp, 8, photometric=2, samples=3, planes=2), LIMIT).shape == (4, 256, 3)
    with pytest.raises(SourceError, match="a TIFF of 16 bits whose colours lie in planes"):
        decode_image(tiff(ramp.astype(int) * 257, 16, photometric=2, samples=3, planes=2), LIMIT)


def test_alpha_lies_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((4, 256, 4), dtype=np.uint8)
    rgba[..., 3] = grey_ramp()
    np.testing.assert_array_equal(write(Image.fromarray(rgba), tmp_path / "rgba.png")[..., 0], 255 - grey_ramp())
    grey = Image.fromarray(rgba[..., 2:], mode=None).convert("LA")
    np.testing.assert_array_equal(write(grey, tmp_path / "la.png")[..., 0], 255 - grey_ramp())
    see_through = Image.new("P", (8, 8), 1)
    see_through.putpalette([9, 9, 9, 200, 0, 0])
    assert (write(see_through, tmp_path / "p.png", transparency=1) == 255).all()
    assert (write(see_through, tmp_path / "bytes.png", transparency=bytes([255, 0])) == 255).all()
    deep = Image.fromarray(np.array([[40000, 10 * 257, 40001]], dtype=np.uint16))
    assert write(deep, tmp_path / "deep.png", transparency=40000)[0, :, 0].tolist() == [255, 10, 156]


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow reads no such TIFF before 13")
def test_alpha_that_grey_was_multiplied_by_lies_over_white() -> None:
    premultiplied = np.array([[0, 0, 60, 120, 200, 255]])  # grey and alpha in turn
    file = tiff(premultiplied, 8, samples=2, extra=1)
    assert decode_image(file, LIMIT)[0, :, 0].tolist() == [255, 195, 200]


@pytest.mark.parametrize(
    ("bits", "colour", "row", "key"),
    [(2, 0, b"\x04", b"\0\1"), (4, 0, b"\0\x50", b"\0\5"), (16, 2, b"\0" * 12 + b"\1\2\3\4\5\6", b"\1\2\3\4\5\6")],
)
def test_the_transparent_value_of_a_png_has_its_bits(bits: int, colour: int, row: bytes, key: bytes) -> None:
    """Two black pixels, one that is transparent."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 3, 1, bits, colour, 0, 0, 0), b"tRNS": key}
    chunks |= {b"IDAT": zlib.compress(b"\0" + row), b"IEND": b""}
    packed = [struct.pack(">I", len(data)) + kind + data for kind, data in chunks.items()]
    file = io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(one + struct.pack(">I", zlib.crc32(one[4:])) for one in packed))
    assert decode_image(file, LIMIT)[0, :, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF", "JPEG2000", "JPEG"])
def test_a_picture_without_a_suffix_is_one(kind: str, tmp_path: Path) -> None:
    """As a video, alpha would be dropped, and EXIF would mirror nothing."""
    clear = Image.new("RGBA" if kind != "JPEG" else "L", (8, 8), (0, 0, 0, 0) if kind != "JPEG" else 255)
    clear.save(tmp_path / "0a1b2c", kind)
    source = open_source(tmp_path / "0a1b2c")
    assert source.probe().kind == "images"
    (frame,) = source.read(0, 1)
    assert frame.image is not None
    assert (frame.image == 255).all()


def test_a_large_colour_profile_is_passed_over(tmp_path: Path) -> None:
    profile = np.random.default_rng(0).integers(0, 4, 3 << 20, np.uint8).tobytes()
    Image.fromarray(make.paint(5)).save(tmp_path / "a.png", icc_profile=profile)
    assert read_header(tmp_path / "a.png", 10**6).height == make.HEIGHT
    assert make.read_index(decode_image(tmp_path / "a.png", 10**6)) == 5
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1 << 20, "other users of Pillow keep its limit"


def test_cmyk(tmp_path: Path) -> None:
    red = write(Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK"), tmp_path / "cmyk.jpg", quality=95)
    assert abs(red.astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize(
    "options", [{}, {"lossless": True}, {"alpha": True}, {"exif": True}, {"xmp": True}, {"animated": True}]
)
def test_webp_headers_say_what_pillow_says(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.fromarray(make.paint(3, height=33, width=101))
    extra: dict[str, object] = {"lossless": options.get("lossless", False)}
    if "alpha" in options:
        picture.putalpha(Image.new("L", picture.size, 90))
    if "exif" in options:
        extra["exif"] = Image.Exif()
        extra["exif"][0x0112] = 6
    if "xmp" in options:
        extra["xmp"] = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    if "animated" in options:
        extra |= {"save_all": True, "append_images": [Image.fromarray(make.paint(9, height=33, width=101))]}
    file = io.BytesIO()
    picture.save(file, "WEBP", **extra)
    turned = "exif" in options or "xmp" in options
    upright = (101, 33) if turned else (33, 101)
    opened = []
    monkeypatch.setattr(
        Image, "open", lambda *_, original=Image.open, **words: opened.append(1) or original(*_, **words)
    )
    header = read_header(file, LIMIT)
    assert (header.height, header.width) == upright
    assert bool(opened) == turned
    assert decode_image(file, LIMIT).shape[:2] == upright


def test_a_header_that_lies_sizes_nothing() -> None:
    file = io.BytesIO()
    Image.new("L", (64, 48)).save(file, "JPEG")
    lying = bytearray(file.getvalue())
    at = lying.index(b"\xff\xc0") + 5
    assert lying[at : at + 4] == bytes([0, 48, 0, 64])
    lying[at] = 0x40  # 16432 rows of 64 pixels, in a few hundred bytes
    header = read_header(io.BytesIO(lying), LIMIT)
    assert (header.height, header.width) == (0, 0)
    with pytest.raises(SourceError, match=r"promises 64x16432 pixels, which \d+ bytes cannot hold"):
        decode_image(io.BytesIO(lying), LIMIT)


def webp(chunk: bytes, data: bytes, more: int = 0) -> bytes:
    """A WebP file of one chunk, that says it has so many bytes more."""
    return b"RIFF" + struct.pack("<I", 12 + len(data) + more) + b"WEBP" + chunk + struct.pack("<I", len(data)) + data


def patched(kind: str, mark: bytes, shift: int) -> bytes:
    """A small picture with sides of 11,000 so far behind a mark."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, kind)
    data = file.getvalue()
    at = data.index(mark) + shift
    return data[:at] + struct.pack(">II", SIDE, SIDE) + data[at + 8 :]


def small_tiff(compression: int) -> bytes:
    """One that promises so many pixels in a strip of 50 bytes."""
    tags = {256: SIDE, 257: SIDE, 258: 8, 259: compression, 262: 1, 273: 8, 277: 1, 278: SIDE, 279: 50}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 58) + bytes(50) + struct.pack("<H", len(tags)) + entries + bytes(4)


LYING = {
    "empty.webp": webp(b"VP8X", bytes(4) + (SIDE - 1).to_bytes(3, "little") * 2),
    "cut.webp": webp(b"VP8L", b"\x2f" + (SIDE - 1 | SIDE - 1 << 14).to_bytes(4, "little") + bytes(40), more=50),
    "lossy.webp": webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 999, 999) + bytes(40)),
    **{f"{name}.tif": small_tiff(code) for name, code in {"raw": 1, "lzw": 5, "deflate": 8, "packbits": 32773}.items()},
    "a.jp2": patched("JPEG2000", b"ihdr", 4),
    "a.avif": patched("AVIF", b"ispe", 8),
}


@pytest.mark.parametrize("name", LYING)
@pytest.mark.parametrize("kind", ["folder", "shard.tar", "shard.parquet"])
def test_a_header_that_lies_sizes_no_source(name: str, kind: str, tmp_path: Path) -> None:
    files, path = {"0.png": make.encode(5), name: LYING[name]}, tmp_path / kind
    if kind == "folder":
        folder(path, files)
    elif kind == "shard.parquet":
        make.write_parquet(path, {"image": list(files.values())})
    else:
        make.write_tar(path, list(files.items()))
    source = open_source(path)
    probed = source.probe()
    assert (probed.height, probed.width) == (make.HEIGHT, make.WIDTH)
    assert [frame.image is None for frame in source.read(0, 2)] == [False, True]
    source.close()


@pytest.mark.parametrize(
    "head",
    [b"P6 9000 9000 255\n", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 9000, 9000, 1, 24, *[0] * 6)],
)
def test_a_header_alone_sizes_nothing(head: bytes) -> None:
    assert read_header(io.BytesIO(head), LIMIT).height == 0
    with pytest.raises(SourceError, match="promises 9000x9000 pixels"):
        decode_image(io.BytesIO(head), LIMIT)


def folder(path: Path, pictures: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, data in pictures.items():
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["folder", "shard.tar", "shard.tgz", "shard.parquet"])
def test_a_tall_and_a_wide_picture_do_not_spoil_the_others(kind: str, tmp_path: Path) -> None:
    """A row of a canvas as high as the one and as wide as the other could not be stored."""
    sizes = {"a.png": (48, 64), "b.png": (1, 3000), "c.png": (2000, 1), "d.png": (40, 70)}
    pictures = {name: make.encode(5, height=height, width=width) for name, (height, width) in sizes.items()}
    path = tmp_path / kind
    if kind == "folder":
        folder(path, pictures)
    elif kind == "shard.parquet":
        make.write_parquet(path, {"image": list(pictures.values())})
    else:
        make.write_tar(path, list(pictures.items()))
    source = open_source(path, max_pixels=100_000)
    probed = source.probe()
    assert (probed.height, probed.width) == (2000, 70)
    frames = list(source.read(0, 4))
    source.close()
    assert [frame.image is None for frame in frames] == [False, True, False, False]
    assert "3000x1 pixels: with the others of its source, each row would take 3000x2000" in frames[1].error
    assert open_source(path).probe().width == 3000, "by default there is room for both"


def test_a_reason_says_that_a_mended_picture_makes_another_input(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path / "a", {"a.png": b""}))
    (frame,) = source.read(0, 1)
    assert frame.error.endswith(": replace it or leave it out, and label its input anew")
    Image.new("RGB", (1, 1)).save(tmp_path / "a" / "a.png")
    assert open_source(tmp_path / "a").probe().fingerprint != source.probe().fingerprint


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory when reading image file")], ids=repr)
def test_a_picture_is_not_damaged_for_lack_of_memory(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its own damage it would be committed as failed, and left out of training."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", Mock(side_effect=error))
    with pytest.raises(MemoryError, match="no memory is left"):
        decode_image(buffer, LIMIT)


def test_a_digest_is_of_the_size_and_both_ends() -> None:
    data = make.encode(1, ".bmp", height=100, width=100)
    others = (data[:99] + b"x" + data[100:], data[:-1] + b"x", data[:9000] + b"x" + data[9000:])
    assert len({read_header(io.BytesIO(one), LIMIT).digest for one in (data, *others)}) == 4


def test_large_pictures_are_fewer_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_MAX_BYTES_AHEAD", 100)
    made: list[int] = []
    waiting = (made.append(index) or Encoded(index, None, size_bytes=60) for index in range(5))
    assert [len(made) for _ in decode_ahead(waiting, LIMIT, threads=4)] == [2, 3, 4, 5, 5]


def test_sides_are_limited() -> None:
    file = io.BytesIO()
    Image.new("1", (70_000, 1)).save(file, "PNG")
    assert read_header(file, LIMIT).width == 0
    with pytest.raises(SourceError, match="at most 65535 a side"):
        decode_image(file, LIMIT)


@pytest.mark.parametrize(
    ("kind", "mode", "side", "options"),
    [
        ("PNG", "1", 8000, {"optimize": True}),
        ("JPEG", "L", 8000, {"quality": 1, "progressive": True, "optimize": True}),
        ("GIF", "L", 2000, {}),
        ("JPEG2000", "L", 3000, {}),
        ("AVIF", "L", 2000, {"quality": 0, "speed": 10}),
        ("WEBP", "L", 1, {"lossless": True}),
        ("WEBP", "L", 2000, {"lossless": True, "method": 0}),
        ("WEBP", "L", 2000, {"quality": 0, "method": 4}),
        ("TIFF", "L", 3000, {"compression": "jpeg", "quality": 1}),
        *(("TIFF", "1", 4000, {"compression": name, "strip_size": 1 << 30}) for name in TIFFS),
    ],
)
def test_the_densest_pictures_there_are_can_be_read(
    kind: str, mode: str, side: int, options: dict[str, object]
) -> None:
    file = io.BytesIO()
    try:
        Image.new(mode, (side, side), 128 if mode == "L" else 1).save(file, kind, **options)
    except OSError as error:
        if options.get("compression") != "zstd":
            raise
        pytest.skip(f"Pillow {PIL.__version__} writes no TIFF in zstd here: {error}")
    assert read_header(file, LIMIT).width == side
    assert decode_image(file, LIMIT).shape == (side, side, 3)


def test_a_picture_that_was_broken_since_it_was_probed_is_no_failed_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    make.write_image(path)
    digest = read_header(path, LIMIT).digest
    path.write_bytes(b"half")
    given = (one for one in [Encoded(0, path, digest=digest)])
    with pytest.raises(SourceChangedError, match=r"a\.png changed"):
        list(decode_ahead(given, LIMIT, 1))
