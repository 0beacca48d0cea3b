"""`export3d look SRC --age 15 -o OUT`: change how the person in a photo looks."""

from pathlib import Path
from typing import Any

import click

from export3d_cli import console, core, options


@click.command()
@click.argument("source", type=options.EXISTING_FILE, metavar="SRC")
@click.option("-o", "--output", type=options.OUTPUT_FILE, required=True, help="Picture: .png or .jpg.")
@click.option("--age", type=float, default=0.0, help="Years to add, -20 to 40: --age 15.  [default: 0]")
@click.option("--weight", type=float, default=0.0,
              help="-1 (much leaner) to 1 (much heavier): --weight -.3.  [default: 0]")  # fmt: skip
@click.option("--hair", default="", metavar="#rrggbb",
              help="Mean colour of the hair: --hair '#5b3a1e'.  [default: its own]")  # fmt: skip
@click.option("--beard", type=float, default=0.0, help="Stubble, 0 to 1, in the hair's colour.  [default: 0]")
@options.face_option
@options.landmarks_option
@options.watermark_option
@click.option("--overwrite", is_flag=True, help="Overwrite an existing output file.")
@options.json_option
def look(source: Path, output: Path, age: float, weight: float, hair: str, beard: float, as_json: bool,
         **chosen: Any) -> None:  # fmt: skip
    """Change the age, weight, hair colour or beard of a person in the photo SRC; the background stays as it is.

    Age moves the landmarks and changes the skin's tone and contrast, as between rendered heads of different ages: it
    draws no wrinkles that the photo does not show. Hair keeps its cut. The same changes are the option --look of
    reenact, novel-view, edit-basis and live.
    """
    job = core.PortraitOptions(look=core.Look(age, weight, hair, beard), **chosen)
    console.run(core.write_look, source, output, job, as_json=as_json)
