"""Animation of a portrait: the engine, and the jobs that go from files to files.

    animator, framing             the engine: weights -> `Animator`, photo -> `Portrait`, motion -> frames
    rendering, retargeting        rendering quality and uint8 frames; which of the driver's motion is used
    reenact, batch, options       a driver animates one portrait, or several; what a user can choose
    novel_view, edit_basis        the camera moves, or expression coefficients do; `view_writer` writes both
    driver_stream, compositor     the driver's motion in batches; background, paste-back and comparison
    pipeline, watermark           reading and writing in threads; visible and invisible marks
    mesh_export, basis_description    the head as a mesh; the meaning of the expression basis

Imports `model`, `face`, `media`, `config` and `runtime`. Imported by `evaluation` and `diagnostics`, and by the
commands through `core`.
"""
