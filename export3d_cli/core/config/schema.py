"""Every size and knob, as frozen dataclasses; the named presets; YAML in and out. No torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from export3d_cli.core.config.validation import validate_model_config, validate_train_config
from export3d_cli.core.config.yaml_loader import build_dataclass, parse_yaml, read_yaml, short_repr
from export3d_cli.core.runtime.errors import ConfigError

BETA_DIM = 64
CAMERA_DIM = 25
NUM_LANDMARKS = 478  # MediaPipe's face mesh with irises


@dataclass(frozen=True)
class ModelConfig:
    """The size of the network. Kept inside the weights file and rebuilt from it."""

    image_size: int = 256  # H = W of source and result
    expression_space: Literal["arkit64", "bfm64"] = "arkit64"  # what the 64 numbers of beta mean
    # LeBS (sec. 3.1)
    expression: Literal["clebs", "lebs", "direct"] = "clebs"  # f_e by contrast, end to end, or beta itself (ablations)
    basis: int = 10  # n, number of basis vectors
    code_dim: int = 96  # d, dimension of beta'
    code_hidden: int = 64  # width between the two fully connected layers of f_e
    # generator (sec. 3.2)
    width: int = 384  # h, dimension of a token
    heads: int = 4
    ffn_ratio: int = 2  # Mix-FFN widening
    conditioning: Literal["eadaln", "cross_attention"] = "eadaln"  # how beta' enters a ViT block (ablation)
    eadaln_blocks: int = 7  # ViT blocks with EAdaLN at H/16
    plain_blocks: int = 1  # ViT blocks without it, at H/8
    plain_width: int = 0  # dimension of a token in them; 0: h / 2
    stem: tuple[int, int, int] = (32, 64, 96)  # channels of the source features at H/2, H/4, H/8
    plane_channels: int = 32
    plane_size: int = 64  # P, side of a plane
    plane_width: int = 64  # channels of the convolutions that make the planes
    plane_ema: float = 0.998  # delta of eq. 12; 0 turns the online EMA off
    lowpass: bool = True  # Gaussian filter after each pixel shuffle
    # renderer (sec. 3.3)
    decoder_hidden: int = 64
    raw_size: int = 64  # h = w of the raw render
    raw_channels: int = 32  # feature channels of the raw render, RGB first
    coarse_samples: int = 16
    fine_samples: int = 16
    # super-resolution
    superres: tuple[int, int] = (48, 24)  # channels at H/2 and H
    # beyond the paper; each off in the `paper` preset (docs of export3d_cli.core.model.warp.mesh_flow and source_view)
    source_skip: bool = True  # stem features join the upsampled tokens
    source_plane: bool = True  # fourth feature plane in the source camera
    head_prior: bool = True  # densities start as a head-shaped ellipsoid
    flow: bool = True  # basis flow and photo detail in super-resolution
    mesh_size: int = 128  # side at which the face mesh is rasterised
    flow_size: int = 64  # side at which the candidate flows are blended
    flow_width: int = 32  # channels of the network that blends the candidate flows
    mouth: int = 0  # first width of the network that paints what a photo with shut lips hides; 0: none
    eyes: int = 0  # of that which paints what narrow eyes hide
    lids: int = 0  # and of that which paints the lids of eyes that shut
    face_residual_ratio: float = (
        0.0  # share of the flow's learned shift that a face takes; above 0 the shift knows lambda, too
    )

    @property
    def num_coefficients(self) -> int:
        """How many numbers lambda has: n, or all of beta where the code is read from beta directly."""
        return BETA_DIM if self.expression == "direct" else self.basis


INPAINTERS = ("mouth", "eyes", "lids")  # stages that train a painter each, of the same name in `ModelConfig`
STAGES = ("clebs", *INPAINTERS, "reconstruction", "adversarial", "pose_debias")  # in the order they are trained

PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        image_size=64, code_dim=16, code_hidden=32, width=32, heads=2, eadaln_blocks=1, stem=(8, 8, 16),
        plane_channels=8, plane_size=16, plane_width=16, decoder_hidden=16, raw_size=16, raw_channels=8,
        coarse_samples=4, fine_samples=4, superres=(8, 8), mesh_size=32, flow_size=16, flow_width=8,
    ),
    "compact": ModelConfig(basis=20, code_hidden=256, face_residual_ratio=0.15, mouth=24, eyes=16, lids=16),
    "paper": ModelConfig(
        code_dim=256, code_hidden=256, width=1024, heads=4, ffn_ratio=4, eadaln_blocks=5, stem=(64, 128, 256),
        plain_width=1024, plane_channels=32, plane_size=128, plane_width=256, decoder_hidden=64, raw_size=64,
        raw_channels=32, coarse_samples=48, fine_samples=48, superres=(128, 64),
        source_skip=False, source_plane=False, head_prior=False, flow=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """Which frames are trained on, and how pairs are drawn."""

    path: tuple[str, ...] = ()  # data set folders written by `preprocess`
    weight: tuple[float, ...] = ()  # sampling share of each folder; empty: equal
    cache: str = ""  # folder of the decode-once cache; empty: `<data set>/cache-<size>`
    cache_stride: int = 1  # keep every k-th frame of a clip in the cache
    hard_pair_ratio: float = 0.5  # share of pairs whose driver is picked for a different pose or expression
    wide_view_ratio: float = (
        0.0  # share of pairs that are the two frames furthest apart in view among those of a few clips
    )
    flip: bool = True  # mirror images, beta and camera together
    jitter: float = 0.2  # colour and gamma changes, the same on both frames; 0: none
    still_image_ratio: float = 0.2  # how often a person known from stills only is drawn, against 1 for people on video
    cross_identity_ratio: float = (
        0.0  # share of pairs driven by another head, where clips `<head>_tNN` share the track NN
    )
    workers: int = 0  # threads that draw batches ahead; 0: one on a CPU, four beside another device


@dataclass(frozen=True)
class ClebsConfig:
    """Contrastive pre-training (sec. 3.1, 6.2)."""

    steps: int = 60_000
    weight: tuple[float, ...] = ()  # sampling share of each data set in this stage; empty: data.weight
    negatives: int = 32  # other frames of the same clip
    clips_per_step: int = 1  # clips of a step; several processes share them where their number divides it
    temperature: float = 0.07
    lr: float = 1e-4
    denominator: Literal["printed", "infonce"] = "infonce"  # eq. 1 leaves the positive out of the sum; InfoNCE keeps it
    image_size: int = 128  # side of the crops f_I sees
    encoder_width: int = 64  # first width of ResNet-SE-18
    geometry: float = 0.0  # weight of reading landmark motion linearly from lambda (beyond the paper)
    # Beyond the paper: keep people apart from lambda directly, and let a mirrored face have a mirrored lambda
    identity_leakage: float = (
        0.0  # weight of how far people's mean lambda lie apart, against how each person's lambda varies
    )
    mirror: float = 0.0  # weight of lambda staying the same when a face is mirrored, but for
    antisymmetric_dims: int = 0  # the last so many of lambda, which change sign: glances and lopsided mouths
    geometry_warmup_steps: int = 0  # steps at first that learn geometry alone, without pictures
    geometry_pairs: int = 256  # pairs of frames a step reads geometry from
    ridge: float = 1.0  # strength of the ridge regression of the basis flow, in pairs
    ridge_pairs: int = 20_000  # pairs the basis flow is fitted to


@dataclass(frozen=True)
class InpaintConfig:
    """What the stages `mouth`, `eyes` and `lids` (beyond the paper) have in common: holes in pictures are filled."""

    steps: int = 8000
    weight: tuple[float, ...] = ()  # sampling share of each data set in this stage; empty: data.weight
    batch: int = 16  # close-ups of one update, over all processes
    lr: float = 1e-3  # falls to a tenth, evenly
    jitter: float = 0.05  # in place of data.jitter: teeth are white, whatever the light
    l1: float = 1.0  # mean absolute difference where it was hidden
    perceptual: float = 3.0  # of the whole close-up, with loss.backbone
    adversarial: float = 0.1  # what a critic of the inside makes of it, from `after` on
    adversarial_start: int = 500  # steps without the critic's word
    discriminator_lr: float = 2e-4
    discriminator_width: int = 16  # its first channels
    r1_gamma: float = 0.02  # gamma of `gamma / 2 * |dD/dx|^2` on real close-ups, every 8 steps
    ema: float = 0.998


@dataclass(frozen=True)
class MouthConfig(InpaintConfig):
    """The stage `mouth`: open mouths."""

    min_opening: float = 0.02  # least opening of lips that are looked at, in distances between the eyes
    partial_hole_ratio: float = 0.25  # share of holes that leave what a photo with lips a little apart would show


@dataclass(frozen=True)
class EyesConfig(InpaintConfig):
    """The stage `eyes`: open eyes."""

    min_opening: float = 0.2  # least opening of lids that are looked at, in widths of the eye
    hidden_iris_ratio: float = (
        0.1  # share of holes that are filled without the iris' colour, as where a photo has the eyes shut
    )


@dataclass(frozen=True)
class LidsConfig(InpaintConfig):
    """The stage `lids`: eyes that are shut, or nearly."""

    jitter: float = 0.2  # skin has the colour of the light
    max_opening: float = 0.2  # widest opening of lids that are looked at, in widths of the eye


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of eq. 13 and 14 and of those beyond the paper."""

    l2: float = 1.0
    l1: float = 0.0
    perceptual: float = 1.0
    raw: float = 1.0  # factor on the raw image's terms
    # VGG16 or MobileNetV2 features, a file or hf:owner/repo:file; empty: no perceptual term. It is LPIPS, and called
    # so, with torchvision's vgg16-397923af.pth here and the linear weights of LPIPS v0.1 (vgg.pth) as `lpips`.
    backbone: str = ""
    backbone_sha256: str = ""  # what the backbone must be; empty: not asked for
    lpips: str = ""  # linear weights of LPIPS, likewise; not needed where the backbone's file holds them too
    perceptual_scales: int = (
        2  # image sizes the perceptual term is taken at, each half the one before; the raw image at one
    )
    l2_scales: int = 1  # the same for L2, raw image included
    crop_perceptual: float = 0.0  # the perceptual term on mouth and eyes by themselves
    mask: float = 0.0  # eyes and mouth, PlaneDict's mask loss
    adversarial: float = 0.01  # now `adversarial.weight`; stays so that older files are read
    residual_flow: float = 0.0  # penalty on the residual flow
    flow: float = 0.0  # the photo's colours along the flow are to be the target's already
    density_tv: float = 0.0  # EG3D's density regularisation: neighbours in the volume are to be alike
    silhouette: float = 0.0  # the volume is to be opaque where the target shows the head, hair and all, and only there
    landmarks: float = 0.0  # what the face landmarker sees in result and driver is to agree, percent of the face's view
    identity: float = 0.0  # 1 - cosine of embeddings of result and driver
    embedder: str = ""  # TorchScript face embedder, (B, 3, 112, 112) RGB with ImageNet's mean and deviation


