"""Long text in, short answer out."""

from fourfold.bench.workload import Workload

WORKLOAD = Workload(
    "document", input_tokens=2048, output_tokens=128, example="retrieval, classifying, summarising"
)
