"""What a terminal, or a pipe, shows and reads.

    print(visible(text))                       # control characters are shown, not obeyed
    print(columns([one, other], width=80))     # beside each other; wide characters count as two
    draw = Frame(); draw("a░░"); draw("a░b")   # text that changes in place
    line = terminal_reader()("> ")             # with line editing and a history

Standard library only.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from unicodedata import category, east_asian_width

# Obeyed by terminals: C0 but \n and \t, DEL, C1, line separators, direction marks and overrides, tags.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\U000e0000-\U000e007f\ud800-\udfff]"
)
HEAT = ((0.8, 84), (0.5, 157), (0.2, 228), (0.05, 215), (0, 203))  # probability from which on: terminal colour


def visible(text: str) -> str:
    """Control characters as \\xNN or \\uNNNN: shown to the reader, not obeyed by the terminal."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}" if match[0] < "\x80" else ascii(match[0])[1:-1], text)


class Frame:
    """A text on the terminal that changes in place; an empty one leaves the line as it was before."""

    def __init__(self) -> None:
        self.rows = 0  # above the cursor

    def __call__(self, text: str) -> None:
        width, height = shutil.get_terminal_size()
        rows = [
            line[i : i + width - 1] for line in visible(text).split("\n") for i in range(0, len(line) or 1, width - 1)
        ]
        up = f"\x1b[{self.rows}A" if self.rows else ""
        print(f"{up}\r\x1b[J" + "\n".join(rows[1 - height :]), end="", flush=True)
        self.rows = min(len(rows), height - 1) - 1


def remark(text: str) -> None:
    """One line beside the answers, on stderr."""
    print(visible(" ".join(text.split())), file=sys.stderr, flush=True)


def columns(texts: list[str], width: int) -> str:
    """Texts beside each other, wrapped, in `width` cells of a terminal."""
    each = max(10, (width - 3 * (len(texts) - 1)) // len(texts))
    wrapped = [[row for line in text.split("\n") for row in wrap(line, each)] for text in texts]
    rows = zip_longest(*wrapped, fillvalue="")
    return "\n".join(" | ".join(cell + " " * (each - cells(cell)) for cell in row).rstrip() for row in rows)


def wrap(line: str, width: int) -> list[str]:
    """Rows of at most `width` cells, cut between words, or within one that is longer than a row."""
    rows = [""]
    for word in re.split(r"(?<=\s)(?=\S)", line.expandtabs(4)):  # each with the spaces behind it
        if rows[-1] and cells(rows[-1] + word.rstrip()) > width:
            rows.append("")
        for character in word.rstrip():
            rows += [""] if cells(rows[-1] + character) > width else []
            rows[-1] += character
        rows[-1] += word[len(word.rstrip()) :]
    return [row.rstrip() for row in rows]


def cells(text: str) -> int:
    """How wide a terminal shows `text`: Chinese, Japanese, Korean and emoji take two cells, combining marks none."""
    marks = ("Mn", "Me", "Cf")
    return sum(1 + (east_asian_width(c) in "WF") for c in text if category(c) not in marks)


def heat(text: str, chance: float) -> str:
    colour = f"\x1b[30;48;5;{next(code for least, code in HEAT if chance >= least)}m"
    return colour + visible(text).replace("\n", f"\x1b[0m\n{colour}") + "\x1b[0m"


def terminal_reader() -> Callable[[str], str]:
    """input() with line editing, and with a history that outlives the session where a file can be written."""
    try:
        import readline
    except ImportError:  # Windows
        return input
    folder = Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) / "nano416"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        readline.read_history_file(folder / "chat_history")

    def read(prompt: str) -> str:
        try:
            line = input(prompt)
        except EOFError:
            print()  # Ctrl-D leaves the cursor behind the prompt
            raise
        with contextlib.suppress(OSError):  # after each line: a closed window ends without a word
            readline.set_history_length(1000)
            readline.write_history_file(folder / "chat_history")
        return line

    return read


def pipe_reader(prompt: str) -> str:
    """The next line of a pipe or a file, without a prompt."""
    line = sys.stdin.readline() if sys.stdin is not None else ""
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def whole_text(line: str, read: Callable[[str], str]) -> str:
    """A line and those that belong to it: up to closing quotes, or while they end with a backslash."""
    with contextlib.suppress(EOFError):  # an open text ends with the input
        if line.startswith('"""'):
            line = line[3:]
            while not line.endswith('"""'):
                line += "\n" + read("... ")
            return line.removesuffix('"""')
        while line.endswith("\\"):
            line = line[:-1] + "\n"
            line += read("... ")
    return line
