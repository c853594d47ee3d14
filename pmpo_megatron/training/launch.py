"""What every command needs before it starts: the rank's environment, logging, signals and exit codes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from pmpo_megatron.errors import ConfigError, PmpoError

logger = logging.getLogger(__name__)

EXIT_CONFIG = 2  # the user's input is wrong; nothing was started
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
CLOSE_S = 10.0  # longest time that closing takes after an interrupt


class StopRequest:
    """True once SIGTERM, SIGINT or SIGUSR1 (Slurm's warning) asks the run to save and exit; a second SIGINT ends at once.

    While the run starts there is nothing to save yet: until `started` is called the first SIGINT calls ``close`` and ends it.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.close: Callable[[], object] = lambda: None
        self._starting = True

    def __call__(self) -> bool:
        return self.signal is not None

    def install(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        return self

    def started(self) -> None:
        self._starting = False

    def _on_signal(self, number: int, frame: object) -> None:
        if self._starting and number == signal.SIGINT:
            self._end_start()
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        logger.warning("%s: saving and stopping at the next safe point", self.signal)

    def _end_start(self) -> None:
        """Here and not by an exception, which would pass through imports of libraries, and some catch everything."""
        signal.signal(signal.SIGINT, _leave)  # a second one does not wait until everything is closed
        limit = threading.Timer(CLOSE_S, _leave)
        limit.daemon = True
        limit.start()
        with contextlib.suppress(Exception):
            self.close()
        _leave()


def rank_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun set them; without torchrun this becomes a run of one process.

    Raises:
        ConfigError: only some of torchrun's variables are set.
    """
    from pmpo_megatron.parallel.environment import RANK_VARIABLES  # imports torch, which --help must not wait for

    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if set(missing) in (set(RANK_VARIABLES), {"RANK", "WORLD_SIZE", "LOCAL_RANK"}):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    elif missing:
        raise ConfigError(
            "environment", f"{', '.join(missing)} not set; start with torchrun, or without any of {RANK_VARIABLES}"
        )
    return _number("RANK"), world_size_of_environment()


def world_size_of_environment() -> int:
    """torchrun's number of processes; 1 without torchrun."""
    return _number("WORLD_SIZE") if "WORLD_SIZE" in os.environ else 1


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ConfigError("environment", f"{name}={os.environ[name]!r} is not a number; torchrun sets it") from None


def set_up_logging(rank: int) -> None:
    """Rank 0 says what happens; the others speak up with warnings only, and say who they are."""
    who = "" if rank == 0 else f"rank {rank}: "
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s {who}%(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    logging.getLogger("pmpo_megatron").setLevel(logging.INFO if rank == 0 else logging.WARNING)


def quiet_libraries() -> None:
    """Hides what libraries say on every start that no user of ours can act upon."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of a store that died are pages of C++ frames
    # Read by Python's resource tracker, a process of its own: it misses the semaphores of an engine that was ended.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    for module in ("megatron", "torch", "transformers", "multiprocessing"):
        warnings.filterwarnings("ignore", module=rf"{module}\b")
    for name in ("vllm", "triton", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _rank() -> int:
    """This process's rank before anything is checked: nonsense counts as 0, and is named later."""
    return int(rank) if (rank := os.environ.get("RANK", "0")).isdigit() else 0


def _leave(*signal_and_frame: object) -> NoReturn:
    """Ends this process where it is; children notice that it is gone. No exception passes through libraries' imports."""
    if _rank() == 0:
        os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def close_on_interrupt() -> None:
    """Makes an interrupt a KeyboardInterrupt, because there is something to close now; before, it just ends the process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_command(command: Callable[[], int | None]) -> int:
    """``command()`` with errors turned into messages: a user's mistake gets one line, a defect its traceback.

    An interrupt ends the process at once, until `close_on_interrupt` or `StopRequest` says that there is something to close.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, _leave) if in_main_thread else None
    try:
        return _run_command(command, _rank())
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)


def _run_command(command: Callable[[], int | None], rank: int) -> int:
    try:
        return command() or 0
    except ConfigError as error:
        if rank == 0:
            print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)  # some quote a library at length
        return EXIT_CONFIG
    except PmpoError as error:
        print(f"error (rank {rank}): {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stdout.flush()
        _leave()  # everything is closed; threads that still wait for an engine would hold up the end
    except Exception:
        print(f"error (rank {rank}):\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return EXIT_FAILED
