"""How a failing command of Dure ends: one line on stderr and an exit code.

2: what the config file asks for can't be provided, so the file or what it names has to change: a wrong or missing
   setting, a port in use, missing GPUs, a database that does not answer, or a model that reports why it can't be loaded
   or warmed up (its source, checkpoint, engine or memory).
1: the machine or the cluster failed: Ray or Serve did not start, a process died without a message, a disk is full, or
   no server answers.
0: success, or a signal ended `dure serve`. A signal that comes before anything has started just kills the process.

Wrong command-line arguments exit with 2, as usual.
"""

from __future__ import annotations

import re

MACHINE, CONFIG = 1, 2
LONGEST = 500
"""Most characters shown of a reason."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class MachineError(Exception):
    """The machine or the cluster failed. The message is one line."""


def one_line(text: str) -> str:
    """The line of an error's text that says what is wrong.

    In a traceback this is the line that names the exception, otherwise the first line. If the first line only announces
    the second, ending with a colon, both are joined.
    """
    lines = [line.rstrip() for line in COLOURS.sub("", text).splitlines() if line.strip()]
    frames = [number for number, line in enumerate(lines) if line.lstrip().startswith('File "')]
    raised = [line for line in lines[frames[-1] + 1 :] if not line[0].isspace()] if frames else []
    announced = not raised and lines and lines[0].endswith(":")
    shown = printable(" ".join(line.strip() for line in (raised or lines)[: 2 if announced else 1]))
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."


def printable(text: str) -> str:
    """The text with unprintable characters, such as a terminal's control sequences, replaced by spaces."""
    return "".join(character if character.isprintable() else " " for character in text)
