"""Novel views: of real photos by their own consistency, of rendered heads against exact pictures and depth."""

from pathlib import Path

import cv2
import numpy as np

from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.novel_view import NovelViewOptions, orbit_cameras
from export3d_cli.core.animation.photo_canvas import FrameLayers, VolumeRender
from export3d_cli.core.dataset.exact_views import CLOTHES, HAIR, SKIN, read_labels
from export3d_cli.core.evaluation import metrics
from export3d_cli.core.evaluation.protocol import read_rows
from export3d_cli.core.evaluation.scorer import Frames, MetricSuite, Scores, TrackedFrames
from export3d_cli.core.face.head_pose import fit_cameras
from export3d_cli.core.model.volume_renderer import HALF_EXTENT

YAWS = (0, 15, 30, 45, 60)  # degrees; each view counts for the nearest one
MIN_OPACITY = 0.5  # opacity from which the volume shows a surface
DEPTH_RANGE_MM = 150  # before and behind the face, in the pictures of depth


def paste_crop(photo: np.ndarray, square: tuple[float, float, float], image: np.ndarray) -> np.ndarray:
    """Return a copy of a photo with the square x0, y0, side, whole pixels, replaced by an image of any size."""
    x0, y0, side = map(round, square)
    left, top, result = max(x0, 0), max(y0, 0), photo.copy()
    part = result[top : y0 + side, left : x0 + side]
    large = cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC)[top - y0 :, left - x0 :]
    part[:] = large[: part.shape[0], : part.shape[1]]
    return result


def copied_fraction(portrait: Portrait, layers: list[FrameLayers]) -> float:
    """Return the fraction of whole frames that is the photo's pixels, moved: everything outside the network's crop."""
    (x0, y0, side), (width, height) = portrait.square, portrait.frame_size
    inside = np.prod([min(x0 + side, width) - max(x0, 0), min(y0 + side, height) - max(y0, 0)])
    synthesised = 1 - np.mean([layer.volume.copied for layer in layers])
    return float(1 - synthesised * inside / (width * height))


def score_novel_views(animator: Animator, portrait: Portrait, suite: MetricSuite,
                      source: TrackedFrames) -> tuple[dict[str, Scores], Frames]:  # fmt: skip
    """Score views of a photo `source`, turned to both sides, by pose and identity; also return the pictures."""
    turns = [NovelViewOptions(yaw=(-yaw, yaw), frames=2, loop="once") for yaw in YAWS[1:]]
    cameras = np.concatenate([orbit_cameras(portrait.camera, turn) for turn in turns])
    tracked = suite.track(list(animator.view(portrait, cameras)), independent=True)
    scores = {}
    for number, yaw in enumerate(YAWS[1:]):
        rows = np.array([2 * number, 2 * number + 1])
        found = rows[tracked.found[rows]]
        scores[f"view {yaw}"] = {"lost": 1 - len(found) / 2} | suite.identity(tracked, source, rows)
        if len(found) and tracked.motion is not None and source.motion is not None:
            aucon = metrics.action_unit_consistency(tracked.motion.beta[found], source.motion.beta)
            scores[f"view {yaw}"]["aucon"] = aucon
            angles = metrics.rotation_angle(_crop_cameras(portrait, tracked)[found], cameras[found])
            scores[f"view {yaw}"]["view_pose"] = float(angles.mean())
    return scores, [*tracked.frames[-2::-2], *tracked.frames[1::2]]  # from left to right


def _crop_cameras(portrait: Portrait, tracked: TrackedFrames) -> np.ndarray:
    """Return the cameras (T, 25) of faces tracked in whole frames, as cameras of the network's crop."""
    assert tracked.motion is not None
    x0, y0, side = portrait.square
    return fit_cameras((tracked.motion.landmarks * portrait.frame_size[0] - (x0, y0, 0)) / side)


