"""Evaluation: scores a model, baselines and other tools' results on a data set.

`evaluate` runs it, `protocol` makes the cases, `scorer` applies the `metrics` (pure functions), `face_embedding` loads
identity networks, `report` writes tables, pictures and HTML. Only `commands` may import this package; it imports
`animation`, `train`, `dataset` and everything below them.
"""
