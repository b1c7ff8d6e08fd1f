"""A tokenizer read by us is transformers': ids, texts, conversations. Others are left to it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_config, write_tiny_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from fourfold.core.errors import UsageError
from fourfold.engine.plain_tokenizer import PlainTokenizer
from fourfold.engine.tokenizer import PLAIN_MODELS, Tokenizer, read_tokenizer

QWEN = """{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- if messages[0].role == 'system' %}
    {{- '<s>' + messages[0].content + '</s>\\n' }}
{%- endif %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" and message.content is string %}
        {%- set ns.found = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if loop.index0 > ns.last + 2 %}{% break %}{% endif %}
    {{- bos_token + message.role + '\\n' + message.content.strip().split('</think>')[-1].lstrip('\\n') }}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}
{%- if tools %}{{- tools|tojson }}{%- endif %}{{- eos_token }}"""
JSON = """{{ messages|tojson }} {{ messages[0]|tojson(indent=2) }} {{ dict(a=1) }} {{ documents }}
{% if messages|length > 2 %}
    {{ raise_exception('two turns at most, ' + messages[0]['role']) }}
{% endif %}"""
LLAMA = """{{- bos_token }}{%- if not date is defined %}{%- set date = strftime_now("%d %b %Y") %}{%- endif %}
{%- for m in messages %}
    {{- '<|' + m['role'] + '|>' + date + m['content']|trim + missing|default('') }}{%- endfor %}
{% if add_generation_prompt %}assistant{% endif %}
"""
UNSAFE = (
    "{{ messages.__class__.__name__ }}",
    "{{ messages.append(1) }}",
    "{% set ns = namespace(_a=1) %}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{{ missing.role }}",
    "{{ dict.mro() }}",
)
ROLES = st.sampled_from(["system", "user", "assistant"])
CONVERSATIONS = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text()}), min_size=1, max_size=4)
ADDED = [{"content": "<|bos|>", "special": True, "normalized": False}, {"content": "<tag>", "lstrip": True}]


def folder_of(folder, model_type="llama", template=None, **changes):
    """A tiny tokenizer whose files say ``changes`` too, with an added token and a beginning of texts."""
    folder.mkdir(parents=True)
    write_tiny_tokenizer(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["<tag>"])
    begin = [("<|bos|>", 0)]
    backend.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=begin)
    backend.save(str(folder / "tokenizer.json"))
    said = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    if template is not None:
        said["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "config.json").write_text(json.dumps(tiny_config(model_type)))
    return folder


def both(folder):
    """Ours and transformers' on the files of ``folder``."""
    from transformers import AutoTokenizer

    plain = PlainTokenizer.read(folder)
    assert plain is not None
    return Tokenizer(plain, set()), Tokenizer(AutoTokenizer.from_pretrained(folder), set())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return both(folder_of(tmp_path_factory.mktemp("pair") / "model"))


@given(st.text() | st.lists(st.sampled_from(["<tag>", " <tag>", "<|eos|>", "a b", "\n", "é"])).map("".join))
def test_ids_and_texts_are_transformers(pair, text):
    ours, theirs = pair
    for special in (False, True):
        ids = theirs.encode(text, special)
        assert ours.encode(text, special) == ids
        assert ours.decode(ids, special) == theirs.decode(ids, special)
    assert (len(ours), ours.bos_token_id) == (len(theirs), theirs.bos_token_id)


@pytest.mark.parametrize("model_type", PLAIN_MODELS)
@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_it_is_what_autotokenizer_makes_of_the_folder(tmp_path, model_type, named):
    more = {
        "additional_special_tokens": ["<|eos|>"],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": True,
    }
    folder = folder_of(tmp_path / "model", model_type, tokenizer_class=named, **more)
    ours, theirs = both(folder)
    assert ours._backend.to_str() == theirs._tokenizer.backend_tokenizer.to_str()
    assert ours._tokenizer.named == theirs._tokenizer.special_tokens_map
    assert ours._tokenizer.eos_token_id == theirs._tokenizer.eos_token_id
    assert isinstance(read_tokenizer(folder, "x", model_type), PlainTokenizer)


@pytest.mark.parametrize("template", [None, QWEN, JSON, LLAMA])
@settings(max_examples=30)
@given(
    messages=CONVERSATIONS, variables=st.fixed_dictionaries({}, optional={"enable_thinking": st.booleans()})
)
def test_conversations_are_transformers(tmp_path_factory, template, messages, variables):
    ours, theirs = templated(tmp_path_factory, template)
    for prompt in (False, True):
        assert talk(ours, messages, prompt, variables) == talk(theirs, messages, prompt, variables)


@pytest.mark.parametrize("template", UNSAFE)
def test_what_the_sandbox_of_transformers_refuses_ours_refuses(tmp_path, template):
    for tokenizer in both(folder_of(tmp_path / "model", template=template)):
        with pytest.raises(UsageError, match="chat template refused"):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


_pairs = {}


def templated(factory, template):
    """Both tokenizers with ``template``, made once."""
    if template not in _pairs:
        _pairs[template] = both(folder_of(factory.mktemp("templated") / "model", template=template))
    return _pairs[template]


def talk(tokenizer, messages, prompt, variables):
    """The conversation as text, or why there is none."""
    try:
        return tokenizer.decode(tokenizer.apply_chat_template(messages, prompt, **variables), False)
    except UsageError as error:
        return str(error)


def test_a_template_beside_the_settings_goes_first(tmp_path):
    folder = folder_of(tmp_path / "model", template="old")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    for tokenizer in both(folder):
        assert talk(tokenizer, [{"role": "user", "content": "new"}], True, {}) == "new!"


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"auto_map": {}},
        {"split_special_tokens": True},
        {"eos_token": "<|new|>"},
        {"extra_special_tokens": {"image_token": "<tag>"}},
        {"additional_special_tokens": ["<|new|>"]},
        {"added_tokens_decoder": {"256": {"content": "<tag>", "special": True}}},
        {"chat_template": [{"name": "default", "template": "x"}]},
        {"chat_template": "{%- generation %}x{% endgeneration %}"},
    ],
)
def test_settings_that_do_more_are_left_to_transformers(tmp_path, change):
    assert PlainTokenizer.read(folder_of(tmp_path / "model", **change)) is None


@pytest.mark.parametrize("file", ["special_tokens_map.json", "added_tokens.json"])
def test_so_are_files_of_older_tokenizers_unless_the_settings_repeat_them(tmp_path, file):
    folder = folder_of(tmp_path / "older")
    (folder / file).write_text("{}")
    assert PlainTokenizer.read(folder) is None
    added = {"0": ADDED[0], "256": {"content": "<tag>", "special": False}}
    newer = folder_of(tmp_path / "newer", added_tokens_decoder=added)
    (newer / file).write_text('{"eos_token": "<|new|>"}')
    ours, theirs = both(newer)
    assert ours._backend.to_str() == theirs._tokenizer.backend_tokenizer.to_str()


def test_a_file_that_cuts_texts_is_left_to_transformers(tmp_path):
    folder = folder_of(tmp_path / "model")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.save(str(folder / "tokenizer.json"))
    assert PlainTokenizer.read(folder) is None


def test_other_models_are_left_to_transformers(tmp_path):
    folder = folder_of(tmp_path / "model", "mistral")
    assert PlainTokenizer.read(folder) is not None
    assert not isinstance(read_tokenizer(folder, "x", "mistral"), PlainTokenizer)
