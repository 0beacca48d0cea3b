"""`export3d edit-basis [SRC] --v 4 --scale 1:10`: change coefficients of the expression basis."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from export3d_cli import console, core, options

GRID_SCALE = (-6.0, 6.0)  # 98 % of the values of filmed people lie in this range around their clip's mean


@click.command("edit-basis")
@click.argument("source", type=options.EXISTING_FILE, metavar="[SRC]", required=False)
@click.option("-o", "--output", type=options.OUTPUT_FILE,
              help="Video, or .png/.jpg with --grid.  [default: edit_basis.mp4 or .png, replaced]")  # fmt: skip
@click.option("--v", "vectors", type=click.IntRange(1), multiple=True, help="Number of a basis vector, from 1.")
@click.option("--scale", "scales", type=options.NumberRange(), multiple=True,
              help="Change of its coefficient, from A to B; may be negative.")  # fmt: skip
@click.option("--grid", is_flag=True,
              help="Contact sheet: a row per --v (default: all) with five values "
              f"({GRID_SCALE[0]:g} to {GRID_SCALE[1]:g}).")  # fmt: skip
@click.option("--describe", is_flag=True, help="Print the meaning of every basis vector; write nothing.")
@options.expression_options
@options.source_options
@click.option("--frames", type=click.IntRange(1, 100_000), default=60, show_default=True, help="Number of frames.")
@options.fps_option
@options.quality_option
@options.model_options
@options.output_options
def edit_basis(source: Path | None, output: Path | None, vectors: tuple[int, ...],
               scales: tuple[tuple[float, float], ...], describe: bool, overwrite: bool, as_json: bool,
               **values: Any) -> None:  # fmt: skip
    """Change the expression of the portrait SRC (default: the bundled example).

    By controls: edit-basis me.jpg --smile 0:1, or --smile .6 -o smile.png. By coefficients of the expression basis:
    each --v takes one --scale, in order; with --grid one --scale can apply to all.
    """
    grid, expression = values["grid"], values["expression"]
    if describe:
        ctx = click.get_current_context()
        kept = {"describe", "weights", "device", "precision", "threads", "as_json"}
        options.refuse_unused({str(option.name) for option in ctx.command.params} - kept, "--describe")
    if grid:
        options.refuse_unused({"frames", "fps"}, "--grid")
    if not (grid or describe or expression):
        for name, given in (("--v", vectors), ("--scale", scales)):
            if not given:
                raise click.MissingParameter(param_hint=f"'{name}'", param_type="option")
    applies_to_all = grid and len(scales) < 2
    if len(vectors) != len(scales) and not applies_to_all:
        raise click.BadParameter(f"give one --scale per --v, got {len(vectors)} --v and {len(scales)} --scale")
    common = scales[0] if scales else GRID_SCALE
    edits = tuple(zip(vectors, [common] * len(vectors) if applies_to_all else scales, strict=True))
    chosen = core.EditOptions(overwrite=overwrite or output is None, edits=edits, **values)
    if output is not None:
        chosen.check_outputs(output)
    animator = options.load_animator()
    if describe:
        basis = core.describe_basis(animator)
        if as_json:
            console.print_json({"vectors": basis})
            return
        for vector in basis:  # changes of lambda_i per standard deviation, and what b_i moves in pixels at 256
            by = ", ".join(f"{name} {change:+.2f}" for name, change in vector.moved_by.items())
            moves = ", ".join(f"{region} {pixels:.2f} px" for region, pixels in vector.moves.items())
            click.echo(f"v{vector.v}: {by}" + (f"; moves {moves}" if moves else ""))
        return
    if grid and not expression.controls and not vectors:
        every = range(1, animator.model.config.num_coefficients + 1)
        chosen = dataclasses.replace(chosen, edits=tuple((v, common) for v in every))
    out = output or Path("edit_basis.png" if grid or chosen.single else "edit_basis.mp4")
    source = source or core.example_path("source.jpg")
    console.run(core.edit_basis, animator, source, out, chosen, as_json=as_json)
