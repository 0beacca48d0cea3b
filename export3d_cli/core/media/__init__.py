"""Reading and writing images and videos.

    image                            still images as uint8 RGB arrays and float tensors; folders of images
    colour_profile                   conversion of photos to sRGB
    reader, writer                   videos, image sequences and cameras as streams of frames; output formats
    soundtrack                       the audio track of output videos
    probe                            properties of input videos
    ffmpeg_process                   ffmpeg subprocesses, killed if they hang
    scene_detection                  cuts, dissolves and fades
    mjpeg_server                     a local page that shows a live picture
    content_credentials              signed statements that a file is synthetic (C2PA)

Imports `runtime` only. Imported by all packages above it except `model`; users go through `export3d_cli.core`.
"""
