"""Append-only JSON lines that survive a kill: every line is written whole or cut away when the file is next opened."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pmpo_megatron.errors import DataError


class JsonLines:
    """One file, appended to by one process. `size` is a position to come back to with `rewind`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut_torn_line()

    @property
    def size(self) -> int:
        """Bytes of complete lines."""
        return os.fstat(self._file).st_size

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line with one call to the system, or nothing.

        Raises:
            OSError: the disk is full or gone; the file is as it was before.
        """
        line = (json.dumps(_plain(record), allow_nan=False, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
        before = self.size
        try:
            while line:  # a short write means that the disk became full in the middle: the next call says so
                line = line[os.write(self._file, line) :]
        except OSError:
            os.ftruncate(self._file, before)
            raise

    def rewind(self, size: int) -> None:
        """Cuts away everything after the first ``size`` bytes, which must be an earlier `size`."""
        if size < self.size:
            os.ftruncate(self._file, size)
            self._cut_torn_line()

    def replace(self, lines: Iterable[bytes]) -> None:
        """Has ``lines`` in place of the present ones, however that ends."""
        other = self.path.with_name(f"{self.path.name}.tmp")
        with other.open("wb") as file:
            file.writelines(lines)
        os.replace(other, self.path)
        os.close(self._file)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND)

    def close(self) -> None:
        os.close(self._file)

    def _cut_torn_line(self) -> None:
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.ftruncate(self._file, content.rfind(b"\n") + 1)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of ``path``; a torn last line (the writer was killed, or is writing) is left out.

    Raises:
        DataError: a complete line is not a JSON object; gives file and line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not a line of JSON: {error}") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number}: not a JSON object")
            yield record


def _plain(value: Any) -> Any:
    """``value`` for strict JSON: NaN and infinities become the strings that ``float`` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(float(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain(value.tolist())
    return value
