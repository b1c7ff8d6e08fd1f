"""Tokens to text: characters whole, stop strings unseen, special tokens silent, chat templates applied."""

import json
import logging
import shutil

import pytest
from engine_models import continue_all, drain, greedy, load, prompt
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_tokenizer

from fourfold.core.errors import UsageError
from fourfold.engine import Completion, Request, SamplingParams
from fourfold.engine.sequence import StopText
from fourfold.engine.tokenizer import Tokenizer, read_tokenizer

VARIED = {"repetition_penalty": 1.5, "frequency_penalty": 2.0}


@pytest.fixture(scope="module")
def engine(tiny_llama):
    return load(tiny_llama)


@pytest.mark.parametrize(
    "text", ["plain words", "grüße 😀 日本語", "Ω" * 9, "e\u0301 👩‍👩‍👧", " leading", ""]
)
def test_pieces_join_to_the_text_and_are_whole_characters(engine, text):
    stream = engine.tokenizer.stream()
    pieces = [stream.push(token) for token in engine.tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) == len(text.encode())  # the tiny tokenizer's tokens are bytes


def test_an_unfinished_character_is_not_shown(engine):
    stream = engine.tokenizer.stream()
    smile = engine.tokenizer.encode("a😀")
    assert [stream.push(token) for token in smile[:-1]] == ["a", "", "", ""]


def test_broken_bytes_do_not_stop_the_text_after_them(engine):
    stream = engine.tokenizer.stream()
    tokens = engine.tokenizer.encode("😀")[:2] + engine.tokenizer.encode("ok")
    assert "".join(stream.push(token) for token in tokens).endswith("ok")


def test_text_comes_straight_from_tokenizers_unless_a_tokenizer_adds_to_it(tiny_llama):
    from transformers import PreTrainedTokenizerFast

    class Shouting(PreTrainedTokenizerFast):
        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs).upper()

    plain, loud = PreTrainedTokenizerFast.from_pretrained(tiny_llama), Shouting.from_pretrained(tiny_llama)
    tokens = [0, *plain.encode("grüße 😀"), 1]
    for own in (plain, loud):
        ours = Tokenizer(own, set())
        for skip in (True, False):
            theirs = own.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(tokens, skip) == theirs
    assert Tokenizer(loud, set()).decode(plain.encode("loud")) == "LOUD"


def test_special_tokens_are_silent_in_between(engine):
    stream = engine.tokenizer.stream()
    tokens = [*engine.tokenizer.encode("a"), 0, *engine.tokenizer.encode("b")]
    assert [stream.push(token) for token in tokens] == ["a", "", "b"]


def cut(text: str, stops: list[str]) -> str:
    """``text`` up to the first stop string, all at once."""
    return text[: min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))]


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=5)))
def test_stop_strings_end_the_text_wherever_pieces_are_cut(pieces, stops):
    watcher, shown, stopped = StopText(stops), "", False
    for piece in pieces:
        text, stopped = watcher.push(piece)
        shown += text
        assert cut(shown, stops) == shown
        if stopped:
            break
    shown += watcher.flush()
    expected = cut("".join(pieces), stops)
    assert stopped == (expected != "".join(pieces))
    # a longer stop string may begin earlier but end later than the one that was reached first
    assert shown == expected or (stopped and expected.startswith(shown)) or shown.startswith(expected)


def run(engine, params: SamplingParams, tokens: list[int]) -> tuple[Completion, list[str]]:
    done, texts = Completion(tokens, [], "", "length"), []
    engine.add(Request("one", tokens, params))
    for output in drain(engine):
        done.extend(output)
        texts.append(output.text)
    return done, texts


@pytest.fixture(scope="module")
def speaker(tiny_llama, tmp_path_factory):
    """An engine whose model has nothing to say but letters: all other rows of its head are zero."""
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("speaker") / "model")
    tensors = load_file(folder / "model.safetensors")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    others = [i for token, i in vocabulary.items() if not (token.isascii() and token.isalpha())]
    tensors["lm_head.weight"][others] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return load(folder)


