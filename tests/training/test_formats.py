"""Text, completions and chats as tokens; loss on answers only."""

from __future__ import annotations

import copy
from typing import Any

import datasets
import pytest

from ladder_kernels.errors import ConfigError, DataError
from ladder_kernels.training.formats import encode_rows

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "count"},
    {"role": "assistant", "content": "one two"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "three\nfour"},
]


def encode(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[dict[str, Any]]:
    return encode_rows(datasets.Dataset.from_list(rows), tokenizer, **options).to_list()


def learned(row: dict[str, Any], tokenizer: Any) -> str:
    """What is learned; `|` where something in between is not."""
    text, gap = "", True
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if label != -100:
            text += ("|" if gap and text else "") + tokenizer.decode([label])
        gap = label == -100
    return text


def test_text(tokenizer: Any):
    (row,) = encode([{"text": "a ladder climbs"}], tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "a ladder climbs<|im_end|>"
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_completion(tokenizer: Any):
    (row,) = encode([{"prompt": "2+2=", "completion": "4 of course"}], tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "2+2=4 of course<|im_end|>"
    assert learned(row, tokenizer) == "4 of course<|im_end|>"


def test_a_token_across_the_border_is_learned(tokenizer: Any):
    """A prompt that ends with a space shares a token with the answer."""
    (row,) = encode([{"prompt": "the quick ", "completion": "brown fox"}], tokenizer)
    assert learned(row, tokenizer) == " brown fox<|im_end|>"


def test_an_eos_that_is_there_already_is_not_doubled(tokenizer: Any):
    (row,) = encode([{"text": "a ladder<|im_end|>"}], tokenizer)
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1


def test_chat_learns_every_assistant_turn_and_its_end(tokenizer: Any):
    (row,) = encode([{"messages": CHAT}], tokenizer)
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == expected
    assert learned(row, tokenizer) == "one two<|im_end|>|three\nfour<|im_end|>"


def test_a_template_that_rewrites_earlier_turns(tokenizer: Any):
    """Qwen3's kind: an answer is marked while it is the last turn, and plain afterwards."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{{ '<think>' if loop.last and m.role == 'assistant' }}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    first, second = encode([{"messages": CHAT}], other)
    assert learned(first, other) == "<think>one two<|im_end|>"
    assert learned(second, other) == "<think>three\nfour<|im_end|>"
    assert other.decode(second["input_ids"]) == other.apply_chat_template(CHAT, tokenize=False)


def test_a_template_without_an_end_of_turn_token(tokenizer: Any):
    """There the line break is all that ends an answer."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (row,) = encode([{"messages": CHAT[1:3]}], other)
    assert learned(row, other).strip(" ") == "one two\n"


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": CHAT, "text": "x y"}, "chat"),
        ({"prompt": "a", "completion": " b c"}, "completion"),
        ({"text": "x y", "prompt": "a"}, "text"),
    ],
)
def test_the_format_follows_from_the_columns(row: dict[str, Any], format: str, tokenizer: Any):
    assert encode([row], tokenizer) == encode([row], tokenizer, format=format)


def test_columns_of_other_names(tokenizer: Any):
    plain = encode([{"prompt": "a", "completion": " b c"}], tokenizer)
    named = encode(
        [{"q": "a", "a": " b c", "text": "no"}],
        tokenizer,
        format="completion",
        prompt_column="q",
        completion_column="a",
    )
    assert named == plain


def test_documents_are_cut_and_those_without_a_lesson_left_out(tokenizer: Any):
    rows = [
        {"prompt": "a long question about a ladder", "completion": "b"},
        {"prompt": "q", "completion": "an answer that goes on and on and on"},
    ]
    (row,) = encode(rows, tokenizer, max_length=6)
    assert len(row["input_ids"]) == len(row["labels"]) == 6
    assert learned(row, tokenizer).startswith("an")


def test_tokens_stay_in_arrow(tokenizer: Any, write: Any):
    from ladder_kernels.training.sources import load_rows

    rows = load_rows(write("rows.jsonl", [{"text": "a ladder"}] * 3))
    encoded = encode_rows(rows, tokenizer)
    assert encoded.cache_files
    assert encoded.features["input_ids"].feature.dtype == "int32"


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"body": "x"}, {}, "found the columns 'body'; needed are 'text', or 'prompt' and"),
        ({"body": "x"}, {"format": "text"}, "no column 'text'; there are 'body'"),
        ({"prompt": "x"}, {"format": "completion"}, "no column 'completion'; there are 'prompt'"),
        ({"text": "x"}, {"text_column": "body", "format": "text"}, "no column 'body'"),
        ({"text": 3}, {}, "found 3 as a document; it must be text"),
        ({"messages": "hello"}, {}, "it must be a list of messages"),
        ({"messages": [{"role": "user"}]}, {}, "it must be a list of messages"),
        ({"messages": CHAT[:2]}, {}, "nothing to learn in 1 rows"),
        ({"text": ""}, {}, "nothing to learn in 1 rows"),
    ],
)
def test_bad_rows(row: dict[str, Any], options: dict[str, Any], message: str, tokenizer: Any):
    with pytest.raises(DataError, match=message) as caught:
        encode([row], tokenizer, **options)
    assert "\n" not in str(caught.value)


def test_bad_formats_and_tokenizers(tokenizer: Any):
    with pytest.raises(ConfigError, match="format: found 'poem'; allowed are auto, text"):
        encode([{"text": "x"}], tokenizer, format="poem")
    other = copy.deepcopy(tokenizer)
    other.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        encode([{"messages": CHAT}], other)
    other.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(DataError, match="refuses a row: roles must alternate"):
        encode([{"messages": CHAT}], other)
    other.chat_template = "{{ messages | length }}{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(DataError, match="does not go on from its generation prompt"):
        encode([{"messages": CHAT}], other)
