"""Fast paths: sparse rendering and tri-plane interpolation for inference, fused convolutions.

Imported by `core.model` and, for the interpolation, by `core.animation`; imports only from `core.model`.
"""
