"""Export3D, figure 1 of the paper: `D_hat = SR(render(G(S, beta'_D), p_D))`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import BETA_DIM, CAMERA_DIM, ModelConfig
from export3d_cli.core.face.landmarks import FACE_OVAL, NUM_LANDMARKS
from export3d_cli.core.model import motion_beyond_lambda, volume_renderer
from export3d_cli.core.model.cached_tensors import index_tensor
from export3d_cli.core.model.encoded_source import Source, expand_batch, take_row
from export3d_cli.core.model.expression import DirectCode, LeBS
from export3d_cli.core.model.face_cover import FaceCover, cover_motion, make_code_filter
from export3d_cli.core.model.fast import sparse_renderer
from export3d_cli.core.model.generator import Generator
from export3d_cli.core.model.inpaint.eyelids import EyelidInpainter
from export3d_cli.core.model.inpaint.eyes import EyeInpainter
from export3d_cli.core.model.inpaint.inpainter import InpaintedPatch, Inpainter
from export3d_cli.core.model.inpaint.mouth import MouthInpainter
from export3d_cli.core.model.masks import WHOLE, Window, box_mean, linear_step
from export3d_cli.core.model.motion_beyond_lambda import NUM_MEASURES, apply_measures, interocular
from export3d_cli.core.model.photo_colours import PhotoColours, add_light, remove_light
from export3d_cli.core.model.planedict import PlaneDict, correct
from export3d_cli.core.model.source_view import SourceView, fill_push_pull, sample_view_plane
from export3d_cli.core.model.super_resolution import PhotoDetail, SuperResolution, SuperResolutionOutput
from export3d_cli.core.model.triplane import Decoder, FaceField, sample_face_field, sample_planes
from export3d_cli.core.model.volume_renderer import BatchRows, RayOutputs, project
from export3d_cli.core.model.warp import photo_selection
from export3d_cli.core.model.warp.flow_blending import FlowBlend, LayeredFlow, neck_flow, relative_rotation, rigid_flow
from export3d_cli.core.model.warp.layer_warp import LayerWarp, highpass, upscale_with_detail
from export3d_cli.core.model.warp.mesh_flow import BasisFlow, DeformedMesh, MeshFlow, resize, warp
from export3d_cli.core.model.warp.rasterizer import gather_rows

DENSITY_TV_POINTS = 1024  # points at which `_density_tv` compares neighbours
DENSITY_TV_DISTANCE = 0.008  # largest distance of neighbours along each axis, head-frame units
OPACITY_FADE = (0.1, 0.5)  # ray opacities that are not shown (scraps in the air) and fully shown
SHOWN_FADE = (0.5, 0.9)  # validity of additional photos over which they replace inpainting
# Gain that gives an additional photo the colours of the first one, as a map over the crop:
GAIN_SIZE = 16  # cells of its side
MIN_GAIN_LEVEL, MAX_GAIN = 0.08, 3.0  # least brightness that is compared, of 2, and the limit of the gain
DEFAULT_BODY_WEIGHT = 0.2  # body weight of pixels outside the head if no person mask is given
FACE_WINDOW_MARGIN = 0.03  # image sizes around the face and the mesh's inner ring that `face_only` renders
FACE_WINDOW_STEPS = 32  # positions of its borders along a side of the image, at most
CPU_UPSCALE_BATCH = 2  # images upscaled together on a CPU; one takes 250 MB at 2048 x 2048
SampleCounts = tuple[int, int]  # coarse and fine samples per ray


@dataclass(frozen=True)
class PosedHead:
    """A source with an expression: everything that does not depend on the camera."""

    planes: Tensor  # (B, 3, C, P, P)
    surface: Tensor | None  # (B, 6, s, s), see `BasisFlow.rasterize_surface`
    mesh: DeformedMesh | None
    distances: Tensor | None = None  # (B, 478, J) of several photos' expressions, see `expression_distances`

    def expand(self, batch: int) -> PosedHead:
        """Expand a single head to a batch of cameras, without copying memory."""
        return PosedHead(*(expand_batch(part, batch) for part in vars(self).values()))


class Output(NamedTuple):
    """Result of B frames."""

    image: Tensor  # (B, 3, H, W), about [-1, 1]
    raw: Tensor  # (B, 3, h, w) volume rendering before super-resolution
    depth: Tensor  # (B, 1, h, w) distance along the camera's axis, head-frame units
    opacity: Tensor  # (B, 1, h, w) of the volume, [0, 1]
    residual_flow: Tensor | None  # (B, 2, H/2, W/2) in image sizes
    flow_weights: Tensor | None  # (B, 4, m, m) weights of mesh, rigid, static and neck flow
    face: Tensor | None = None  # (B, 1, m, m) 1 in the face, falling to 0 at the mesh's inner ring
    density_tv: Tensor | None = None  # (B,) density regularisation, in training only
    warped_photo: Tensor | None = None  # (B, 3, H/2, W/2) photo colours sampled along the flow
    source_visibility: Tensor | None = None  # (B, 1, m, m) 1 where the photo shows the pixel
    before_inpainting: Tensor | None = None  # (B, 3, H, W) image without `inpainted`
    sample_grid: Tensor | None = None  # (B, 2 L, H, W) photo positions of each layer, see `LayerWarp`
    blend_weights: Tensor | None = None  # (B, L, H, W) weights of the layers
    inpainted: tuple[InpaintedPatch, ...] = ()  # synthesised patches: mouth, eyes, eyelids
    windows: tuple[Window, ...] = ()  # part of each image that was computed, the rest is undefined; empty: all

    def upscale(self, photos: Tensor, size: int) -> Tensor:
        """Return the image as (B, 3, size, size) with the detail of photos (N, 3, M, M), see `upscale_with_detail`."""
        if self.before_inpainting is None or self.sample_grid is None or self.blend_weights is None:
            return F.interpolate(self.image.float(), (size, size), mode="bicubic", align_corners=False)
        batch = CPU_UPSCALE_BATCH if photos.device.type == "cpu" else len(self.image)
        batch = 1 if self.windows else batch
        parts = [x.split(batch) for x in (self.before_inpainting, self.sample_grid, self.blend_weights)]
        large = [
            upscale_with_detail(image, LayerWarp(grid, weights), photos, size, window)
            for image, grid, weights, window in zip(*parts, self.windows or [WHOLE] * len(parts[0]), strict=True)
        ]
        return composite_patches(torch.cat(large), self.inpainted)


def composite_patches(image: Tensor, patches: tuple[InpaintedPatch, ...]) -> Tensor:
    """Paste inpainted patches into images (B, 3, ., .), in place."""
    for patch in patches:
        patch.paste_into(image)
    return image


class Export3D(nn.Module):
    """The whole model. Images are RGB in [-1, 1]; cameras and points are in the head frame."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.expression: LeBS | DirectCode = DirectCode(config) if config.expression == "direct" else LeBS(config)
        self.generator = Generator(config)
        self.decoder = Decoder(config)
        self.source_view = SourceView(config) if config.source_plane else None
        self.flow = BasisFlow(config) if config.flow else None
        self.flow_blend = FlowBlend(config) if config.flow else None
        self.superres = SuperResolution(config)
        self.planedict = PlaneDict(config) if config.motion == "planedict" else None
        self.inpainters = nn.ModuleDict()  # each trained in a stage of its own
        for name, inpainter in (("mouth", MouthInpainter), ("eyes", EyeInpainter), ("lids", EyelidInpainter)):
            if width := getattr(config, name):
                self.inpainters[name] = inpainter(width)

    def encode_source(self, image: Tensor, beta: Tensor, camera: Tensor, landmarks: Tensor,
                      person_mask: Tensor | None = None, covered: Tensor | None = None,
                      first: Source | None = None) -> Source:  # fmt: skip
        """Encode photos (B, 3, H, W) for `drive`.

        Of each, `beta` (B, 64) is the expression, `camera` (B, 25) the camera, `landmarks` (B, 478, 3) are in the head
        frame. `person_mask` (B, 1, ., .) is 1 on the person; without it hair counts as background. `covered` (B, 3) is
        1 where something is before the mouth, the person's right eye and left eye. `first` is the main photo, if this
        is an additional one, whose colours must match, see `match_colours`.
        """
        B, H = image.shape[0], self.config.image_size
        for name, value, shape in (
            ("image", image, (B, 3, H, H)), ("beta", beta, (B, BETA_DIM)), ("camera", camera, (B, CAMERA_DIM)),
            ("landmarks", landmarks, (B, NUM_LANDMARKS, 3)),
        ):  # fmt: skip
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must be {shape}, got {tuple(value.shape)}")
        inference = not torch.is_grad_enabled()
        proximity = head_mask = colours = outline = None
        detail = highpass(image) if inference else None
        if self.flow is not None:
            with torch.no_grad():
                proximity = self.flow.source_proximity(landmarks, camera)
                head_mask = self.flow.head_mask(landmarks, camera, person_mask, proximity)
                if person_mask is not None:
                    outline = self.flow.find_outline(landmarks, camera, person_mask)
            if first is not None:
                colours = first.colours
            elif inference:
                colours = PhotoColours.measure(image, project(landmarks, camera)[0], head_mask)
        if colours is not None and detail is not None:
            image, detail = remove_light(image, colours.light), detail / colours.light
        stem, tokens = self.generator.encode(image)  # [(B, c2, H/2, W/2), ...], (B, N, h)
        lam, measures = self.coefficients(beta).split([self.config.num_coefficients, NUM_MEASURES], dim=1)
        basis = self.expression.basis() if inference else None
        source = Source(image, camera, landmarks, lam, measures, stem, tokens, basis=basis)
        if self.planedict is not None:
            motion = self.planedict.encode(image, project(landmarks.float(), camera)[0]).motion
            source = replace(source, motion=motion)
        if head_mask is not None:
            person = DEFAULT_BODY_WEIGHT if person_mask is None else resize(person_mask.float(), head_mask.shape[-1])
            source = replace(source, proximity=proximity, outline=outline, head_mask=head_mask,
                             body_mask=(1 - head_mask) * person,
                             image_half=F.avg_pool2d(image.float(), 2), features_half=self.superres.detail2(stem[0]),
                             features_quarter=self.superres.detail4(stem[1]), highpass=detail, colours=colours,
                             cover=self._measure_cover(image, landmarks, camera, covered))  # fmt: skip
        if self.source_view is not None:
            view_plane = self.source_view.make_view_plane(stem)  # (B, C, H/4, W/4)
            head = source.head_mask
            filled_photo = None if head is None else fill_push_pull(image, 1 - head, H // 4)  # (B, 3, H/4, W/4)
            background = self.source_view.make_background(stem, filled_photo)
            source = replace(source, view_plane=view_plane, background=background)
        return source

    def match_colours(
        self, first: Source, photo: Tensor, margin: int, camera: Tensor, landmarks: Tensor
    ) -> tuple[Tensor, float]:
        """Return an additional photo in the colours and the light of the first one, and their `similarity`.

        The photo (1, 3, M, M) continues `margin` pixels around the crop that has this camera and these landmarks. Its
        gain is smooth, and measured where both photos show the face.
        """
        assert self.flow is not None
        centre = photo[..., margin:-margin, margin:-margin]
        mesh = self.flow.render_flow(self.flow.deform_mesh(first.landmarks, first.camera, landmarks), camera)
        skin = (mesh.face * mesh.valid * (1 - mesh.mouth - mesh.eye) > 0.5).float()
        pair = torch.cat([warp(first.image, mesh.uv), F.interpolate(centre, mesh.uv.shape[2:], mode="area")])
        if first.colours is not None:
            pair[:1] = add_light(pair[:1], first.colours.light)
        like, own = (fill_push_pull(pair, skin.expand(2, -1, -1, -1), GAIN_SIZE) + 1).clamp_min(MIN_GAIN_LEVEL)
        gain = box_mean((like / own).clamp(1 / MAX_GAIN, MAX_GAIN)[None], 1)
        photo = (photo + 1) * F.pad(resize(gain, centre.shape[-1]), (margin,) * 4, mode="replicate") - 1
        if first.colours is not None:
            white = first.colours.range.limit(remove_light(photo, first.colours.light))
            photo = add_light(white, first.colours.light)
        return photo.clamp(-1, 1), photo_selection.similarity(pair, skin)

    def coefficients(self, beta: Tensor) -> Tensor:
        """Map expressions `beta` (B, 64) to coefficients lambda, and to measures beyond it: (B, n + m)."""
        lam, measures = self.expression.coefficients(beta), motion_beyond_lambda.measure(beta)
        if self.flow is not None:
            measures = measures - lam.detach().float() @ motion_beyond_lambda.measure_basis(self.flow.basis.float())
        return torch.cat([lam, measures.to(lam)], dim=1)

    def change_expression(self, beta: Tensor, base: Tensor) -> Tensor:
        """Return the change of lambda and measures (B, n + m) that an edit needs for `beta` (B, 64) instead of `base`.

        Unlike the difference of `coefficients`, it moves landmarks also where lambda hardly does, or far enough.
        """
        change = self.coefficients(beta) - self.coefficients(base)
        if self.flow is None:
            return change
        lam, measures = change.float().split([self.config.num_coefficients, NUM_MEASURES], dim=1)
        return motion_beyond_lambda.change_expression(lam, measures, beta.float() - base, self.flow.basis.float())

    def generate_planes(self, source: Source, lam: Tensor) -> Tensor:
        """Generate the tri-plane (B, 3, C, P, P) of the source with coefficients lambda (B, n)."""
        return self.generator(source.stem, source.tokens, self._expression_code(source, lam))

    def identity_planes(self, source: Source) -> Tensor:
        """Generate the source's tri-plane (B, 3, C, P, P) with the mean expression, for `PlaneDict.planes`."""
        mean = self.expression.coefficients(self.expression.beta_mean[None])
        code = self.expression.code(mean, None if torch.is_grad_enabled() else source.basis)
        return self.generator(source.stem, source.tokens, code.expand(len(source.tokens), -1))

    def read_coefficients(self, source: Source, motion: Tensor, tracked: Tensor | None = None) -> Tensor:
        """Return coefficients (B, n + m) of the source with motion codes (B, d) that were read from pixels.

        With those of the landmarks, `tracked` (B, n + m), these are returned, their lambda corrected by the pixels.
        """
        assert self.planedict is not None and source.motion is not None
        lam = source.lam + self.planedict.read_lambda(motion) - self.planedict.read_lambda(source.motion)
        if tracked is not None:
            lam = correct(tracked[:, : lam.shape[1]], lam)
        rest = source.measures.expand(len(lam), -1) if tracked is None else tracked[:, lam.shape[1] :]
        return torch.cat([lam, rest], dim=1)

    def landmark_offsets(self, source: Source, lam: Tensor, landmarks: Tensor, reference_lam: Tensor, reference: Tensor,
                         rest: Tensor | None = None) -> Tensor:  # fmt: skip
        """Return how far a driver's landmarks (B, 478, 3) are from where lambda (B, n + m) puts them: (B, 478, 3).

        Lambda moves them from those of a reference frame, (1, n + m) and (1, 478, 3). The result has the size of the
        source's face. `rest` (1, 478, 3), such a distance of the driver's face at rest, is subtracted. A wink's lids
        stay where the measures put them, since trackers see a winking eye half open.
        """
        assert self.flow is not None
        n = self.config.num_coefficients
        reference = reference.float().expand_as(landmarks)
        expected = self.flow.deform_landmarks(reference, lam[:, :n] - reference_lam[:, :n])
        expected = apply_measures(expected, reference, lam[:, n:], reference_lam[:, n:].expand(len(lam), -1))
        offsets = (landmarks - expected) * (interocular(source.landmarks) / interocular(reference))[..., None]
        offsets = offsets if rest is None else offsets - rest
        lids = index_tensor(motion_beyond_lambda.WINKING_POINTS, offsets)
        offsets[:, lids] *= (1 - lam[:, n, None, None].abs()).clamp_min(0)
        return offsets

    def pose_head(
        self, source: Source, lam: Tensor, planes: Tensor | None = None, offsets: Tensor | None = None
    ) -> PosedHead:
        """Apply lambda (B, n), or (B, n + m) with measures, for any cameras; `planes` are its tri-planes, if known.

        `offsets` (B, 478, 3) of `landmark_offsets` are added to the landmarks.
        """
        n = self.config.num_coefficients
        if lam.ndim != 2 or lam.shape[1] not in (n, n + NUM_MEASURES):
            raise ValueError(f"lam must be (B, {n}) or (B, {n + NUM_MEASURES}), got {tuple(lam.shape)}")
        planes = self.generate_planes(source, lam) if planes is None else planes  # (B, 3, C, P, P)
        mesh, surface, distances = None, None, None
        if self.flow is not None:
            with torch.no_grad():
                photos = (source, *source.others)
                deformed = [self.deform(photo, lam) + (0 if offsets is None else offsets) for photo in photos]
                landmarks = deformed[0]  # (B, 478, 3)
                if source.others:
                    distances = photo_selection.expression_distances(landmarks, deformed, [x.landmarks for x in photos])
                    angles = [relative_rotation(x.camera, source.camera).norm(dim=1) for x in photos]
                    landmarks = photo_selection.blend_landmarks(deformed, distances, torch.stack(angles, dim=1))
                if source.cover is not None:
                    landmarks = torch.lerp(source.landmarks.float(), landmarks, source.cover.motion)
                mesh = self.flow.deform_mesh(source.landmarks, source.camera, landmarks, source.outline)
                if self.config.head_prior:
                    surface = self.flow.rasterize_surface(landmarks, landmarks - source.landmarks)  # (B, 6, s, s)
        return PosedHead(planes, surface, mesh, distances)

    def drive(self, source: Source, lam: Tensor, camera: Tensor, *, posed: PosedHead | None = None,
              raw_size: int | None = None, samples: SampleCounts | None = None, mesh_size: int | None = None,
              batch_rows: BatchRows | None = None, face_only: bool = False) -> Output:  # fmt: skip
        """Render the source with coefficients lambda (B, n), or (B, n + m) with measures, seen by a camera (B, 25).

        `posed` is the result of `pose_head` for them, if known. `raw_size` is the side of the volume rendering,
        `samples` are coarse and fine ones per ray, `mesh_size` is the side at which the face mesh is rasterised; the
        defaults are the config's. `batch_rows` are the rows of a larger batch that these are, whose training noise they
        get. With `face_only`, for CPUs, the image is computed only in a window around the face, frame by frame.
        """
        if posed is None:
            posed = self.pose_head(source, lam)  # planes (B, 3, C, P, P)
        size = raw_size or self.config.raw_size
        features, depth, opacity = self.render(source, posed, camera, size, samples, batch_rows)  # (B, ., h, w)
        detail = self._prepare_photo_detail(source, posed, lam, camera, depth, opacity, mesh_size)
        features = self._composite_background(source, features, opacity, detail)  # (B, C', h, w)
        colours = source.colours
        if colours is not None and detail is not None:
            features = torch.cat([colours.range.limit(features[:, :3].float()), features[:, 3:]], dim=1)
        windows = self._face_windows(source, posed, camera) if face_only else ()
        quarter = resize(features, self.config.image_size // 4)
        if windows and detail is not None:  # of each frame alone, whatever the batch
            parts = [self.superres(quarter[k : k + 1], take_row(detail, k), w) for k, w in enumerate(windows)]
            refined = SuperResolutionOutput(*map(torch.cat, zip(*parts, strict=True)))  # (B, 3, H, W)
        else:
            refined = self.superres(quarter, detail)
        patches = () if self.training else self._inpaint(source, posed, refined.image, camera, detail)
        if colours is not None:
            refined = refined._replace(image=add_light(refined.image, colours.light))
            features = add_light(features[:, :3], colours.light)
        image = composite_patches(refined.image.clone(), patches) if patches else refined.image
        return Output(raw=features[:, :3], depth=depth, opacity=opacity, flow_weights=detail and detail.flow.weights,
                      face=detail and detail.mesh.face,
                      density_tv=self._density_tv(source, posed, batch_rows) if self.training else None,
                      before_inpainting=refined.image, inpainted=patches, windows=windows,
                      **refined._replace(image=image)._asdict())  # fmt: skip

    def forward(self, source_image: Tensor, source_beta: Tensor, source_camera: Tensor, source_landmarks: Tensor,
                driver_beta: Tensor, driver_camera: Tensor, person_mask: Tensor | None = None,
                raw_size: int | None = None, batch_rows: BatchRows | None = None,
                rays: Tensor | None = None, driver_face: Tensor | None = None) -> Output:  # fmt: skip
        """Encode and drive in one call, for training; with `driver_face` (B, 3, 64, 64), by `PlaneDict`.

        With `rays` (B, R), pixel indices of the raw render, only the volume is rendered, and only at these pixels: the
        maps of the output are (B, ., R, 1), without background.
        """
        source = self.encode_source(source_image, source_beta, source_camera, source_landmarks, person_mask)
        if driver_face is None or self.planedict is None:
            lam = self.coefficients(driver_beta)  # (B, n + m)
            posed = self.pose_head(source, lam)
        else:
            motion = self.planedict.encoder(driver_face).motion  # (B, d)
            lam = self.read_coefficients(source, motion)
            planes = self.identity_planes(source) + self.planedict.planes(motion)
            posed = self.pose_head(source, lam, planes)
        if rays is None:
            return self.drive(source, lam, driver_camera, posed=posed, raw_size=raw_size, batch_rows=batch_rows)
        size = raw_size or self.config.raw_size
        features, depth, opacity = self.render(source, posed, driver_camera, size, None, batch_rows, rays)
        return Output(image=features[:, :3], raw=features[:, :3], depth=depth, opacity=opacity, residual_flow=None,
                      flow_weights=None, density_tv=self._density_tv(source, posed, batch_rows))  # fmt: skip

    def render(self, source: Source, posed: PosedHead, camera: Tensor, size: int, samples: SampleCounts | None = None,
               batch_rows: BatchRows | None = None, rays: Tensor | None = None) -> RayOutputs:  # fmt: skip
        """Render the volume (sec. 3.3), without the background; `rays` (B, R) selects pixels by their index.

        Returns features (B, C', s, s), RGB first, depth and opacity (B, 1, s, s), or (B, ., R, 1) with `rays`; fp32.
        """
        coarse_samples, fine_samples = samples or (self.config.coarse_samples, self.config.fine_samples)
        origin, directions = volume_renderer.camera_rays(camera, size)  # (B, 3), (B, R, 3), R = s * s
        shape = (size, size) if rays is None else (rays.shape[1], 1)
        if rays is not None:
            directions = gather_rows(directions, rays)
        coarse = volume_renderer.sample_coarse_depths(
            camera, directions.shape[1], coarse_samples, jitter=self.training, batch_rows=batch_rows
        )  # (B, R, S)
        if self._use_sparse_path(camera):
            outputs = self._render_sparse(source, posed, origin, directions, coarse, fine_samples)
        else:

            def decode(depths: Tensor) -> tuple[Tensor, Tensor]:
                B, R, S = depths.shape
                points = (origin[:, None, None] + directions[:, :, None] * depths[..., None]).view(B, R * S, 3)
                colours, densities = self.query_field(source, posed, points)
                return colours.view(B, R, S, -1), densities.view(B, R, S)

            outputs = volume_renderer.render_rays(decode, coarse, fine_samples, jitter=self.training,
                                                  batch_rows=batch_rows)  # fmt: skip
        features, depth, opacity = (x.view(len(x), *shape, -1).permute(0, 3, 1, 2) for x in outputs)
        return features, depth, opacity

    def query_field(self, source: Source, posed: PosedHead, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return colour features (B, N, C'), RGB first, and densities (B, N) at points (B, N, 3) of the head frame."""
        face = sample_face_field(points, posed.surface)
        features = self._sample_features(source, posed, points, face)  # (B, N, C)
        return self.decoder(features, points, face and face.log_density)

    def _expression_code(self, source: Source, lam: Tensor) -> Tensor:
        """Return beta' (B, d); with gradients the basis is recomputed, so that they reach it."""
        lam = source.lam + self._visible_change(source, lam)
        return self.expression.code(lam, None if torch.is_grad_enabled() else source.basis)

    def _change(self, source: Source, lam: Tensor) -> Tensor:
        """Return the change of lambda (B, n) from the photo's; `lam` may hold measures."""
        return lam[:, : self.config.num_coefficients] - source.lam

    def deform(self, source: Source, lam: Tensor) -> Tensor:
        """Return a photo's landmarks (B, 478, 3) with lambda (B, n), or (B, n + m) with measures."""
        assert self.flow is not None
        landmarks = self.flow.deform_landmarks(source.landmarks, self._change(source, lam))
        measures = lam[:, self.config.num_coefficients :]  # (B, m or 0)
        if not measures.shape[1]:
            return landmarks
        return apply_measures(landmarks, source.landmarks, measures, source.measures)

    def _visible_change(self, source: Source, lam: Tensor) -> Tensor:
        """Return the change of lambda (B, n) from the photo's, without what covers hide."""
        change = self._change(source, lam)
        return change if source.cover is None else (change[:, :, None] * source.cover.code_filter).sum(1)

    def _measure_cover(
        self, image: Tensor, landmarks: Tensor, camera: Tensor, covered: Tensor | None
    ) -> FaceCover | None:
        if self.flow is None or covered is None or not covered.any():
            return None
        with torch.no_grad():
            motion = cover_motion(landmarks.float(), covered.float())
            values = torch.cat([1 - motion, motion], dim=-1)
            mask, visible = self.flow.rasterize_landmark_values(landmarks, camera, values).split(1, dim=1)
            skin = (resize(image, mask.shape[-1]) * visible).sum((2, 3), keepdim=True)
            skin = skin / visible.sum((2, 3), keepdim=True).clamp_min(1)
            return FaceCover(motion, make_code_filter(self.flow.basis, motion), mask, skin)

    def _use_sparse_path(self, like: Tensor) -> bool:
        """Return whether invisible samples are skipped: on a CPU without gradients."""
        return like.device.type == "cpu" and not (self.training or torch.is_grad_enabled())

    def _render_sparse(self, source: Source, posed: PosedHead, origin: Tensor, directions: Tensor, coarse: Tensor,
                       fine_samples: int) -> RayOutputs:  # fmt: skip
        """Render rays as `volume_renderer.render_rays` does, head by head and without invisible samples."""
        decoder, channels = self.decoder, posed.planes.shape[2]
        weight = decoder.hidden.weight
        tables: dict[int, Tensor] = {}  # by the memory of their planes, which frames of one head or photo share

        def table(planes: Tensor, layer: Tensor) -> Tensor:
            if planes.data_ptr() not in tables:
                tables[planes.data_ptr()] = sparse_renderer.make_feature_table(planes, layer)
            return tables[planes.data_ptr()]

        def render(b: int) -> RayOutputs:
            surface = None if posed.surface is None else posed.surface[b : b + 1]
            # the decoder's first layer comes before the sampling; / 3: planes are averaged
            planes = table(posed.planes[b], weight[:, :channels] / 3)
            view = None if source.view_plane is None else source.view_plane[b : b + 1]
            view_table = None if view is None else table(view, weight[:, channels:])

            def decode(points: Tensor) -> tuple[Tensor, Tensor]:
                face = sample_face_field(points[None], surface)
                flat = points.T.contiguous()  # (3, M)
                x = sparse_renderer.sample_plane_table(planes, posed.planes.shape[-1], flat)
                if view is not None and view_table is not None:
                    neutral = flat if face is None else flat - face.displacement[0].T
                    x += sparse_renderer.sample_view_table(
                        view_table, view.shape[-1], neutral, source.camera[b : b + 1]
                    )
                x = decoder.activate(x.add_(decoder.hidden.bias))  # (M, hidden)
                return x, decoder.decode_densities(x, points, face and face.log_density[0])

            return sparse_renderer.render_rays(decode, decoder.decode_colours, origin[b], directions[b], coarse[b],
                                               fine_samples)  # fmt: skip

        with torch.autocast(origin.device.type, enabled=False):
            heads = [render(b) for b in range(len(origin))]
        features, depth, opacity = (torch.stack(x) for x in zip(*heads, strict=True))
        if not posed.planes.isfinite().all():  # such samples were skipped as invisible; the result must show them
            features = torch.full_like(features, torch.nan)
        return features, depth, opacity

    def _sample_features(self, source: Source, posed: PosedHead, points: Tensor, face: FaceField | None) -> Tensor:
        """Sample the decoder's input (B, N, C) at points (B, N, 3); the photo's before the expression moved them."""
        features = sample_planes(posed.planes, points)
        if source.view_plane is not None:
            in_photo = points if face is None else points - face.displacement
            features = torch.cat([features, sample_view_plane(source.view_plane, in_photo, source.camera)], dim=-1)
        return features

    def _composite_background(
        self, source: Source, features: Tensor, opacity: Tensor, detail: PhotoDetail | None
    ) -> Tensor:
        """Composite the head over the background, which moves with the flow instead of turning with the head."""
        if source.background is None:
            return features
        background, size = source.background.float(), features.shape[-1]
        if detail is None:
            background = resize(background, size)
        else:
            background = warp(background, resize(detail.flow.background, size))
        if not self.training:
            fade = linear_step(opacity, *OPACITY_FADE)
            features, opacity = features * fade, opacity * fade
        return features + (1 - opacity) * background

    def _prepare_photo_detail(self, source: Source, posed: PosedHead, lam: Tensor, camera: Tensor, depth: Tensor,
                              opacity: Tensor, mesh_size: int | None) -> PhotoDetail | None:  # fmt: skip
        """Compute where each pixel comes from in the photo; None without `config.flow`."""
        if self.flow is None or self.flow_blend is None or posed.mesh is None:
            return None
        m = self.config.flow_size
        with torch.no_grad():
            mesh = self.flow.render_flow(posed.mesh, camera, mesh_size, source.head_mask)
        cover = None
        if source.cover is not None:
            cover = warp(source.cover.mask, mesh.uv) * mesh.face
            mesh = mesh.without_interior(cover)
        origin, directions = volume_renderer.camera_rays(camera, m)
        rigid = rigid_flow(resize(depth, m), directions, origin, source.camera)  # (B, 2, m, m)
        neck = neck_flow(source.camera, camera, m)  # (B, 2, m, m)
        rotation = relative_rotation(source.camera, camera)  # (B, 3)
        assert source.head_mask is not None and source.body_mask is not None
        flow = self.flow_blend(source.image, mesh, rigid, neck, resize(opacity, m), source.head_mask, source.body_mask,
                               rotation, self._visible_change(source, lam))  # fmt: skip
        if source.others:
            flow, mesh = self._select_photos(source, posed, camera, flow, mesh, cover)
        return PhotoDetail(source, mesh, flow, self._expression_code(source, lam), cover)

    def _select_photos(self, source: Source, posed: PosedHead, camera: Tensor, flow: LayeredFlow, mesh: MeshFlow,
                       cover: Tensor | None) -> tuple[LayeredFlow, MeshFlow]:  # fmt: skip
        """Let the additional photos supply what they show of the face better than the first one."""
        assert self.flow is not None and posed.mesh is not None and posed.distances is not None
        head, points = posed.mesh.points, posed.mesh.points[:, :NUM_LANDMARKS]
        meshes, shown = [mesh], [1 - mesh.face * 0]
        for photo in source.others:
            own = self.flow.deform_mesh(photo.landmarks, photo.camera, points, photo.outline)
            flow_of = self.flow.render_flow(own._replace(points=head), camera, mesh.uv.shape[-1], photo.head_mask)
            covers = [cover] if photo.cover is None else [cover, warp(photo.cover.mask, flow_of.uv)]
            meshes.append(flow_of)
            shown.append(torch.stack([1 - x for x in covers if x is not None] or shown[:1]).amin(0))
        expression = resize(self.flow.rasterize_landmark_values(points, camera, posed.distances), mesh.uv.shape[-1])
        angles = [relative_rotation(photo.camera, camera).norm(dim=1) for photo in (source, *source.others)]
        return photo_selection.select_photos(flow, meshes, expression, torch.stack(angles, 1), torch.cat(shown, 1))

    def _inpaint(
        self, source: Source, posed: PosedHead, image: Tensor, camera: Tensor, detail: PhotoDetail | None
    ) -> tuple[InpaintedPatch, ...]:
        """Synthesise the parts of mouth, eyes and eyelids that the photo does not show."""
        if posed.mesh is None:
            return ()
        landmarks = posed.mesh.points[:, :NUM_LANDMARKS]
        if source.cover is not None and detail is not None and detail.cover is not None:
            # a blue mask below an eye must not tint its lid
            image = torch.lerp(image, source.cover.skin, resize(detail.cover, image.shape[-1]))
        own = (source.landmarks, source.camera)
        patches = self.inpaint(image, source.image, *own, landmarks, camera, source.colours)
        if detail is not None and detail.flow.fractions is not None:  # what other photos show is not synthesised
            shown = linear_step(detail.flow.fractions.sum(1, keepdim=True) * detail.mesh.valid, *SHOWN_FADE)
            patches = [patch._replace(mask=patch.mask * (1 - patch.crop.sample(shown))) for patch in patches]
        return tuple(patches)

    def inpaint(self, image: Tensor, photo: Tensor, photo_points: Tensor, photo_camera: Tensor, points: Tensor,
                camera: Tensor, colours: PhotoColours | None) -> list[InpaintedPatch]:  # fmt: skip
        """Inpaint mouth, eyes and eyelids of results, see `Inpainter.inpaint`; the patches are in the photo's light."""
        patches = list[InpaintedPatch]()
        for inpainter in self.inpainters.values():
            assert isinstance(inpainter, Inpainter)
            patches += inpainter.inpaint(image, photo, photo_points, photo_camera, points, camera)
        return patches if colours is None else [x._replace(colours=colours.show(x.colours)) for x in patches]

    def _face_windows(self, source: Source, posed: PosedHead, camera: Tensor) -> tuple[Window, ...]:
        """Return a window around the face of each result and of the photo."""
        if posed.mesh is None:
            return ()
        oval = index_tensor(FACE_OVAL, camera)
        ring = posed.mesh.points[:, NUM_LANDMARKS : NUM_LANDMARKS + len(FACE_OVAL)]
        uv = torch.cat([
            project(points.float(), view)[0] for points, view in (
                (posed.mesh.points[:, oval], camera), (ring, camera), (source.landmarks[:, oval], source.camera),
            )
        ], dim=1)  # fmt: skip
        cells = self.config.image_size // 4  # pixels of the smallest features
        step = max(1, cells // FACE_WINDOW_STEPS)
        low = ((uv.amin(1) - FACE_WINDOW_MARGIN) * cells / step).floor().clamp(0, cells // 2 // step) * step
        high = ((uv.amax(1) + FACE_WINDOW_MARGIN) * cells / step).ceil() * step
        borders = torch.cat([low, high.clamp(cells // 2 + 1, cells)], dim=1)
        return tuple(Window(*row) for row in F.pad(borders, (0, 1), value=cells).long().tolist())

    def _density_tv(self, source: Source, posed: PosedHead, batch_rows: BatchRows | None) -> Tensor:
        """Return EG3D's density regularisation: mean difference of the log densities of nearby points, (B,)."""
        like = posed.planes.new_empty(len(posed.planes), DENSITY_TV_POINTS, 3, dtype=torch.float32)
        points = volume_renderer.uniform_noise(like, batch_rows) - 0.5  # (B, N, 3)
        nearby = points + DENSITY_TV_DISTANCE * (2 * volume_renderer.uniform_noise(like, batch_rows) - 1)
        points = torch.cat([points, nearby], dim=1)
        features = self._sample_features(source, posed, points, sample_face_field(points, posed.surface))  # (B, 2N, C)
        logits = self.decoder.density_logits(self.decoder.activate(self.decoder.hidden(features)))  # (B, 2N)
        first, second = logits.chunk(2, dim=1)
        return (first - second).abs().mean(1)
