"""Model and training configuration as frozen dataclasses, and the named model presets. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

Count = Annotated[int, "1 or more"]  # the other numbers of a configuration are 0 or more
BETA_DIM = 64
CAMERA_DIM = 25


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of the network. Stored in the header of a weights file, from which the network is rebuilt."""

    image_size: int = 256  # H = W of the source and the output
    expression_space: Literal["arkit64"] = "arkit64"  # meaning of the 64 numbers of beta
    # LeBS (sec. 3.1)
    expression: Literal["clebs", "lebs", "direct"] = "clebs"  # f_e pre-trained, end to end, or beta (ablations)
    basis: int = 10  # n, the number of basis vectors
    code_dim: int = 96  # d, dimension of beta'
    code_hidden: int = 64  # width between the two fully connected layers of f_e
    motion: Literal["landmarks", "planedict"] = "landmarks"  # planedict: also reads it from pixels, see `PlaneDict`
    # generator (sec. 3.2)
    width: int = 384  # h, dimension of a token
    heads: int = 4
    ffn_ratio: int = 2  # expansion of the Mix-FFN
    conditioning: Literal["eadaln", "cross_attention"] = "eadaln"  # how beta' conditions a ViT block
    eadaln_blocks: int = 7  # ViT blocks with EAdaLN at H/16
    plain_blocks: int = 1  # ViT blocks without EAdaLN, at H/8
    plain_width: int = 0  # dimension of their tokens; 0: h / 2
    stem: tuple[int, int, int] = (32, 64, 96)  # channels of the source features at H/2, H/4, H/8
    plane_channels: int = 32
    plane_size: int = 64  # P, side of a plane in texels
    plane_width: int = 64  # channels of the convolutions before the planes
    plane_ema: float = 0.998  # delta of eq. 12; 0 disables the online EMA
    lowpass: bool = True  # Gaussian filter after each pixel shuffle
    # renderer (sec. 3.3)
    decoder_hidden: int = 64
    raw_size: int = 64  # h = w of the raw render in pixels
    raw_channels: int = 32  # channels of the raw render; the first three are RGB
    coarse_samples: int = 16
    fine_samples: int = 16
    # super-resolution
    superres: tuple[int, int] = (48, 24)  # channels at H/2 and H
    # beyond the paper, all off in the preset `paper`; see export3d_cli.core.model.warp.mesh_flow and source_view
    source_skip: bool = True  # concatenate the stem features with the upsampled tokens
    source_plane: bool = True  # a fourth feature plane, in the source camera
    head_prior: bool = True  # initialise the density as a head-shaped ellipsoid
    flow: bool = True  # warp the photo along the basis flow and add its detail in super-resolution
    mesh_size: int = 128  # side of the rasterised face mesh in pixels
    flow_size: int = 64  # side at which the candidate flows are blended, in pixels
    flow_width: int = 32  # channels of the network that blends the candidate flows
    mouth: int = 0  # base width of the mouth inpainter (a photo with closed lips hides the teeth); 0: none
    eyes: int = 0  # base width of the eye inpainter (narrow eyes hide the iris); 0: none
    lids: int = 0  # base width of the eyelid inpainter (open eyes hide the lids); 0: none
    # fraction of the learned residual flow that is applied on the face; above 0 the residual also depends on lambda
    face_residual_ratio: float = 0.0
    # calibration of trained weights (`CALIBRATION`), used at inference only; measured for the weights that carry it
    expression_gain: float = 1.0  # factor on changes of lambda that makes frames show the driver's expression; 1: none
    # distance of lambda from the line between two frames within which the CPU interpolates their tri-planes, 0: never;
    # lambda of an expression is about 3 long. The second is for the quality balanced; the first, which older weights
    # hold, is not used
    triplane_tolerance: tuple[float, float] = (0.0, 0.0)
    surface_density: float = 8.0  # density of the exported mesh's surface, per unit of the head frame

    @property
    def num_coefficients(self) -> int:
        """Length of lambda: n, or that of beta where beta is used directly."""
        return BETA_DIM if self.expression == "direct" else self.basis


