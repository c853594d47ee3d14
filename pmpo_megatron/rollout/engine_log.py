"""What a rollout engine's log says of why it ended: the first error, which is the cause; what follows are its consequences."""

from __future__ import annotations

import re
from pathlib import Path

LINES = 25
# vLLM 0.32 (logger.py, logging_utils/formatter.py) puts it before every line of a message, and joins these by \r\n.
ERROR = re.compile(r"(\(\S+ pid=\d+\) )?ERROR \d\d-\d\d \d\d:\d\d:\d\d \[[^]]*\] ?")


def cause(path: Path, start: int) -> str:
    """The end of the first error in the log at ``path`` from byte ``start`` on, or of the log where vLLM reported none.

    With tensor parallelism a worker's error is followed by those of all processes that waited for it.
    """
    try:
        text = path.read_bytes()[start:].decode(errors="replace")
    except OSError:
        return "It wrote no log."
    error = first_error(text)
    what = "The first error" if error else "The end"
    return f"{what} in its log {path}:\n" + "\n".join((error or text.splitlines())[-LINES:])


def first_error(text: str) -> list[str]:
    """The lines of the first message of level ERROR, with the name of its process, without what precedes each line."""
    error: list[str] = []
    for line in text.split("\n"):
        if error or ERROR.match(line):
            prefix = ERROR.match(line)
            process = (prefix[1] or "") if prefix and not error else ""
            error.append(process + line[prefix.end() if prefix else 0 :].rstrip("\r"))
            if not line.endswith("\r"):
                break
    return error
