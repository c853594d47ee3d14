"""The cause of an engine's end, from logs as vLLM 0.32 writes them."""

import logging

from vllm.logging_utils import NewLineFormatter

from pmpo_megatron.rollout.engine_log import LINES, cause


def write(path, *messages: tuple[str, int, str]) -> None:
    """(process, level, message) through vLLM's own formatter, in the format of its logger.py."""
    formatter = NewLineFormatter(
        "(%(name)s pid=7) %(levelname)s %(asctime)s [%(fileinfo)s:%(lineno)d] %(message)s", "%m-%d %H:%M:%S"
    )
    with path.open("a", newline="") as log:
        for process, level, text in messages:
            record = logging.LogRecord(process, level, "multiproc_executor.py", 953, text, None, None)
            log.write(formatter.format(record) + "\n")


def test_the_first_error_of_a_worker_is_shown_and_not_those_that_follow(tmp_path):
    log = tmp_path / "engine-0.log"
    write(
        log,
        ("Worker_TP1", logging.WARNING, "something else"),
        (
            "Worker_TP1",
            logging.ERROR,
            "WorkerProc failed to start.\nTraceback (most recent call last):\n  x\nValueError: the cause",
        ),
        ("Worker_TP0", logging.ERROR, "WorkerProc failed to start.\nEOFError"),
        ("EngineCore", logging.ERROR, "EngineCore failed to start.\n" + "\n".join(map(str, range(50)))),
    )
    *_, last = shown = cause(log, 0).splitlines()
    assert last == "ValueError: the cause" and "EngineCore" not in "".join(shown)
    assert shown[:2] == [f"The first error in its log {log}:", "(Worker_TP1 pid=7) WorkerProc failed to start."]


def test_only_what_was_written_since_the_start_counts_and_a_log_without_errors_shows_its_end(tmp_path):
    log = tmp_path / "engine-0.log"
    write(log, ("Worker", logging.ERROR, "of a run before"))
    start = log.stat().st_size
    with log.open("a") as text:
        text.write("\n".join(f"line {number}" for number in range(100)))
    shown = cause(log, start).splitlines()
    assert shown[0] == f"The end in its log {log}:" and shown[-1] == "line 99" and len(shown) == LINES + 1
    assert cause(tmp_path / "absent.log", 0) == "It wrote no log."
