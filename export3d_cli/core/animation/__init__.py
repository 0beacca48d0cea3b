"""Animation of a portrait: the engine, and the jobs that go from files to files.

    animator, framing             the engine: weights -> `Animator`, photo -> `Portrait`, motion -> frames
    photo_canvas, background_fill the photo as person and background, onto which every frame is composed
    reenact, batch, options       a driver animates one portrait, or several; what a user can choose
    clip_editing, retouching      expressions in a video change, its other pixels stay
    attribute_editing             age, weight, hair colour and beard of the person in a photo
    novel_view, edit_basis        the camera moves, or expression coefficients do
    expression_controls, live     expressions by name; a camera or another program drives
    driver_stream, retargeting    the driver's motion in batches; which of it is used
    compositor                    background, several persons and comparison
    pipeline, frame_writer        reading and writing in threads; frames to files
    watermark                     visible and invisible marks
    sample                        people who do not exist
    mesh_export                   the head as a mesh

Imports `model`, `face`, `media`, `config` and `runtime`. Imported by `evaluation` and `diagnostics`, and by the
commands through `core`.
"""
