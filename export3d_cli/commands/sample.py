"""`export3d sample -n 8 -o people/%03d.png`: pictures of people who do not exist."""

from pathlib import Path
from typing import Any

import click

from export3d_cli import console, core, options


@click.command("sample")
@click.option("-n", "--count", type=click.IntRange(1, 10_000), default=1, show_default=True, help="Number of pictures.")
@click.option("-o", "--output", type=options.OUTPUT_FILE, required=True,
              help="Picture (.png, .jpg), or people/%03d.png: numbered .png files.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True,
              help="Number of the first person, the next ones follow; a number always gives the same "
              "picture.")  # fmt: skip
@click.option("--truncation", type=click.FloatRange(0, 1.5), default=0.75, show_default=True,
              help="Variety of the faces: 0 is the mean face, 1 as varied as the training heads.")  # fmt: skip
@click.option("--age", type=options.NumberRange(), help="Range of ages in years: 20:40.")
@click.option("--mix", type=click.IntRange(0, 2**31), nargs=2, metavar="A B",
              help="Mix the persons A and B (numbers as for --seed); hair and clothes change half-way.")  # fmt: skip
@click.option("--at", type=options.NumberRange(), default="0.5", show_default=True,
              help="Position between A and B, 0 to 1; 0:1 with -n walks from A to B.")  # fmt: skip
@click.option("--weights", metavar="NAME|PATH|hf:OWNER/REPO", default="export3d-sampler", show_default=True,
              help="Weights of the stage sampler.")  # fmt: skip
@options.watermark_option
@click.option("--overwrite", is_flag=True, help="Overwrite an existing picture, but no numbered ones.")
@options.json_option
def sample(output: Path, weights: str, as_json: bool, **values: Any) -> None:
    """Write pictures of people who do not exist, 256 x 256, as sources for the other commands.

    A face sampled from a model of rendered heads (CC0) gets hair and clothes of one of them. No photo of a person was
    used.
    """
    if values["mix"] is not None:
        options.refuse_unused({"seed", "age"}, "--mix")
    else:
        options.refuse_unused({"at"}, "one person: give --mix A B")
    console.run(core.sample, output, core.SampleOptions(**values), weights, as_json=as_json)
