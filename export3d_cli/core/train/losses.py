"""Losses of the stage `reconstruction` (sec. 6.3) and beyond the paper. Images are (B, 3, H, W) in [-1, 1]."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from torch import Tensor, nn

from export3d_cli.core.config.schema import TrainConfig
from export3d_cli.core.face.landmarks import LEFT_EYE, NUM_LANDMARKS, OUTER_LIPS, RIGHT_EYE
from export3d_cli.core.face.tracker import read_bundle
from export3d_cli.core.model.cached_tensors import index_tensor
from export3d_cli.core.model.inpaint.inpainter import AlignedCrop, level_axes
from export3d_cli.core.model.volume_renderer import pixel_grid
from export3d_cli.core.model.warp.mesh_flow import resize, warp
from export3d_cli.core.train.perceptual import PerceptualDistance
from export3d_cli.core.train.training_data import Batch

CROP_SIZE_PX = 64  # side of the crops of eyes and mouth
SOLID_HEAD = 0.9  # head mask from which the depth of the surface counts: the mask fades out on the neck
VIEW_SIZE_PX = 256  # side of the landmark network's input
VIEW_MARGIN = 1.5  # side of the input relative to the landmarks' bounding box


class LandmarkNetwork(nn.Module):
    """The landmark network of a `face_landmarker.task` bundle in PyTorch, so that gradients pass through it."""

    def __init__(self, bundle: Path) -> None:
        super().__init__()
        (content,) = read_bundle(bundle, "face_landmarks_detector.tflite")
        plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES  # keeps the file's operations
        reader = Interpreter(model_content=content, experimental_op_resolver_type=plain)
        reader.allocate_tensors()
        shapes = {d["index"]: d["shape"].tolist() for d in reader.get_tensor_details()}
        self.output_index = next(d["index"] for d in reader.get_output_details() if d["shape"][-1] == 3 * NUM_LANDMARKS)
        self.input_index = reader.get_input_details()[0]["index"]
        self.operations: list[tuple[str, list[int], int, int]] = []  # operation, inputs, output, stride
        self.channel_padding: dict[int, list[int]] = {}  # output of a PAD operation -> channels added before and after
        stored: dict[int, int] = {}  # tensor -> its half-precision original
        computed = {self.input_index}
        for operation in reader._get_ops_details():  # the public interface does not expose the graph
            name, inputs, (out,) = operation["op_name"], operation["inputs"].tolist(), operation["outputs"].tolist()
            if name == "DEQUANTIZE":
                stored[out] = inputs[0]
                continue
            for index in set(inputs) - computed:
                value = torch.from_numpy(reader.get_tensor(stored.get(index, index)).copy())
                if value.ndim == 4:  # convolution (out, h, w, in), depthwise (1, h, w, C)
                    value = value.permute(3, 0, 1, 2) if name.startswith("DEPTH") else value.permute(0, 3, 1, 2)
                self.register_buffer(f"of_{index}", value.float() if value.is_floating_point() else value)
            if name == "PAD":
                self.channel_padding[out] = reader.get_tensor(inputs[1])[3].tolist()
            self.operations.append((name, inputs, out, round(shapes[inputs[0]][1] / shapes[out][1])))
            computed.add(out)
            if out == self.output_index:
                break

    def forward(self, face: Tensor) -> Tensor:
        """Face crops (B, 3, 256, 256) in [0, 1] -> landmarks (B, 478, 3) in pixels of the crop."""
        values = {self.input_index: face}

        def value(index: int) -> Tensor:
            return values[index] if index in values else getattr(self, f"of_{index}")

        for name, inputs, out, stride in self.operations:
            x = value(inputs[0])
            if name in ("CONV_2D", "DEPTHWISE_CONV_2D"):
                weight, bias = value(inputs[1]), value(inputs[2])
                short = max(weight.shape[-1] - stride, 0)  # TensorFlow's "same" padding; all kernels are square
                x = F.pad(x, (short // 2, short - short // 2) * 2)
                x = F.conv2d(x, weight, bias, stride, groups=1 if name == "CONV_2D" else x.shape[1])
            elif name == "PRELU":
                x = F.prelu(x, value(inputs[1]).flatten())
            elif name == "ADD":
                x = x + value(inputs[1])
            elif name == "MAX_POOL_2D":
                x = F.max_pool2d(x, stride)
            elif name == "PAD":  # of channels
                x = F.pad(x, (0, 0, 0, 0, *self.channel_padding[out]))
            else:
                raise ValueError(f"the landmark network has an unsupported operation {name}")
            values[out] = x
        return values[self.output_index].flatten(1).view(-1, NUM_LANDMARKS, 3)


class LandmarkLoss(nn.Module):
    """Mean absolute difference per axis of the landmarks that the network finds in two images of one face."""

    def __init__(self, network: LandmarkNetwork) -> None:
        super().__init__()
        self.network = network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor, target: Tensor, landmarks: Tensor) -> Tensor:
        """Images (B, 3, H, W), [-1, 1], of landmarks (B, 478, 2), crop units -> percent of the side, differentiable."""
        with torch.autocast(image.device.type, enabled=False):
            grid = landmarker_view_grid(landmarks.float())
            with torch.no_grad():
                target_landmarks = self.network(warp(target, grid) / 2 + 0.5)
            return (self.network(warp(image, grid) / 2 + 0.5) - target_landmarks).abs().mean() * (100 / VIEW_SIZE_PX)


def landmarker_view_grid(landmarks: Tensor) -> Tensor:
    """Return the sampling grid of the network's input, (B, 2, 256, 256) in crop units, for landmarks (B, 478, 2)."""
    low, high = landmarks.amin(1), landmarks.amax(1)
    view = AlignedCrop((low + high) / 2, level_axes(landmarks), VIEW_MARGIN * (high - low).amax(1))
    return view.pixel_positions(VIEW_SIZE_PX)


