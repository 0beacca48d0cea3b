"""Export3D, figure 1 of the paper: `D_hat = SR(render(G(S, beta'_D), p_D))`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import BETA_DIM, CAMERA_DIM, NUM_LANDMARKS, ModelConfig
from export3d_cli.core.model import volume_renderer as render
from export3d_cli.core.model.expression import DirectCode, LeBS
from export3d_cli.core.model.fast import sparse_renderer as lean
from export3d_cli.core.model.generator import Generator
from export3d_cli.core.model.inpaint.eyelids import EyelidInpainter
from export3d_cli.core.model.inpaint.eyes import EyeInpainter
from export3d_cli.core.model.inpaint.inpainter import InpaintedPatch, Inpainter
from export3d_cli.core.model.inpaint.mouth import MouthInpainter
from export3d_cli.core.model.masks import linear_step
from export3d_cli.core.model.source_view import SourceView, fill_push_pull, sample_view_plane
from export3d_cli.core.model.super_resolution import (
    LayerWarp,
    PhotoDetail,
    SuperResolution,
    highpass,
    upscale_with_detail,
)
from export3d_cli.core.model.triplane import Decoder, face_log_density, sample_planes
from export3d_cli.core.model.warp.flow_blending import FlowBlend, neck_flow, relative_rotation, rigid_flow
from export3d_cli.core.model.warp.mesh_flow import SURFACE_HALF_EXTENT, BasisFlow, DeformedMesh, MeshFlow, resize, warp

DENSITY_TV_POINTS, DENSITY_TV_DISTANCE = (
    1024,
    0.008,
)  # points of `_density_tv`; largest distance of neighbours along each axis, head-frame units
OPACITY_FADE = (0.1, 0.5)  # ray opacities that are not shown (scraps in the air) and fully shown
DEFAULT_BODY_WEIGHT = 0.2  # body weight of pixels outside the head if no person mask is given
CPU_UPSCALE_BATCH = 2  # images upscaled together on a CPU; one takes 250 MB at 2048 x 2048
SampleCounts = tuple[int, int]  # coarse and fine samples per ray


@dataclass(frozen=True)
class Source:
    """A photo, encoded: everything that depends on it alone. Encode once, drive many times."""

    image: Tensor  # (B, 3, H, W) in [-1, 1]
    camera: Tensor  # (B, 25), head frame
    landmarks: Tensor  # (B, 478, 3), head frame
    lam: Tensor  # (B, n) expression coefficients lambda
    head_mask: Tensor | None  # (B, 1, m, m) 1 on the head, hair included
    body_mask: Tensor | None  # (B, 1, m, m) 1 on the rest of the person
    stem: list[Tensor]  # features at H/2, H/4, H/8
    tokens: Tensor  # (B, N, h)
    view_plane: Tensor | None  # (B, C, H/4, W/4) features in the source camera
    background: Tensor | None  # (B, C', H/4, W/4) features behind the head, RGB first
    features_half: Tensor | None  # (B, 16, H/2, W/2) stem features for super-resolution
    features_quarter: Tensor | None  # (B, 16, H/4, W/4) stem features for super-resolution
    image_half: Tensor | None  # (B, 3, H/2, W/2) the photo, downsampled
    visibility: Tensor | None  # (B, 2, m, m) what the photo shows of the mesh, see `BasisFlow.source_visibility`
    margins: Tensor | None  # (B, 3) how far a larger photo continues, see `encode_source`
    # Set without gradients only:
    highpass: Tensor | None = None  # (B, 1, H, W) luminance detail, see `super_resolution.highpass`
    basis: Tensor | None = None  # (n, d) expression basis of the weights
    view_tables: list[Tensor] | None = None  # `make_feature_table` of each view plane

    def expand(self, batch: int) -> Source:
        """Expand a single source to a batch of drivers, without copying memory."""
        kept = {"basis": self.basis, "view_tables": self.view_tables and self.view_tables * batch}
        grown = {k: _expand_batch(v, batch) for k, v in vars(self).items() if k not in ("stem", *kept)}
        stem = [f.expand(batch, *f.shape[1:]) for f in self.stem]
        return Source(stem=stem, **grown, **kept)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PosedHead:
    """A source with an expression: everything that does not depend on the camera."""

    planes: Tensor  # (B, 3, C, P, P)
    surface: Tensor | None  # (B, 3, s, s), see `BasisFlow.rasterize_surface`
    mesh: DeformedMesh | None
    plane_tables: list[Tensor] | None  # `make_feature_table` of each head's planes; None on the plain path
    planes_finite: bool = True  # whether all values of the planes are finite; checked if `plane_tables` is set

    def expand(self, batch: int) -> PosedHead:
        """Expand a single head to a batch of cameras, without copying memory."""
        mesh = None if self.mesh is None else DeformedMesh(*(x.expand(batch, *x.shape[1:]) for x in self.mesh))
        planes = self.planes.expand(batch, *self.planes.shape[1:])
        return PosedHead(
            planes,
            _expand_batch(self.surface, batch),
            mesh,
            self.plane_tables and self.plane_tables * batch,
            self.planes_finite,
        )


def _rays_to_maps(met: tuple[Tensor, Tensor, Tensor], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Reshape ray outputs (B, size * size, C) or (B, size * size) to maps (B, ., size, size)."""
    features, depth, opacity = (x.view(len(x), size, size, -1).permute(0, 3, 1, 2) for x in met)
    return features, depth, opacity


