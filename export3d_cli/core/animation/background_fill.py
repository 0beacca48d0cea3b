"""Fill the background behind a person: edges continue from the surroundings, with their grain."""

import cv2
import numpy as np

WORKING_SIDE_PX = 256  # longer side of the image in which a hole is filled
RADIUS_PX = 10  # neighbourhood of Telea's method, working pixels
GRAIN_SD_PX = 0.7  # of the blur that makes noise as coarse as that of photos
LOOSE_HAIR_REACH = 0.12  # crop sides around the person in which loose hair is looked for
LOOSE_HAIR_WINDOW = 0.045  # crop sides: window whose median shows the background without loose hair
LOOSE_HAIR_CONTRAST = (5.0, 4.0)  # least levels, and times the background's own texture, that loose hair differs by
MAX_MEDIAN_PX = 255  # largest window of OpenCV's median


def fill_hole(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Fill a hole, bool (H, W), of an image, uint8 (H, W, 3).

    Colours and edges continue from the hole's border (Telea 2004), at a reduced size. Noise as strong as the image's
    grain outside the hole is added.
    """
    if not hole.any() or hole.all():
        return image.copy()
    H, W = hole.shape
    scale = min(1.0, WORKING_SIDE_PX / max(H, W))
    size = max(1, round(W * scale)), max(1, round(H * scale))
    known = (~hole).astype(np.float32)
    weight = cv2.resize(known, size, interpolation=cv2.INTER_AREA)
    small = cv2.resize(image * known[..., None], size, interpolation=cv2.INTER_AREA) / weight.clip(1e-3)[..., None]
    small = cv2.inpaint(np.uint8(small.clip(0, 255)), np.uint8(weight < 0.5), RADIUS_PX, cv2.INPAINT_TELEA)  # type: ignore[call-overload]
    filled = cv2.resize(small, (W, H), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    strength = np.median(np.abs(grey - cv2.GaussianBlur(grey, (0, 0), 2 * GRAIN_SD_PX))[~hole])
    noise = cv2.GaussianBlur(np.random.default_rng(0).standard_normal((H, W), np.float32), (0, 0), GRAIN_SD_PX)
    filled += (noise * strength / np.median(np.abs(noise)))[..., None]
    return np.where(hole[..., None], np.rint(filled.clip(0, 255)), image).astype(np.uint8)


def find_loose_hair(image: np.ndarray, person: np.ndarray, side: float) -> np.ndarray:
    """Return where an image, uint8 (H, W, 3), shows thin structures around a person: bool (H, W), as `person` is.

    They differ from the median of their surroundings by more than the background's texture does. `side` is that of the
    face crop in pixels.
    """

    def window(size: float) -> int:
        return 2 * max(1, round(size * side / 2)) + 1

    median = cv2.medianBlur(image, min(window(LOOSE_HAIR_WINDOW), MAX_MEDIAN_PX))
    difference = cv2.absdiff(image, median).max(-1).astype(np.float32)
    background = (~person).astype(np.float32)
    area = (window(LOOSE_HAIR_REACH),) * 2
    texture = cv2.blur(difference * background, area) / cv2.blur(background, area).clip(1e-3)
    near = cv2.dilate(person.astype(np.uint8), np.ones((window(2 * LOOSE_HAIR_REACH),) * 2, np.uint8)) > 0
    least, ratio = LOOSE_HAIR_CONTRAST
    return near & ~person & (difference > least + ratio * texture)
