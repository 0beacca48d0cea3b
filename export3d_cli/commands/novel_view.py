"""`export3d novel-view [SRC] --yaw A:B`: move the camera around a portrait."""

from pathlib import Path
from typing import Any

import click

from export3d_cli import console, core, options


@click.command("novel-view")
@click.argument("source", type=options.EXISTING_FILE, metavar="[SRC]", required=False)
@click.option("-o", "--output", type=options.OUTPUT_FILE,
              help="Video, or .png/.jpg for one view.  [default: novel_view.mp4 or .png, replaced]")  # fmt: skip
@click.option("--yaw", type=options.NumberRange(), default="-30:30", show_default=True,
              help="Yaw in degrees; + turns the head to the image's right.")  # fmt: skip
@click.option("--pitch", type=options.NumberRange(), help="Pitch in degrees; + is up.")
@click.option("--roll", type=options.NumberRange(), help="Roll in degrees; + is clockwise.")
@click.option("--frames", type=click.IntRange(1, 100_000), help="Number of frames.  [default: 60; 9 views with --grid]")
@click.option("--loop", type=click.Choice(["pingpong", "once"]), default="pingpong", show_default=True,
              help="Sweep there and back, or once.")  # fmt: skip
@click.option("--grid", is_flag=True,
              help="Write a contact sheet (.png, .jpg) of the sweep, labelled with yaw and pitch.")  # fmt: skip
@click.option("--depth", is_flag=True, help="Render the depth of the face crop in colours: red is near, blue is far.")
@click.option("--mesh", type=options.OUTPUT_FILE, metavar="OUT.ply|OUT.glb",
              help="Write the head as a mesh (metres, y up); other "
              "outputs only with -o, --grid or --depth.")  # fmt: skip
@click.option("--morphs", type=click.Choice(["none", "arkit"]), default="none", show_default=True,
              help="Give a .glb mesh 52 morph targets with ARKit's names, for "
              "other programs; the mouth has no inside.")  # fmt: skip
@options.source_options
@options.expression_options
@options.fps_option
@click.option("--drive", type=options.EXISTING_FILE, help="Take the expression of this image, video or .motion.npz.")
@options.quality_option
@options.model_options
@options.output_options
def novel_view(source: Path | None, output: Path | None, frames: int | None, overwrite: bool, as_json: bool,
               **values: Any) -> None:  # fmt: skip
    """Turn the portrait SRC (default: the bundled example) from A to B degrees.

    A single angle, or --frames 1, makes a picture.
    """
    mesh, grid, depth, drive = (values[name] for name in ("mesh", "grid", "depth", "drive"))
    if mesh is not None and not (output or grid or depth):
        unused = {"yaw", "pitch", "roll", "frames", "loop", "framing", "size", "watermark", "also"}
        options.refuse_unused(unused, "a mesh alone (add -o, --grid or --depth)")
    if mesh is None:
        options.refuse_unused({"morphs"}, "views: morph targets need --mesh OUT.glb")
    if grid:
        options.refuse_unused({"loop"} if drive else {"loop", "fps"}, "--grid")
    overwrite = overwrite or (output is None and mesh is None)
    chosen = core.NovelViewOptions(frames=frames or (9 if grid else 60), overwrite=overwrite, **values)
    picture = grid or (chosen.single and drive is None)
    out: Path | None = output or Path("novel_view.png" if picture else "novel_view.mp4")
    if mesh is not None and not (output or grid or depth):
        out = None
    chosen.check_outputs(*([] if out is None else [out]))
    source = source or core.example_path("source.jpg")
    console.run(core.novel_view, options.load_animator(), source, out, chosen, as_json=as_json)
