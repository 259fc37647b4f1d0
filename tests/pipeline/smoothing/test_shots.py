from pathlib import Path

import cv2
import numpy as np
import pytest

from depthmill.pipeline.smoothing.edges import FIELDS, GAPS, segment_edges, view
from depthmill.pipeline.smoothing.shots import find_shots
from depthmill.pipeline.sources import open_source


def video(frames=60, cuts=(), flashes=()):
    """Scores, edges of which only the coverage is filled in, and labels, of a video with cuts and flashes."""
    scene, score = np.zeros(frames, int), np.full(frames, 0.02, np.float32)
    score[0] = np.nan
    for cut in cuts:
        scene[cut:] += 1
        score[cut] = 0.5
    for flash in flashes:
        scene[flash] = -flash
        score[flash : flash + 2] = 0.7
    edges = np.full((frames, len(GAPS), len(FIELDS)), np.nan, np.float32)
    for row, gap in enumerate(GAPS):
        edges[gap:, row, -1] = np.where(scene[gap:] == scene[:-gap], 0.9, 0.05)
    return score, edges, np.ones(frames, bool)


def starts(video):
    return np.flatnonzero(np.diff(find_shots(*video))).tolist()


def test_cuts_are_found_and_numbered():
    shots = find_shots(*video(cuts=(20, 21, 50)))
    assert shots.dtype == np.int32
    assert np.bincount(shots).tolist() == [20, 1, 29, 10]


def test_flow_leads_across_a_flash():
    assert starts(video(flashes=(10, 30))) == []
    assert starts(video(cuts=(20,), flashes=(30,))) == [19]


def test_a_fast_pan_is_no_cut():
    score, edges, labelled = video()
    edges[20:30, :, -1] = 0.0
    score[20:30] = 0.15
    assert starts((score, edges, labelled)) == []


def test_a_cut_behind_missing_frames():
    score, edges, labelled = video(cuts=(20,))
    labelled[18:21] = False
    score[18:22] = np.nan
    edges[18:21] = np.nan
    for row, gap in enumerate(GAPS):
        edges[18 + gap : 21 + gap, row] = np.nan
    assert starts((score, edges, labelled)) == [20]


def test_missing_frames_at_the_start_are_no_shot():
    score, edges, labelled = video()
    labelled[:3] = False
    score[:4] = np.nan
    for row, gap in enumerate(GAPS):
        edges[: 3 + gap, row] = np.nan
    assert starts((score, edges, labelled)) == []


def test_frames_that_could_not_be_read_again_are_no_shots_of_their_own():
    score, edges, labelled = video(frames=120)
    score[20:85] = np.nan
    edges[20:84, :, -1] = -1  # their own, and those that lead to them
    for row, gap in enumerate(GAPS):
        edges[20 + gap : 84 + gap, row, -1] = -1
    assert starts((score, edges, labelled)) == [83], "no edge is long enough to lead across"
    score, edges, labelled = video(frames=120)
    score[20:30] = np.nan
    edges[20:29, :, -1] = -1
    for row, gap in enumerate(GAPS):
        edges[20 + gap : 29 + gap, row, -1] = -1
    assert starts((score, edges, labelled)) == []


def test_a_cut_between_pictures_of_the_same_greys():
    score, edges, labelled = video(cuts=(20,))
    score[20] = 0.02
    assert starts((score, edges, labelled)) == [19]


@pytest.fixture(scope="module")
def street():
    """24 pictures of the shipped clip, (24, 144, 192, 3), and its first as it is, (576, 768, 3)."""
    source = open_source(Path(__file__).parents[3] / "demo" / "pedestrians.mp4")
    images = [frame.image for frame in source.read(0, 24)]
    source.close()
    return np.stack([cv2.resize(one, (192, 144), interpolation=cv2.INTER_AREA) for one in images]), images[0]


def panned(picture, px):
    return np.stack([picture[200:344, x : x + 192] for x in range(0, 576, px)])


def other(images):
    return images[:, ::-1, ::-1] // 2


def faded(images, to):
    return np.stack([one * share for one, share in zip(images, np.linspace(1 - to, to, len(images)), strict=True)])


REAL = {
    "another scene": (lambda clip, _: [clip[:12], other(clip[12:])], [12]),
    "its mirror image": (lambda clip, _: [clip[:12], clip[12:, :, ::-1]], [12]),
    "through black": (lambda clip, _: [faded(clip[:12], 0), faded(clip[12:, :, ::-1], 1)], [11, 13]),
    "a short shot between": (lambda clip, _: [clip[:12], other(clip[:12]), clip[12:]], [12, 24]),
    "one of a second": (lambda clip, _: [clip[:12], other(clip), other(clip[:4]), clip[12:]], [12, 40]),
    "frames missed": (lambda clip, _: [clip[:8], clip[20:]], []),
    "a flash": (lambda clip, _: [clip[:8], np.minimum(clip[8:11] * 1.8 + 40, 255), clip[11:]], []),
    "white frames": (lambda clip, _: [clip[:8], np.full_like(clip[8:10], 255), clip[10:]], []),
    "noise": (lambda clip, _: [clip + np.random.default_rng(0).normal(0, 12, clip.shape)], []),
    "a step of exposure at night": (lambda clip, _: [clip[:12] * 0.08 + 3, clip[12:] * 0.08 + 5], []),
    "a pan": (lambda _, picture: [panned(picture, 8)], []),
    "a pan too fast for flow": (lambda _, picture: [panned(picture, 64)], []),
}


@pytest.mark.parametrize("what", REAL)
def test_cuts_of_a_real_clip(street, what):
    parts, cuts = REAL[what]
    images = np.clip(np.concatenate(parts(*street)), 0, 255).astype(np.uint8)
    ramp = np.linspace(0.2, 0.7, 192, dtype=np.float32) * np.ones((144, 1), np.float32)
    edges, score = segment_edges((view(image, ramp) for image in images), 0)
    shot = find_shots(score, edges, np.ones(len(images), bool))
    assert (np.flatnonzero(np.diff(shot)) + 1).tolist() == cuts