def score_head(animator: Animator, dataset: Path, name: str,
               suite: MetricSuite) -> tuple[dict[str, Scores], dict[str, Frames]]:  # fmt: skip
    """Score views of a head, seen by the cameras tracked in the true pictures, from its most frontal one, by yaw."""
    labels = read_labels(dataset, name)
    rows = np.flatnonzero(labels.expression == labels.expression[0])
    yaws, pitches, _ = labels.rotation[rows].T
    depth, classes = labels.depth[rows], labels.classes[rows]
    frames = read_rows(dataset / "clips" / f"{name}.mp4", rows)
    first = int((np.abs(yaws) + np.abs(pitches)).argmin())
    portrait = animator.portrait(frames[first], name=name)
    frames = [cv2.resize(frame, portrait.frame_size, interpolation=cv2.INTER_AREA) for frame in frames]
    tracked = suite.track(frames, independent=True)
    seen = np.flatnonzero(tracked.found)
    cameras = _crop_cameras(portrait, tracked)[seen]
    photo = suite.track([frames[first]])
    layers = list(animator.view(portrait, cameras, layers=True))
    views = suite.track([portrait.canvas.compose(layer) for layer in layers], independent=True)
    raw = [paste_crop(portrait.canvas.photo, portrait.square, x.volume.colours) for x in layers]
    truths = [tracked.frames[k] for k in seen]
    pictures: dict[str, Frames] = {"truth": truths, "result": views.frames, "raw": raw, "true depth": [], "depth": []}
    by_yaw: dict[int, list[Scores]] = {yaw: [] for yaw in YAWS}
    for number, row in enumerate(seen):
        render, camera = layers[number].volume, cameras[number]
        score, reliefs = _compare_depth(portrait, render, camera, depth[row], classes[row], labels.focal)
        pictures["true depth"].append(reliefs[0])
        pictures["depth"].append(reliefs[1])
        head = (classes[row] > 0) & (classes[row] != CLOTHES)
        head = cv2.resize(head.astype(np.uint8), portrait.frame_size, interpolation=cv2.INTER_NEAREST) > 0
        score["psnr"] = metrics.psnr(views.frames[number][head], tracked.frames[row][head])
        score["lost"] = float(not views.found[number])
        score["copied"] = copied_fraction(portrait, [layers[number]])
        score |= suite.identity(views, photo, np.array([number]))
        if views.found[number]:
            assert views.motion is not None and tracked.motion is not None
            own, true = views.motion.landmarks[number], tracked.motion.landmarks[row]
            score["akd478"] = metrics.landmark_distance(own[None], true[None])
        turn = abs(float(yaws[row] - yaws[first]))
        by_yaw[min(YAWS, key=lambda yaw: abs(yaw - turn))].append(score)
    means = {}
    for yaw, scores in by_yaw.items():
        keys = dict.fromkeys(key for score in scores for key in score)
        means[f"view {yaw}"] = {key: metrics.finite_mean([score.get(key, np.nan) for score in scores]) for key in keys}
    return means, pictures


def _compare_depth(portrait: Portrait, render: VolumeRender, camera: np.ndarray, depth: np.ndarray, classes: np.ndarray,
                   focal: float) -> tuple[Scores, tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Compare a volume's depth with the truth (d, d) at the truth's pixels; also return both in colours."""
    count, (x0, y0, side), size = len(depth), portrait.square, portrait.frame_size[0]
    centres = (np.arange(count, dtype=np.float32) + 0.5) * size / count  # pixels of the frame
    x, y = np.meshgrid((centres - x0) / side, (centres - y0) / side)  # crop units
    inside = (x > 0) & (x < 1) & (y > 0) & (y < 1)
    column, line = ((v * len(render.depth) - 0.5).astype(np.float32) for v in (x, y))
    opacity, own = (
        cv2.remap(image, column, line, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        for image in (render.opacity, render.depth)
    )
    far = float(np.linalg.norm(camera.reshape(25)[[3, 7, 11]])) + HALF_EXTENT
    own = (own - (1 - opacity) * far) / np.maximum(opacity, MIN_OPACITY)
    surface = inside & (opacity > MIN_OPACITY)
    known, head = inside & (classes != CLOTHES), classes > 0
    both, either = (surface & head & known).sum(), ((surface | head) & known).sum()
    scores = {"silhouette": float(both / max(1, either))}
    skin = surface & (classes == SKIN)
    if not skin.any():
        return scores, (np.zeros((count, count, 3), np.uint8),) * 2
    true_middle, own_middle = float(np.median(depth[skin])), float(np.median(own[skin]))
    # One photo does not show the scale: a pixel of the face must be as wide in both.
    scale = (true_middle / focal) / (own_middle / float(camera[16]) * size / side)  # metres in a unit
    relief, own_relief = 1000 * (depth - true_middle), 1000 * scale * (own - own_middle)
    for key, part in (("depth_skin", skin), ("depth_hair", surface & (classes == HAIR))):
        if part.any():
            scores[key] = float(np.median(np.abs(relief - own_relief)[part]))
    return scores, (_colour_relief(relief, classes > 0), _colour_relief(own_relief, surface))


def _colour_relief(relief: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return a relief (d, d) in mm in colours, black outside the mask: red is near, blue is far."""
    nearness = (0.5 - relief / (2 * DEPTH_RANGE_MM)).clip(0, 1)
    colours = cv2.applyColorMap((255 * nearness).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    return np.uint8(colours * mask[..., None])  # type: ignore[return-value]