def _model_preset(sizes: dict[str, Any]) -> ModelConfig:
    fields: dict[str, Any] = {name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()}
    return ModelConfig(**fields)


CALIBRATION = ("expression_gain", "triplane_tolerance", "surface_density")  # fields of `ModelConfig`, see there
INPAINTERS = ("mouth", "eyes", "lids")  # stages that train the inpainter of the same name in `ModelConfig`
# in training order
STAGES = ("clebs", *INPAINTERS, "planedict", "reconstruction", "adversarial", "pose_debias", "sampler")

# keys that a preset sets, between the defaults and the user's file; PRESETS: its model
TRAINING_PRESETS: dict[str, dict[str, Any]]
TRAINING_PRESETS = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8"))
PRESETS = {name: _model_preset(preset.pop("model")) for name, preset in TRAINING_PRESETS.items()}


@dataclass(frozen=True)
class DataConfig:
    """Training data, and how pairs of frames are drawn from it."""

    path: tuple[str, ...] = ()  # dataset folders written by `preprocess`
    weight: tuple[float, ...] = ()  # sampling weight of each folder; empty: equal
    cache: str = ""  # folder of the cache of decoded frames; empty: `<dataset>/cache-<size>`
    cache_stride: Count = 1  # cache every k-th frame of a clip
    hard_pair_ratio: float = 0.5  # fraction of pairs whose driver is chosen for its different pose and expression
    wide_view_ratio: float = 0.0  # fraction of pairs that are the two most different views among a few clips
    flip: bool = True  # mirror half of the pairs: images, beta, landmarks and camera
    jitter: float = 0.2  # strength of random colour and gamma changes, equal for both frames of a pair; 0: none
    still_image_ratio: float = 0.2  # sampling rate of people with still images only, relative to people with video
    # fraction of pairs whose driver is another head, for clips `<head>_tNN` that share the motion track NN
    cross_identity_ratio: float = 0.0
    workers: int = 0  # threads that prefetch batches; 0: one on a CPU, four with another device


@dataclass(frozen=True)
class ClebsConfig:
    """Stage `clebs`: contrastive pre-training of the expression code (sec. 3.1, 6.2)."""

    steps: int = 60_000
    weight: tuple[float, ...] = ()  # sampling weight of each dataset in this stage; empty: data.weight
    negatives: Count = 32  # negatives for a positive: other frames of the same clip
    clips_per_step: Count = 1  # several processes share them if their number divides this one
    temperature: float = 0.07
    lr: float = 1e-4
    lr_decay: bool = True  # linear, to a tenth over the stage
    clip_grad: float = 5.0  # largest gradient norm; 0: no clipping
    denominator: Literal["printed", "infonce"] = "infonce"  # only infonce sums over the positive
    image_size: Count = 128  # side of the images that f_I receives, in pixels
    encoder_width: Count = 64  # base width of ResNet-SE-18
    geometry: float = 0.0  # weight of a linear readout of landmark motion from lambda (beyond the paper)
    # weight of the variance between people's mean lambda relative to that within each person (beyond the paper)
    identity_leakage: float = 0.0
    mirror: float = 0.0  # weight of the change of lambda when the face is mirrored (beyond the paper)
    antisymmetric_dims: int = 0  # number of dimensions of lambda, the last ones, that change sign when mirrored
    geometry_warmup_steps: int = 0  # first steps, on landmark motion alone, without images
    geometry_pairs: Count = 256  # pairs of frames of a step for the landmark readout
    ridge: float = 1.0  # regularisation of the basis flow's ridge regression, in pairs
    ridge_pairs: int = 20_000  # pairs of frames that the basis flow is fitted to


@dataclass(frozen=True)
class InpaintConfig:
    """Options shared by the inpainting stages `mouth`, `eyes` and `lids` (beyond the paper)."""

    steps: int = 8000
    weight: tuple[float, ...] = ()  # sampling weight of each dataset in this stage; empty: data.weight
    batch: Count = 16  # crops of one update, over all processes
    lr: float = 1e-3  # decays linearly to a tenth
    jitter: float = 0.05  # replaces data.jitter; small, since teeth are white in any light
    l1: float = 1.0  # weight of the L1 loss inside the hole
    perceptual: float = 3.0  # weight of the perceptual loss of the whole crop, with loss.backbone
    adversarial: float = 0.1  # weight of the adversarial loss, from step `adversarial_start`
    adversarial_start: int = 500  # first step with the adversarial loss
    discriminator_lr: float = 2e-4
    discriminator_width: Count = 16  # base width of the discriminator
    r1_gamma: float = 0.02  # gamma of `gamma / 2 * |dD/dx|^2` on real crops, every 8 steps
    ema: float = 0.998


