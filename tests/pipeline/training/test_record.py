import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image

from depthmill.pipeline.training.record import LossTable, abs_rel, draw_sheet, mean_angle_deg

EVERY_DEPTH = (1e-3, math.inf)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_steps_that_are_done_again_are_dropped(tmp_path):
    path = tmp_path / "losses.csv"
    with LossTable(path, lambda row: pytest.fail("there is none")) as table:
        for step in range(4):
            table.write({"step": step, "loss": 0.5, "gone": 1})
    before = path.read_bytes()
    with LossTable(path, lambda row: int(row["step"]) < 2) as table:
        assert path.read_bytes() == before  # nothing may be left to do
        table.write({"step": 2, "loss": 0.25, "new": 7})
        assert rows(path) == [
            {"step": "0", "loss": "0.5", "new": ""},
            {"step": "1", "loss": "0.5", "new": ""},
            {"step": "2", "loss": "0.25", "new": "7"},
        ]


def test_a_kill_while_the_table_is_begun_again_loses_no_row(tmp_path, monkeypatch):
    path = tmp_path / "losses.csv"
    with LossTable(path, lambda row: True) as table:
        table.write({"step": 1, "loss": 0.5})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception), LossTable(path, lambda row: True) as table:
            table.write({"step": 2, "loss": 0.25})
    assert path.read_bytes() == before


def test_a_row_that_was_cut_is_dropped(tmp_path):
    path = tmp_path / "losses.csv"
    path.write_text("stage,step,loss\nvae,1,0.5\nvae")
    with LossTable(path, lambda row: int(row["step"]) < 2) as table:
        table.write({"stage": "vae", "step": 2, "loss": 0.25})
    assert [row["step"] for row in rows(path)] == ["1", "2"]


def test_abs_rel_is_the_mean_over_pictures_with_truth_of_the_exact_fits():
    depth = torch.tensor([[[1.0, 2.0], [4.0, torch.inf]]] * 3)
    mask = torch.isfinite(depth)
    mask[2] = False
    prediction = torch.tensor([[[1.0, 2.0], [4.0, 0.0]], [[7.0, 7.0], [7.0, 7.0]], [[0.0, 0.0], [0.0, 0.0]]])
    constant = (4 / 3 / 1 + 1 / 3 / 2 + 5 / 3 / 4) / 3  # fitted to the mean, 7 / 3
    assert abs_rel(prediction, depth, mask, EVERY_DEPTH) == pytest.approx(constant / 2)
    assert math.isnan(abs_rel(prediction[2:], depth[2:], mask[2:], EVERY_DEPTH))
    # However little a prediction varies: a fit that is held back, as the loss's is, would leave an error of 0.4.
    assert abs_rel(prediction[:1] * 1e-4, depth[:1], mask[:1], EVERY_DEPTH) < 1e-4
    # Held to the range: 4 is out of it.
    assert abs_rel(prediction[:1], depth[:1], mask[:1], (1.0, 2.0)) == pytest.approx(0.5 / 3)


def test_an_answer_without_a_direction_is_90_degrees_off():
    normals = torch.tensor([0.0, 0, 1]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    mask = torch.tensor([[[True, True], [True, False]]])
    answer = torch.zeros(1, 3, 2, 2)
    answer[0, 2, 0] = 3.0
    answer[0, 0, 1, 1] = 1.0
    assert mean_angle_deg(answer, normals, mask) == pytest.approx(30)
    assert math.isnan(mean_angle_deg(answer, normals, torch.zeros_like(mask)))


def test_a_sheet_has_a_row_of_pictures_below_another(tmp_path):
    pictures = torch.linspace(0, 1, 2 * 3 * 4 * 5).view(2, 3, 4, 5)
    draw_sheet([pictures, 1 - pictures], tmp_path / "pictures" / "a.png")
    sheet = np.asarray(Image.open(tmp_path / "pictures" / "a.png")) / 255
    assert sheet.shape == (8, 10, 3)
    np.testing.assert_allclose(sheet[4:, 5:], 1 - pictures[1].permute(1, 2, 0), atol=0.51 / 255)
