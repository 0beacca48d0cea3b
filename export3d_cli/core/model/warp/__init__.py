"""Warping (beyond the paper): where in the photo each output pixel comes from.

`mesh_flow` moves and rasterises the face mesh, `mouth_eye_interior` holds the coordinates inside mouth and eyes,
`rasterizer` draws triangles, `flow_blending` blends the mesh's flow with those of head, neck and background,
`layer_warp` samples the photo along the result.

Imported by `core.model` and `core.train`; imports only from `core.model`, `core.face.landmarks` and `core.config`.
"""
