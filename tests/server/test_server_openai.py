"""The openai client against a live server."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from openai import BadRequestError, NotFoundError

from fourfold.engine import Engine, EngineConfig, SamplingParams

GREEDY = {"temperature": 0.0, "max_tokens": 12}
QUESTION = [{"role": "user", "content": "Where is it?"}]


@pytest.fixture(scope="session")
def reference(tiny_llama):
    """An engine of our own, to compare the server with."""
    return Engine.load(tiny_llama, EngineConfig(threads=1))


def test_models_tells_card_and_context(live):
    [model] = live.openai().models.list().data
    assert model.id == "tiny-llama"
    assert model.model_extra["max_model_len"] == 512 and model.model_extra["vocab_size"] == 256
    assert model.model_extra["fourfold"] == live.engine.card.model_dump(mode="json")
    assert live.openai().models.retrieve("tiny-llama").id == "tiny-llama"
    with pytest.raises(NotFoundError, match="gpt-4"):
        live.openai().models.retrieve("gpt-4")


def test_completion_is_what_the_engine_says(live, reference):
    [want] = reference.generate(["A tale"], SamplingParams(temperature=0, max_tokens=12))
    got = live.openai().completions.create(model="tiny-llama", prompt="A tale", **GREEDY)
    assert got.object == "text_completion"
    assert got.choices[0].text == want.text
    assert got.choices[0].finish_reason == want.finish_reason
    assert got.usage.model_dump(exclude_none=True, exclude={"prompt_tokens_details"}) == {
        "prompt_tokens": len(want.prompt_token_ids),
        "completion_tokens": len(want.token_ids),
        "total_tokens": len(want.prompt_token_ids) + len(want.token_ids),
    }


def test_token_ids_and_their_text_are_one_prompt(live):
    tokens = live.engine.tokenizer.encode("A tale", add_special_tokens=True)
    create = live.openai().completions.create
    by_text = create(model="tiny-llama", prompt="A tale", **GREEDY)
    by_ids = create(model="tiny-llama", prompt=tokens, **GREEDY)
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_ids.usage.prompt_tokens == len(tokens)


def test_cached_prompt_tokens_are_told_once_for_each_prompt(start_server):
    server = start_server()
    prompt = list(range(100, 150))  # 50 tokens: three full blocks of 16 can be reused
    ask = {"prompt": [prompt, list(range(200, 250))], "max_tokens": 3, "temperature": 0, "n": 2}
    server.complete(prompt=prompt, max_tokens=1)
    usage = server.complete(**ask).json()["usage"]
    assert usage["prompt_tokens"] == 100 and usage["prompt_tokens_details"] == {"cached_tokens": 48}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    last = server.complete(**ask, **options).text.strip().split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["usage"]["prompt_tokens_details"] == {"cached_tokens": 96}


@pytest.mark.parametrize("prompts", [["one", "two", "one"], [[50, 51], [60, 61, 62]]])
def test_lists_of_prompts_give_choices_in_order(live, prompts):
    create = live.openai().completions.create
    alone = [create(model="tiny-llama", prompt=p, **GREEDY).choices[0].text for p in prompts]
    together = create(model="tiny-llama", prompt=prompts, **GREEDY)
    assert [c.index for c in together.choices] == list(range(len(prompts)))
    assert [c.text for c in together.choices] == alone


def test_n_choices_differ_and_a_seed_repeats_them(live):
    def ask():
        return live.openai().completions.create(
            model="tiny-llama", prompt="Once", n=3, seed=7, max_tokens=8, extra_body={"ignore_eos": True}
        )

    first, second = ask(), ask()
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) > 1
    assert texts == [choice.text for choice in second.choices]
    assert first.usage.completion_tokens == 24


def test_completion_streams_one_chunk_per_token(live):
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = live.openai().completions.create(
        model="tiny-llama",
        prompt="A tale",
        stream=True,
        stream_options=options,
        temperature=0,
        max_tokens=40,
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    tokens, last = chunks[:-1], chunks[-1]
    assert [c.usage.completion_tokens for c in tokens] == list(range(1, 41))
    assert last.choices == [] and last.usage.completion_tokens == 40
    assert "" in {c.choices[0].text for c in tokens}, "bytes that are half a character still make a chunk"
    assert [c.choices[0].finish_reason for c in tokens] == [None] * 39 + ["length"]
    whole = live.openai().completions.create(
        model="tiny-llama", prompt="A tale", temperature=0, max_tokens=40, extra_body={"ignore_eos": True}
    )
    assert "".join(c.choices[0].text for c in tokens) == whole.choices[0].text


def test_stream_of_several_choices_counts_all_tokens(live):
    stream = live.openai().completions.create(
        model="tiny-llama",
        prompt=["a", "b"],
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=5,
        extra_body={"ignore_eos": True},
    )
    *tokens, last = list(stream)
    assert sorted(c.choices[0].index for c in tokens) == [i for i in range(4) for _ in range(5)]
    assert all(c.usage is None for c in tokens)
    assert last.usage.completion_tokens == 20 and last.usage.prompt_tokens == 2


def test_chat_streams_what_it_says_whole(live):
    create = live.openai().chat.completions.create
    whole = create(model="tiny-llama", messages=QUESTION, **GREEDY)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(create(model="tiny-llama", messages=QUESTION, stream=True, **GREEDY))
    assert "".join(c.choices[0].delta.content for c in chunks) == whole.choices[0].message.content
    assert len(chunks) == whole.usage.completion_tokens
    assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_chat_takes_text_parts_and_goes_through_the_template(live):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    got = live.openai().chat.completions.create(model="tiny-llama", messages=parts, **GREEDY)
    want = live.openai().completions.create(
        model="tiny-llama",
        prompt="user: a\nb\nassistant:",
        extra_body={"add_special_tokens": False},
        **GREEDY,
    )
    assert got.choices[0].message.content == want.choices[0].text
    assert got.usage.prompt_tokens == want.usage.prompt_tokens


def test_an_answer_can_be_sent_back_as_history(live):
    create = live.openai().chat.completions.create
    answer = create(model="tiny-llama", messages=QUESTION, **GREEDY).choices[0].message
    history = [{"role": "system", "content": "Be short."}, *QUESTION, answer.model_dump(), *QUESTION]
    assert create(model="tiny-llama", messages=history, **GREEDY).usage.completion_tokens > 0


def test_chat_without_a_limit_fills_the_context(live):
    long = [{"role": "user", "content": "word " * 90}]
    got = live.openai().chat.completions.create(
        model="tiny-llama", messages=long, extra_body={"ignore_eos": True}
    )
    assert got.usage.total_tokens == 512 and got.choices[0].finish_reason == "length"


def test_stop_string_ends_the_text_before_it(live):
    def ask(**more):
        return live.openai().completions.create(
            model="tiny-llama", prompt="A tale", temperature=0, max_tokens=60, **more
        )

    text = ask(extra_body={"ignore_eos": True}).choices[0].text
    stop = text[len(text) // 2 :][:2]
    got = ask(stop=stop, extra_body={"ignore_eos": True})
    assert got.choices[0].text == text[: text.index(stop)]
    assert got.choices[0].finish_reason == "stop"
    streamed = ask(stop=[stop], stream=True, extra_body={"ignore_eos": True})
    assert "".join(c.choices[0].text for c in streamed) == got.choices[0].text


def test_stop_token_ids_and_min_tokens(live):
    ids = live.engine.tokenizer.encode("A tale", add_special_tokens=True)
    create = live.openai().completions.create
    free = create(model="tiny-llama", prompt=ids, logprobs=0, extra_body={"ignore_eos": True}, **GREEDY)
    assert free.usage.completion_tokens == 12
    everything = {"stop_token_ids": list(range(2, 66))}
    banned = create(
        model="tiny-llama", prompt=ids, seed=1, max_tokens=12, extra_body=everything | {"min_tokens": 12}
    )
    assert banned.usage.completion_tokens == 12


def test_completion_logprobs_are_the_engines(live, reference):
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True)
    [want] = reference.generate(["A tale"], params)
    got = live.openai().completions.create(
        model="tiny-llama",
        prompt="A tale",
        temperature=0,
        max_tokens=6,
        logprobs=3,
        extra_body={"ignore_eos": True},
    )
    logprobs = got.choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx(want.logprobs)
    assert logprobs.tokens == [live.engine.tokenizer.token_text(t) for t in want.token_ids]
    assert len(logprobs.top_logprobs) == len(logprobs.text_offset) == 6
    assert max(logprobs.top_logprobs[0].values()) == pytest.approx(want.logprobs[0])


def test_an_echoed_prompt_comes_with_the_engines_logprobs(live, reference):
    ids = live.engine.tokenizer.encode("A tale of two")
    got = live.openai().completions.create(
        model="tiny-llama", prompt=[ids, ids[:4]], temperature=0, max_tokens=2, logprobs=2, echo=True, n=2
    )
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    for choice, prompt in zip(got.choices, [ids, ids, ids[:4], ids[:4]], strict=True):
        text = live.engine.tokenizer.decode(prompt)
        assert choice.text.startswith(text)
        logprobs, want = choice.logprobs, torch.from_numpy(reference.logits(prompt)).log_softmax(-1)
        assert len(logprobs.tokens) == len(prompt) + 2
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        expected = [float(want[i, token]) for i, token in enumerate(prompt[1:])]
        assert logprobs.token_logprobs[1 : len(prompt)] == pytest.approx(expected, abs=1e-4)
        best = [max(top.values()) for top in logprobs.top_logprobs[1 : len(prompt)]]
        assert best == pytest.approx(want.max(-1).values[:-1].tolist(), abs=1e-4)
        assert logprobs.text_offset[len(prompt)] == len(text)


def test_an_echo_without_logprobs_is_text_only(live):
    plain = live.complete(prompt="A tale", temperature=0, max_tokens=3).json()["choices"][0]
    echoed = live.complete(prompt="A tale", temperature=0, max_tokens=3, echo=True).json()["choices"][0]
    assert echoed["text"] == "A tale" + plain["text"] and echoed["logprobs"] is None
    refused = live.complete(prompt="a" * 600, echo=True)
    assert refused.status_code == 400 and "context length" in refused.text


def test_chat_logprobs(live):
    got = live.openai().chat.completions.create(
        model="tiny-llama", messages=QUESTION, logprobs=True, top_logprobs=2, **GREEDY
    )
    content = got.choices[0].logprobs.content
    assert len(content) == got.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in content)
    assert content[0].logprob == max(top.logprob for top in content[0].top_logprobs)
    assert bytes(content[0].bytes).decode() == content[0].token
    bare = live.openai().chat.completions.create(
        model="tiny-llama", messages=QUESTION, logprobs=True, **GREEDY
    )
    assert bare.choices[0].logprobs.content[0].top_logprobs == []


def test_eight_clients_get_what_each_gets_alone(live):
    def ask(i):
        chunks = live.openai().completions.create(
            model="tiny-llama",
            prompt=f"prompt {i}",
            temperature=0,
            max_tokens=30,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join(c.choices[0].text for c in chunks)

    alone = [ask(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone


def test_what_changes_nothing_is_accepted(live):
    got = live.openai().chat.completions.create(
        model="tiny-llama",
        messages=QUESTION,
        user="me",
        metadata={"a": "b"},
        tools=[],
        response_format={"type": "text"},
        logit_bias={},
        store=False,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "chat_template_kwargs": {}},
        **GREEDY,
    )
    assert got.choices[0].finish_reason in {"stop", "length"}


def test_unknown_model_and_tools_are_refused(live):
    create = live.openai().chat.completions.create
    with pytest.raises(NotFoundError) as missing:
        create(model="gpt-4", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(BadRequestError, match="does not support 'tools'"):
        create(
            model="tiny-llama", messages=QUESTION, tools=[{"type": "function", "function": {"name": "look"}}]
        )
