"""Render every picture of README.md: `python examples/make_pictures.py` fills examples/pictures/ in a few minutes.

The portraits are a CC0 render and a NASA photo in the public domain, the driver is a CC0 render. The pictures show
typical results of the embedded weights (or of --weights), not selected ones.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import wave
from pathlib import Path

import cv2
import numpy as np

from export3d_cli.core import (
    Animator,
    EvaluateOptions,
    ExpressionEdit,
    NovelViewOptions,
    ReenactOptions,
    SampleOptions,
    build_dataset,
    edit_expression,
    evaluate_model,
    novel_view,
    reenact,
    sample,
    torch_state,
)
from export3d_cli.core.animation.novel_view import orbit_cameras
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.media.probe import ffmpeg_path
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT

HERE = Path(__file__).resolve().parent
OUT = HERE / "pictures"
SOURCE, PHOTO, DRIVER = HERE / "source.jpg", HERE / "astronaut.jpg", HERE / "drive.mp4"
WIDTH_PX = 840  # of every picture
CAPTION_HEIGHT_PX = 22
LOSSLESS = {"audio": "none", "crf": 0, "overwrite": True}


def main() -> None:
    """Render all pictures and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="others than the embedded ones")
    parser.add_argument("--frames", type=int, default=90, help="of the driver, for the animation")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: all")
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    animator = Animator.from_weights(options.weights)
    with tempfile.TemporaryDirectory() as folder, torch_state(threads=options.threads):
        render_all(animator, Path(folder), options.frames)
    for path in sorted(OUT.iterdir()):
        print(f"{path.stat().st_size / 1e3:7.0f} kB  {path.name}")


def render_all(animator: Animator, folder: Path, count: int) -> None:
    """Render the animation at the top, then the pictures of each command."""
    videos = []
    for name, portrait in (("render", SOURCE), ("photo", PHOTO)):
        out = folder / f"{name}.mkv"
        reenact(animator, portrait, DRIVER, out, ReenactOptions(compare=True, max_frames=count, **LOSSLESS))  # type: ignore[arg-type]
        videos.append([np.split(frame, 3, axis=1) for frame in read_frames(out)])
    a, b = videos
    captions = ("driver", "photo", "result", "photo", "result")
    moving = [row([y[1], x[0], x[2], y[0], y[2]], captions) for x, y in zip(a, b, strict=True)]
    write_gif(moving[::2], OUT / "reenact.gif")
    chosen = np.linspace(0, len(a) - 1, 6).astype(int)[1:]
    drivers = row([BLANK] + [a[k][1] for k in chosen], ("", "driver"))
    results = [row([video[0][0]] + [video[k][2] for k in chosen], ("photo", "result")) for video in videos]
    save_jpeg("reenact.jpg", drivers, *results)
    detail(animator, folder)
    compose(animator, folder)
    views = []
    for depth in (False, True):
        path = folder / f"view{depth}.png"
        options = NovelViewOptions(yaw=(-30, 30), frames=5, grid=True, depth=depth)
        novel_view(animator, SOURCE if depth else PHOTO, path, options)
        views.append(resize_to_width(read_image(path)))
        if depth:
            continue
        novel_view(animator, SOURCE, folder / "own.png", options)
        views.insert(0, resize_to_width(read_image(folder / "own.png")))
    save_jpeg("novel-view.jpg", *views)
    controls(animator)
    corrections(animator, folder)
    failures(animator)
    people(folder)
    data_set(animator, folder)


def detail(animator: Animator, folder: Path) -> None:
    """Show the face in the photo, in an enlarged frame of 256 x 256, and in a frame as large as the photo."""
    photo = read_image(SOURCE)
    tiles = [photo]
    for size in (256, 512):
        out = folder / f"{size}.mkv"
        reenact(animator, SOURCE, DRIVER, out, ReenactOptions(start=0.8, max_frames=1, size=size, **LOSSLESS))  # type: ignore[arg-type]
        tiles.append(cv2.resize(read_frames(out)[0], photo.shape[1::-1], interpolation=cv2.INTER_CUBIC))
    x0, y0, x1, y1 = animator.portrait(photo).face_box
    left, top = (x0 + x1) // 2 - 125, (y0 + y1) // 2 - 125
    part = [tile[top : top + 250, left : left + 250] for tile in tiles]
    save_jpeg("detail.jpg", row(part, ("photo", "--size 256, enlarged", "--size 512")))


