"""Loss terms against closed forms; the landmark network in PyTorch against LiteRT."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from export3d_cli.core.config.loading import make_train_config
from export3d_cli.core.face.landmarks import LEFT_EYE, OUTER_LIPS, RIGHT_EYE
from export3d_cli.core.face.tracker import LiteRTNetwork, open_landmarker_tracker, read_bundle
from export3d_cli.core.media.image import read_image
from export3d_cli.core.model.export3d import Output
from export3d_cli.core.model.warp.mesh_flow import resize, warp
from export3d_cli.core.runtime.weights import example_path, resolve_weights
from export3d_cli.core.train import losses
from export3d_cli.core.train.clebs_stage import identity_leakage_loss, mirror_loss
from export3d_cli.core.train.losses import (
    VIEW_SIZE_PX,
    LandmarkLoss,
    LandmarkNetwork,
    draw_rays,
    landmarker_view_grid,
    ray_loss,
    reconstruction_loss,
)
from export3d_cli.core.train.training_data import Batch

from .conftest import motion_of


def test_mask_covers_eyes_and_mouth_only() -> None:
    landmarks = motion_of(0, 1).landmarks[..., :2]
    mask = losses.face_mask(torch.from_numpy(landmarks), 64)
    assert mask.shape == (1, 1, 64, 64)

    def mask_at(point: np.ndarray) -> float:
        x, y = (point * 64).astype(int)
        return float(mask[0, 0, y, x])

    eye = landmarks[0, [33, 133]].mean(0)
    mouth = landmarks[0, [13, 14]].mean(0)
    assert mask_at(eye) > 0.9
    assert mask_at(mouth) > 0.9
    assert mask_at(landmarks[0, 10]) < 0.05
    assert mask_at(landmarks[0, 152]) < 0.2
    assert mask.mean() < 0.15


def test_mask_term_is_limited_to_eyes_and_mouth() -> None:
    config = make_train_config({"loss": {"l2": 1, "l1": 1, "raw": 0, "perceptual": 0, "mask": 2}})
    marks = torch.from_numpy(motion_of(0, 1).landmarks)
    black, white, head = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64), torch.zeros(1, 1, 8, 8)
    camera, beta = torch.zeros(1, 25), torch.zeros(1, 64)
    batch = Batch(black, beta, camera, marks, head, white, beta, camera, marks[..., :2], marks, head, head, white, beta)
    terms = reconstruction_loss(Output(black, black, head, head, None, None), batch, config, None)[1]
    assert terms["l2"] == terms["l1"] == 1.0
    assert terms["mask"] == pytest.approx(2 * float(losses.face_mask(marks[..., :2], 64).mean()))


def test_identity_leakage_loss_is_fishers_criterion() -> None:
    torch.manual_seed(0)
    lam = torch.randn(30, 400, 5)
    lam = lam - lam.mean(1, keepdim=True)
    assert identity_leakage_loss(lam) < 1e-8
    means = torch.randn(30, 1, 5)
    apart = (means - means.mean(0)).square().mean((0, 1))  # in variances of 1 within a person
    assert identity_leakage_loss(lam + means) == pytest.approx(apart.mean().item(), rel=0.05)
    turn = torch.linalg.qr(torch.randn(5, 5))[0]
    assert identity_leakage_loss(3 * (lam + means) @ turn) == pytest.approx(
        identity_leakage_loss(lam + means).item(), rel=1e-2
    )


def test_mirror_loss_flips_the_antisymmetric_dims() -> None:
    lam = torch.randn(50, 4)
    mirrored = lam * torch.tensor([1.0, 1.0, 1.0, -1.0])
    assert mirror_loss(lam, mirrored, 1) == 0
    assert mirror_loss(lam, mirrored, 0) == pytest.approx((4 * lam[:, 3] ** 2).mean().item() / 4 / lam.var(0).mean())


def test_crop_eyes_and_mouth_centres_and_sizes() -> None:
    """The image holds its own coordinates, which tell where the crops are."""
    axis = (torch.arange(64) + 0.5) / 64
    image = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[None].expand(2, -1, -1, -1)
    marks = torch.rand(2, 478, 2) * 0.01
    for centre, wide, region in ((0.3, 0.1, LEFT_EYE), (0.6, 0.1, RIGHT_EYE), (0.5, 0.2, OUTER_LIPS)):
        marks[:, list(region)] = centre
        marks[:, region[0], 0], marks[:, region[1], 0] = centre - wide / 2, centre + wide / 2
    seen = losses.crop_eyes_and_mouth(image, marks, 8)
    assert seen.shape == (6, 2, 8, 8)
    for k, (centre, wide) in enumerate(((0.3, 0.1), (0.6, 0.1), (0.5, 0.2))):
        part = seen[2 * k : 2 * k + 2]
        torch.testing.assert_close(part.mean((2, 3)), torch.full((2, 2), centre), atol=1e-3, rtol=0)
        width = part[:, 0, :, -1] - part[:, 0, :, 0]
        torch.testing.assert_close(width, torch.full((2, 8), 1.4 * wide * 7 / 8), atol=1e-3, rtol=0)


def test_flow_loss_covers_visible_parts_at_several_scales() -> None:
    target, known = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 8, 8)
    known[..., :4] = 1
    config = make_train_config({"loss": {"l2": 0, "raw": 0, "perceptual": 0, "flow": 2}})
    alternating = torch.ones(1, 3, 16, 16)
    alternating[..., 1::2] = -1  # differences of single pixels cancel out in cells
    marks = torch.zeros(1, 478, 2)
    batch = Batch(target, marks, marks, marks, known, target, marks, marks, marks, marks, known, known, marks, marks)
    for sampled, wanted in ((torch.ones(1, 3, 16, 16), 2 * 0.5), (alternating, 2 * 0.5 / 3)):
        shown = resize(known, 16).mean().item() / 0.5  # the mask has a soft border
        output = Output(
            target, target, known, known, None, None, warped_photo=sampled.requires_grad_(), source_visibility=known
        )
        total, terms = reconstruction_loss(output, batch, config, None)
        assert terms["flow"] == pytest.approx(wanted * shown, rel=0.15)
        total.backward()
        assert sampled.grad is not None and sampled.grad[..., :6].abs().max() > 0
        assert not sampled.grad[..., 10:].any()


def test_silhouette_depth_and_density_tv_terms() -> None:
    weights = {"l2": 0, "raw": 0, "perceptual": 0, "silhouette": 2, "density_tv": 3, "depth": 8}
    config = make_train_config({"loss": weights})
    image, head = torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    head[..., :4] = 1
    opacity = torch.full((1, 1, 4, 4), 0.25)
    output = Output(image, image, opacity, opacity, None, None, density_tv=torch.tensor([0.5]))
    camera, beta = torch.zeros(1, 25), torch.zeros(1, 64)
    marks = torch.zeros(1, 478, 2)
    depth = 0.5 * head
    depth[..., :4, :] = 0  # known on half of the head; the expected depth is 0.25
    batch = Batch(image, beta, camera, beta, head, image, beta, camera, marks, marks, head, depth, image, beta)
    total, terms = reconstruction_loss(output, batch, config, None, head_mask=head)
    assert terms["silhouette"] == pytest.approx(2 * 0.5) and terms["density_tv"] == pytest.approx(3 * 0.5)
    assert terms["depth"] == pytest.approx(8 * 0.25 / 4)
    assert float(total) == pytest.approx(3.0)


def test_ray_loss_compares_head_and_depth_at_the_drawn_pixels() -> None:
    weights = {"l2": 1, "l1": 2, "silhouette": 3, "mask": 20, "depth": 10}
    config = make_train_config({"loss": weights, "raw_rays": 16})
    marks = torch.from_numpy(motion_of(0, 1).landmarks)
    image, head = torch.ones(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    head[..., :8] = 1
    camera, beta = torch.zeros(1, 25), torch.zeros(1, 64)
    depth = 2.5 * head
    depth[..., 0, :4] = 0  # not known at the first of the pixels below
    batch = Batch(
        image, beta, camera, marks, head, image, beta, camera, marks[..., :2], marks, head, depth, image, beta
    )
    rays = draw_rays(config, batch, 8)
    assert len(set(rays[0].tolist())) == 16  # distinct pixels
    rays = torch.tensor([[0, 2, 6, 7]])  # two on the head, two outside it
    opacity = torch.tensor([1.0, 1, 0, 0]).view(1, 1, 4, 1)
    perfect = Output(opacity.expand(-1, 3, -1, -1), opacity, 2.5 * torch.ones_like(opacity), opacity, None, None)
    for _ in range(3):  # before any colour
        assert float(ray_loss(perfect, rays, 8, batch, config, head)[0]) == pytest.approx(0, abs=1e-6)
    half = perfect._replace(opacity=opacity / 2, image=perfect.image / 2, depth=perfect.depth + 0.1)
    torch.manual_seed(0)
    difference = (1 - (2 * torch.rand(1, 3, 1, 1) - 1)) / 2  # from the background, at two of four pixels
    torch.manual_seed(0)
    total, terms = ray_loss(half, rays, 8, batch, config, head)
    assert terms["l2_raw"] == pytest.approx(float(difference.square().mean() / 2))
    assert terms["l1_raw"] == pytest.approx(float(difference.mean()))
    assert terms["silhouette"] == pytest.approx(3 * 0.25)
    assert terms["depth"] == pytest.approx(10 * 0.1 / 4, rel=1e-4)
    assert float(total) == pytest.approx(float(sum(terms.values())))


@pytest.fixture(scope="module")
def network() -> LandmarkNetwork:
    return LandmarkNetwork(resolve_weights("face_landmarker"))


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """(256, 256, 3) uint8."""
    return cv2.resize(
        read_image(example_path("source.jpg")), (VIEW_SIZE_PX, VIEW_SIZE_PX), interpolation=cv2.INTER_AREA
    )


def test_network_matches_litert(network: LandmarkNetwork, photo: np.ndarray) -> None:
    bundle = resolve_weights("face_landmarker")
    own = LiteRTNetwork(*read_bundle(bundle, "face_landmarks_detector.tflite"), bundle, 1)
    face = photo.astype(np.float32) / 255
    with torch.no_grad():
        found = network(torch.from_numpy(face).permute(2, 0, 1)[None])[0]
    np.testing.assert_allclose(found.numpy(), own(face)[0].reshape(-1, 3), atol=0.01)


def test_view_grid_matches_the_landmarkers_crop(network: LandmarkNetwork, photo: np.ndarray) -> None:
    """Landmarks found in the crop of a tilted face, mapped back, equal the landmarker's."""
    tilted = cv2.warpAffine(photo, cv2.getRotationMatrix2D((128, 128), 20, 0.8), (VIEW_SIZE_PX, VIEW_SIZE_PX))
    landmarker = open_landmarker_tracker()
    face = landmarker.find(tilted)
    assert face is not None
    face = landmarker.find_near(tilted, face)
    assert face is not None
    where = landmarker_view_grid(torch.from_numpy(face.landmarks[None, :, :2]) / VIEW_SIZE_PX)
    image = torch.from_numpy(tilted).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        seen = network(warp(image, where))[0, :, :2]
    back = warp(where, seen.T[None, :, None] / VIEW_SIZE_PX)
    np.testing.assert_allclose(back[0, :, 0].T.numpy() * VIEW_SIZE_PX, face.landmarks[:, :2], atol=1.0)


def test_loss_is_zero_for_equal_images_and_measures_a_moved_mouth(network: LandmarkNetwork, photo: np.ndarray) -> None:
    face = open_landmarker_tracker().find(photo)
    assert face is not None
    marks = torch.from_numpy(face.landmarks[None, :, :2]) / VIEW_SIZE_PX
    image = torch.from_numpy(photo).permute(2, 0, 1)[None] / 127.5 - 1
    loss = LandmarkLoss(network)
    assert loss(image, image, marks) == 0
    moved = image.roll(3, dims=3).requires_grad_()
    found = loss(moved, image, marks)
    wide = (
        landmarker_view_grid(marks)[0, 0, 0, -1] - landmarker_view_grid(marks)[0, 0, 0, 0]
    ).item()  # fractions of the image
    assert found.item() == pytest.approx(100 * 3 / VIEW_SIZE_PX / wide / 3, rel=0.3)  # along one of three axes
    found.backward()
    assert moved.grad is not None and moved.grad.isfinite().all() and moved.grad.any()
    assert not [p for p in loss.parameters() if p.requires_grad]