@pytest.fixture(scope="module")
def spoken(speaker):
    """A prompt with the 24 letters that follow it."""
    done = speaker.generate([prompt(6)], greedy(24, **VARIED))[0]
    assert len(done.text) == 24 and done.text.isalpha() and len(set(done.text)) > 12
    return prompt(6), done


def test_a_stop_string_over_several_tokens(speaker, spoken):
    tokens, whole = spoken
    stop = whole.text[8:12]
    done, texts = run(speaker, greedy(24, **VARIED, stop=["never there", stop]), tokens)
    assert done.finish_reason == "stop"
    assert done.text == cut(whole.text, [stop])
    assert "".join(texts) == done.text and len(texts) == len(done.token_ids)
    assert len(done.token_ids) < 24


def test_text_held_back_comes_when_the_length_ends_it(speaker, spoken):
    tokens, whole = spoken
    stop = whole.text[-3:] + "\x00"
    done, texts = run(speaker, greedy(24, **VARIED, stop=[stop]), tokens)
    assert done.finish_reason == "length" and done.text == whole.text
    assert texts[-1].endswith(whole.text[-3:]) and texts[-2] == ""


def test_stop_token_ends_without_its_text(speaker, spoken):
    tokens, whole = spoken
    stop = whole.token_ids[5]
    done, texts = run(speaker, greedy(24, **VARIED, stop_token_ids=[stop]), tokens)
    end = whole.token_ids.index(stop)
    assert done.finish_reason == "stop" and done.token_ids == whole.token_ids[: end + 1]
    assert done.text == whole.text[:end] and texts[-1] == ""


def test_min_tokens_outlasts_stop_strings(speaker, spoken):
    tokens, whole = spoken
    params = greedy(24, **VARIED, stop=[whole.text[0]], min_tokens=10)
    done, _ = run(speaker, params, tokens)
    assert len(done.token_ids) >= 10


def eos_run(engine, **params) -> Completion:
    """A run that would like nothing better than to end: every token but one is an end."""
    ends = SamplingParams(**({"seed": 3, "max_tokens": 40, "temperature": 3.0} | params))
    engine.tokenizer.eos_token_ids = set(range(255))
    try:
        return engine.generate([prompt(4)], ends)[0]
    finally:
        engine.tokenizer.eos_token_ids = {1}


def test_eos_ends_unless_ignored(engine):
    ended = eos_run(engine)
    assert ended.finish_reason == "stop" and len(ended.token_ids) == 1
    assert eos_run(engine, ignore_eos=True).finish_reason == "length"
    assert len(eos_run(engine, min_tokens=6).token_ids) >= 7


def test_eos_ids_come_from_generation_config_and_tokenizer(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 11]}))
    assert load(folder).tokenizer.eos_token_ids == {9, 11, 1}


def test_chat_template(engine):
    messages = [{"role": "user", "content": "hi"}]
    ids = engine.tokenizer.apply_chat_template(messages)
    assert engine.tokenizer.decode(ids) == "user: hi\nassistant:"
    assert engine.tokenizer.decode(engine.tokenizer.apply_chat_template(messages, False)) == "user: hi\n"


def test_a_template_that_refuses_is_the_callers_error(engine):
    with pytest.raises(UsageError, match="chat template refused"):
        engine.tokenizer.apply_chat_template([{"role": "user"}, 3])


def test_generate_takes_text(engine):
    by_text, by_ids = engine.generate(["abc", engine.encode("abc")], greedy(5))
    assert by_text.token_ids == by_ids.token_ids
    assert continue_all(engine, [engine.encode("abc")], greedy(5)) == [by_ids.token_ids]


def test_a_text_longer_than_the_context_is_encoded_without_a_warning(tmp_path, caplog):
    write_tiny_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"model_max_length": 4}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(read_tokenizer(tmp_path, "x"), set())
    with caplog.at_level("WARNING"):
        transformers_logger = logging.getLogger("transformers")
        transformers_logger.addHandler(caplog.handler)
        assert len(tokenizer.encode("longer than four")) == 16
        transformers_logger.removeHandler(caplog.handler)
    assert not caplog.records
