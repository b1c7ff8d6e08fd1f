"""Calibration sequences: where they come from, that a seed decides them, and what too little text is told."""

import json

import pytest
import torch

from fourfold.checkpoint import open_checkpoint
from fourfold.compress import Recipe, quantize
from fourfold.compress.calibration import SELF_WRITTEN, CalibrationSet, SelfWritten, cut
from fourfold.compress.calibration_data import PIECE_CHARACTERS, read_calibration
from fourfold.core.errors import FourfoldError, UsageError

WORDS = "Call me Ishmael. Some years ago, never mind how long precisely.\n"


class Letters:
    """A tokenizer of one token per character; 999 begins a document, 998 a turn of a conversation."""

    def encode(self, text, add_special_tokens=False):
        return [999] * add_special_tokens + [ord(c) for c in text]

    def apply_chat_template(self, messages, add_generation_prompt=True):
        assert not add_generation_prompt
        return [t for m in messages for t in (998, *self.encode(m["content"]))]


def test_sequences_are_cut_without_overlap_and_a_seed_decides_where(tmp_path):
    ids = torch.arange(1000)
    for samples, length in ((7, 20), (50, 20), (1, 1000)):
        one = cut(ids, samples, length, 3, "x").token_ids
        assert one.shape == (samples, length) and one.dtype == torch.int64
        assert (one.diff() == 1).all()  # each is a run of the text
        assert len(one.unique()) == samples * length  # and none shares a token with another
        assert torch.equal(one, cut(ids, samples, length, 3, "x").token_ids)
    assert not torch.equal(cut(ids, 7, 20, 3, "x").token_ids, cut(ids, 7, 20, 4, "x").token_ids)
    starts = torch.cat([cut(ids, 2, 20, seed, "x").token_ids[:, 0] for seed in range(400)])
    assert starts.min() < 20 and starts.max() > 960  # all of the text is reached


def test_too_short_a_text_names_the_tokens_and_what_would_fit():
    with pytest.raises(UsageError, match=r"has 1000 tokens, but 51 sequences of 20 need 1020.*--samples 50"):
        cut(torch.arange(1000), 51, 20, 0, "x")
    with pytest.raises(UsageError, match=r"has 10 tokens.*ask for less: --samples 1 --sequence-tokens 10"):
        cut(torch.arange(10), 2, 20, 0, "x")
    for few in (0, 7):  # the command takes no sequences of less than 8
        with pytest.raises(UsageError, match=rf"has {few} tokens.*Give a longer text\.$"):
            cut(torch.arange(few), 2, 20, 0, "x")


def test_a_text_is_one_document_however_long(tmp_path):
    text = (WORDS * (PIECE_CHARACTERS // len(WORDS) + 1)) + "x" * (PIECE_CHARACTERS + 5)
    (tmp_path / "a.txt").write_text(text)
    length = len(text) + 1
    found = read_calibration(str(tmp_path / "a.txt"), Letters(), 1, length, 0)
    assert found.token_ids[0].tolist() == [999, *map(ord, text)]
    assert found.source == "a.txt"


def test_jsonl_takes_texts_and_conversations(tmp_path):
    rows = [{"text": "ab", "id": 1}, {"messages": [{"role": "user", "content": "c"}]}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    found = read_calibration(str(tmp_path / "a.jsonl"), Letters(), 1, 5, 0)
    assert found.token_ids[0].tolist() == [999, ord("a"), ord("b"), 998, ord("c")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": 3}', "Line 2 of .*neither a `text`"),
        ('{"messages": []}', "Line 2 of .*`messages`"),
        ('{"messages": [{"content": "x"}]}', "Line 2 of .*`messages`"),
        ("[1]", "Line 2 of .*neither"),
        ("{", "Line 2 of .*not JSON"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(FourfoldError, match=words):
        read_calibration(str(tmp_path / "a.jsonl"), Letters(), 1, 2, 0)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="no calibration file"):
        read_calibration(str(tmp_path / "a.txt"), Letters(), 1, 2, 0)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(FourfoldError, match=r"not UTF-8 \(byte 3\)"):
        read_calibration(str(tmp_path / "b.txt"), Letters(), 1, 2, 0)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab")
    found = read_calibration(str(tmp_path / "a.txt"), Letters(), 1, 3, 0)
    assert found.token_ids[0].tolist() == [999, 97, 98]


def test_conversations_for_a_model_that_takes_none(tmp_path):
    class Plain(Letters):
        def apply_chat_template(self, messages, add_generation_prompt=True):
            raise UsageError("It has no chat template.")

    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "c"}]}))
    with pytest.raises(UsageError, match=r"hold conversations.*no chat template\. Or give plain texts"):
        read_calibration(str(tmp_path / "a.jsonl"), Plain(), 1, 2, 0)


def test_a_dataset_without_its_library(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)  # what a missing package looks like to import
    with pytest.raises(FourfoldError, match=r"pip install 'fourfold\[datasets\]'"):
        read_calibration("some/texts", Letters(), 1, 2, 0)


def test_a_dataset_through_its_library(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": c * 9}) + "\n" for c in "abc"))
    found = read_calibration(str(folder), Letters(), 2, 15, 0)
    assert found.token_ids.flatten().tolist() == [t for c in "abc" for t in (999, *[ord(c)] * 9)]
    (folder / "train.jsonl").write_text(json.dumps({"words": "x"}) + "\n")
    with pytest.raises(FourfoldError, match="Row 0 of the dataset"):
        read_calibration(str(folder), Letters(), 1, 2, 0)
    with pytest.raises(FourfoldError, match="cannot be read as a dataset"):
        read_calibration(str(tmp_path / "nothing-here"), Letters(), 1, 2, 0)


GPTQ = Recipe.model_validate({"name": "own", "rules": [{"weight": "mxfp4"}], "passes": ["gptq"]})


def test_the_checkpoint_says_what_it_was_calibrated_on(tiny_llama, tmp_path):
    tokens = torch.arange(128).view(2, 64)
    manifest = quantize(tiny_llama, tmp_path / "out", GPTQ, calibration=CalibrationSet(tokens, "mine", 5))
    expected = {"source": "mine", "samples": 2, "sequence_tokens": 64, "seed": 5}
    assert manifest.calibration is not None and expected.items() <= manifest.calibration.items()
    assert len(manifest.calibration["sha256"]) == 64
    assert manifest == open_checkpoint(tmp_path / "out").manifest


def test_what_the_model_writes_is_written_once(tiny_llama, tmp_path):
    """An interrupted run keeps the pieces that are finished, and asks only for the others."""
    asked: list[int] = []

    def write(first, count, fail=False):
        asked.append(first)
        if fail and first:
            raise InterruptedError
        return torch.arange(first, first + count)[:, None].expand(count, 64) % 256

    def run(fail, **options):
        calibration = SelfWritten(40, 64, 0, lambda f, c: write(f, c, fail))
        return quantize(tiny_llama, tmp_path / "out", GPTQ, calibration=calibration, **options)

    with pytest.raises(InterruptedError):
        run(fail=True)
    manifest = run(fail=False, resume=True)
    assert asked == [0, 32, 32]
    assert manifest.calibration is not None and manifest.calibration["source"] == SELF_WRITTEN
    assert not list((tmp_path / "out").glob("layers"))
