"""Small data sets, written in each set's own layout: what they hold is returned, for tests to compute with."""

import io
import struct
import tarfile
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image

from depthmill.pipeline.evaluation import decode
from depthmill.pipeline.evaluation.datasets import SETS


@dataclass(frozen=True, eq=False)
class Written:
    """One picture: its name, its RGB, its ground truth (metres, or vectors as the file has them), what is valid."""

    name: str
    rgb: np.ndarray
    truth: np.ndarray
    valid: np.ndarray


def png(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def jpeg(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG")
    return buffer.getvalue()


def npy(values):
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def exr(values, kind="<f4"):
    """An uncompressed scan-line OpenEXR with float (or half) channels, written by the format's description."""

    def attribute(name, kind, value):
        return name + b"\0" + kind + b"\0" + struct.pack("<i", len(value)) + value

    H, W, _ = values.shape
    number = {"<f2": 1, "<f4": 2}[kind]
    channels = b"".join(name + struct.pack("<iBxxxii", number, 0, 1, 1) for name in (b"B\0", b"G\0", b"R\0")) + b"\0"
    box = struct.pack("<4i", 0, 0, W - 1, H - 1)
    header = struct.pack("<ii", 20000630, 2) + b"".join(
        (
            attribute(b"channels", b"chlist", channels),
            attribute(b"compression", b"compression", b"\0"),
            attribute(b"dataWindow", b"box2i", box),
            attribute(b"displayWindow", b"box2i", box),
            attribute(b"lineOrder", b"lineOrder", b"\0"),
            attribute(b"pixelAspectRatio", b"float", struct.pack("<f", 1)),
            attribute(b"screenWindowCenter", b"v2f", struct.pack("<2f", 0, 0)),
            attribute(b"screenWindowWidth", b"float", struct.pack("<f", 1)),
            b"\0",
        )
    )
    rows = [values[y, :, ::-1].T.astype(kind).tobytes() for y in range(H)]  # B, G, R, one after the other
    blocks = [struct.pack("<ii", y, len(row)) + row for y, row in enumerate(rows)]
    starts = [len(header) + 8 * H + sum(map(len, blocks[:y])) for y in range(H)]
    return header + struct.pack(f"<{H}Q", *starts) + b"".join(blocks)


def metres(rng, shape, low, high):
    """A slanted floor with noise: depth that a prediction can be near to."""
    rows = np.linspace(high, low, shape[0])[:, None]
    return rows * rng.uniform(0.8, 1, shape)


def rgb(rng, shape):
    return rng.integers(0, 256, (*shape, 3), dtype=np.uint8)


def nyuv2(rng):
    written, files = [], {"./train/office_0003/depth_0003.png": b"not of the split"}
    for folder, number in (("kitchen_0004", "0001"), ("kitchen_0004", "0002"), ("office_0005", "0009")):
        steps = (metres(rng, (480, 640), 0.5, 9) * 1000).astype(np.uint16)
        steps[100:110, 100:200] = 0
        steps[200:210, 100:200] = 12_000
        valid = np.zeros((480, 640), bool)
        valid[45:471, 41:601] = True
        valid[100:110, 100:200] = valid[200:210, 100:200] = False
        picture = rgb(rng, (480, 640))
        base = f"./test/{folder}"
        files |= {f"{base}/rgb_{number}.png": png(picture), f"{base}/depth_{number}.png": png(steps)}
        files |= {f"{base}/filled_{number}.png": png(np.maximum(steps, 1))}
        written.append(Written(f"test/{folder}/rgb_{number}", picture, steps / 1000, valid))
    return replace(SETS["nyuv2"], count=3), files, written


def kitti(rng):
    written, files = [], {}
    for drive, number, shape in (("0002", "0000000069", (375, 1242)), ("0009", "0000000001", (370, 1226))):
        day = "2011_09_26"
        steps = (metres(rng, shape, 2, 90) * 256).astype(np.uint16)
        steps[rng.random(shape) < 0.5] = 0  # lidar is sparse
        picture = rgb(rng, shape)
        sync = f"{day}_drive_{drive}_sync"
        files |= {
            f"./{day}/{sync}/image_02/data/{number}.png": png(picture),
            f"./{day}/{sync}/image_02/data/0000000075.png": png(picture),  # a picture without ground truth
            f"./{sync}/proj_depth/groundtruth/image_02/{number}.png": png(steps),
        }
        left = {1242: 13, 1226: 5}[shape[1]]
        cut = np.s_[shape[0] - 352 :, left : left + 1216]
        depth = (steps / 256)[cut]
        valid = (depth > 0) & (depth < 80)
        valid[:117] = valid[321:] = valid[:, :43] = valid[:, 1172:] = False
        written.append(Written(f"{day}/{sync}/image_02/data/{number}", picture[cut], depth, valid))
    return replace(SETS["kitti"], count=2), files, written


def eth3d(rng, height=42, width=2063):
    written, files = [], {}
    for scene, number in (("office", "0219"), ("relief_2", "0220")):
        depth = metres(rng, (height, width), 0.5, 40).astype("<f4")
        depth[:5, 3:] = np.inf
        picture = rgb(rng, (height, width))
        files |= {
            f"./rgb/{scene}/images/dslr_images/DSC_{number}.JPG": jpeg(picture),
            f"./depth/{scene}_dslr_depth/{scene}/ground_truth_depth/dslr_images/DSC_{number}.JPG": depth.tobytes(),
        }
        picture = np.asarray(Image.open(io.BytesIO(jpeg(picture))))
        written.append(Written(f"rgb/{scene}/images/dslr_images/DSC_{number}", picture, depth, np.isfinite(depth)))
    smaller = partial(decode.depth_raw, height=height, width=width)
    return replace(SETS["eth3d"], count=2, decode=smaller), files, written


def scannet(rng):
    written, files = [], {}
    for scene, number in (("scene0406_02", "000300"), ("scene0088_02", "001100")):
        steps = (metres(rng, (480, 640), 0.5, 12) * 1000).astype(np.uint16)
        steps[:20] = 0
        picture = jpeg(rgb(rng, (480, 640)))
        files |= {f"./{scene}/color/{number}.jpg": picture, f"./{scene}/depth/{number}.png": png(steps)}
        decoded = np.asarray(Image.open(io.BytesIO(picture)))
        valid = (steps > 1) & (steps < 10_000)
        written.append(Written(f"{scene}/color/{number}", decoded, steps / 1000, valid))
    return replace(SETS["scannet"], count=2), files, sorted(written, key=lambda one: one.name)


def diode(rng):
    written, files = [], {}
    for base in (
        "indoors/scene_00021/scan_00189/00021_00189_indoors_200_010",
        "outdoor/scene_00022/scan_00196/00022_00196_outdoor_350_020",
    ):
        depth = metres(rng, (768, 1024), 0.3, 400).astype(np.float32)[..., None]  # beyond the range, and valid
        valid = rng.random((768, 1024)) < 0.7
        depth[~valid] = np.nan
        picture = rgb(rng, (768, 1024))
        files |= {
            f"./{base}.png": png(picture),
            f"./{base}_depth.npy": npy(depth),
            f"./{base}_depth_mask.npy": npy(valid.astype(np.float32)),
        }
        written.append(Written(base, picture, depth[..., 0], valid))
    return replace(SETS["diode"], count=2), files, written


def vectors(rng, shape):
    """Unit vectors around z, as (H, W, 3) float32."""
    values = np.concatenate([rng.normal(0, 0.4, (*shape, 2)), np.ones((*shape, 1))], axis=-1)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def _png_normals(name, bases, rng):
    written, files = [], {}
    for base in bases:
        bytes_ = np.rint((vectors(rng, (480, 640)) + 1) / 2 * 255).astype(np.uint8)
        bytes_[:30] = 0
        picture = rgb(rng, (480, 640))
        files |= {
            f"{base}_img.png": png(picture),
            f"{base}_normal.png": png(bytes_),
            f"{base}_intrins.npy": npy(np.eye(3)),
        }
        valid = np.arange(480)[:, None].repeat(640, 1) >= 30
        written.append(Written(f"{base}_img", picture, bytes_ / 255 * 2 - 1, valid))
    return replace(SETS[name], count=len(bases)), files, sorted(written, key=lambda one: one.name)


def nyuv2_normals(rng):
    wanted, files, written = _png_normals("nyuv2-normals", ["test/000000", "test/000001"], rng)
    return wanted, {**files, "train/000002_img.png": b"", "train/000002_normal.png": b""}, written


def scannet_normals(rng):
    return _png_normals("scannet-normals", ["scene0532_00/000000", "scene0220_02/000450"], rng)


def _exr_normals(name, bases, shape, rng):
    written, files = [], {}
    for base in bases:
        normals = vectors(rng, shape)
        normals[:30] = 0
        normals[30] *= 0.4  # too short to be valid
        normals[100, 50] = (0, 0, 1)  # valid, whatever numbers of it are 0
        picture = rgb(rng, shape)
        files |= {
            f"{base}_img.png": png(picture),
            f"{base}_normal.exr": exr(normals),
            f"{base}_intrins.npy": npy(np.eye(3)),
        }
        valid = np.arange(shape[0])[:, None].repeat(shape[1], 1) > 30
        written.append(Written(f"{base}_img", picture, normals, valid))
    return replace(SETS[name], count=len(bases)), files, written


def ibims(rng):
    return _exr_normals("ibims", ["ibims/corridor_01", "ibims/lab_02"], (480, 640), rng)


def sintel(rng):
    return _exr_normals("sintel", ["alley_1/frame_0001", "temple_3/frame_0050"], (436, 1024), rng)


LAYOUTS = {
    "nyuv2": nyuv2,
    "kitti": kitti,
    "eth3d": eth3d,
    "scannet": scannet,
    "diode": diode,
    "nyuv2-normals": nyuv2_normals,
    "scannet-normals": scannet_normals,
    "ibims": ibims,
    "sintel": sintel,
}


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def guesses(written, wanted, rng):
    """Something like a prediction of each picture: float32, affine-invariant depth, or vectors in the set's axes."""
    for one in written:
        if wanted.modality == "depth":
            truth = np.where(one.valid, one.truth, 1)
            yield (0.02 * truth + 0.1 + rng.normal(0, 0.03, truth.shape)).astype(np.float32)
        else:
            yield (one.truth + rng.normal(0, 0.2, one.truth.shape)).astype(np.float32)


def write_predictions(folder, names, predictions):
    for name, prediction in zip(names, predictions, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", prediction)
    return folder