def _expand_batch(value: Tensor | None, batch: int) -> Tensor | None:
    return None if value is None else value.expand(batch, *value.shape[1:])


class Output(NamedTuple):
    """Result of B frames."""

    image: Tensor  # (B, 3, H, W), about [-1, 1]
    raw: Tensor  # (B, 3, h, w) volume rendering before super-resolution
    depth: Tensor  # (B, 1, h, w) distance along the camera's axis, head-frame units
    opacity: Tensor  # (B, 1, h, w) of the volume, [0, 1]
    residual_flow: Tensor | None  # (B, 2, H/2, W/2) in image sizes
    flow_weights: Tensor | None  # (B, 4, m, m) weights of mesh, rigid, identity and neck flow
    density_tv: Tensor | None = None  # (B,) density regularisation, in training only
    warped_photo: Tensor | None = None  # (B, 3, H/2, W/2) photo colours sampled along the flow
    source_visibility: Tensor | None = None  # (B, 1, m, m) 1 where the photo shows the pixel
    before_inpainting: Tensor | None = None  # (B, 3, H, W) image without `inpainted`
    sample_grid: Tensor | None = None  # (B, 4, H, W) photo positions of both layers, see `LayerWarp`
    blend_weights: Tensor | None = None  # (B, 2, H, W) weights of both layers
    inpainted: tuple[InpaintedPatch, ...] = ()  # synthesised patches: mouth, eyes, eyelids

    def upscale(self, detail: Tensor, size: int) -> Tensor:
        """Return the image as (B, 3, size, size) with `detail` (B, 3, M, M), the `photo_residual` of a larger photo."""
        if self.before_inpainting is None or self.sample_grid is None or self.blend_weights is None:
            return F.interpolate(self.image.float(), (size, size), mode="bicubic", align_corners=False)
        at_once = CPU_UPSCALE_BATCH if detail.device.type == "cpu" else len(detail)
        parts = (part.split(at_once) for part in (self.before_inpainting, self.sample_grid, self.blend_weights, detail))
        large = [
            upscale_with_detail(bare, LayerWarp(*taken), own, size) for bare, *taken, own in zip(*parts, strict=True)
        ]
        return composite_patches(torch.cat(large), self.inpainted)


