"""Make `cover_detector.npz`: small networks that separate covered mouths and eyes from visible ones.

    python weights/make_cover_detector.py weights/cover_detector.npz DATASET/stills/*.jpg DATASET/clips/*.mp4

All faces in the files must be uncovered. Covers are drawn: cloth, skin with gaps between fingers, pieces of other
pictures, dark lenses. Clear glasses and covers next to the part are drawn on visible parts. For mouths and eyes one
network learns from covers that hide the whole part, and one also from covers whose edge crosses it (cups, microphones).
Files with the same name up to the first "_" show one person. The script keeps every fifth person for a test, and prints
its result.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.face.cover_detection import (
    CROP_SIZE_PX,
    NETWORKS,
    PICTURE_SIZE_PX,
    crop_part,
    normalize_crops,
)
from export3d_cli.core.face.crop import crop_with_padding
from export3d_cli.core.face.landmarks import EYE_RIMS, LEFT_EYE, LIPS, OUTER_LIPS, RIGHT_EYE
from export3d_cli.core.face.tracker import open_landmarker_tracker
from export3d_cli.core.media.image import has_image_suffix, read_image
from export3d_cli.core.media.reader import VideoReader

FRAMES_PER_CLIP = 5
SAMPLES, EPOCHS, BATCH = 24000, 8, 64
SIZE = 96  # side at which crops are drawn on
SKIN_POINTS = (151, 108, 337, 50, 280, 205, 425, 199, 10)  # landmarks with skin around them
PARTS_POINTS = list(LIPS + RIGHT_EYE + LEFT_EYE)
OUTLINES = (OUTER_LIPS, EYE_RIMS[0][1], EYE_RIMS[1][1])  # landmarks around mouth, right and left eye
# Fraction of lips and of an eye that a cover hides whose edge crosses them: when it counts, and when it does not.
HIDDEN, VISIBLE = ((0.35, 0.95), (0.5, 0.95)), (0, 0.08)
CLOTH = np.array([[170, 205, 225], [150, 190, 215], [235, 235, 235], [25, 25, 28], [120, 160, 140], [200, 180, 190]])
Face = tuple[np.ndarray, np.ndarray]  # picture uint8 (256, 256, 3), landmarks (478, 2) in its sizes
Y, X = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE - 0.5


def read_faces(paths: list[Path]) -> dict[str, list[Face]]:
    """Return the faces of each person, from a photo or some frames of a clip."""
    tracker, people = open_landmarker_tracker(threads=1), {}
    for path in paths:
        frames = [read_image(path)] if has_image_suffix(path) else list(VideoReader(path))
        for frame in frames[:: max(1, len(frames) // FRAMES_PER_CLIP)][:FRAMES_PER_CLIP]:
            face = max(tracker.find_all(frame), key=lambda f: np.ptp(f.landmarks[:, 0]), default=None)
            if face is not None:
                low, high = face.landmarks[:, :2].min(0), face.landmarks[:, :2].max(0)
                side = 2 * float((high - low).max())
                square = (*((low + high) / 2 - side / 2), side)
                picture = crop_with_padding(frame, square, PICTURE_SIZE_PX)
                people.setdefault(path.name.split("_")[0], []).append(
                    (picture, (face.landmarks[:, :2] - square[:2]) / side)
                )
    return people


class CoverPainter:
    """Draws training crops, reproducible by `seed`; the edge of some covers crosses the part if `crossing`."""

    def __init__(self, faces: list[Face], seed: int, *, crossing: bool) -> None:
        self.faces, self.r, self.crossing = faces, np.random.default_rng(seed), crossing

    def draw(self, part: int) -> tuple[np.ndarray, bool]:
        """Return a crop of a part (see `crop_part`), uint8, and whether it is covered: half of them are."""
        r, covered = self.r, self.r.random() < 0.5
        face, other = (self.faces[r.integers(len(self.faces))] for _ in range(2))
        shift_x, shift_y, roll = r.normal(0, 0.05, 3)
        view = (part, shift_x, shift_y, np.exp(r.normal(0, 0.08)), roll, SIZE)
        crop = crop_part(*face, *view).astype(np.float32)
        if not covered and part and r.random() < 0.35:
            crop = self.clear_glasses(crop)
        if covered or r.random() < (0.4 if self.crossing else 0.2):
            if self.crossing and r.random() < 0.4:
                outline = np.rint(face[1][list(OUTLINES[part])] * PICTURE_SIZE_PX).astype(np.int32)
                inside = cv2.fillPoly(np.zeros(face[0].shape[:2], np.uint8), [outline], 255)
                hidden = r.uniform(*(HIDDEN[min(part, 1)] if covered else VISIBLE))
                mask = self.crossing_shape(part, crop_part(inside, face[1], *view) > 127, hidden)
            else:
                mask = self.shape(part) if covered else self.shape_next_to(part)
            if self.crossing and r.random() < 0.4:  # the cover's shadow
                shadow = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), r.uniform(2, 8))[..., None]
                crop = crop * (1 - r.uniform(0, 0.7) * shadow)
            mask = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), r.uniform(0.4, 2))[..., None]
            crop = crop * (1 - mask) + self.cover(part, face, other) * mask
        return self.photograph(crop), covered

    def cover(self, part: int, face: Face, other: Face) -> np.ndarray:
        """Return the texture of a cover, float (SIZE, SIZE, 3)."""
        r = self.r
        kind = r.choice(["cloth", "skin", "piece", "lens"], p=[0.1, 0.2, 0.3, 0.4] if part else [0.4, 0.25, 0.35, 0])
        if kind == "cloth":
            colour = CLOTH[r.integers(len(CLOTH))] * r.uniform(0.5, 1.05) if r.random() < 0.6 else r.uniform(5, 250, 3)
            pattern = r.normal(0, r.uniform(0, 60) if r.random() < 0.3 else r.uniform(0, 8), (*r.integers(2, 20, 2), 3))
            texture = self.shade(colour + cv2.resize(pattern, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC))
            if self.crossing and r.random() < 0.3:  # the grille of a microphone
                period = r.uniform(2, 8)
                grille = np.sign(np.sin((X + Y) * SIZE / period * 2) * np.sin((X - Y) * SIZE / period * 2))
                texture = texture * (1 + r.uniform(0, 0.4) * grille[..., None])
            texture = self.lines(texture, r.integers(0, 7), pleats=True)
        elif kind == "skin":
            texture = self.piece(face, *self.skin_square(face)) * r.uniform(0.75, 1.12)
            texture = self.lines(self.shade(texture) if r.random() < 0.5 else texture, r.integers(0, 5))
        elif kind == "piece":
            texture = self.piece(other, *self.square_off_parts(other)) * r.uniform(0.6, 1.2)
        else:
            dark = r.random() < 0.75
            texture = self.shade(r.uniform(3, 60) + r.normal(0, 8, 3) if dark else r.uniform(20, 160, 3))
            if r.random() < 0.5:  # a reflected scene
                texture = texture + r.uniform(0.02, 0.4) * self.piece(other, r.uniform(45, 210, 2), r.uniform(25, 90))
            if r.random() < 0.5:  # a reflected lamp
                (x, y), (w, h) = r.uniform(-0.4, 0.4, 2), r.uniform(0.03, 0.3, 2)
                texture = texture + np.exp(-(((X - x) / w) ** 2) - ((Y - y) / h) ** 2)[..., None] * r.uniform(20, 200)
        return np.clip(texture + r.normal(0, r.uniform(0, 3), texture.shape), 0, 255)

    def shade(self, texture: np.ndarray) -> np.ndarray:
        """Light a texture or colour unevenly."""
        r, angle = self.r, self.r.uniform(0, 2 * np.pi)
        light = 1 + r.uniform(0, 0.5) * 2 * (np.cos(angle) * X + np.sin(angle) * Y)
        light -= r.uniform(0, 1.2) * ((X - r.uniform(-0.3, 0.3)) ** 2 + (Y - r.uniform(-0.3, 0.3)) ** 2)
        return texture * np.clip(light, 0.2, 1.6)[..., None]

    def lines(self, texture: np.ndarray, count: int, *, pleats: bool = False) -> np.ndarray:
        """Draw parallel lines, mostly dark: pleats or gaps between fingers."""
        r = self.r
        angle = r.normal(np.pi / 2, 0.1) if pleats else r.uniform(0, np.pi)
        along, across = np.cos(angle) * Y - np.sin(angle) * X, np.cos(angle) * X + np.sin(angle) * Y
        across = across + r.uniform(-0.3, 0.3) * along**2
        for _ in range(count):
            profile = np.exp(-(((across - r.uniform(-0.5, 0.5)) / r.uniform(0.008, 0.03)) ** 2))
            texture = texture * (1 - r.uniform(-0.25, 0.6) * profile)[..., None]
        return texture

    def skin_square(self, face: Face) -> tuple[np.ndarray, float]:
        """Return centre and side, in pixels, of a square of skin."""
        r, points = self.r, face[1] * PICTURE_SIZE_PX
        for _ in range(10):
            centre, side = points[r.choice(SKIN_POINTS)] + r.normal(0, 4, 2), r.uniform(14, 34)
            if (np.abs(points[PARTS_POINTS] - centre).max(1) > side / 2).all():
                break
        return centre, side

    def square_off_parts(self, face: Face) -> tuple[np.ndarray, float]:
        """Return centre and side, in pixels, of a square with neither eye nor mouth."""
        r, points = self.r, face[1] * PICTURE_SIZE_PX
        for _ in range(20):
            side = r.uniform(25, 90)
            centre = r.uniform(side / 2, PICTURE_SIZE_PX - side / 2, 2)
            if (np.abs(points - centre).max(1) > side / 2 + 4).all():
                break
        return centre, side

    def piece(self, face: Face, centre: np.ndarray, side: float) -> np.ndarray:
        """Return a turned square of a picture."""
        matrix = cv2.getRotationMatrix2D(centre.tolist(), self.r.uniform(-180, 180), SIZE / side)
        matrix[:, 2] += SIZE / 2 - centre
        flags = {"flags": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_REFLECT}
        return cv2.warpAffine(face[0], matrix, (SIZE, SIZE), **flags).astype(np.float32)

    def shape(self, part: int) -> np.ndarray:
        """Return the mask of a cover that hides the part: everything, or an ellipse to rectangle."""
        r = self.r
        if r.random() < 0.45:
            return np.ones((SIZE, SIZE))
        width, height = (r.uniform(0.38, 0.7), r.uniform(0.3, 0.7)) if part else r.uniform((0.42, 0.32), 0.8)
        (x, y), angle, power = r.normal(0, 0.03, 2), r.normal(0, 0.15), r.choice([2, 4, 8])
        along = np.cos(angle) * (X - x) + np.sin(angle) * (Y - y)
        across = np.cos(angle) * (Y - y) - np.sin(angle) * (X - x)
        return (np.abs(along) / width) ** power + (np.abs(across) / height) ** power < 1

    def crossing_shape(self, part: int, inside: np.ndarray, hidden: float) -> np.ndarray:
        """Return the mask of a cover, a bent plane, a ball or a cup, that hides a fraction of the pixels `inside`."""
        r = self.r
        angle = r.uniform(0, 2 * np.pi) if part or r.random() < 0.3 else r.normal(np.pi / 2, 0.4)
        along, across = np.cos(angle) * X + np.sin(angle) * Y, np.cos(angle) * Y - np.sin(angle) * X
        across = across - r.normal(0, 0.06)
        kind = r.integers(3)
        if kind == 0:
            field = along + r.uniform(-0.8, 0.8) * across**2
        elif kind == 1:
            field = -np.hypot(along - r.uniform(0.1, 0.6), across)
        else:
            field = along + r.uniform(-0.8, 0.8) * across**2
            field = np.where(np.abs(across) < r.uniform(0.2, 0.5) * (1 - r.uniform(0, 0.6) * along), field, -1)
        return field > np.quantile(field[inside], 1 - hidden) if inside.any() else field > 0.3

    def shape_next_to(self, part: int) -> np.ndarray:
        """Return the mask of a cover next to the part."""
        r, angle = self.r, self.r.uniform(0, 2 * np.pi)
        border = ((0.26, 0.4) if part else (0.3, 0.42))[int(abs(np.sin(angle)) <= 0.6)] + r.uniform(0, 0.1)
        bend = r.uniform(-0.3, 0.3) * (np.cos(angle) * Y - np.sin(angle) * X) ** 2
        return np.cos(angle) * X + np.sin(angle) * Y + bend > border

    def clear_glasses(self, crop: np.ndarray) -> np.ndarray:
        """Draw a rim, perhaps a reflection or a slight tint."""
        r = self.r
        (x, y), power = r.normal((0, 0.06), 0.05), r.choice([2, 3, 5])
        radius = np.abs((X - x) / r.uniform(0.38, 0.62)) ** power + np.abs((Y - y) / r.uniform(0.24, 0.45)) ** power
        radius = radius ** (1 / power)
        rim = np.exp(-(((radius - 1) / r.uniform(0.015, 0.07)) ** 4))[..., None] * r.uniform(0.6, 1)
        crop = crop * (1 - rim) + (r.uniform(0, 90) + r.normal(0, 10, 3)) * rim
        lens = (radius < 1)[..., None]
        if r.random() < 0.4:
            angle = r.uniform(0, np.pi)
            streak = (np.cos(angle) * X + np.sin(angle) * Y - r.uniform(-0.4, 0.4)) / r.uniform(0.02, 0.12)
            crop = crop + lens * np.exp(-(streak**2))[..., None] * r.uniform(10, 70)
        return np.where(lens, crop * r.uniform(0.75, 1), crop) if r.random() < 0.3 else crop

    def photograph(self, crop: np.ndarray) -> np.ndarray:
        """Vary light, contrast, sharpness and noise: uint8 (CROP_SIZE_PX, CROP_SIZE_PX, 3)."""
        r = self.r
        if r.random() < 0.2:
            crop = np.repeat(crop.mean(-1, keepdims=True), 3, axis=-1)
        if r.random() < 0.2:
            crop = crop * r.uniform(0.5, 1.3, 3)
        mean = crop.mean()
        crop = (crop - mean) * r.uniform(0.7, 1.2) + mean * r.uniform(0.75, 1.15)
        if r.random() < 0.4:
            crop = cv2.GaussianBlur(crop, (0, 0), r.uniform(0.3, 3.5))
        crop = cv2.resize(crop, (CROP_SIZE_PX, CROP_SIZE_PX), interpolation=cv2.INTER_AREA)
        return np.clip(crop + r.normal(0, r.uniform(0, 4), crop.shape), 0, 255).astype(np.uint8)


class Network(nn.Module):
    """Four convolutions with stride 2, then one logit; `CoverDetector` does the same."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 16, 24, 32)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.out = nn.Linear(widths[-1] * (CROP_SIZE_PX // 16) ** 2, 1)

    def forward(self, crops: Tensor) -> Tensor:
        """Return the logits (N,) that crops (N, 3, s, s), see `to_input`, are covered."""
        for layer in self.layers:
            crops = F.relu(layer(crops))
        return self.out(crops.permute(0, 2, 3, 1).flatten(1))[:, 0]