def l2(image: Tensor, target: Tensor) -> Tensor:
    """Return an L2 term of eq. 13: the mean squared difference."""
    return F.mse_loss(image.float(), target.float())


def l1(image: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference (beyond the paper): blurs less than L2."""
    return F.l1_loss(image.float(), target.float())


def downsample(image: Tensor, size: int) -> Tensor:
    """Return the target of the raw terms of eq. 13: D at the side of the raw render."""
    return F.interpolate(image, size=(size, size), mode="area") if image.shape[-1] != size else image


def face_mask(landmarks: Tensor, size: int) -> Tensor:
    """Return soft ellipses around eyes and mouth of landmarks (B, 478, 2), crop units: (B, 1, size, size) in 0..1."""
    pixels = pixel_grid(size, landmarks.device).view(size, size, 2)
    mask = torch.zeros(len(landmarks), size, size, device=landmarks.device)
    for region in (LEFT_EYE, RIGHT_EYE, OUTER_LIPS):
        points = landmarks[:, index_tensor(region, landmarks)].float()  # (B, R, 2)
        centre = points.mean(1)  # (B, 2)
        deviation = points - centre[:, None]
        covariance = deviation.transpose(1, 2) @ deviation / len(region)  # (B, 2, 2)
        # closed eyes and lips are lines: no region is thinner than 3 % of the crop
        covariance = covariance + (0.015**2) * torch.eye(2, device=landmarks.device)
        # closed form: torch.linalg.inv synchronises with the device
        a, b, d = covariance[:, 0, 0], covariance[:, 0, 1], covariance[:, 1, 1]
        inverse = torch.stack([d, -b, -b, a], dim=-1).view(-1, 2, 2) / (a * d - b * b)[:, None, None]
        offset = pixels[None] - centre[:, None, None]  # (B, H, W, 2)
        # points on an ellipse lie at a squared Mahalanobis distance of 2 from its centre
        distance = ((offset @ inverse[:, None]) * offset).sum(-1) / (2 * 1.5**2)
        mask = torch.maximum(mask, torch.sigmoid(6 * (1 - distance)))
    return mask[:, None]


def crop_eyes_and_mouth(image: Tensor, landmarks: Tensor, side: int = CROP_SIZE_PX) -> Tensor:
    """Crop eyes and mouth, 1.4 times as wide, by landmarks (B, 478, 2): (B, C, H, W) -> (3 B, C, side, side)."""
    offsets = pixel_grid(side, image.device).T.view(2, side, side) - 0.5
    crops = []
    for region in (LEFT_EYE, RIGHT_EYE, OUTER_LIPS):
        points = landmarks[:, index_tensor(region, landmarks)].float()  # (B, R, 2)
        low, high = points.amin(1), points.amax(1)
        width = 1.4 * (high - low).amax(1).clamp_min(0.01)
        crops.append(warp(image, (low + high)[:, :, None, None] / 2 + offsets * width[:, None, None, None]))
    return torch.cat(crops)


def flow_loss(sampled: Tensor, target: Tensor, source_visibility: Tensor) -> Tensor:
    """Return the loss of the warped source where `source_visibility` (B, 1, m, m), over cells of 1, 4 and 8 pixels."""
    size = sampled.shape[-1]
    difference = (sampled.float() - downsample(target.float(), size)) * resize(source_visibility.detach().float(), size)
    cells = [difference, F.avg_pool2d(difference, 4), F.avg_pool2d(difference, 8)]
    return torch.stack([x.abs().mean() for x in cells]).mean()


def draw_rays(config: TrainConfig, batch: Batch, size: int) -> Tensor:
    """Draw `raw_rays` pixels of raw renders of side `size`, more densely in eyes and mouth: indices (B, R)."""
    density = 1 + config.loss.mask * face_mask(batch.target_landmarks, size)
    return torch.multinomial(density.flatten(1), config.raw_rays)


def depth_loss(expected: Tensor, truth: Tensor, head: Tensor) -> Tensor:
    """Return the mean error of the expected depth of solid parts of the head; 0 where `truth` is not known."""
    return ((expected - truth).abs() * (truth > 0) * (head > SOLID_HEAD)).mean()


def ray_loss(output: Any, rays: Tensor, size: int, batch: Batch, config: TrainConfig,
             head_mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Return the loss of a volume rendered at the pixels `rays` (B, R) of images of side `size`, and its terms.

    Colours are compared in front of a random colour for each pair: the head must be opaque, and end, where the target's
    is and does. In the expected depth transparency counts as the far end, so that its loss makes the head opaque, too.
    """

    def pick(image: Tensor, mode: str = "area") -> Tensor:
        image = F.interpolate(image, (size, size), mode=mode).flatten(2)
        return image.gather(2, rays[:, None].expand(-1, image.shape[1], -1))[..., None]  # (B, C, R, 1)

    assert head_mask is not None
    w, head = config.loss, pick(head_mask)
    background = 2 * torch.rand_like(batch.target[:, :, :1, :1]) - 1
    colour = output.image + (1 - output.opacity) * background
    target = torch.lerp(background, pick(batch.target), head)
    terms = {"l2_raw": w.l2 * l2(colour, target), "l1_raw": w.l1 * l1(colour, target)}
    terms["silhouette"] = w.silhouette * l1(output.opacity, head)
    if w.depth > 0:
        terms["depth"] = w.depth * depth_loss(output.depth, pick(batch.target_depth, "nearest"), head)
    if w.density_tv > 0:
        terms["density_tv"] = w.density_tv * output.density_tv.mean()
    return _sum_terms(terms)


def reconstruction_loss(output: Any, batch: Batch, config: TrainConfig, perceptual: PerceptualDistance | None,
                        landmarks: LandmarkLoss | None = None,
                        head_mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Return eq. 13, `L_rec = L2_raw + L2 + LPIPS_raw + LPIPS`, plus terms beyond the paper, and its weighted terms.

    `head_mask` (B, 1, ., .) in 0..1 is where the target shows the head: the desired opacity.
    """
    w = config.loss
    raw_target = downsample(batch.target, output.raw.shape[-1])
    terms = {"l2": w.l2 * l2(output.image, batch.target), "l2_raw": w.raw * w.l2 * l2(output.raw, raw_target)}
    if w.l1 > 0:
        terms["l1"] = w.l1 * l1(output.image, batch.target)
        terms["l1_raw"] = w.raw * w.l1 * l1(output.raw, raw_target)
    if perceptual is not None and w.perceptual > 0:
        terms[perceptual.name] = w.perceptual * perceptual(output.image, batch.target, scales=w.perceptual_scales)
        if w.raw > 0:
            terms[f"{perceptual.name}_raw"] = w.raw * w.perceptual * perceptual(output.raw, raw_target, scales=1)
        if w.crop_perceptual > 0:
            crops = (crop_eyes_and_mouth(x, batch.target_landmarks) for x in (output.image, batch.target))
            terms["crop_perceptual"] = w.crop_perceptual * perceptual(*crops, scales=1)
    if w.mask > 0:
        mask = face_mask(batch.target_landmarks, batch.target.shape[-1])
        terms["mask"] = w.mask * (mask * (output.image.float() - batch.target.float()).abs()).mean()  # PlaneDict's
    if landmarks is not None and w.landmarks > 0:
        terms["landmarks"] = w.landmarks * landmarks(output.image, batch.target, batch.target_landmarks)
    if w.residual_flow > 0 and output.residual_flow is not None:
        terms["residual_flow"] = w.residual_flow * output.residual_flow.float().square().mean()
    if w.flow > 0 and output.warped_photo is not None:
        terms["flow"] = w.flow * flow_loss(output.warped_photo, batch.target, output.source_visibility)
    if w.density_tv > 0 and output.density_tv is not None:
        terms["density_tv"] = w.density_tv * output.density_tv.mean()
    if head_mask is not None:
        head = downsample(head_mask, output.opacity.shape[-1])
        if w.silhouette > 0:
            terms["silhouette"] = w.silhouette * l1(output.opacity, head)
        if w.depth > 0:
            depth = F.interpolate(batch.target_depth, output.depth.shape[2:])
            terms["depth"] = w.depth * depth_loss(output.depth, depth, head)
    return _sum_terms(terms)


def _sum_terms(terms: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = torch.stack([t.float() for t in terms.values()]).sum()
    return loss, {k: v.detach().float() for k, v in terms.items()}
