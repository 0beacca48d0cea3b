"""Write the tables of README.md: `python weights/make_tables.py DATASET=data HEADS=heads VIEWS=views identity.pt=x.pt`.

A table follows each command `export3d evaluate NAME ...` in the text. It is replaced with what the command writes, with
the given paths in place of the names; tables with other names stay. BUNDLED is made from the heads in `tests/data`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).with_name("README.md")
HEADS = Path(__file__).parents[1] / "tests" / "data"
TABLE = re.compile(r"(?<=`export3d )(evaluate [^`]+)`\n\n(?:\|.*\n)+")


def update_tables(text: str, paths: dict[str, str]) -> str:
    """Return the text with the tables of the commands whose names are all in `paths`, or BUNDLED."""
    with tempfile.TemporaryDirectory() as folder:
        for head in ("head1", "head2"):  # names of heads with one track
            shutil.copyfile(HEADS / f"{head}.mp4", Path(folder, f"{head}_t00.mp4"))
        paths = {"BUNDLED": f"{folder}/bundled", **paths}
        _export3d("preprocess", *map(str, Path(folder).glob("*.mp4")), "-o", paths["BUNDLED"], "--size", "320")

        def make(found: re.Match[str]) -> str:
            words = found[1].split()
            if any(word not in paths for word in words if word.isupper() or word.endswith(".pt")):
                return found[0]
            _export3d(*(paths.get(word, word) for word in words), "-o", f"{folder}/out")
            report = Path(folder, "out", "report.md").read_text(encoding="utf-8")
            return f"{found[1]}`\n\n" + "".join(f"{row}\n" for row in report.splitlines() if row.startswith("|"))

        return TABLE.sub(make, text)


def _export3d(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "export3d_cli", "-q", *arguments], check=True)


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    README.write_text(update_tables(README.read_text(encoding="utf-8"), given), encoding="utf-8")