def compose(animator: Animator, folder: Path) -> None:
    """Show a photo, a frame, and the same frame in front of another background."""
    tiles = [read_image(PHOTO)]
    for name, background in (("photo", "source"), ("coloured", "#2a7f62")):
        out = folder / f"{name}.mkv"
        options = ReenactOptions(start=1.3, max_frames=1, background=background, **LOSSLESS)  # type: ignore[arg-type]
        reenact(animator, PHOTO, DRIVER, out, options)
        tiles.append(read_frames(out)[0])
    save_jpeg("compose.jpg", row(tiles, ("photo", "frame", "--background")))


def controls(animator: Animator) -> None:
    """Show the named expression controls on both portraits, cropped to the face."""
    values = {"smile": 0.9, "jaw": 0.5, "pucker": 0.9, "blink": 0.9, "eyes-open": 0.2, "brows": (0.7, -0.7)}
    values |= {"gaze-x": (0.6, -0.6), "gaze-y": -0.5, "mouthLeft": 0.6}
    captions, tiles = ["photo"], [[read_image(path)] for path in (SOURCE, PHOTO)]
    portraits = [animator.portrait(images[0]) for images in tiles]
    for name, ends in values.items():
        for value in np.atleast_1d(ends):
            captions.append(f"{name} {value:g}")
            for portrait, images in zip(portraits, tiles, strict=True):
                edit = edit_expression(animator, portrait, ExpressionEdit({name: float(value)}))
                images += animator.edit(portrait, animator.expression_change(portrait, edit.beta))
    for portrait, images in zip(portraits, tiles, strict=True):
        x0, y0, x1, y1 = portrait.face_box
        scale = images[1].shape[0] / images[0].shape[0]
        images[0] = cv2.resize(images[0], images[1].shape[1::-1], interpolation=cv2.INTER_AREA)
        centre, half = np.array([x0 + x1, y0 + y1]) / 2 * scale, 0.62 * (y1 - y0) * scale
        (left, top), side = np.maximum(centre - half, 0).astype(int), int(2 * half)
        images[:] = [image[top : top + side, left : left + side] for image in images]
    save_jpeg("controls.jpg", *(
        row(images[k : k + 6], tuple(captions[k : k + 6]) if number == 0 else ())
        for k in (0, 6) for number, images in enumerate(tiles)
    ))  # fmt: skip


def corrections(animator: Animator, folder: Path) -> None:
    """Show frames before and after `--eyes-to-camera`, and before and after `--lips-shut-when-silent`."""
    silence, rows = folder / "silence.wav", []
    with wave.open(str(silence), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(2 * 16000))
    for number, path in enumerate((SOURCE, PHOTO)):
        tiles = []
        for start, option in ((1.96, "eyes_to_camera"), (0.64, "lips_shut_when_silent")):
            for value in (False, True):
                out = folder / f"{option}{value}{number}.mkv"
                options = ReenactOptions(
                    start=start, max_frames=1, framing="face", size=512, crf=0, audio=str(silence), **{option: value}
                )  # type: ignore[arg-type]
                reenact(animator, path, DRIVER, out, options)
                tiles.append(read_frames(out)[0][140:452, 100:412])  # the face
        rows.append(row(tiles, () if number else ("frame", "--eyes-to-camera", "frame", "--lips-shut-when-silent")))
    save_jpeg("corrections.jpg", *rows)


def failures(animator: Animator) -> None:
    """Show both portraits beyond the range of expressions and turns that the weights support."""
    captions = ("photo", "v1 +20", "v2 +15", "v5 -15", "45 degrees", "from below")
    rows = []
    for number, path in enumerate((SOURCE, PHOTO)):
        photo = read_image(path)
        portrait = animator.portrait(photo)
        changes = np.zeros((3, animator.model.config.num_coefficients), np.float32)
        changes[range(3), [0, 1, 4]] = 20, 15, -15
        views = NovelViewOptions(yaw=(45, 0), pitch=(0, 30), frames=2, grid=True)
        turned = animator.view(portrait, orbit_cameras(portrait.camera, views))
        tiles = [photo, *animator.edit(portrait, changes), *turned]
        rows.append(row(tiles, () if number else captions))
    save_jpeg("failures.jpg", *rows)


