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

    def __post_init__(self) -> None:
        numbers = (self.seed, *(self.mix or ()))
        if self.count < 1 or min(numbers) < 0 or not all(0 <= end <= 1 for end in self.at):
            raise InputError("count must be 1 or more, seed and mix 0 or more, both ends of at 0 to 1")
        if not 0 <= self.truncation <= 1.5:
            raise InputError(f"truncation must be 0 to 1.5, got {self.truncation}")
        if self.mix and self.age:
            raise InputError("age has no effect on a mixture: leave out age or mix")


def sample(out: Path, options: SampleOptions, weights: str = SAMPLER_WEIGHTS, *,
           progress: Progress | None = None) -> Summary:  # fmt: skip
    """Write one picture, or several into files numbered as in `people/%03d.png`."""
    began, add_watermark, several = time.monotonic(), get_watermarker(options.watermark), "%" in out.name
    if not (out.suffix.lower() == ".png" if several else options.count == 1 and is_image_output(out)):
        hint = "a .png or .jpg for one, FOLDER/%03d.png for several"
        raise InputError(f"{out} cannot hold {options.count} picture(s): give {hint}")
    if several and options.overwrite:
        raise InputError(f"numbered pictures are never overwritten: give {out} another folder, without overwrite")
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
