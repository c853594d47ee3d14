"""Counts how often this process, or the one that it was forked from, initialised CUDA. Imported before what shall not."""

import torch

count = 0
_initialise = torch._C._cuda_init


def _counted() -> None:
    global count
    count += 1
    _initialise()


torch._C._cuda_init = _counted
