"""Data sets: videos and photos become face crops with motion files, a manifest and an overview picture.

`preprocess` writes a data set or one motion file, `segmentation` splits videos into clips of one face and filters them,
`overview` draws what was tracked, `track_video` reads the motion of one file.
`commands`, `evaluation` and `diagnostics` may import this package; it imports `face`, `media`, `config` and `runtime`.
"""
