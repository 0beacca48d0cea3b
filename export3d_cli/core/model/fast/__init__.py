"""Inference only: the sparse renderer, used by `export3d`, and tri-plane interpolation, used by `animation`."""
