"""The framing of messages between the pool and its workers: a length, then a pickle."""

import struct

HEADER = struct.Struct("<Q")
