"""export3d: animate a portrait from one photo and a driving video (Export3D, ECCV 2024)."""

__version__ = "0.1.0"
