"""Motion of a driver's torso: the picture below the chin is registered with that of the shot's first frame.

The registration (inverse compositional Lucas-Kanade: Baker and Matthews 2004) fits a similarity transform to the pixels
of the person below the chin. It needs the person mask of one frame per shot, and does not drift.
"""

import cv2
import numpy as np

from export3d_cli.core.face.crop import Square, crop_image
from export3d_cli.core.face.face_track import Face
from export3d_cli.core.face.landmarks import TORSO_ANCHOR
from export3d_cli.core.face.matting import PersonMatting

FACE_PX = 48  # size of the face's box in the patches that are registered
REGION_PX = (144, 80)  # width and height of the template; the torso's point is its centre
PATCH_PX = 176  # side of the patch around the template in which it is searched
MIN_AREA = 0.05  # fraction of the template that must show the person
MIN_CONTRAST = 0.1  # least standard deviation of the template at the coarse blur: clothes have 0.25, flat areas 0.03
MIN_CORRELATION = 0.5  # with the template, from which on the torso counts as found ...
SURE_CORRELATION = 0.9  # ... and no other place is tried
BLURS_PX = (2.8, 1.0)  # standard deviations of the two passes
STEPS = 8  # of a pass, at most
_X, _Y = np.meshgrid(*(np.arange(size) - (size - 1) / 2 for size in REGION_PX))
_PLACES = (_X + 1j * _Y).astype(np.complex64)  # of the template's pixels, from its centre


