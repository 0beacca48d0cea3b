"""Text that `export3d` prints without arguments, and two examples for each --help."""

import click

COMMANDS = {
    "reenact": "animate a portrait with a video",
    "live": "animate a portrait with a camera",
    "app": "open a page in the browser that does it",
    "serve": "do it for other programs, by HTTP",
    "novel-view": "turn a portrait; --grid, --depth",
    "edit-basis": "change an expression; --smile, --preset, --grid",
    "personalize": "make one file of a person from photos and a video",
    "edit": "change an expression in a video; --smile, --gaze",
    "look": "change age, weight, hair colour or beard in a photo",
    "sample": "make pictures of people who do not exist",
    "preprocess": "track faces; write a motion file or a training data set",
    "train": "train a model on data sets; resumes",
    "evaluate": "score weights on a data set",
    "weights": "list, download, inspect and upload weights",
    "bench": "measure the speed of this machine, stage by stage",
    "sign": "add C2PA content credentials to a result",
    "verify-mark": "check whether a file carries this program's marks",
    "doctor": "check the installation",
}
EXAMPLES: dict[str, tuple[str, str]] = {
    "reenact": ("reenact src.jpg drive.mp4 -o out.mp4",
                "reenact src.jpg speech.wav -o out.mp4 --text speech.txt --smile .3"),
    "live": ("live src.jpg", "live src.jpg --to http://127.0.0.1:8000 --record out.mp4"),
    "app": ("app", "app --port 7861 --quality fast"),
    "serve": ("serve", "serve --port 8081 --quality fast"),
    "novel-view": ("novel-view --yaw -30:30", "novel-view src.jpg --yaw 20 --smile .7 -o smile.png"),
    "edit-basis": ("edit-basis src.jpg --smile 0:1 --jaw .2 -o laugh.mp4",
                   "edit-basis src.jpg --preset joy --from neutral -o joy.png"),
    "personalize": ("personalize src.jpg --video clip.mp4 -o me.person.safetensors",
                    "personalize src.jpg picture.png -o me.person.safetensors"),
    "edit": ("edit clip.mp4 --smile .4 -o out.mp4",
             "edit clip.mp4 --eyes-to-camera --lips-shut-when-silent -o out.mp4"),
    "look": ("look src.jpg --age 15 -o older.png", "look src.jpg --weight -.3 --hair '#5b3a1e' -o changed.jpg"),
    "sample": ("sample -n 8 --seed 1 -o people/%03d.png", "sample -n 5 --mix 1 2 --at 0:1 -o walk/%d.png"),
    "preprocess": ("preprocess drive.mp4 -o drive.motion.npz", "preprocess videos -o data"),
    "train": ("train --config config.yaml", "train --config config.yaml batch=4 loss.l1=1 --dry-run"),
    "evaluate": ("evaluate data", "evaluate data --cross --cases 10 -o scores"),
    "weights": ("weights list", "weights download hf:owner/repo@v1.0"),
    "weights list": ("weights list", "weights list --json"),
    "weights download": ("weights download hf:owner/repo", "weights download hf:owner/repo@v1.0:small.safetensors"),
    "weights info": ("weights info", "weights info my.safetensors --json"),
    "weights push": ("weights push my.safetensors hf:owner/repo --dry-run",
                     "weights push my.safetensors hf:owner/repo"),
    "bench": ("bench --device cpu --threads 4 --frames 60", "bench --against 'tool --photo {src} --video {drv} {out}'"),
    "sign": ("sign out.mp4", "sign out.mp4 picture.png"),
    "verify-mark": ("verify-mark out.mp4", "verify-mark picture.png --json"),
    "doctor": ("doctor", "doctor --json"),
}  # fmt: skip
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
