"""Metrics with their reductions, the record of a run, progress, and the report."""

from pmpo_megatron.monitor.config import MonitorConfig
from pmpo_megatron.monitor.log import RunLog
from pmpo_megatron.monitor.metrics import Distribution, Maximum, Mean, Metric, Sum, summarize
from pmpo_megatron.monitor.report import write_report
from pmpo_megatron.monitor.timer import PhaseTimer

__all__ = [
    "Distribution",
    "Maximum",
    "Mean",
    "Metric",
    "MonitorConfig",
    "PhaseTimer",
    "RunLog",
    "Sum",
    "summarize",
    "write_report",
]
