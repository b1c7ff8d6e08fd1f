"""Load and measurement: what a server does under a closed loop of users, seen only through HTTP."""

from fourfold.bench.metric import Metric, measure_all, metrics_in_order
from fourfold.bench.plan import BenchPlan, BenchSummary, summarise
from fourfold.bench.run import run
from fourfold.bench.workload import Workload, get_workload, workload_names

__all__ = [
    "BenchPlan",
    "BenchSummary",
    "Metric",
    "Workload",
    "get_workload",
    "measure_all",
    "metrics_in_order",
    "run",
    "summarise",
    "workload_names",
]