@dataclass(frozen=True)
class MouthConfig(InpaintConfig):
    """Stage `mouth`: inside of open mouths."""

    min_opening: float = 0.02  # smallest lip opening of a training crop, in interocular distances
    partial_hole_ratio: float = 0.25  # fraction of holes that leave the visible part of a slightly open mouth


@dataclass(frozen=True)
class EyesConfig(InpaintConfig):
    """Stage `eyes`: open eyes."""

    min_opening: float = 0.2  # smallest eyelid opening of a training crop, in eye widths
    hidden_iris_ratio: float = 0.1  # fraction of holes inpainted without the iris colour, as for closed eyes


@dataclass(frozen=True)
class LidsConfig(InpaintConfig):
    """Stage `lids`: closed and nearly closed eyes."""

    jitter: float = 0.2  # skin takes the colour of the light
    max_opening: float = 0.2  # largest eyelid opening of a training crop, in eye widths


@dataclass(frozen=True)
class PlaneDictConfig:
    """Stage `planedict`: the encoder of `PlaneDict` learns to read lambda from faces, without rendering."""

    steps: Count = 4000
    weight: tuple[float, ...] = ()  # sampling weight of each dataset in this stage; empty: data.weight
    batch: Count = 32
    lr: float = 1e-3  # decays linearly to a tenth


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of eq. 13 and of the terms beyond the paper."""

    l2: float = 1.0
    l1: float = 0.0
    perceptual: float = 1.0
    raw: float = 1.0  # factor on the terms of the raw render
    # VGG16 or MobileNetV2 features, a file or hf:owner/repo:file; empty: no perceptual term. The term is LPIPS, and is
    # logged as such, with torchvision's vgg16-397923af.pth and the linear weights of LPIPS v0.1 (vgg.pth) in `lpips`.
    backbone: str = ""
    lpips: str = ""  # linear weights of LPIPS, a file or hf: name; empty if the backbone's file holds them
    perceptual_scales: Count = 2  # image sizes of the perceptual term, each half the one before; raw render: one
    crop_perceptual: float = 0.0  # perceptual term on crops of the mouth and the eyes
    mask: float = 0.0  # L1 inside eyes and mouth, PlaneDict's mask loss
    residual_flow: float = 0.0  # squared length of the residual flow
    flow: float = 0.0  # photometric loss of the source warped along the flow
    density_tv: float = 0.0  # EG3D's total variation of the density
    depth: float = 0.0  # L1 of the expected depth where the data set has exact depth
    silhouette: float = 0.0  # L1 between the opacity and the head mask of the target
    disentangle: float = 0.0  # PlaneDict's, alone in every third step; needs model.motion planedict
    landmarks: float = 0.0  # L1 of the landmarks detected in output and target, percent of the face crop


@dataclass(frozen=True)
class AdversarialConfig:
    """Stage `adversarial` (sec. 6.3, 6.4): eq. 14, `L_rec + weight * L_adv`, after the stage `reconstruction`.

    The generator keeps the final learning rate of the stage `reconstruction`. R1 is lazy, as in StyleGAN2: the penalty
    is computed every `r1_interval` steps and multiplied by it; with c = r1_interval / (r1_interval + 1), the
    discriminator's Adam uses the learning rate c * lr and the betas beta1^c and beta2^c.
    """

    steps: int = 10_000
    weight: float = 0.01  # of L_adv
    lr: float = 1e-5  # of the discriminator
    betas: tuple[float, float] = (0.0, 0.99)  # of the discriminator's Adam
    r1_gamma: float = 0.0  # gamma of `gamma / 2 * |dD/dx|^2` on real images; 0: off
    r1_interval: Count = 16  # steps between R1 penalties
    channel_max: Count = 512  # upper limit of a block's channels
    channel_base: Count = 16_384  # a block at side s has min(channel_max, channel_base / s) channels
    mapping_layers: int = 8  # layers of the camera mapping network
    mbstd_group_size: Count = 4  # images of a group for the minibatch standard deviation


@dataclass(frozen=True)
class PoseDebiasConfig:
    """Stage `pose_debias` (beyond the paper): remove the head rotation that an expression appears to cause."""

    steps: Count = 100
    weight: tuple[float, ...] = ()  # sampling weight of each dataset in this stage; empty: data.weight
    batch: Count = 4  # source images of a step
    ridge: float = 30.0  # regularisation of the ridge regression


@dataclass(frozen=True)
class SamplerConfig:
    """Stage `sampler` (beyond the paper), alone in its run: fits a `HeadSampler` in closed form."""

    steps = 1  # no key: a closed form
    shapes: Count = 20  # components of the shape
    textures: Count = 80  # components of the texture
    held_out: int = 10  # every n-th head is left out, for measurements; 0: none
    # CSV with the columns person, age (years; 0: not known) and shown (1: the picture may be part of the weights);
    # empty: ages are not known, all may be shown
    attributes: str = ""


@dataclass(frozen=True)
class TrainConfig:
    """One training run: stages, schedule and bookkeeping."""

    run: str = "runs/compact"  # run folder
    license: str = ""  # licence of the trained weights, e.g. CC-BY-4.0; training refuses to start without
    preset: str = "compact"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clebs: ClebsConfig = field(default_factory=ClebsConfig)
    mouth: MouthConfig = field(default_factory=MouthConfig)
    eyes: EyesConfig = field(default_factory=EyesConfig)
    lids: LidsConfig = field(default_factory=LidsConfig)
    planedict: PlaneDictConfig = field(default_factory=PlaneDictConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    pose_debias: PoseDebiasConfig = field(default_factory=PoseDebiasConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    stages: tuple[str, ...] = ("clebs", "reconstruction")
    init: str = ""  # weights to start from: a name, a file or hf:owner/repo
    expression_from: str = ""  # weights whose expression code and basis flow replace the stage clebs
    steps: int = 300_000  # of the stage reconstruction
    batch: Count = 8  # pairs of one update, over all processes and accumulation parts
    accumulate: Count = 1  # parts into which a process splits its rows of the batch, to save memory
    lr: float = 1e-4
    warmup: int = 0  # steps of linear learning-rate warm-up
    decay: bool = False  # cosine to a tenth over `steps`
    decay_by_time: bool = False  # cosine over `max_minutes` of wall clock; the run is not reproducible
    ema: float = 0.999  # decay of the moving average of the weights; 0: none
    clip_grad: float = 1.0  # largest gradient norm; 0: no clipping
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: int = 0  # CPU threads; 0: torch's default
    cuda_graph: bool = True  # stage reconstruction on one GPU: run forward and backward as one CUDA graph
    skip_nonfinite: int = 0  # consecutive steps with a non-finite loss that are skipped before giving up
    raw_size_start: int = 0  # initial side of the raw render in pixels; 0: model.raw_size
    # pixels of each raw render that the stage reconstruction trains on; then only the volume is trained, without
    # background, flow and super-resolution, which is a fraction of the work; 0: all pixels, and the whole model
    raw_rays: int = 0
    # the stage reconstruction trains only parameters whose names start so, e.g. superres.; empty: all that it can
    trainable: tuple[str, ...] = ()
    raw_size_grow_step: int = 0  # step from which the raw render has the side model.raw_size
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 2  # training states to keep
    sample_every: int = 500
    log_every: Count = 10
    max_minutes: float = 0.0  # save and stop after this time; 0: no limit

    def stage_steps(self, stage: str) -> int:
        """Return the number of steps of a stage; 0 for `clebs` if the expression code is an ablation."""
        if stage == "clebs":
            return self.clebs.geometry_warmup_steps + self.clebs.steps if self.model.expression == "clebs" else 0
        return self.steps if stage == "reconstruction" else getattr(self, stage).steps