def people(folder: Path) -> None:
    """Show the first persons of `sample`."""
    sample(folder / "people/%02d.png", SampleOptions(count=16, seed=1))
    tiles = [read_image(path) for path in sorted((folder / "people").iterdir())]
    save_jpeg("sample.jpg", row(tiles[:8]), row(tiles[8:]))


def data_set(animator: Animator, folder: Path) -> None:
    """Show the tracker's overlay and a contact sheet of an evaluation."""
    build_dataset([DRIVER], folder / "a.motion.npz", max_frames=100, overlay=folder / "seen.mkv")
    overlay = list(read_frames(folder / "seen.mkv"))
    save_jpeg("preprocess.jpg", row([overlay[k] for k in np.linspace(0, len(overlay) - 1, 5).astype(int)]))
    build_dataset([DRIVER], folder / "data", max_frames=50)
    evaluate_model(animator, folder / "data", EvaluateOptions(max_frames=10), out=folder / "scores")
    sheets = sorted((folder / "scores").rglob("*.png")) + sorted((folder / "scores").rglob("*.jpg"))
    save_jpeg("evaluate.jpg", resize_to_width(read_image(sheets[0])))


BLANK = np.full((256, 256, 3), 255, np.uint8)


def read_frames(path: Path) -> list[np.ndarray]:
    """Read all frames of a short video, uint8 (H, W, 3)."""
    with VideoReader(path) as reader:
        return list(reader)


def resize_to_width(picture: np.ndarray) -> np.ndarray:
    """Resize a picture to the common width."""
    height = round(picture.shape[0] * WIDTH_PX / picture.shape[1])
    return np.asarray(cv2.resize(picture, (WIDTH_PX, height), interpolation=cv2.INTER_AREA))


def row(tiles: list[np.ndarray], captions: tuple[str, ...] = ()) -> np.ndarray:
    """Place square pictures in a row, each below its caption."""
    side = WIDTH_PX // len(tiles)
    small = [cv2.resize(tile, (side, side), interpolation=cv2.INTER_AREA) for tile in tiles]
    line = np.hstack(small)
    if not captions:
        return line
    head = np.full((CAPTION_HEIGHT_PX, line.shape[1], 3), 255, np.uint8)
    for index, caption in enumerate(captions):
        position = (index * side + 4, CAPTION_HEIGHT_PX - 7)
        cv2.putText(head, caption, position, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (70, 70, 70), 1, cv2.LINE_AA)
    return np.vstack([head, line])


def save_jpeg(name: str, *rows: np.ndarray) -> None:
    """Stack rows and write them as a small JPEG with the synthetic mark."""
    picture = np.vstack(rows)
    write_image(OUT / name, picture, comment=SYNTHETIC_COMMENT)
    ok, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    assert ok
    marked = (OUT / name).read_bytes()
    segment = marked[2 : 6 + int.from_bytes(marked[4:6], "big") - 2]  # the comment segment of write_image
    (OUT / name).write_bytes(data.tobytes()[:2] + segment + data.tobytes()[2:])


def write_gif(pictures: list[np.ndarray], out: Path) -> None:
    """Write a GIF of 12.5 frames/s with one palette for all frames."""
    height, width = pictures[0].shape[:2]
    command = [ffmpeg_path(), "-loglevel", "error", "-y"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    palette = (
        "split[a][b];[a]palettegen=max_colors=128[p];[b][p]paletteuse=dither=bayer:bayer_scale=5:diff_mode=rectangle"
    )
    command += ["-framerate", "25/2", "-i", "pipe:0", "-filter_complex", palette, str(out)]
    subprocess.run(command, input=b"".join(picture.tobytes() for picture in pictures), check=True)


if __name__ == "__main__":
    main()
