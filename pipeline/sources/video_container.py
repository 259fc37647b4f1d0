"""A video file as libav opens it: which of its streams counts, and its packets."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import av
import av.container
import av.video.frame
import av.video.stream
from av.video.frame import PictureType

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.objects import is_url
from depthmill.pipeline.sources.opening import open_binary, unanswered

# A demuxer that meets damage may answer with an error and go on behind it; one that does nothing else is left.
_MAX_DEMUX_ERRORS = 16

# Errors of the system with which libav speaks of what is in a file. All others are the disk's or the network's.
_OF_CONTENT = (errno.EPERM, errno.EAGAIN, errno.EDOM)

# Brands of HEIF pictures, of which libav shows a tile, or the thumbnail. AVIF pictures may have one of them as well.
_HEIF_BRANDS = ("heic", "heim", "heis", "heix", "hevc", "hevm", "hevs", "hevx", "mif1", "mif2", "msf1")
_AVIF_BRANDS = ("avif", "avis")

_TEXT_FORMATS = ("adf", "bin", "idf", "tty", "xbin")  # libav draws the letters of any text, and of other bytes
_AS_A_LIST = "give a list of inputs as @list.txt"

# Local files only: a playlist that calls itself .mp4 must not make the library fetch what it names.
_OPEN_OPTIONS = {"protocol_whitelist": "file"}
# Titles need not be UTF-8; PyAV 19 never minds.
_LENIENT: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


def open_container(uri: str) -> tuple[av.container.InputContainer, av.video.stream.VideoStream]:
    """Open a video file and pick the video stream that libav finds best, or the first that is not a cover picture.

    Raises:
        SourceError: If the file is no video, or its disk or network does not answer.
    """
    file: Any = uri
    try:
        if is_url(uri):  # a file that FFmpeg opens itself costs less than one that is read through Python
            file = open_binary(uri)
        container = av.open(file, "r", options=_OPEN_OPTIONS, **_LENIENT)
    except (av.FFmpegError, OSError) as error:
        if file is not uri:  # not left to the collector: a thread that it stops would wait for the one that reads ahead
            file.close()
        # Of EIO only if it came through Python: libav itself says so of damage as well, where a file begins.
        of_content = _OF_CONTENT if type(error) is OSError else (*_OF_CONTENT, errno.EIO)
        if isinstance(error, OSError) and error.errno not in of_content:
            raise unanswered(uri, error) from error
        remedy = _AS_A_LIST if uri.endswith(".txt") else "check it with ffprobe"
        raise SourceError(
            f"{uri}: cannot be opened as a video ({reason(error)}); expected a file that FFmpeg reads, whole up to "
            f"its index: {remedy}, or leave it out"
        ) from error
    refusal = _refusal(container)
    if refusal:
        container.close()
        raise SourceError(f"{uri}: {refusal}")
    stream: Any  # its stub promises a codec context, which a codec without a decoder lacks
    for stream in filter(None, (container.streams.best("video"), *container.streams.video)):
        if not stream.disposition & av.stream.Disposition.attached_pic:
            if stream.codec_context is None:
                container.close()
                raise SourceError(
                    f"{uri}: no decoder for its video stream; expected a codec that PyAV's FFmpeg knows: re-encode it"
                )
            return container, stream
    kinds = ", ".join(stream.type for stream in container.streams) or "none"
    container.close()
    raise SourceError(f"{uri}: no video stream among its streams ({kinds}); expected one: leave this file out")


def _refusal(container: av.container.InputContainer) -> str:
    """Why a file that libav can open is no video; "" if it may be one."""
    if container.format.name == "concat":  # whatever the file is called
        return f"a list of other files, which are no part of it; expected a video: {_AS_A_LIST}, or leave it out"
    if container.format.name in _TEXT_FORMATS:
        return f"text or other bytes, which FFmpeg would draw; expected a video: {_AS_A_LIST}, or leave it out"
    brand, others = (container.metadata.get(name, "") for name in ("major_brand", "compatible_brands"))
    if brand in _HEIF_BRANDS and not any(avif in others for avif in _AVIF_BRANDS):
        return f"a HEIF picture ({brand}), which is not read: convert it to JPEG, PNG or AVIF"
    return ""


def demux(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> Iterator[av.Packet[Any]]:
    """Yield the stream's packets, going on behind errors where the demuxer can.

    Raises:
        SourceError: If the disk or the network fails: the packets that come then are not all there are.
    """
    errors = 0
    while errors <= _MAX_DEMUX_ERRORS:
        try:
            for packet in container.demux(stream):
                if packet.size:  # an empty packet is PyAV's end of file: to a decoder it means "drain"
                    errors = 0
                    yield packet
            return
        except IndexError:  # PyAV's own, behind the last packet, where damage looks like one more stream
            return
        except (av.FFmpegError, OSError) as error:  # an OSError alone is that of a file read through Python
            if isinstance(error, OSError) and error.errno not in _OF_CONTENT:
                raise unanswered(error.filename or container.name, error) from error
            errors += 1


def lacking(container: av.container.InputContainer, stream: av.video.stream.VideoStream, packets: int) -> int:
    """How many more packets an MP4's or MOV's index lists than came to the end of the file; 0 for other formats."""
    if "mp4" not in container.format.name.split(",") or len(stream.index_entries) <= packets:
        return 0
    return max(0, sum(entry.size > 0 for entry in stream.index_entries) - packets)


def is_intra(frame: av.video.frame.VideoFrame) -> bool | None:
    """Whether the decoder says that a picture is made of no others; None if it says nothing, as some codecs' do."""
    if frame.key_frame or frame.pict_type == PictureType.I:
        return True
    return None if frame.pict_type == PictureType.NONE else False


def decoder_limits(max_pixels: int) -> dict[str, str]:
    """Options by which a decoder makes no picture of far more pixels: a video's size may change midway."""
    return {"max_pixels": str(min(max_pixels + (1 << 20), (1 << 31) - 1))}  # it counts whole blocks, in a C int


def check_resources(error: Exception, *codes: int) -> None:
    """Say that libav can start no thread, or has no memory, which is no frame's fault; `codes` are those that mean it.

    Raises:
        RuntimeError: If that is what went wrong.
    """
    if isinstance(error, av.FFmpegError) and error.errno in codes:
        raise RuntimeError(
            f"FFmpeg can start no thread or has no memory left ({error.strerror}): raise the limits (`ulimit -u`, "
            "`ulimit -v`, the container's)"
        ) from error


def reason(error: BaseException) -> str:
    """What went wrong, in libav's own short words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