def draw_samples(faces: list[Face], count: int, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` crops for one of `NETWORKS`, and whether each is covered."""
    painter, eyes = CoverPainter(faces, seed, crossing=name.endswith("crossing")), name.startswith("eye")
    crops, covered = zip(*(painter.draw(1 + k % 2 if eyes else 0) for k in range(count)), strict=True)
    return np.stack(crops), np.array(covered)


def to_input(crops: np.ndarray) -> Tensor:
    """Return the network's input, (N, 3, s, s), for crops (N, s, s, 3)."""
    return torch.from_numpy(normalize_crops(crops)).permute(0, 3, 1, 2)


def train(crops: np.ndarray, covered: np.ndarray) -> Network:
    """Train a network on crops and their labels."""
    network, labels = Network(), torch.from_numpy(covered).float() * 0.98 + 0.01
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=EPOCHS * (len(crops) // BATCH))
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(crops))[: len(crops) // BATCH * BATCH].split(BATCH):
            loss = F.binary_cross_entropy_with_logits(network(to_input(crops[rows.numpy()])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def main(out: Path, paths: list[Path]) -> None:
    """Train the networks on the faces in `paths`, test them, and write them to `out`."""
    people = read_faces(paths)
    test_people = sorted(people)[::5]
    faces = [face for person in sorted(people) if person not in test_people for face in people[person]]
    test_faces = [face for person in test_people for face in people[person]]
    print(f"{len(faces)} faces of {len(people) - len(test_people)} people, {len(test_faces)} for the test")
    weights: dict[str, np.ndarray] = {}
    for names in zip(*NETWORKS, strict=True):
        torch.manual_seed(0)
        for name in names:
            network = train(*draw_samples(faces, SAMPLES, 1, name))
            crops, covered = draw_samples(test_faces, SAMPLES // 8, 2, name)
            with torch.no_grad():
                logits = network(to_input(crops)).numpy()
            print(f"{name}: {np.mean((logits > 0) == covered):.2%} of the test's crops are classified correctly")
            for k, layer in enumerate(network.layers):
                weights[f"{name}.{k}"] = layer.weight.detach().permute(2, 3, 1, 0).numpy()
                weights[f"{name}.{k}.bias"] = layer.bias.detach().numpy()
            weights[f"{name}.out"] = network.out.weight.detach()[0].numpy()
            weights[f"{name}.out.bias"] = network.out.bias.detach()[0].numpy()
    np.savez_compressed(out, **{key: value.astype(np.float16) for key, value in weights.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
