"""What drafts looked up in the text save: the same requests without and with them, in turn, one at a time.

The tokens must be the same, or this fails. Steps and drafts are counts and repeat exactly; processor time of
the whole process, prompts included, is given as a ratio.

    python benchmarks/engine/speculation.py MODEL --text TEXT [--text TEXT ...]
"""

import argparse
import time
from pathlib import Path

from fourfold.engine import Completion, Engine, EngineConfig, SamplingParams

DRAFT, ROUNDS = 8, 2
CHARACTERS = 900
QUESTIONS = [
    "Write a story about a lighthouse keeper who finds a letter.",
    "Tell me about the history of bread.",
    "What makes a good teacher?",
    "Describe a walk through a forest in autumn.",
]


def prompts_of(engine: Engine, texts: list[str]) -> dict[str, list[list[int]]]:
    """Token ids by kind: answers that repeat their prompt, that go on with it, and that are their own."""

    def encode(text: str) -> list[int]:
        return engine.tokenizer.apply_chat_template([{"role": "user", "content": text}])

    task = "Correct the spelling of this text and write out the whole corrected text:\n\n"
    return {
        "correct": [encode(task + text) for text in texts],
        "continue": [engine.encode(text) for text in texts],
        "prose": [encode(question) for question in QUESTIONS],
    }


def run(engine: Engine, prompts: list[list[int]], temperature: float) -> tuple[list[Completion], float]:
    """Answers one after the other, and processor time in seconds."""
    start_s, done = time.process_time(), []
    for seed, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=192, temperature=temperature, seed=seed)
        done += engine.generate([prompt], sampling)
    return done, time.process_time() - start_s


def compare(plain: Engine, drafting: Engine, prompts: list[list[int]], temperature: float) -> str:
    """A row of the table."""
    times_s: dict[Engine, list[float]] = {plain: [], drafting: []}
    answers: dict[Engine, list[list[int]]] = {}
    before = {engine: (engine.stats.steps, engine.stats.draft_tokens) for engine in times_s}
    accepted = drafting.stats.accepted_draft_tokens
    for _ in range(ROUNDS):
        for engine, taken_s in times_s.items():
            done, time_s = run(engine, prompts, temperature)
            taken_s.append(time_s)
            answers[engine] = [completion.token_ids for completion in done]
    assert answers[plain] == answers[drafting], "drafts changed a token"
    steps = {engine: (engine.stats.steps - before[engine][0]) // ROUNDS for engine in times_s}
    drafted = (drafting.stats.draft_tokens - before[drafting][1]) // ROUNDS
    accepted = (drafting.stats.accepted_draft_tokens - accepted) // ROUNDS
    ratio = min(times_s[plain]) / min(times_s[drafting])
    tokens = sum(map(len, answers[plain]))
    return f"{tokens} | {steps[plain]} | {steps[drafting]} | {accepted} of {drafted} | {ratio:.2f}x |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, action="append", required=True, help="its middle is a prompt")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    plain, drafting = (
        Engine.load(
            arguments.model,
            EngineConfig(
                threads=arguments.threads, max_batch_size=1, prefix_cache=False, speculative_tokens=tokens
            ),
        )
        for tokens in (0, DRAFT)
    )
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in arguments.text]
    middles = [text[len(text) // 2 :][:CHARACTERS] for text in texts]
    print("| prompts | temperature | tokens | steps | with drafts | accepted | time |")
    print("|---|---|---|---|---|---|---|")
    for kind, prompts in prompts_of(plain, middles).items():
        for temperature in (0.0, 0.8):
            print(f"| {kind} | {temperature} |", compare(plain, drafting, prompts, temperature), flush=True)


if __name__ == "__main__":
    main()
