"""The stage `sampler` (beyond the paper): fits the linear model of `HeadSampler` in closed form, without a network."""

import csv
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from export3d_cli.core.config.schema import CAMERA_DIM
from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.landmarks import FACE_OVAL, LEFT_BROW, LEFT_EYE_OUTER, RIGHT_BROW, RIGHT_EYE_OUTER
from export3d_cli.core.model.head_sampler import HeadSampler, warp_picture
from export3d_cli.core.runtime.camera import orbit_camera, project_points, yaw_pitch_roll
from export3d_cli.core.runtime.errors import InputError, TrainingError
from export3d_cli.core.train.stage import Stage, TrainingRun
from export3d_cli.core.train.training_data import FaceDataset

MAX_LIP_GAP, MIN_EYE_GAP = 0.06, 0.06  # of a neutral frame, in distances between the outer corners of the eyes
MAX_TURN = 15.0  # largest yaw and pitch, in degrees, of frames that give a texture
EXPRESSION_COST = 6.0  # degrees of turning that count as much as the strength 1 of one coefficient of beta
INCOMPLETE_COST = 30.0  # degrees of turning that count as much as hair cut by the picture's border
SHAPE_FRAMES = 8  # number of frames of a head; its shape is the median of their landmarks
MASK_SCALE, MASK_FADE = 0.92, 0.02  # of the face's outline, and the blur of its border in sides of the picture
BROW_MARGIN = 0.025  # sides of the picture above the brows at which the mask ends: fringes are not part of a face
EXEMPLAR_OFFSET, EXEMPLAR_BOTTOM = 0.2, 0.92  # of the face in an exemplar: from the centre, and its lower end
EXEMPLAR_EXPRESSION = 4.0  # largest sum of its expression's coefficients
JPEG_QUALITY = 92
AGE_RIDGE = 30.0


class SamplerStage(Stage):
    """The whole of its run."""

    def __init__(self, run: TrainingRun, datasets: list[FaceDataset]) -> None:
        super().__init__(run, "sampler")
        self.config, self.datasets = run.config.sampler, datasets
        self.attributes = _read_attributes(self.config.attributes)

    def train(self) -> bool:
        """Fit the model and write the weights."""
        arrays, self.values = self.fit()
        self.step = 1
        self.run.log(self.name, 1, 1, self.values)
        if self.run.world.is_main:
            HeadSampler.save(self.run.weights, arrays, self.run.record | self.values, licence=self.run.config.license)
        return True

    def fit(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Return the arrays of a `HeadSampler`, and what the components explain."""
        config, heads = self.config, self._find_heads()
        side = self.run.config.model.image_size
        first = np.array([rows[0] for _, rows in heads]).reshape(-1, 2)
        marks = np.array([self.datasets[d].landmarks[k, :, :2] * side - 0.5 for d, k in first])
        camera = np.array([self.datasets[d].camera[k] for d, k in first]).reshape(-1, CAMERA_DIM)
        frontal = np.flatnonzero((np.abs(yaw_pitch_roll(camera)[:, :2]) < MAX_TURN).all(1))
        if len(frontal) < 2:
            raise TrainingError(f"2 heads must be seen from the front, lips shut and eyes open, not {len(frontal)}")
        shapes = np.stack([self._shape(rows) for _, rows in heads])
        shape_scores, shape_basis, shape_share = _principal_components(shapes.reshape(len(shapes), -1), config.shapes)
        mean = shapes.mean(0)

        # textures: faces warped to the mean shape
        points = project_points(orbit_camera(0), mean) * side - 0.5
        mask, corner = _face_mask(points, side)
        crop = np.s_[corner[1] : corner[1] + len(mask), corner[0] : corner[0] + mask.shape[1]]
        photos = [np.asarray(self.datasets[d].frames[k]) for d, k in first[frontal]]
        faces = [warp_picture(photo, points, marks[i], side)[crop] for i, photo in zip(frontal, photos, strict=True)]
        textures = np.stack(faces).astype(np.float32) / 255
        weight = np.sqrt(mask)[..., None].repeat(3, 2).ravel()
        weighted = textures.reshape(len(textures), -1) * weight
        texture_scores, _, texture_share = _principal_components(weighted, config.textures)
        centred = textures - textures.mean(0)
        texture_basis = np.tensordot(texture_scores.T, centred, 1) / len(centred) * mask[..., None]

        # exemplars: pictures that may be shown
        names = [heads[i][0] for i in frontal]
        whole = [_shows_whole_head(data) for data in self.datasets]
        may_show = [not self.attributes or self.attributes.get(name, (0.0, False))[1] for name in names]
        shown = [j for j, i in enumerate(frontal) if may_show[j] and whole[first[i][0]][first[i][1]]]
        if not shown:
            raise TrainingError("no head can be an exemplar: faces must be central, and `shown` in sampler.attributes")
        files = [self._jpeg(*first[frontal[j]]) for j in shown]
        rows = frontal[shown]
        years = np.array([self.attributes.get(name, (0.0, True))[0] for name in names])
        codes = np.concatenate([shape_scores[frontal], texture_scores], axis=1)
        age, age_fit = _fit_age(codes, years)
        report = {
            "heads": float(len(heads)), "textures": float(len(frontal)), "exemplars": float(len(shown)),
            "shape_share": shape_share, "texture_share": texture_share, "age_correlation": age_fit,
        }  # fmt: skip
        arrays = {
            "shape_mean": mean, "shape_basis": shape_basis.reshape(-1, *mean.shape), "texture_basis": texture_basis,
            "texture_points": points - corner, "age": age, "pictures": np.concatenate(files),
            "ends": np.cumsum([len(file) for file in files]).astype(np.int32), "landmarks": marks[rows],
            "camera": camera[rows], "shape": shape_scores[rows], "texture": texture_scores[shown],
            "years": years[shown],
        }  # fmt: skip
        return arrays, report

    def _find_heads(self) -> list[tuple[str, list[tuple[int, int]]]]:
        """Return each head's name and neutral frames (data set, row), the best for a texture first.

        Every `held_out`-th head is left out, for measurements.
        """
        heads: dict[str, list[tuple[float, int, int]]] = {}
        for d, data in enumerate(self.datasets):
            marks = data.landmarks[..., :2]
            ends = ((LEFT_EYE_OUTER, RIGHT_EYE_OUTER), (13, 14), (159, 145), (386, 374))
            size, lips, right_eye, left_eye = (np.linalg.norm(marks[:, a] - marks[:, b], axis=1) for a, b in ends)
            neutral = (lips < MAX_LIP_GAP * size) & (np.minimum(right_eye, left_eye) > MIN_EYE_GAP * size)
            turn = np.abs(yaw_pitch_roll(data.camera)[:, :2]).max(1)
            cost = turn + EXPRESSION_COST * data.beta[:, :52].sum(1) + INCOMPLETE_COST * ~_shows_whole_head(data)
            for clip in data.clips:
                rows = np.arange(clip.start, clip.start + clip.count)
                heads.setdefault(clip.person, []).extend((cost[k], d, k) for k in rows[neutral[rows]])
        found = [(name, [row[1:] for row in sorted(rows)]) for name, rows in heads.items() if rows]
        every = self.config.held_out
        return [head for number, head in enumerate(found) if not every or number % every]

    def _shape(self, rows: list[tuple[int, int]]) -> np.ndarray:
        rows = rows[:SHAPE_FRAMES]
        marks = np.stack([self.datasets[d].landmarks[k] for d, k in rows])
        camera = np.stack([self.datasets[d].camera[k] for d, k in rows])
        return np.asarray(np.median(landmarks_to_head_frame(marks, camera), axis=0))

    def _jpeg(self, d: int, k: int) -> np.ndarray:
        picture = cv2.cvtColor(self.datasets[d].frames[k], cv2.COLOR_RGB2BGR)
        return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].ravel()


def _shows_whole_head(data: FaceDataset) -> np.ndarray:
    """Return which frames (F,) show a quiet face and all of its hair."""
    oval = data.landmarks[:, list(FACE_OVAL), :2]
    is_central = np.abs((oval[..., 0].min(1) + oval[..., 0].max(1)) / 2 - 0.5) < EXEMPLAR_OFFSET
    is_whole = (data.person_mask[:, 0].max(1) < 128) & (oval[..., 1].max(1) < EXEMPLAR_BOTTOM)
    return np.asarray(is_central & is_whole & (data.beta[:, :52].sum(1) < EXEMPLAR_EXPRESSION))


def _read_attributes(name: str) -> dict[str, tuple[float, bool]]:
    """Read the CSV `sampler.attributes`: age and whether a person's picture may be shown, by name."""
    if not name:
        return {}
    try:
        with Path(name).open(newline="", encoding="utf-8") as file:
            return {row["person"]: (float(row["age"]), row["shown"] == "1") for row in csv.DictReader(file)}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"sampler.attributes {name} must be a CSV with person, age and shown (0 or 1): "
                         f"{error}") from error  # fmt: skip


