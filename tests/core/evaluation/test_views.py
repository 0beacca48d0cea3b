"""Novel views and the volume's depth, against small exact scenes."""

from types import SimpleNamespace

import numpy as np
import pytest

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.photo_canvas import VolumeRender
from export3d_cli.core.evaluation import views
from export3d_cli.core.evaluation.evaluate import EvaluateOptions, evaluate
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.model.volume_renderer import HALF_EXTENT
from export3d_cli.core.runtime.camera import FOCAL, orbit_camera
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path


def test_compare_depth_ignores_scale_and_distance_and_measures_shape() -> None:
    """A head seen by a volume of half its size from another distance, with hair 10 mm too far back."""
    y, x = np.mgrid[:64, :64] / 64
    depth = (1.6 + 0.3 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)).astype(np.float32)  # metres
    classes = np.zeros((64, 64), np.uint8)
    classes[16:48, 16:48], classes[8:16, 16:48], classes[48:] = views.SKIN, views.HAIR, views.CLOTHES
    portrait = SimpleNamespace(square=(0.0, 0.0, 256.0), frame_size=(256, 256))
    camera = orbit_camera(0, radius=2.7)
    truth_focal = 5.0
    middle = float(np.median(depth[classes == views.SKIN]))
    metre = (2.7 / FOCAL) / (middle / truth_focal)  # in units, so that a pixel of the face is as wide in both
    shape = depth - middle + 0.01 * (classes == views.HAIR)
    opacity = np.where(classes > 0, 0.8, 0.0).astype(np.float32)
    own = opacity * (2.7 + metre * shape) + (1 - opacity) * (2.7 + HALF_EXTENT)
    render = VolumeRender(np.zeros((64, 64, 3), np.uint8), own.astype(np.float32), opacity, 0.0)
    scores, _ = views._compare_depth(portrait, render, camera, depth, classes, truth_focal)
    assert scores["depth_skin"] == pytest.approx(0, abs=0.05) and scores["depth_hair"] == pytest.approx(10, abs=0.1)
    assert scores["silhouette"] == pytest.approx(1)
    opacity[8:16] = 0  # bald
    scores, _ = views._compare_depth(portrait, render, camera, depth, classes, truth_focal)
    assert "depth_hair" not in scores and scores["silhouette"] == pytest.approx(0.8, abs=0.01)


def test_paste_crop_places_an_enlarged_image_in_the_photo() -> None:
    photo = np.full((40, 60, 3), 9, np.uint8)
    image = np.full((8, 8, 3), 200, np.uint8)
    pasted = views.paste_crop(photo, (20.0, -8.0, 16.0), image)
    expected = photo.copy()
    expected[:8, 20:36] = 200
    assert np.array_equal(pasted, expected)


def test_evaluate_scores_exact_views_by_yaw(tmp_path) -> None:
    """The views are frames of the example driver: the shipped model renders them from its first frame."""
    for name in ("clips", "labels", "depth"):
        (tmp_path / name).mkdir()
    with VideoReader(example_path("drive.mp4"), size=(256, 256)) as reader:
        frames = [frame for _, frame in zip(range(4), reader, strict=False)]
    with VideoWriter(tmp_path / "clips" / "a.mp4", size=(256, 256), fps=reader.info.fps) as writer:
        for frame in frames:
            writer.write(frame)
    yaw = np.array([[1, 0, 0], [-16, 0, 0], [17, 0, 0], [5, 0, 0]])
    labels = {"expression": np.array([0, 0, 0, 1]), "head_rot_deg": yaw, "intrinsics": np.diag([FOCAL, FOCAL, 1])}
    np.savez(tmp_path / "labels" / "a.npz", **labels)
    classes = np.zeros((4, 64, 64), np.uint8)
    classes[:, 24:44, 24:40] = views.SKIN
    np.savez(tmp_path / "depth" / "a.npz", depth=np.full((4, 64, 64), 1.5, np.float16), classes=classes)
    animator = Animator.from_weights(device="cpu", precision="fp32", quality="fast")
    result = evaluate(animator, tmp_path, EvaluateOptions(), out=tmp_path / "out")
    assert (
        result.protocol == "exact views"
        and list(result.mean) == [f"view {yaw}" for yaw in views.YAWS]
        and result.frames == 3
    )
    first, turned = result.mean["view 0"], result.mean["view 15"]
    assert result.mean["view 30"]["psnr"] is None
    assert first["psnr"] > 30 and first["akd478"] < 1 and turned["psnr"] > 20 and turned["lost"] == 0
    assert 0 < first["depth_skin"] < 20 and 0 < first["silhouette"] < 1  # a face is no plane
    assert (tmp_path / "out" / "a.jpg").is_file()
    with pytest.raises(InputError, match="do not apply"):
        evaluate(animator, tmp_path, EvaluateOptions(cross=True))
    (tmp_path / "labels" / "a.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="no exact views of a"):
        evaluate(animator, tmp_path)
