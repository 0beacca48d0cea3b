"""`export3d edit CLIP --smile .4 -o OUT`: change the expression in a video."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from export3d_cli import console, core, options


@click.command()
@click.argument("clip", type=options.EXISTING_FILE, metavar="CLIP")
@click.option("-o", "--output", type=options.OUTPUT_FILE, required=True,
              help="Output: .mp4, .mov, .mkv, .webm, .gif, or FOLDER/%05d.png.")  # fmt: skip
@options.expression_options
@options.correction_options
@options.range_options
@click.option("--audio", default="source", show_default=True, metavar="source|none|FILE",
              callback=options.validate_audio, help="Sound of the result.")  # fmt: skip
@options.face_option
@options.smooth_option
@options.batch_option
@options.dry_run_option
@options.model_options
@options.output_options
def edit(clip: Path, output: Path, dry_run: bool, as_json: bool, **chosen: Any) -> None:
    """Change the expression of a face in the video CLIP; all but the face stays as it is.

    Controls hold their value in every frame: --gaze 0,0 looks straight ahead throughout. The result has CLIP's size,
    frame rate and sound. Another video drives regions of the face with `export3d reenact CLIP DRIVE --drive mouth`.
    """
    job = core.ReenactOptions(**chosen)
    dataclasses.replace(job, overwrite=job.overwrite or dry_run).check_outputs(output)
    if dry_run:
        planned = core.plan_edit(options.load_animator(), clip, output, job)
        console.print_lines(map(str, planned.sources))
        console.print_summary(planned, as_json=as_json)
        return
    console.run(core.edit_clip, options.load_animator(), clip, output, job, as_json=as_json)
