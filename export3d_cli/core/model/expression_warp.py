"""A change of expression in a picture that keeps its head pose: the face mesh moves pixels, inpainters add the rest.

Without a turn of the head the photo shows all but the inside of an opening mouth, opening eyes and closing eyelids, so
that neither the volume nor super-resolution is needed, and pixels outside the face stay as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.face.landmarks import INNER_LIPS
from export3d_cli.core.model.cached_tensors import index_tensor
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.face_cover import cover_motion
from export3d_cli.core.model.inpaint.inpainter import InpaintedPatch
from export3d_cli.core.model.motion_beyond_lambda import apply_measures
from export3d_cli.core.model.photo_colours import PhotoColours, remove_light
from export3d_cli.core.model.volume_renderer import project
from export3d_cli.core.model.warp.mesh_flow import identity_grid, warp

MOVING_LIPS = 0.002  # head-frame units: motion of lips from which the inside of a mouth moves as far as it should
COLOUR_POOLING = 4  # pictures are reduced by this before their colours are measured


class ExpressionWarp(NamedTuple):
    """What a change of expression does to B pictures."""

    displacement: Tensor  # (B, 2, H, W) position in the picture minus own position, image sizes; 0 outside the face
    patches: tuple[InpaintedPatch, ...]  # what the pictures do not show: mouth, eyes, eyelids


def warp_expression(model: Export3D, image: Tensor, landmarks: Tensor, camera: Tensor, change: Tensor,
                    measures: Tensor, source_measures: Tensor, still: Tensor) -> ExpressionWarp:  # fmt: skip
    """Change the expression in pictures (B, 3, H, H) in [-1, 1] around faces by the model's basis flow and inpainters.

    `landmarks` (B, 478, 3) are in the head frame, `camera` is (B, 25), `change` of lambda (B, n); `measures` to show
    and `source_measures` of the pictures, (B, m), are those of `motion_beyond_lambda`. `still` (B, 3) is how far mouth,
    the person's right eye and left eye stay as they are, [0, 1].
    """
    assert model.flow is not None
    deformed = apply_measures(model.flow.deform_landmarks(landmarks, change), landmarks, measures, source_measures)
    deformed = torch.lerp(landmarks.float(), deformed, cover_motion(landmarks.float(), still))
    mesh = model.flow.render_flow(model.flow.deform_mesh(landmarks, camera, deformed), camera, image.shape[-1])
    colours = PhotoColours.measure(F.avg_pool2d(image, COLOUR_POOLING), project(landmarks, camera)[0], mesh.face)
    if colours is not None:
        image = remove_light(image, colours.light)
    patches = model.inpaint(warp(image, mesh.uv), image, landmarks, camera, deformed, camera, colours)
    displacement = mesh.uv - identity_grid(image.shape[-1], mesh.uv)
    # positions behind the lips are found along them, and meet pixels of a mouth that does not move only nearly
    lips = index_tensor(INNER_LIPS, landmarks)
    moved = (deformed - landmarks)[:, lips].norm(dim=-1).amax(1)  # (B,)
    share = (moved / MOVING_LIPS).clamp_max(1)[:, None, None, None]
    return ExpressionWarp(displacement * (1 - mesh.mouth * (1 - share)), tuple(patches))
