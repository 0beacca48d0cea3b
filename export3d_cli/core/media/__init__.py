"""Reading and writing images and videos.

    image, image_folder              still images as uint8 RGB arrays and float tensors; image sequences
    colour_profile                   conversion of photos to sRGB
    reader, writer                   videos as streams of frames; output formats and encoders
    soundtrack                       the audio track of output videos
    probe                            properties of input videos
    ffmpeg_process                   ffmpeg subprocesses, killed if they hang
    scene_detection                  cuts, dissolves and fades
    content_credentials              signed statements that a file is synthetic (C2PA)

Imports `runtime` only. Imported by all packages above it except `model`; users go through `export3d_cli.core`.
"""
