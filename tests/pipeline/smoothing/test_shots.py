import numpy as np

from depthmill.pipeline.smoothing.edges import FIELDS, GAPS
from depthmill.pipeline.smoothing.shots import find_shots


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
