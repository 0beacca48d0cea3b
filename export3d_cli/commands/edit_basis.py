"""`export3d edit-basis [SRC] --v 4 --scale 1:10`: one coefficient of the expression basis moves."""

from __future__ import annotations

from pathlib import Path

import click

from export3d_cli import console, options


@click.command("edit-basis")
@click.argument("source", type=options.EXISTING_FILE, metavar="[SRC]", required=False)
@click.option("-o", "--output", type=options.NEW_FILE, help="Video to write.  [default: edit_basis.mp4, replaced]")
@click.option("--v", "vectors", type=click.IntRange(1), multiple=True, required=True, help="Basis vector, from 1.")
@click.option("--scale", "scales", type=options.Range(), multiple=True, required=True, help="Its value, from A to B.")
@options.frames_option(60)
@options.model_options
@options.output_options
def edit_basis(
    source: Path | None,
    output: Path | None,
    vectors: tuple[int, ...],
    scales: tuple[tuple[float, float], ...],
    frames: int,
    weights: str | None,
    device: str,
    precision: str,
    threads: int,
    crf: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Move coefficients of the expression basis in the portrait SRC (the bundled example when none is given).

    Several --v take one --scale each, in order.
    """
    from export3d_cli import core

    if len(vectors) != len(scales):
        raise click.BadParameter(f"{len(vectors)} times --v but {len(scales)} times --scale: give one --scale per --v")
    animator = core.Animator.from_weights(weights, device=device, precision=precision, threads=threads)
    chosen = core.EditOptions(
        edits=tuple(zip(vectors, scales, strict=True)), frames=frames, crf=crf, overwrite=overwrite or output is None
    )
    with console.progress() as report:
        summary = core.edit_basis(
            animator, source or core.example("source.jpg"), output or Path("edit_basis.mp4"), chosen, progress=report
        )
    console.finish(summary, as_json=as_json)
