"""An MP4 for people, written picture by picture."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
from av.video.reformatter import ColorRange, Colorspace

from depthmill.pipeline.colours import Rgb

_TIME_BASE = Fraction(1, 90_000)
_LONGEST_S = 5.0  # that a frame is shown: nobody waits for more, and an MP4 cannot say 2^31 units
_BT709 = 1  # FFmpeg's number of it, as matrix, primaries and transfer


def write_mp4(
    path: Path, frames: Iterable[tuple[float, Rgb]], size: tuple[int, int], rate: Fraction, pixel_aspect: Fraction
) -> None:
    """Write a video, whole or not at all.

    Args:
        path: The file.
        frames: The second at which each is shown, and the frame, (H, W, 3) uint8. None is shown longer than 5 s.
        size: Width and height, even.
        rate: Frames a second, about.
        pixel_aspect: Width over height of a pixel as it is shown.
    """
    partial = path.with_name(f".{path.name}")  # of a preview, still one by its name, if this is killed
    try:
        with av.open(str(partial), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            context = stream.codec_context
            context.time_base, context.sample_aspect_ratio = _TIME_BASE, pixel_aspect
            # Said, not left to be guessed from the height, as players do.
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = ColorRange.MPEG
            pts, before_s, shown_s = -1, 0.0, 0.0
            for time_s, picture in frames:
                shown = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                before_s, shown_s = time_s, shown_s + min(time_s - before_s, _LONGEST_S)
                pts = max(pts + 1, round(shown_s / _TIME_BASE))
                shown.pts, shown.time_base = pts, _TIME_BASE
                container.mux(stream.encode(shown))
            container.mux(stream.encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
