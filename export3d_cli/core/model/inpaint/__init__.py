"""Inpainting (beyond the paper): small networks that synthesise what the photo does not show.

`inpainter` holds the aligned crop, the hole and the network; `mouth`, `eyes` and `eyelids` define their holes, their
conditions and when they are inpainted.

Imported by `core.model` and `core.train`; imports only from `core.model` and `core.face.landmarks`.
"""