@dataclass(frozen=True)
class AdversarialConfig:
    """The stage `adversarial` (sec. 6.3, 6.4): eq. 14, `L_rec + weight * L_adv`, after the stage `reconstruction`.

    The generator goes on at the rate the reconstruction ended with. With R1, the discriminator's Adam is corrected for
    its being regularised only every `r1_every` steps, as StyleGAN2 does: with c = r1_every / (r1_every + 1) its rate
    is c * lr and its betas are beta1^c and beta2^c; the penalty is multiplied by r1_every.
    """

    steps: int = 10_000
    weight: float = 0.01  # of L_adv
    lr: float = 1e-5  # of the discriminator
    betas: tuple[float, float] = (0.0, 0.99)  # of the discriminator's Adam
    r1_gamma: float = 0.0  # gamma of `gamma / 2 * |dD/dx|^2` on real images; 0: off
    r1_interval: int = 16  # steps between two R1 penalties
    channel_max: int = 512  # most channels of a block
    channel_base: int = 16_384  # channels times side: a block at side s has min(channels, base / s)
    mapping_layers: int = 8  # layers of the mapping of the camera
    mbstd_group_size: int = 4  # images over which minibatch standard deviation is taken
    # adaptive augmentation of what the discriminator sees: with r = mean(sign(D(real))), the probability of every
    # augmentation moves by batch * ada_every / ada_images towards where r is `ada`, every `ada_every` steps
    ada: float = 0.0  # wanted r, 0.6 in StyleGAN2-ADA; 0: the probability stays as it is
    ada_every: int = 4
    ada_images: int = 500_000  # images in which the probability can go from 0 to 1
    augment: float = 0.0  # the probability at first


