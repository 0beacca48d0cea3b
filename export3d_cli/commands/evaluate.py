"""`export3d evaluate DATASET`: score the weights on a data set."""

from pathlib import Path
from typing import Any

import click

from export3d_cli import console, core, options

_REENACT_OPTIONS = ("framing", "pose", "motion", "smooth", "watermark")
_FOLDER, _EXISTING_FOLDER = (click.Path(exists=exists, file_okay=False, path_type=Path) for exists in (False, True))


def _check_identity(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and value != "dlib" and not Path(value).is_file():
        raise click.BadParameter(f"must be dlib or an existing file, got {value!r}", ctx, param)
    return value


def _check_network(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.startswith("hf:") and not Path(value).is_file():
        raise click.BadParameter(f"must be an existing file or hf:owner/repo:file, got {value!r}", ctx, param)
    return value


@click.command()
@click.argument("dataset", type=_EXISTING_FOLDER, metavar="DATASET")
@click.option("-o", "--output", type=_FOLDER, help="Folder for report.md, scores.csv, scores.json and pictures.")
@click.option("--max-frames", type=click.IntRange(0), default=50, show_default=True,
              help="Maximum frames per clip; 0: all.")  # fmt: skip
@click.option("--take", type=click.Choice(["spread", "first"]), default="spread", show_default=True,
              help="Which frames of a clip to score: evenly spread, or the first.")  # fmt: skip
@click.option("--protocol", type=click.Choice(["vfhq", "talkinghead"]),
              help="Compare as papers do: the first frame of each clip is the photo, 512 x 512; vfhq: 50 frames of 50 "
              "clips, background black; talkinghead: all frames.")  # fmt: skip
@click.option("--cross", is_flag=True, help="Let another person drive.")
@click.option("--cases", type=click.IntRange(1),
              help="Maximum number of clips, pairs or heads.  [default: all, 5 with --cross]")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
              help="Random seed of the pairs and intervals.")  # fmt: skip
@click.option("--identity", metavar="dlib|FILE", callback=_check_identity,
              help="Measure identity with dlib (pip install "
              "'export3d-cli[eval]') or a TorchScript face embedder.")  # fmt: skip
@click.option("--perceptual", metavar="FILE|hf:owner/repo:FILE", callback=_check_network,
              help="Measure perceptual distance with a VGG16 or MobileNetV2.")  # fmt: skip
@click.option("--lpips", metavar="FILE|hf:owner/repo:FILE", callback=_check_network,
              help="LPIPS' learned weights for that VGG16.")  # fmt: skip
@click.option("--results", type=_EXISTING_FOLDER, multiple=True,
              help="Also score finished videos of any tool: CASE.mp4 in a "
              "folder, framed as the clips. Repeatable.")  # fmt: skip
@click.option("--model/--no-model", default=True, help="Without the model: score only --results and the baselines.")
@click.option("--write-inputs", type=_FOLDER, help="Only write each case's source and driver there, for another tool.")
@options.frame_option
@options.motion_option
@options.pose_option
@options.smooth_option
@options.watermark_option
@options.quality_option
@options.model_options
@options.json_option
def evaluate(dataset: Path, output: Path | None, protocol: str | None, write_inputs: Path | None, as_json: bool,
             **chosen: Any) -> None:  # fmt: skip
    """Score what `reenact` writes by default on DATASET, a folder written by `preprocess`, next to baselines.

    The most frontal frame of each clip is animated by the clip. `raw` is the volume's render alone, `pwa` the photo
    warped by the true landmarks, `repeat` the photo itself, `view N` the photo turned by N degrees. A DATASET with
    exact views of rendered heads (clips/, labels/, depth/) is scored on novel views and depth instead. Printed are
    means over clips; report.md explains the metrics.
    """
    if write_inputs is not None:
        unused = {"output", "weights", "device", "precision", "quality", *chosen}
        options.refuse_unused(unused - {"protocol", "cross", "cases", "seed"}, "--write-inputs")
    if not chosen["model"]:
        options.refuse_unused({"quality", "precision", *_REENACT_OPTIONS}, "--no-model")
    settings = core.ReenactOptions(**{name: chosen.pop(name) for name in _REENACT_OPTIONS})
    chosen["max_frames"] = chosen["max_frames"] or None
    if protocol is not None:
        options.refuse_unused({"max_frames", "cases"}, f"--protocol {protocol}")
        chosen |= core.PROTOCOLS[protocol]
    evaluation = core.EvaluateOptions(**chosen, reenact=settings)
    if write_inputs is not None:
        files = [*map(str, core.write_inputs(dataset, evaluation, write_inputs))]
        if as_json:
            console.print_json({"files": files})
        else:
            console.print_lines(files)
        return
    animator = options.load_animator()
    with console.show_progress() as progress:
        result = core.evaluate_model(animator, dataset, evaluation, out=output, progress=progress)
    if as_json:
        console.print_json(result)
    elif not console.is_quiet():
        console.print_lines([core.describe_evaluation(result), *core.mean_table(result), *map(str, result.files[:3])])