def composite_patches(image: Tensor, patches: tuple[InpaintedPatch, ...]) -> Tensor:
    """Paste inpainted patches into images (B, 3, ., .), in place."""
    for painted in patches:
        painted.paste_into(image)
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
        self.inpainters = nn.ModuleDict()  # each trained in a stage of its own
        if config.mouth:
            self.inpainters["mouth"] = MouthInpainter(config.mouth)
        if config.eyes:
            self.inpainters["eyes"] = EyeInpainter(config.eyes)
        if config.lids:
            self.inpainters["lids"] = EyelidInpainter(config.lids)
        # (first, end, total): the rows of a larger batch that `forward` gets; jitter is then that of the whole batch
        self.batch_rows: tuple[int, int, int] | None = None

    def encode_source(
        self, image: Tensor, beta: Tensor, camera: Tensor, landmarks: Tensor, person_mask: Tensor | None = None,
        margins: Tensor | None = None,
    ) -> Source:  # fmt: skip
        """Encode a photo for `drive`.

        Args:
            image: photo (B, 3, H, W).
            beta: its expression (B, 64).
            camera: its camera (B, 25).
            landmarks: its landmarks (B, 478, 3), head frame.
            person_mask: (B, 1, ., .) in [0, 1], 1 on the person. Without it hair counts as background.
            margins: (B, 3) how far a larger photo continues to the left, top and right, in image sizes.
        """
        B, H = image.shape[0], self.config.image_size
        for name, value, shape in (
            ("image", image, (B, 3, H, H)), ("beta", beta, (B, BETA_DIM)), ("camera", camera, (B, CAMERA_DIM)),
            ("landmarks", landmarks, (B, NUM_LANDMARKS, 3)),
        ):  # fmt: skip
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must be {shape}, got {tuple(value.shape)}")
        stem, tokens = self.generator.encode(image)
        sv, sr = self.source_view, self.superres
        head, body, front = None, None, None
        if self.flow is not None:
            with torch.no_grad():
                front = self.flow.source_visibility(landmarks, camera)
                head = self.flow.head_mask(landmarks, camera, person_mask, front)
                body = (1 - head) * (
                    DEFAULT_BODY_WEIGHT if person_mask is None else resize(person_mask.float(), self.config.mesh_size)
                )
        behind = None if head is None or sv is None else fill_push_pull(image, 1 - head, H // 4)
        view, lasting = sv.make_view_plane(stem) if sv is not None else None, not torch.is_grad_enabled()
        rows = None
        if view is not None and self._use_sparse_path(image):
            rows = self._make_view_tables(view)
        return Source(
            image=image, camera=camera, landmarks=landmarks, lam=self.expression.coefficients(beta),
            head_mask=head, body_mask=body, stem=stem, tokens=tokens,
            view_plane=view, background=sv.make_background(stem, behind) if sv is not None else None,
            features_half=sr.detail2(stem[0]) if sr.uses_flow else None,
            features_quarter=sr.detail4(stem[1]) if sr.uses_flow else None,
            image_half=F.avg_pool2d(image.float(), 2) if sr.uses_flow else None, visibility=front, margins=margins,
            highpass=highpass(image) if lasting and sr.uses_flow else None,
            basis=self.expression.basis() if lasting else None, view_tables=rows,
        )  # fmt: skip

    def generate_planes(self, source: Source, lam: Tensor) -> Tensor:
        """Generate the tri-plane (B, 3, C, P, P) of the source with coefficients lambda (B, n)."""
        return self.generator(source.stem, source.tokens, self._expression_code(source, lam))

    def pose_head(self, source: Source, lam: Tensor, planes: Tensor | None = None) -> PosedHead:
        """Apply coefficients lambda (B, n) to the source, for `drive` with any number of cameras.

        `planes` are the tri-planes if they are known already.
        """
        planes, surface, mesh = self.generate_planes(source, lam) if planes is None else planes, None, None
        if self.flow is not None:
            with torch.no_grad():
                moved = self.flow.deform_landmarks(source.landmarks, lam - source.lam)
                mesh = self.flow.deform_mesh(source.landmarks, source.camera, moved)
                surface = self.flow.rasterize_surface(moved) if self.config.head_prior else None
        if not self._use_sparse_path(planes):
            return PosedHead(planes, surface, mesh, None)
        return PosedHead(planes, surface, mesh, self._make_plane_tables(planes), bool(planes.isfinite().all()))

    def _make_plane_tables(self, planes: Tensor) -> list[Tensor]:
        """Apply the decoder's first layer to tri-planes (B, 3, C, P, P): a `make_feature_table` for each head."""
        weight = self.decoder.hidden.weight[:, : planes.shape[2]] / planes.shape[1]
        return [lean.make_feature_table(part, weight) for part in planes]

    def _make_view_tables(self, view: Tensor) -> list[Tensor]:
        """Apply the decoder's first layer to source-view planes (B, C, h, w): a `make_feature_table` for each."""
        return [
            lean.make_feature_table(part, self.decoder.hidden.weight[:, -view.shape[1] :]) for part in view.split(1)
        ]

    def _expression_code(self, source: Source, lam: Tensor) -> Tensor:
        """Return beta' (B, d); with gradients the basis is recomputed, so that they reach it."""
        return self.expression.code(lam, None if torch.is_grad_enabled() else source.basis)

    def _use_sparse_path(self, like: Tensor) -> bool:
        """Return whether invisible samples are skipped: on a CPU without gradients."""
        return like.device.type == "cpu" and not (self.training or torch.is_grad_enabled())

    def drive(
        self,
        source: Source,
        beta: Tensor | None,
        camera: Tensor,
        *,
        lam: Tensor | None = None,
        posed: PosedHead | None = None,
        raw_size: int | None = None,
        samples: SampleCounts | None = None,
        mesh_size: int | None = None,
    ) -> Output:
        """Render the source with the driver's expression and camera.

        Args:
            source: from `encode_source`.
            beta: driver's expression (B, 64); not needed with `lam`.
            camera: driver's camera (B, 25).
            lam: coefficients lambda (B, n) instead of `beta`.
            posed: result of `pose_head` for the same source and `lam`, if known.
            raw_size: side of the volume rendering; default: the config's.
            samples: coarse and fine samples per ray; default: the config's.
            mesh_size: side at which the face mesh is rasterised; default: the config's.
        """
        if lam is None:
            if beta is None:
                raise ValueError("drive needs beta or lam, got neither")
            lam = self.expression.coefficients(beta)
        posed = self.pose_head(source, lam) if posed is None else posed
        size = raw_size or self.config.raw_size
        features, depth, opacity = self.render(source, posed, camera, size, samples)
        detail, weights = None, None
        if posed.mesh is not None:
            detail = self._prepare_photo_detail(source, posed.mesh, lam, camera, depth, opacity, mesh_size)
            weights = detail.flow.weights
        features = self._composite_background(source, features, opacity, detail)
        full = resize(features, self.config.image_size // 4)
        made = self.superres(full, full[:, :3], detail)
        rough = self._density_tv(source, posed) if self.training else None
        fills = () if self.training else self._inpaint(source, posed, made.image, camera)
        return Output(
            composite_patches(made.image.clone(), fills) if fills else made.image, features[:, :3], depth, opacity,
            made.residual_flow, weights, rough, made.warped_photo, made.source_visibility, made.image,
            made.sample_grid, made.blend_weights, fills,
        )  # fmt: skip

    def _inpaint(self, source: Source, posed: PosedHead, image: Tensor, camera: Tensor) -> tuple[InpaintedPatch, ...]:
        """Synthesise what the photo hides of mouth, eyes and eyelids."""
        if posed.mesh is None:
            return ()
        photo, moved = (source.image, source.landmarks, source.camera), posed.mesh.points[:, :NUM_LANDMARKS]
        fills: list[InpaintedPatch] = []
        for painter in self.inpainters.values():
            assert isinstance(painter, Inpainter)
            fills += painter.inpaint(image, *photo, moved, camera)
        return tuple(fills)

    def forward(
        self,
        source_image: Tensor,
        source_beta: Tensor,
        source_camera: Tensor,
        source_landmarks: Tensor,
        driver_beta: Tensor,
        driver_camera: Tensor,
        person_mask: Tensor | None = None,
        raw_size: int | None = None,
    ) -> Output:
        """Encode and drive in one call, for training."""
        source = self.encode_source(source_image, source_beta, source_camera, source_landmarks, person_mask)
        return self.drive(source, driver_beta, driver_camera, raw_size=raw_size)

    def render(
        self, source: Source, posed: PosedHead, camera: Tensor, size: int, samples: SampleCounts | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Render the volume (sec. 3.3), without the background.

        Returns:
            Features (B, C', s, s), RGB first, depth and opacity (B, 1, s, s); fp32.
        """
        cfg = self.config
        origin, directions = render.camera_rays(camera, size)
        if posed.plane_tables is not None and self._use_sparse_path(camera):
            return _rays_to_maps(self._render_sparse(source, posed, posed.plane_tables, camera, size, samples), size)
        coarse, fine = samples or (cfg.coarse_samples, cfg.fine_samples)
        depths = render.sample_coarse_depths(
            camera, size * size, coarse, jitter=self.training, batch_rows=self.batch_rows
        )
        colours, densities = self._decode_samples(source, posed, origin, directions, depths)
        if fine:
            with torch.no_grad():
                weights, _ = render.ray_weights(densities, depths)
                more = render.sample_importance_depths(
                    depths, weights, fine, jitter=self.training, batch_rows=self.batch_rows
                )
            more_colours, more_densities = self._decode_samples(source, posed, origin, directions, more)
            depths, order = torch.sort(torch.cat([depths, more], dim=-1), dim=-1)
            densities = torch.cat([densities, more_densities], dim=-1).gather(-1, order)
            colours = torch.cat([colours, more_colours], dim=-2)
            colours = colours.gather(-2, order[..., None].expand_as(colours))
        return _rays_to_maps(render.composite(colours, densities, depths), size)

    def _composite_background(
        self, source: Source, features: Tensor, opacity: Tensor, detail: PhotoDetail | None
    ) -> Tensor:
        """Composite the head over the background, which moves with the flow instead of turning with the head."""
        if source.background is None:
            return features
        still, size = source.background.float(), features.shape[-1]
        behind = resize(still, size) if detail is None else warp(still, resize(detail.flow.background, size))
        if not self.training:
            kept = linear_step(opacity, *OPACITY_FADE)
            features, opacity = features * kept, opacity * kept
        return features + (1 - opacity) * behind

    def _render_sparse(
        self,
        source: Source,
        posed: PosedHead,
        rows: list[Tensor],
        camera: Tensor,
        size: int,
        samples: SampleCounts | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Render as `render` does, but without gradients and without invisible samples."""
        cfg, decoder = self.config, self.decoder
        coarse, fine = samples or (cfg.coarse_samples, cfg.fine_samples)
        origins, directions = render.camera_rays(camera, size)
        depths = render.sample_coarse_depths(camera, size * size, coarse, jitter=False)
        made, side, surface, views = [], posed.planes.shape[-1], posed.surface, source.view_tables
        if source.view_plane is not None and views is None:
            views = self._make_view_tables(source.view_plane)

        for b in range(len(camera)):

            def decode(points: Tensor, b: int = b) -> tuple[Tensor, Tensor]:
                flat = points.T.contiguous()
                hidden = lean.sample_plane_table(rows[b], side, flat)
                if source.view_plane is not None and views is not None:
                    hidden += lean.sample_view_table(
                        views[b], source.view_plane.shape[-1], flat, source.camera[b : b + 1]
                    )
                hidden = decoder.activate(hidden.add_(decoder.hidden.bias))
                prior = None
                if surface is not None:
                    prior = face_log_density(points[None], surface[b : b + 1], SURFACE_HALF_EXTENT)[0]
                return hidden, decoder.decode_densities(hidden, points, prior)

            with torch.autocast(camera.device.type, enabled=False):
                made.append(
                    lean.render_rays(decode, decoder.decode_colours, origins[b], directions[b], depths[b], fine)
                )
        features, depth, opacity = (torch.stack(values) for values in zip(*made, strict=True))
        if not posed.planes_finite:  # non-finite samples were skipped as invisible; the result must still show them
            features = torch.full_like(features, torch.nan)
        return features, depth, opacity

    def _decode_samples(
        self, source: Source, posed: PosedHead, origin: Tensor, directions: Tensor, depths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return colour features (B, R, S, C') and densities (B, R, S) at the sample depths (B, R, S) of the rays."""
        B, R, S = depths.shape
        points = (origin[:, None, None] + directions[:, :, None] * depths[..., None]).view(B, R * S, 3)
        colours, densities = self.query_field(source, posed, points)
        return colours.view(B, R, S, -1), densities.view(B, R, S)

    def query_field(self, source: Source, posed: PosedHead, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return colour features (B, N, C'), RGB first, and densities (B, N) at points (B, N, 3) of the head frame."""
        features = self._sample_features(source, posed, points)
        prior = None if posed.surface is None else face_log_density(points, posed.surface, SURFACE_HALF_EXTENT)
        return self.decoder(features, points, prior)

    def _sample_features(self, source: Source, posed: PosedHead, points: Tensor) -> Tensor:
        """Sample the decoder's input features (B, N, C) at points (B, N, 3)."""
        features = sample_planes(posed.planes, points)
        if source.view_plane is not None:
            features = torch.cat([features, sample_view_plane(source.view_plane, points, source.camera)], dim=-1)
        return features

    def _density_tv(self, source: Source, posed: PosedHead) -> Tensor:
        """Return EG3D's density regularisation: mean difference of the log densities of nearby points, (B,)."""
        like = posed.planes.new_empty(len(posed.planes), DENSITY_TV_POINTS, 3, dtype=torch.float32)
        points = render.uniform_noise(like, self.batch_rows) - 0.5
        near = points + DENSITY_TV_DISTANCE * (2 * render.uniform_noise(like, self.batch_rows) - 1)
        features = self._sample_features(source, posed, torch.cat([points, near], dim=1))
        hidden = self.decoder.activate(self.decoder.hidden(features))
        here, there = self.decoder.density_logits(hidden).chunk(2, dim=1)
        return (here - there).abs().mean(1)

    def _prepare_photo_detail(
        self,
        source: Source,
        moved: DeformedMesh,
        lam: Tensor,
        camera: Tensor,
        depth: Tensor,
        opacity: Tensor,
        size: int | None,
    ) -> PhotoDetail:
        assert self.flow is not None and self.flow_blend is not None and source.image_half is not None
        assert source.features_half is not None and source.features_quarter is not None
        assert source.head_mask is not None and source.body_mask is not None
        s = self.config.flow_size
        with torch.no_grad():
            mesh: MeshFlow = self.flow.render_flow(
                moved, camera, size, source.head_mask, source.visibility, source.margins
            )
        depth, opacity = resize(depth, s), resize(opacity, s)
        origin, directions = render.camera_rays(camera, s)
        rigid = rigid_flow(depth, directions, origin, source.camera)
        drift = neck_flow(source.camera, camera, s)
        turned, change = relative_rotation(source.camera, camera), lam - source.lam
        flow = self.flow_blend(
            source.image, mesh, rigid, drift, opacity, source.head_mask, source.body_mask, turned, change
        )
        halves = (source.image, source.image_half, source.features_half, source.features_quarter)
        return PhotoDetail(
            *halves, flow, mesh, source.head_mask, source.body_mask, self._expression_code(source, lam), source.highpass
        )
