"""Evaluation: scores a model, baselines and other tools' results on a data set.

`evaluate` runs it, `protocol` makes the cases, `views` scores novel views and depth, `scorer` applies the `metrics`
(pure functions), `report` writes tables and pictures. Only `commands` may
import this package; it imports `animation`, `train`, `dataset` and everything below them.
"""
