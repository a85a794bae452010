"""How a command of Dure ends where it can't do what it should: one line on stderr, and an exit code.

2: what the config file asks for can't be had, so the file or what it names has to change: a wrong or missing setting, a
   port that is taken, GPUs that are not there, a database that does not answer, a model that says itself why it can't
   be loaded or warmed up (its source, checkpoint, engine or memory).
1: the machine or the cluster failed: Ray or Serve did not start, a process died without a word, a disk is full, no
   server answers.
0: all went well, or a signal asked for the end of `dure serve`; before there is anything to end, a signal just kills.

Wrong arguments of a command are 2, as everywhere.
"""

from __future__ import annotations

import re

MACHINE, CONFIG = 1, 2
LONGEST = 500
"""Characters of a reason that are shown."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class MachineError(Exception):
    """The machine or the cluster can't do what it should: one line."""


def one_line(text: str) -> str:
    """The line of an error's text that says what is wrong: of a traceback the one that names the exception, else the
    first, with the second where the first only announces it."""
    lines = [line.rstrip() for line in COLOURS.sub("", text).splitlines() if line.strip()]
    frames = [number for number, line in enumerate(lines) if line.lstrip().startswith('File "')]
    raised = [line for line in lines[frames[-1] + 1 :] if not line[0].isspace()] if frames else []
    announced = not raised and lines and lines[0].endswith(":")
    told = printable(" ".join(line.strip() for line in (raised or lines)[: 2 if announced else 1]))
    return told if len(told) <= LONGEST else f"{told[: LONGEST - 3]}..."


def printable(text: str) -> str:
    """The text without what would move a terminal's cursor or colour what follows."""
    return "".join(character if character.isprintable() else " " for character in text)
