"""Makes a tiny Qwen2-architecture model that half knows the generated arithmetic task: the quickstart's starting point."""

from __future__ import annotations

import argparse
from pathlib import Path

from pmpo_megatron.hf.tiny_model import TinyModelConfig, make_tiny_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the Hugging Face checkpoint")
    parser.add_argument("--steps", type=int, default=TinyModelConfig.steps, help="supervised steps (default: %(default)s)")
    parser.add_argument(
        "--slip-rate",
        type=float,
        default=TinyModelConfig.slip_rate,
        help="how often the worst remembered sum or difference is wrong in the solutions it learns from (default: %(default)s)",
    )
    parser.add_argument(
        "--call-rate",
        type=float,
        default=TinyModelConfig.call_rate,
        help="how often a step of those solutions is left to a calculator, by a question mark (default: %(default)s)",
    )
    parser.add_argument("--layers", type=int, default=TinyModelConfig.layers, help="(default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=TinyModelConfig.hidden_size, help="(default: %(default)s)")
    parser.add_argument(
        "--positions", type=int, default=TinyModelConfig.positions, help="longest sequence (default: %(default)s)"
    )
    parser.add_argument("--endless", action="store_true", help="no end token: responses go on to the limit")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = ("steps", "slip_rate", "call_rate", "layers", "hidden_size", "positions", "endless", "seed")
    sizes = {name: getattr(options, name) for name in names}
    make_tiny_model(options.out, TinyModelConfig(**sizes))


if __name__ == "__main__":
    main()