class TorsoTracker:
    """Called with a video's frames, uint8 (H, W, 3) RGB, and their faces; returns the torso of each, (4,) float32.

    It is x and y of a point below the chin in pixels, then roll in radians and the logarithm of the size relative to
    the first frame of the shot. All are NaN in a shot whose first frame shows no torso, or one without texture. Where
    the torso is covered it moves with the face.
    """

    def __init__(self, matting: PersonMatting) -> None:
        self._matting = matting
        self._pass: list[tuple[np.ndarray, np.ndarray]] = []  # blurred template (N,) and its derivatives (N, 4)
        self._mask = np.zeros(REGION_PX[::-1], bool)  # the template's pixels that are registered
        self._started = self.unseen = False  # the latter: whether any shot shows no torso
        self._side = 1.0  # of the patch at the size of the first frame, pixels of the frames
        self._centre, self._turn = 0j, 1 + 0j  # of the torso: its point, and rotation times size
        self._middle = 0j  # of the last face

    def __call__(self, image: np.ndarray, face: Face, *, is_new_shot: bool) -> np.ndarray:
        """Return the torso in the next frame."""
        points = face.landmarks[:, :2]
        size, middle = float(np.ptp(points, axis=0).max()), complex(*points.mean(0).tolist())
        if is_new_shot or not self._started:
            self._started, self._side = True, size * PATCH_PX / FACE_PX
            self._centre = complex(middle.real, points[:, 1].max() + TORSO_ANCHOR * size)
            self._turn = 1 + 0j
            self._set_template(image)
            self.unseen |= not self._mask.any()
        elif self._mask.any():
            self._register(image, middle - self._middle)
        self._middle = middle
        if not self._mask.any():
            return np.full(4, np.nan, np.float32)
        values = [self._centre.real, self._centre.imag, np.angle(self._turn), np.log(abs(self._turn))]
        return np.array(values, np.float32)

    def _square(self, centre: complex) -> Square:
        side = self._side * abs(self._turn)
        return centre.real - side / 2, centre.imag - side / 2, side

    def _patch(self, image: np.ndarray, square: Square) -> np.ndarray:
        """Return a square's local contrast, and where the frame shows it, (PATCH_PX, PATCH_PX, 2)."""
        luma = cv2.cvtColor(crop_image(image, square, PATCH_PX), cv2.COLOR_RGB2GRAY).astype(np.float32)
        fine = luma - cv2.GaussianBlur(luma, (0, 0), 6)
        contrast = fine / (np.sqrt(cv2.GaussianBlur(fine * fine, (0, 0), 8)) + 3)
        step, inside = square[2] / PATCH_PX, np.zeros_like(luma)
        (x0, x1), (y0, y1) = (
            (round(max(0.0, -start / step) + 1), round(min(float(PATCH_PX), (length - start) / step) - 1))
            for start, length in zip(square[:2], image.shape[1::-1], strict=True)
        )
        inside[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)] = 1
        return np.dstack([contrast, inside])

    def _set_template(self, image: np.ndarray) -> None:
        square = self._square(self._centre)
        patch, alpha = self._patch(image, square), crop_image(self._matting.alpha(image), square, PATCH_PX)
        person = cv2.dilate(alpha, np.ones((5, 5)))  # its outline moves with it
        width, height = REGION_PX
        rows, columns = (slice((PATCH_PX - n) // 2, (PATCH_PX + n) // 2) for n in (height, width))
        mask = (person[rows, columns] > 0.5) & (patch[rows, columns, 1] > 0)
        self._pass = []
        for blur in BLURS_PX:
            fine = cv2.GaussianBlur(patch[..., 0], (0, 0), blur)
            dy, dx = (d[rows, columns][mask] for d in np.gradient(fine))
            place = _PLACES[mask]
            slopes = [dx, dy, dy * place.real - dx * place.imag, dx * place.real + dy * place.imag]
            self._pass.append((fine[rows, columns][mask], np.stack(slopes, axis=1)))
        self._mask = mask & bool(mask.mean() > MIN_AREA and self._pass[0][0].std() > MIN_CONTRAST)

    def _register(self, image: np.ndarray, face_step: complex) -> None:
        """Find the torso near its last place, or near that place moved with the face, whichever matches better."""
        found = self._search(image, self._centre)
        if found[0] < SURE_CORRELATION:
            found = max(found, self._search(image, self._centre + face_step), key=lambda match: match[0])
        if found[0] > MIN_CORRELATION:
            _, self._centre, self._turn = found
        else:
            self._centre += face_step

    def _search(self, image: np.ndarray, centre: complex) -> tuple[float, complex, complex]:
        """Return the best match near a place: correlation, centre and turn."""
        square = self._square(centre)
        patch, turn, shift, correlation = self._patch(image, square), self._turn / abs(self._turn), 0j, -1.0
        for blur, (template, slopes) in zip(BLURS_PX, self._pass, strict=True):
            blurred = np.dstack([cv2.GaussianBlur(patch[..., 0], (0, 0), blur), patch[..., 1]])
            for _ in range(STEPS):
                view = _warp(blurred, turn, shift)[self._mask]
                weight = (view[:, 1] > 0.99).astype(np.float32)
                if weight.sum() < MIN_AREA * weight.size:
                    return -1.0, centre, self._turn
                error = (view[:, 0] - template) * weight
                scale = 3 * np.median(np.abs(error[weight > 0])) + 1e-3
                weight /= (1 + (error / scale) ** 2) ** 2  # Geman-McClure: hands and hair move otherwise
                weighted = slopes * weight[:, None]
                step_x, step_y, roll, growth = np.linalg.solve(weighted.T @ slopes + 1e-3 * np.eye(4),
                                                               weighted.T @ error).tolist()  # fmt: skip
                turn = turn / np.exp(growth + 1j * roll)
                shift -= turn * complex(step_x, step_y)
                if abs(complex(step_x, step_y)) + 50 * abs(complex(roll, growth)) < 0.02:
                    break
            one, two = (x[view[:, 1] > 0.99] for x in (template, view[:, 0]))
            if min(one.std(), two.std()) < 1e-6:
                return -1.0, centre, self._turn
            correlation = float(np.corrcoef(one, two)[0, 1])
        return correlation, centre + shift * square[2] / PATCH_PX, turn * abs(self._turn)


def _warp(patch: np.ndarray, turn: complex, shift: complex) -> np.ndarray:
    """Sample a patch where the template's pixels are after a similarity transform about the patch's centre."""
    width, height = REGION_PX
    offset = complex(PATCH_PX - 1, PATCH_PX - 1) / 2 + shift - turn * complex(width - 1, height - 1) / 2
    matrix = np.array([[turn.real, -turn.imag, offset.real], [turn.imag, turn.real, offset.imag]])
    return cv2.warpAffine(patch, matrix, REGION_PX, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
