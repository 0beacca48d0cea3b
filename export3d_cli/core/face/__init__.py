"""Faces in pictures: detection, landmarks, expression coefficients and head pose, and their motion over a clip.

    landmarks, expression_coefficients   tables: landmark indices, names of the 64 expression coefficients
    detector                             YuNet
    head_pose, crop, motion              landmarks -> camera, head frame, crop; the `.motion.npz` file
    face_track                           what the trackers share; one face of several, through a video; its cache
    tracker, fan_tracker                 MediaPipe's 478 landmarks and 52 blendshapes; 68 points and their fit
    smoothing                            without lag, or causal
    arkit, motion_packets                drivers recorded by Live Link Face; motion sent by it, or by VMC programs
    speech                               the motion of a head that speaks a sound
    given_landmarks                      landmarks that the user gives for a face that is not found
    matting, cover_detection             the person's alpha; masks, hands and dark lenses before the face

Imports `media`, `config` and `runtime` only. Imported by `animation`, `train`, `dataset`, `evaluation` and
`diagnostics`; `model` may import `landmarks` and `expression_coefficients`, which are data.
"""
