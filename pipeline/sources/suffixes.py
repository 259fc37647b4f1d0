"""How names of files end, of each kind of input."""

import os

IMAGE_SUFFIXES = frozenset(
    [
        *(".avif", ".bmp", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff"),
        ".webp",
    ]
)

# Of pictures that are not read: in folders they are left out, and counted.
UNREAD_SUFFIXES = frozenset(
    [
        *(".arw", ".cr2", ".cr3", ".dng", ".exr", ".heic", ".heif", ".hif", ".jxl", ".nef", ".orf", ".psd", ".raf"),
        *(".rw2", ".tga"),
    ]
)

# What to pick from a folder; a file that is named itself may have any suffix.
VIDEO_SUFFIXES = frozenset(
    [
        *(".264", ".265", ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".h265"),
        *(".hevc", ".insv", ".ivf", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg"),
        *(".mpg", ".mts", ".mxf", ".obu", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m"),
    ]
)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
UNREAD_TAR_SUFFIXES = (".tar.bz2", ".tar.xz", ".tar.zst", ".tbz2", ".txz", ".tzst")

PARQUET_SUFFIXES = frozenset([".parquet", ".pq"])

FILE_SUFFIXES = (*VIDEO_SUFFIXES, *TAR_SUFFIXES, *PARQUET_SUFFIXES)  # of files that are a source each
SUFFIXES = (*IMAGE_SUFFIXES, *FILE_SUFFIXES)


def is_picture(name: str) -> bool:
    """Whether a file or an object is a picture by its name."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 (a Path per name takes longer)
