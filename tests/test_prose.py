"""Plain technical English in docstrings, comments, strings, identifiers and Markdown files."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("export3d_cli", "examples", "tests", "weights")
BANNED = {  # pattern -> what is wrong with it; matched in lower case, with the underscores of identifiers as spaces
    r"\btold\b": "vague",
    r"\banew\b": "archaic",
    r"\bnobody\b": "riddle",
    r"\bbeside\b": "archaic",
    r"\basked for\b": "vague",
    r"\bof which\b": "inversion",
    r"\bwhat is not\b": "riddle",
    r"\bwhat (of|comes|stands|goes|falls|lacks|becomes)\b": "riddle",
    r"\bwhat (the|a) \w+ (hides|tells|lacks)\b": "riddle",
    r"\b(is|are|was) no \w+:": "inversion",
    r"^(test )?who\b": "riddle",
    r"\bwho (comes|wants|asks|needs|looks|swallows)\b": "riddle",
    r"\bneither (is|are|does|do)\b": "inversion",
    r"\bnor (is|are|does|do|has|have)\b": "inversion",
    r"\b(come|comes|made|make|makes) again\b": "vague",
    r"\bof (ours|theirs)\b": "possessive",
    r"\bfor ever\b": "archaic",
    r"\b(thereby|therein|thereof|whence|wherein)\b": "archaic",
    r"\bfor (want|lack) of\b": "archaic",
    r"\bso many (seconds|frames|steps|pixels|of)\b": "vague",
    r"\bnone but\b": "archaic",
}
WORDS = re.compile("|".join(f"(?:{pattern})" for pattern in BANNED))


def python_texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of every comment, string and identifier."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "NAME":
            yield token.start[0], token.string.replace("_", " ")
        elif kind in {"COMMENT", "STRING", "FSTRING_MIDDLE"}:
            text = re.sub(r"\s*\n\s*", "\n", token.string)
            yield token.start[0], re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def find_banned(path: Path) -> list[str]:
    if path.suffix == ".py":
        texts = list(python_texts(path))
    else:
        texts = list(enumerate(path.read_text(encoding="utf-8").splitlines(), start=1))
    return [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r}"
        for line, text in texts
        for match in WORDS.finditer(text.lower())
    ]


@pytest.mark.parametrize("folder", [*FOLDERS, "."])
def test_texts_use_plain_technical_english(folder: str) -> None:
    files = (ROOT / folder).glob("*.md") if folder == "." else (ROOT / folder).rglob("*")
    paths = [path for path in files if path.suffix in {".py", ".md"} and path.name != Path(__file__).name]
    assert paths
    assert [line for path in paths for line in find_banned(path)] == []


@pytest.mark.parametrize("text", ["# It is told", "def test_who_comes(): pass", "x = 'is no video: b'"])
def test_banned_words_are_found(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text(text + "\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert find_banned(tmp_path / "a.py")
