"""Fast paths for inference: sparse rendering, tri-plane interpolation, resampling by OpenCV.

Imported by `core.model` and, for the interpolation, by `core.animation`; imports only from `core.model`.
"""
