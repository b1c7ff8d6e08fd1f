"""Long text in, long answer out."""

from fourfold.bench.workload import Workload

WORKLOAD = Workload(
    "research", input_tokens=2048, output_tokens=2048, example="research, translation, rewriting"
)
