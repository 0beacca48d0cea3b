"""Faces in pictures: detection, landmarks, expression coefficients and head pose, and their motion over a clip.

    landmarks, expression_coefficients   tables: landmark indices, names of the 64 expression coefficients
    detector, landmarker                 YuNet; MediaPipe's 478 landmarks and 52 blendshapes, on LiteRT
    head_pose, crop, motion              landmarks -> camera, head frame, crop; the `.motion.npz` file
    face_track                           what the trackers share: one face through a video, and its motion
    tracker, fan_tracker                 landmarks -> motion, of 478 points or 68 (`landmark_fitting`)
    target_face, track_cache             one face of several, through a video; tracked once for several sources
    smoothing                            without lag, or causal
    arkit, motion_packets                drivers recorded by Live Link Face; motion sent by it, or by VMC programs
    matting, cover_detection             the person's alpha; masks, hands and dark lenses before the face
    canonical_face                       MediaPipe's mean face

Imports `media`, `config` and `runtime` only. Imported by `animation`, `train`, `dataset`, `evaluation` and
`diagnostics`; `model` may import `landmarks` and `expression_coefficients`, which are data.
"""
