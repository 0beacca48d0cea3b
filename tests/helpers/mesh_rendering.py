"""The basis flow from landmarks and cameras in one call."""

from __future__ import annotations

from torch import Tensor

from export3d_cli.core.model.warp.mesh_flow import BasisFlow, MeshFlow


def render_mesh(
    flow: BasisFlow | None, points: Tensor, source_camera: Tensor, deformed_points: Tensor, camera: Tensor,
    size: int | None = None, head_mask: Tensor | None = None,
) -> MeshFlow:  # fmt: skip
    assert flow is not None
    return flow.render_flow(flow.deform_mesh(points, source_camera, deformed_points), camera, size, head_mask)
