from __future__ import annotations

import pytest
import torch

from depthmill.pipeline.training import scenes
from depthmill.pipeline.training.raycast import Views
from depthmill.pipeline.training.shapes import Scene

H, W = 48, 64
SEEDS = range(40, 52)


def test_a_scene_follows_from_its_seed_alone() -> None:
    alone = scenes.view([44], H, W)
    among = scenes.view(list(SEEDS), H, W)[4:5]
    torch.testing.assert_close(alone.rgb, among.rgb, rtol=0, atol=1e-5)
    assert torch.equal(alone.mask, among.mask)
    torch.testing.assert_close(alone.depth, among.depth, rtol=1e-5, atol=0)
    torch.testing.assert_close(alone.normals, among.normals, rtol=0, atol=1e-5)


def test_large_scenes_are_rendered_a_few_at_once_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    together = []

    def render(some: list[Scene], height: int, width: int, **options: object) -> Views:
        together.append(len(some) * height * width)
        flat = torch.zeros(len(some), 1, 1)
        return Views(flat[:, None], flat, flat[:, None], flat > 0)

    monkeypatch.setattr(scenes, "render", render)
    for height, width in ((144, 192), (720, 960), (4000, 6000)):
        assert len(scenes.view(range(5), height, width, device=torch.device("cuda")).depth) == 5
    assert together == [5 * 144 * 192, *(n * 720 * 960 for n in (4, 1)), *[4000 * 6000] * 5]


def test_labels_are_sound_over_many_scenes() -> None:
    views = scenes.view(list(SEEDS), H, W)
    normals, mask = views.normals.movedim(1, -1), views.mask
    assert torch.equal(mask, torch.isfinite(views.depth))
    assert (views.depth[mask] > 0).all()
    torch.testing.assert_close(normals[mask].norm(dim=-1), torch.ones(int(mask.sum())))
    assert (normals[~mask] == 0).all()
    assert ((views.rgb >= 0) & (views.rgb <= 1)).all()
    assert (views.rgb.std(dim=(1, 2, 3)) > 0.01).all()


def test_normals_face_the_camera() -> None:
    for seed in SEEDS:
        scene = scenes.sample(seed)
        views = scenes.view([seed], H, W)
        x = (torch.arange(W) + 0.5 - W / 2) / (scene.focal * W)
        y = -(torch.arange(H) + 0.5 - H / 2) / (scene.focal * W)
        ray = torch.stack([x.expand(H, W), y[:, None].expand(H, W), -torch.ones(H, W)])
        assert ((views.normals[0] * ray).sum(0)[views.mask[0]] < 1e-4).all()


def test_normals_agree_with_the_depth_they_come_with() -> None:
    agreed = total = 0
    for seed in SEEDS:
        scene = scenes.sample(seed)
        views = scenes.view([seed], H, W)
        x = (torch.arange(W) + 0.5 - W / 2) / (scene.focal * W)
        y = -(torch.arange(H) + 0.5 - H / 2) / (scene.focal * W)
        points = torch.stack([x.expand(H, W), y[:, None].expand(H, W), -torch.ones(H, W)]) * views.depth[0]
        right = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
        up = points[:, :-2, 1:-1] - points[:, 2:, 1:-1]
        numeric = torch.nn.functional.normalize(torch.linalg.cross(right, up, dim=0), dim=0)
        normals = views.normals[0]
        middle = normals[:, 1:-1, 1:-1]
        # Where the five pixels of the cross share a normal there is no edge between them, but for parallel steps.
        crosses = (normals[:, 1:-1, 2:], normals[:, 1:-1, :-2], normals[:, :-2, 1:-1], normals[:, 2:, 1:-1])
        smooth = torch.stack([(middle * other).sum(0) > 0.9999 for other in crosses]).all(0)
        cosine = (numeric * middle).sum(0)[smooth]
        agreed += int((cosine > 0.99).sum())
        total += cosine.numel()
    assert total > 5000
    assert agreed / total > 0.97
