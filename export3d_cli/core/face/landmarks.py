"""The canonical face: MediaPipe's mesh, read from the landmarker bundle, and what is known about its 478 points."""

from __future__ import annotations

NUM_LANDMARKS, NUM_MESH_VERTICES = 478, 468  # all points; those of the mesh proper, without the irises

# Eyes, seen from the front: "left" is the person's left, at the image's right.
LEFT_EYE = (362, 398, 384, 385, 386, 387, 388, 466, 263, 249, 390, 373, 374, 380, 381, 382)
RIGHT_EYE = (33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7)
LEFT_EYE_MIRRORED = LEFT_EYE[8::-1] + LEFT_EYE[:8:-1]  # in RIGHT_EYE's order: from the outer corner, upper lid first
LEFT_IRIS, RIGHT_IRIS = (473, 474, 475, 476, 477), (468, 469, 470, 471, 472)
EYE_RIMS = ((RIGHT_IRIS[0], RIGHT_EYE), (LEFT_IRIS[0], LEFT_EYE_MIRRORED))  # iris centre and rim of each eye
# Upper eyelid folds of both eyes, from the outer corner to the inner one, without the corners.
EYELID_FOLDS = ((247, 30, 29, 27, 28, 56, 190), (467, 260, 259, 257, 258, 286, 414))
# Inner lips from the person's right corner of the mouth to the left one, corners included.
UPPER_INNER_LIP = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308)
LOWER_INNER_LIP = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)
INNER_LIPS = UPPER_INNER_LIP + LOWER_INNER_LIP[-2:0:-1]
OUTER_LIPS = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146)
LIPS = INNER_LIPS + OUTER_LIPS
LEFT_BROW = (276, 283, 282, 295, 285, 300, 293, 334, 296, 336)
RIGHT_BROW = (46, 53, 52, 65, 55, 70, 63, 105, 66, 107)
FACE_OVAL = (
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149, 150,
    136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
)  # fmt: skip
FOREHEAD_TOP, CHIN, NOSE_BASE = 10, 152, 2
# Points that tell the head's pose whatever the face does, with their weights: those of MediaPipe's own pose solver.
RIGID_WEIGHTS = {
    4: 0.07091, 6: 0.0321, 10: 0.00845, 33: 0.05872, 54: 0.00767, 67: 0.00908, 117: 0.00979, 119: 0.01457, 121: 0.01859,
    127: 0.0052, 129: 0.12063, 132: 0.00556, 133: 0.05329, 136: 0.06689, 143: 0.01482, 147: 0.01426, 198: 0.02546,
    205: 0.04725, 263: 0.05872, 284: 0.00767, 297: 0.00908, 346: 0.00979, 348: 0.01457, 350: 0.01859, 356: 0.0052,
    358: 0.12063, 361: 0.00556, 362: 0.05329, 365: 0.06689, 372: 0.01482, 376: 0.01426, 420: 0.02546, 425: 0.04725,
}  # fmt: skip
RIGID_POINTS = tuple(RIGID_WEIGHTS)
# The 68 points of iBUG (jaw, brows, nose, eyes, outer and inner lips) among the 478, as commonly chosen.
IBUG68 = (
    162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389, 71, 63, 105, 66, 107, 336, 296,
    334, 293, 301, 168, 197, 5, 4, 75, 97, 2, 326, 305, 33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380, 61,
    39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87,
)  # fmt: skip
IBUG68_MIRROR = (  # for each of them, the one on the other side
    16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 27, 28, 29, 30,
    35, 34, 33, 32, 31, 45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40, 54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55,
    64, 63, 62, 61, 60, 67, 66, 65,
)  # fmt: skip
