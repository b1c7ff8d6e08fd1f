"""Short question, short answer."""

from fourfold.bench.workload import Workload

WORKLOAD = Workload(
    "chat", input_tokens=128, output_tokens=128, example="chat, questions and answers, autocompletion"
)
