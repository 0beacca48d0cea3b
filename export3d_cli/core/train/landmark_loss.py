"""Landmark loss (beyond the paper): distance of the landmarks that the face landmarker finds in output and target."""

from pathlib import Path

import torch
import torch.nn.functional as F
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from torch import Tensor, nn

from export3d_cli.core.face.landmarks import NUM_LANDMARKS
from export3d_cli.core.face.tracker import read_bundle
from export3d_cli.core.model.inpaint.inpainter import AlignedCrop, level_axes
from export3d_cli.core.model.warp.mesh_flow import warp

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