@dataclass(frozen=True)
class PoseDebiasConfig:
    """The stage `steady` (beyond the paper): expressions are not to be read as turns of the head."""

    steps: int = 100
    weight: tuple[float, ...] = ()  # sampling share of each data set in this stage; empty: data.weight
    batch: int = 4  # sources of a step
    ridge: float = 30.0  # strength of the regression


@dataclass(frozen=True)
class TrainConfig:
    """One training run: stages in order, schedule, bookkeeping."""

    run: str = "runs/compact"  # run folder
    preset: str = "compact"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clebs: ClebsConfig = field(default_factory=ClebsConfig)
    mouth: MouthConfig = field(default_factory=MouthConfig)
    eyes: EyesConfig = field(default_factory=EyesConfig)
    lids: LidsConfig = field(default_factory=LidsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    pose_debias: PoseDebiasConfig = field(default_factory=PoseDebiasConfig)
    stages: tuple[str, ...] = ("clebs", "reconstruction")
    init: str = ""  # weights file to start from
    expression_from: str = ""  # weights file whose expression code and flow basis are taken instead of the stage clebs
    steps: int = 300_000  # of the reconstruction stage
    batch: int = 8  # pairs of one update, over all processes and parts
    accumulate: int = 1  # parts a process takes its share of the batch in, to save memory
    lr: float = 1e-4
    warmup: int = 0  # steps of linear warm-up
    decay: bool = False  # cosine to a tenth over `steps`
    decay_by_time: bool = False  # the cosine follows the clock to `max_minutes`: such a run does not repeat exactly
    ema: float = 0.999
    clip_grad: float = 1.0  # 0: off
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: int = 0  # 0: torch's default
    compile: str = ""  # backend of torch.compile for the model, e.g. inductor; empty: not compiled
    cuda_graph: bool = True  # the reconstruction stage on one GPU: forward and backward as one CUDA graph
    skip_nonfinite: int = 0  # steps in a row left out because their loss is no number, before giving up
    raw_size_start: int = 0  # side of the raw render at first; 0: model.raw_size at once
    raw_size_grow_step: int = 0  # step at which the raw render takes its full side
    checkpoint_every: int = 500
    keep_checkpoints: int = 2  # training states kept
    sample_every: int = 500
    log_every: int = 10
    tensorboard: bool = True  # write event files too, where TensorBoard is installed
    max_minutes: float = 0.0  # stop (and save) after this many minutes; 0: no limit

    def stage_steps(self, stage: str) -> int:
        """How many steps a stage takes; `clebs` none where the expression code is an ablation."""
        if stage == "clebs":
            return self.clebs.geometry_warmup_steps + self.clebs.steps if self.model.expression == "clebs" else 0
        steps: int = self.steps if stage == "reconstruction" else getattr(self, stage).steps
        return steps


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain YAML-able data (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def model_config_from_dict(data: dict[str, Any]) -> ModelConfig:
    """The inverse of `to_dict` for a `ModelConfig`; raises `ConfigError` on unknown keys or wrong types."""
    if not isinstance(data, dict):
        raise ConfigError("the model's configuration is not a mapping of keys to values")
    model: ModelConfig = build_dataclass(ModelConfig, data, "model")
    validate_model_config(model)
    return model


def make_train_config(data: dict[str, Any], overrides: tuple[str, ...] = ()) -> TrainConfig:
    """Dataclass defaults < preset < `data` (parsed YAML) < `key=value` overrides; then the cross-field rules."""
    data = {k: dict(v) if isinstance(v, dict) else v for k, v in data.items()}
    for item in overrides:
        key, sep, value = item.partition("=")
        if not sep:
            raise ConfigError(f"override {item!r} is not of the form key=value")
        *parents, leaf = key.split(".")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {key!r}: {parent!r} is not a section")
        node[leaf] = parse_yaml(value, f"override {item[:100]!r}")
    preset = data.get("preset", "compact")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"preset {short_repr(preset)} is unknown: choose one of {', '.join(PRESETS)}")
    model = data.get("model") or {}
    if not isinstance(model, dict):
        raise ConfigError("model must be a section of the configuration")
    stages = data.get("stages", TrainConfig.stages)
    known = INPAINTERS if data.get("init") or not isinstance(stages, (list, tuple)) else stages
    untrained = {name: 0 for name in INPAINTERS if name not in known}  # they would paint noise
    data["model"] = {**to_dict(PRESETS[preset]), **untrained, **model}
    config: TrainConfig = build_dataclass(TrainConfig, data, "")
    validate_train_config(config, STAGES)
    return config


def load_train_config(path: Path, overrides: tuple[str, ...] = ()) -> TrainConfig:
    """Read a YAML file with `yaml.safe_load`; see `train_config`."""
    return make_train_config(read_yaml(path), overrides)


def save_yaml(config: Any, path: Path) -> None:
    """Write a resolved config so that `load_train_config` reads the same."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
