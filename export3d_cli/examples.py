"""Text that `export3d` prints without arguments, and two examples for each --help."""

import json
from pathlib import Path

import click

_TEXTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
COMMANDS = {name: text["summary"] for name, text in _TEXTS.items() if "summary" in text}  # in order of use
EXAMPLES = {name: text["examples"] for name, text in _TEXTS.items()}
OVERVIEW = """export3d animates a portrait from one photo and a driving video.

Start here
  export3d reenact src.jpg drive.mp4 -o out.mp4    animate the photo with the video
  export3d novel-view --yaw -30:30                 turn the bundled portrait (or give your own photo)
  export3d edit-basis --smile 0:1                  make it smile
  export3d doctor                                  check the installation

Commands
{commands}

`export3d COMMAND --help` shows every option with its unit and default, and two examples.
""".format(commands="\n".join(f"  {name:<13}{text}" for name, text in COMMANDS.items()))


def add_examples(command: click.Command, name: str) -> None:
    """Append the examples to the help of a command, and its short help."""
    command.short_help = COMMANDS.get(name, command.short_help)
    if name in EXAMPLES:
        command.epilog = "\b\nExamples:\n" + "\n".join(f"  export3d {line}" for line in EXAMPLES[name])
