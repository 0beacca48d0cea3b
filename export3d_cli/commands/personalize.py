"""`export3d personalize SRC [MORE...] --video CLIP -o me.person.safetensors`: one file for a person."""

from pathlib import Path
from typing import Any

import click

from export3d_cli import console, core, options


@click.command()
@click.argument("source", type=options.EXISTING_FILE, metavar="SRC")
@click.argument("also", type=options.EXISTING_FILE, metavar="[MORE]...", nargs=-1)
@click.option("-o", "--output", type=options.OUTPUT_FILE, required=True, help="Output: a file NAME.person.safetensors.")
@click.option("--video", type=options.EXISTING_FILE,
              help="A video of the person: the largest face up to the first cut, at most 250 frames.")  # fmt: skip
@click.option("--frames", type=click.IntRange(0, 8), default=4, show_default=True,
              help="Number of video frames to keep as photos: those that add most to the given photos.")  # fmt: skip
@click.option("--start", type=click.FloatRange(0), default=0.0, show_default=True, help="Seconds of it to skip.")
@click.option("--duration", type=click.FloatRange(0, 60, min_open=True), default=20.0, show_default=True,
              help="Seconds of it to use, at most.")  # fmt: skip
@click.option("--force", is_flag=True, help="Use photos and a video even if they seem to show somebody else.")
@options.model_options
@click.option("--overwrite", is_flag=True, help="Overwrite an existing output file.")
@options.json_option
def personalize(source: Path, output: Path, as_json: bool, **chosen: Any) -> None:
    """Make a file of the person in SRC from more photos (MORE) and a video; use it wherever a photo is taken.

    Frames show SRC, which is kept at 1080 pixels at most. Teeth, shut eyes and the far cheek come from the other
    photos, and the expressions are fitted to the person. The file shows a real person: make and share it only if they
    agree.
    """
    if chosen["video"] is None:
        options.refuse_unused({"frames", "start", "duration"}, "photos alone (add --video)")
    job = core.PersonalizeOptions(**chosen)
    core.check_person_output(output, job)
    console.run(core.personalize, options.load_animator(), source, output, job, as_json=as_json)
