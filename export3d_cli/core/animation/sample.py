"""Pictures of people who do not exist, from the weights of the stage `sampler`."""

import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from export3d_cli.core.animation.frame_writer import is_image_output, report_each
from export3d_cli.core.animation.options import Progress, Summary, check_overwrite
from export3d_cli.core.animation.watermark import Watermark, get_watermarker
from export3d_cli.core.media.image import write_image
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT, VideoWriter
from export3d_cli.core.model.head_sampler import HeadSampler
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import resolve_weights

SAMPLER_WEIGHTS = "export3d-sampler"


@dataclass(frozen=True)
class SampleOptions:
    """Who is sampled."""

    count: int = 1
    seed: int = 0  # number of the first person; the next ones follow
    truncation: float = 0.75  # 0: the mean face in the light of the picture, 1: as varied as the training heads
    age: tuple[float, float] | None = None  # years
    mix: tuple[int, int] | None = None  # numbers of two persons, instead of `seed`
    at: tuple[float, float] = (0.5, 0.5)  # position between them of the first and the last picture, 0 to 1
    overwrite: bool = False
    watermark: Watermark = "invisible"


def sample(
    out: Path, options: SampleOptions, weights: str = SAMPLER_WEIGHTS, *, progress: Progress | None = None
) -> Summary:
    """Write one picture, or several into files numbered as in `people/%03d.png`."""
    began, add_watermark, several = time.monotonic(), get_watermarker(options.watermark), "%" in out.name
    if not several and (options.count > 1 or not is_image_output(out)):
        raise InputError(f"{out} can hold no {options.count} pictures: name them, for example people/%03d.png")
    if not (options.count >= 1 and options.seed >= 0 and 0 <= min(options.at) <= max(options.at) <= 1):
        raise InputError("count must be 1 or more, seed 0 or more, both ends of at 0 to 1, in ascending order")
    check_overwrite(out, options.overwrite)
    sampler = HeadSampler.load(resolve_weights(weights))

    def draw(number: int) -> np.ndarray:
        if options.mix is None:
            return sampler.render(sampler.draw(options.seed + number, options.truncation, options.age))
        ends = [sampler.draw(seed, options.truncation) for seed in options.mix]
        return sampler.render(sampler.mix(ends[0], ends[1], float(np.linspace(*options.at, options.count)[number])))

    pictures = (add_watermark(draw(number)) for number in report_each(range(options.count), options.count, progress))
    if several:
        with VideoWriter(out, size=sampler.size, fps=Fraction(1)) as writer:
            for picture in pictures:
                writer.write(picture)
    else:
        write_image(out, next(pictures), comment=SYNTHETIC_COMMENT)
    return Summary(out, options.count, 0, Fraction(0), time.monotonic() - began, "cpu")