def _principal_components(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return scores (N, count) of unit variance of rows (N, D), the scaled components, and their share of variance."""
    x = x - x.mean(0)
    values, vectors = np.linalg.eigh((x @ x.T).astype(np.float64))
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    scores = vectors[:, :count] * np.sqrt(len(x))
    return scores, scores.T @ x / len(x), float(values[:count].sum() / values.sum())


def _face_mask(points: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the soft mask (h, w) of a face below its forehead, with landmarks (478, 2) in pixels, and its corner."""
    oval = points[list(FACE_OVAL)]
    outline = oval.mean(0) + (oval - oval.mean(0)) * MASK_SCALE
    top = points[list(RIGHT_BROW + LEFT_BROW), 1].min() - BROW_MARGIN * side
    outline[:, 1] = np.maximum(outline[:, 1], top)
    mask = cv2.fillPoly(np.zeros((side, side), np.float32), [outline.round().astype(np.int32)], 1.0)
    mask = cv2.GaussianBlur(mask, (0, 0), MASK_FADE * side)
    mask[mask < 0.02] = 0
    x, y, w, h = cv2.boundingRect((mask > 0).astype(np.uint8))
    return mask[y : y + h, x : x + w], np.array([x, y])


def _fit_age(codes: np.ndarray, years: np.ndarray) -> tuple[np.ndarray, float]:
    """Return lowest, mean and highest age and its gradient by codes (N, K), and the correlation over ten folds."""
    known = years > 0
    if known.sum() < 2 * codes.shape[1]:
        return np.zeros(3 + codes.shape[1]), 0.0
    x, y = codes[known], years[known] - years[known].mean()

    def solve(rows: Any) -> np.ndarray:
        gram = x[rows].T @ x[rows] + AGE_RIDGE * np.eye(x.shape[1])
        return np.asarray(np.linalg.solve(gram, x[rows].T @ y[rows]))

    fold = np.arange(len(x)) % 10
    predicted = np.empty_like(y)
    for f in range(10):
        predicted[fold == f] = x[fold == f] @ solve(fold != f)
    ends = np.array([years[known].min(), years[known].mean(), years[known].max()])
    return np.concatenate([ends, solve(slice(None))]), float(np.corrcoef(predicted, y)[0, 1])
