"""Short question, long answer."""

from fourfold.bench.workload import Workload

WORKLOAD = Workload("generate", input_tokens=128, output_tokens=2048, example="writing text or code")
