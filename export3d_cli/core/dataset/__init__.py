"""Data sets: videos and photos become face crops with motion files, a manifest and an overview picture.

`preprocess` writes a data set or one motion file, `segmentation` splits videos into clips of one face and filters them,
`overview` draws what was tracked, `exact_views` reads rendered heads with known depth.
`commands`, `evaluation` and `diagnostics` may import this package; it imports `face`, `media`, `config` and `runtime`.
"""
