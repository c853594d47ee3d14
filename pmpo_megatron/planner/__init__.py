"""Plans a run before it starts: memory, communication and time on stated hardware, and a better layout if there is one."""

from pmpo_megatron.hf.known_models import model_shape
from pmpo_megatron.planner.dry_run import memory_report
from pmpo_megatron.planner.hardware import HARDWARE, Hardware, hardware_here, hardware_named
from pmpo_megatron.planner.records import Plan
from pmpo_megatron.planner.run_plan import plan
from pmpo_megatron.planner.search import best_engines, best_layouts

__all__ = [
    "HARDWARE",
    "Hardware",
    "Plan",
    "best_engines",
    "best_layouts",
    "hardware_here",
    "hardware_named",
    "memory_report",
    "model_shape",
    "plan",
]
