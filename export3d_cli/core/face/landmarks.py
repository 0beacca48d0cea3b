"""Indices of the 478 landmarks of MediaPipe's face mesh, by part of the face. Data only.

"Left" and "right" are the person's: the left eye lies at the image's right.
"""

from typing import NamedTuple

NUM_MESH_VERTICES = 468  # points of the mesh; the irises add 10
NUM_LANDMARKS = 478

NOSE_TIP, NOSE_BASE, FOREHEAD_TOP, CHIN = 1, 2, 10, 152
RIGHT_EYE_OUTER, RIGHT_EYE_INNER, LEFT_EYE_INNER, LEFT_EYE_OUTER = 33, 133, 362, 263  # corners of the eyes
RIGHT_MOUTH_CORNER, LEFT_MOUTH_CORNER = 61, 291  # of the outer lips

# Outlines of the eyes: from the right eye's outer corner and the left eye's inner one, upper lid first.
RIGHT_EYE = (33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7)
LEFT_EYE = (362, 398, 384, 385, 386, 387, 388, 466, 263, 249, 390, 373, 374, 380, 381, 382)
RIGHT_IRIS, LEFT_IRIS = (468, 469, 470, 471, 472), (473, 474, 475, 476, 477)  # centre, then four points around it
# Inner lips from the right corner of the mouth to the left one, corners included.
UPPER_INNER_LIP = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308)
LOWER_INNER_LIP = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)
INNER_LIPS = UPPER_INNER_LIP + LOWER_INNER_LIP[-2:0:-1]
OUTER_LIPS = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146)
LIPS = INNER_LIPS + OUTER_LIPS
FACE_OVAL = (  # clockwise from the top of the forehead
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149, 150,
    136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
)  # fmt: skip
RIGHT_BROW = (46, 53, 52, 65, 55, 70, 63, 105, 66, 107)
LEFT_BROW = (276, 283, 282, 295, 285, 300, 293, 334, 296, 336)
JAW = (172, 136, 150, 149, 176, 148, 152, 377, 400, 378, 379, 365, 397)
# (iris centre, rim) of the right and the left eye: both rims run from the outer corner over the upper lid to the inner
# corner, at index 8, and back.
EYE_RIMS = ((RIGHT_IRIS[0], RIGHT_EYE), (LEFT_IRIS[0], LEFT_EYE[8::-1] + LEFT_EYE[:8:-1]))
# Folds of the upper lids, right and left, from the outer corner to the inner one, corners excluded.
EYELID_FOLDS = ((247, 30, 29, 27, 28, 56, 190), (467, 260, 259, 257, 258, 286, 414))

BROWS = (282, 52)  # the middle of the left and of the right one

ARCFACE_POINTS = (NOSE_TIP, RIGHT_MOUTH_CORNER, LEFT_MOUTH_CORNER)  # of ArcFace's five, after the eyes' means
DLIB_POINTS = (LEFT_EYE_OUTER, LEFT_EYE_INNER, RIGHT_EYE_OUTER, RIGHT_EYE_INNER, NOSE_BASE)  # of dlib's face chips

# Points that hold still on the skull in every expression, with their weights in MediaPipe's pose solver.
RIGID_WEIGHTS = {
    4: 0.07091, 6: 0.0321, 10: 0.00845, 33: 0.05872, 54: 0.00767, 67: 0.00908, 117: 0.00979, 119: 0.01457, 121: 0.01859,
    127: 0.0052, 129: 0.12063, 132: 0.00556, 133: 0.05329, 136: 0.06689, 143: 0.01482, 147: 0.01426, 198: 0.02546,
    205: 0.04725, 263: 0.05872, 284: 0.00767, 297: 0.00908, 346: 0.00979, 348: 0.01457, 350: 0.01859, 356: 0.0052,
    358: 0.12063, 361: 0.00556, 362: 0.05329, 365: 0.06689, 372: 0.01482, 376: 0.01426, 420: 0.02546, 425: 0.04725,
}  # fmt: skip
RIGID_POINTS = tuple(RIGID_WEIGHTS)

# The 146 points that the blendshape network reads, in its order.
BLENDSHAPE_POINTS = (
    0, 1, 4, 5, 6, 7, 8, 10, 13, 14, 17, 21, 33, 37, 39, 40, 46, 52, 53, 54, 55, 58, 61, 63, 65, 66, 67, 70, 78, 80, 81,
    82, 84, 87, 88, 91, 93, 95, 103, 105, 107, 109, 127, 132, 133, 136, 144, 145, 146, 148, 149, 150, 152, 153, 154,
    155, 157, 158, 159, 160, 161, 162, 163, 168, 172, 173, 176, 178, 181, 185, 191, 195, 197, 234, 246, 249, 251, 263,
    267, 269, 270, 276, 282, 283, 284, 285, 288, 291, 293, 295, 296, 297, 300, 308, 310, 311, 312, 314, 317, 318, 321,
    323, 324, 332, 334, 336, 338, 356, 361, 362, 365, 373, 374, 375, 377, 378, 379, 380, 381, 382, 384, 385, 386, 387,
    388, 389, 390, 397, 398, 400, 402, 405, 409, 415, 454, 466, 468, 469, 470, 471, 472, 473, 474, 475, 476, 477,
)  # fmt: skip

# iBUG's 68 points (jaw, brows, nose, eyes, outer and inner lips) as the nearest of the 478.
IBUG68 = (
    162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389, 71, 63, 105, 66, 107, 336, 296,
    334, 293, 301, 168, 197, 5, 4, 75, 97, 2, 326, 305, 33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380, 61,
    39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87,
)  # fmt: skip


class MeasurePoints(NamedTuple):
    """Points of the measures in beta. Pairs are (left, right), groups of points are averaged."""

    eye_corners: tuple[tuple[int, int], tuple[int, int]]
    lip_gaps: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # left, centre, right: (upper lip, lower lip)
    mouth_corners: tuple[int, int]
    nose_base: int  # still while the mouth moves
    eyelids: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # left, right: (upper lid, lower lid)
    irises: tuple[int, ...] = ()  # centres


MEASURE_POINTS = MeasurePoints(
    eye_corners=((LEFT_EYE_INNER, LEFT_EYE_OUTER), (RIGHT_EYE_OUTER, RIGHT_EYE_INNER)),
    lip_gaps=(((311,), (402,)), ((13,), (14,)), ((81,), (178,))),
    mouth_corners=(LEFT_MOUTH_CORNER, RIGHT_MOUTH_CORNER),
    nose_base=NOSE_BASE,
    eyelids=(((385, 386, 387), (380, 374, 373)), ((160, 159, 158), (144, 145, 153))),
    irises=(LEFT_IRIS[0], RIGHT_IRIS[0]),
)
IBUG68_MEASURE_POINTS = MeasurePoints(
    eye_corners=((42, 45), (36, 39)),
    lip_gaps=(((63,), (65,)), ((62,), (66,)), ((61,), (67,))),
    mouth_corners=(54, 48),
    nose_base=33,
    eyelids=(((43, 44), (46, 47)), ((37, 38), (40, 41))),
)
TORSO_ANCHOR = 0.98  # face boxes from the chin down to the point about which a torso turns
