#!/usr/bin/env python
"""Time and memory of the checkpoint conversions, against copying the same files (cp and fsync) in the same run.

Makes a bf16 checkpoint of random weights in the shape of Qwen2.5-7B (15 GB; 3B where the disk has no room for four times
that) or, with --size 30B-A3B, of Qwen3-30B-A3B (18,867 tensors in 61 GB, of which --layers takes a part), copies it, converts
it to Megatron's format and back, compares the result with the original, prints one table, and removes everything. Peak memory
is that of the converting process as the system counts it (ru_maxrss, file pages included). The page cache is shared by all
steps: each step finds its input in it as far as it fits, copies and conversions alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pmpo_megatron.convert.hugging_face import SafetensorsStream, SafetensorsWeights
from pmpo_megatron.hf.known_models import known_config
from pmpo_megatron.hf.mapping import WeightMapping
from pmpo_megatron.hf.shape import shape_of

TOOLS = Path(__file__).parents[1]
SIZES = {"30B-A3B": known_config("Qwen/Qwen3-30B-A3B") | {"model_type": "qwen3_moe"}}
SIZES |= {size: known_config(f"Qwen/Qwen2.5-{size}") | {"model_type": "qwen2"} for size in ("7B", "3B", "0.5B")}
COPIES = 4  # original, Megatron's, the one converted back; and room for the rest of the machine
GB = 1e9


def plan_of(size: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    shapes = WeightMapping(shape_of(SIZES[size])).hf_shapes
    return [(name, torch.bfloat16, shape) for name, shape in shapes.items()]


def bytes_of(size: str) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in plan_of(size))


def choose_size(wanted: str, directory: Path) -> str:
    free = shutil.disk_usage(directory).free
    for size in list(SIZES)[list(SIZES).index(wanted) :]:
        if bytes_of(size) * COPIES <= free:
            return size
        print(f"{size} needs {bytes_of(size) * COPIES / GB:.0f} GB of disk, {free / GB:.0f} GB are free")
    raise SystemExit(f"error: too little room in {directory}")


def generate(directory: Path, size: str) -> None:
    """Random bit patterns of bf16 with finite values, so that nothing compresses and everything compares."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SIZES[size]))
    stream = SafetensorsStream(directory, plan_of(size), shard_bytes=4 << 30)
    generator = torch.Generator().manual_seed(0)
    block = torch.randint(-(2**15), 2**15, (1 << 24,), dtype=torch.int16, generator=generator) & ~0x4000
    for number, (name, dtype, shape) in enumerate(plan_of(size)):
        count = torch.Size(shape).numel()
        shifted = block.roll(7919 * number)
        stream.add(name, shifted.repeat(-(-count // len(block)))[:count].view(dtype).view(shape))
    stream.finish()


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)


def run_tool(name: str, *arguments: str) -> float:
    """Runs a tool; its peak memory in bytes."""
    process = subprocess.Popen([sys.executable, str(TOOLS / name), *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: {name} failed")
    return usage.ru_maxrss * 1024.0


def timed(label: str, action, reference: float | None, size: int) -> float:
    started = time.perf_counter()
    peak = action()
    seconds = time.perf_counter() - started
    ratio = f"{seconds / reference:>7.2f}x" if reference else "       -"
    memory = f"{peak / 2**30:>8.2f}" if peak else "       -"
    print(f"{label:<34} {seconds:>8.1f} {size / GB / seconds:>7.2f} {ratio} {memory}", flush=True)
    return seconds


def compare(one: Path, other: Path) -> None:
    first, second = SafetensorsWeights(one), SafetensorsWeights(other)
    assert set(first.info) == set(second.info)
    for name in first.info:
        assert torch.equal(first(name).view(torch.int16), second(name).view(torch.int16)), name
    print(f"{len(first.info)} tensors came back bit for bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7B", help="shape of the checkpoint (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="so many layers of the true shape instead of all")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--verify", action="store_true", help="also time both conversions with --verify")
    arguments = parser.parse_args()
    if arguments.layers is not None:
        SIZES[arguments.size] |= {"num_hidden_layers": arguments.layers}
    size = choose_size(arguments.size, arguments.directory)
    total = bytes_of(size)
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=arguments.directory) as root:
        original, megatron, back = (Path(root) / name for name in ("original", "megatron", "back"))
        generate(original, size)
        layers = SIZES[size]["num_hidden_layers"]
        print(f"{size}-shaped, {layers} layers, bf16, {total / GB:.1f} GB")
        print(f"{'step':<34} {'seconds':>8} {'GB/s':>7}  vs cp   peak GiB")
        seconds = timed("cp and fsync", lambda: copy(original, back), None, total)
        shutil.rmtree(back)
        for extra in [[], ["--verify"]] if arguments.verify else [[]]:
            option = "".join(f" {word}" for word in extra)
            there = ["--hf", str(original), "--out", str(megatron), "--force", *extra]
            timed(
                f"Hugging Face to Megatron{option}", lambda a=there: run_tool("convert_hf_to_megatron.py", *a), seconds, total
            )
            again = ["--checkpoint", str(megatron), "--out", str(back), "--force", *extra]
            timed(
                f"Megatron to Hugging Face{option}", lambda a=again: run_tool("convert_megatron_to_hf.py", *a), seconds, total
            )
            compare(original, back)
            shutil.rmtree(back)
            shutil.rmtree(megatron)
        timed("cp and fsync, once more", lambda: copy(original, back), seconds, total)


if __name__ == "__main__":
    main()
