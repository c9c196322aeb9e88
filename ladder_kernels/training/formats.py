"""What rows of data mean, and how they become tokens and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ladder_kernels.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = ["FORMATS", "IGNORE", "encode_rows"]

FORMATS = ("auto", "text", "completion", "chat")
"""Formats of rows; "auto" chooses by the columns that there are."""

IGNORE = -100
"""Label of a token that is not learned."""

Encoded = tuple[list[int], list[int]]
"""Token ids and labels of one document."""


def encode_rows(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str = "auto",
    text_column: str = "text",
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    messages_column: str = "messages",
    max_length: int | None = None,
) -> datasets.Dataset:
    """Turn rows into tokens and labels.

    - *text*: a document; every token is learned.
    - *completion*: a prompt and what follows it; only that is learned.
    - *chat*: messages ``{"role", "content"}``, rendered with the tokenizer's chat template; the
      assistant's turns are learned, with the token that ends them. If the template renders an
      earlier turn differently once the conversation goes on (some drop a turn's reasoning), each of
      the assistant's turns becomes a document of its own, which is what the model sees in use.

    Text and completions end with the end-of-sequence token; templates set their own. The first
    token of a document is never learned, since nothing predicts it, and documents with nothing to
    learn are left out.

    Args:
        rows: With the columns of their format.
        tokenizer: One that knows the characters of each token (a "fast" one).
        format: One of :data:`FORMATS`. "auto": chat if there is the column of messages, completion
            if there are those of prompt and completion, else text.
        text_column: Name of the column of documents.
        prompt_column: Name of the column of prompts.
        completion_column: Name of the column of completions.
        messages_column: Name of the column of messages.
        max_length: Documents are cut after so many tokens; default never.

    Returns:
        ``input_ids`` and ``labels`` (lists of int32, as long as each other, :data:`IGNORE` where
        nothing is learned), memory-mapped if ``rows`` are.

    Raises:
        ConfigError: If the format is unknown.
        DataError: If a column is missing, the values are not what the format needs, the tokenizer
            has no chat template or no character offsets, or nothing is left to learn.
    """
    import datasets

    columns = {
        "text": [text_column],
        "completion": [prompt_column, completion_column],
        "chat": [messages_column],
    }
    chosen = _choose(format, rows.column_names, columns)
    if chosen != "text" and not tokenizer.is_fast:
        raise DataError(
            f"format {chosen!r}: {type(tokenizer).__name__} does not say which characters a token "
            "stands for, so that answers cannot be found; a fast tokenizer does"
        )
    if chosen == "chat" and not tokenizer.chat_template:
        raise DataError(
            "format 'chat': the tokenizer has no chat template; use prompt and completion columns"
        )
    encoders: dict[str, Callable[..., list[Encoded]]] = {
        "text": _encode_text,
        "completion": _encode_completion,
        "chat": _encode_chat,
    }
    integers = datasets.Sequence(datasets.Value("int32"))
    encoded = rows.map(
        _encode_batch,
        batched=True,
        remove_columns=rows.column_names,
        features=datasets.Features({"input_ids": integers, "labels": integers}),
        fn_kwargs={
            "encode": encoders[chosen],
            "columns": columns[chosen],
            "tokenizer": tokenizer,
            "max_length": max_length,
        },
        desc="Tokenising",
    )
    if len(encoded) == 0:
        raise DataError(f"format {chosen!r}: found nothing to learn in {len(rows)} rows")
    return encoded


def _choose(format: str, there: Sequence[str], columns: dict[str, list[str]]) -> str:
    """The format, after checking that its columns are there."""
    if format not in FORMATS:
        raise ConfigError(f"format: found {format!r}; allowed are {', '.join(FORMATS)}")
    if format == "auto":
        for name in ("chat", "completion", "text"):
            if all(column in there for column in columns[name]):
                return name
        wanted = ", or ".join(" and ".join(map(repr, names)) for names in columns.values())
        raise DataError(f"data: found the columns {_listed(there)}; needed are {wanted}")
    missing = [column for column in columns[format] if column not in there]
    if missing:
        raise DataError(
            f"format {format!r}: found no column {_listed(missing)}; there are {_listed(there)}"
        )
    return format


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _encode_batch(
    batch: dict[str, list[Any]],
    *,
    encode: Callable[..., list[Encoded]],
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> dict[str, list[list[int]]]:
    out: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for values in zip(*(batch[column] for column in columns), strict=True):
        for ids, labels in encode(tokenizer, *values):
            labels = [IGNORE, *labels[1:max_length]]
            if any(label != IGNORE for label in labels):
                out["input_ids"].append(ids[:max_length])
                out["labels"].append(labels)
    return out


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: object) -> list[Encoded]:
    ids = _end(tokenizer, _tokens(tokenizer, _string(text, "a document"))["input_ids"])
    return [(ids, ids)]


def _encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: object, completion: object
) -> list[Encoded]:
    start = _string(prompt, "a prompt")
    text = start + _string(completion, "a completion")
    encoding = _tokens(tokenizer, text, return_offsets_mapping=True)
    ids = _end(tokenizer, encoding["input_ids"])
    labels = [IGNORE] * len(ids)
    for index, (begin, end) in enumerate(encoding["offset_mapping"]):
        # A token across the border has something of the completion in it.
        if end > max(begin, len(start)):
            labels[index] = ids[index]
    if ids[-1:] == [tokenizer.eos_token_id]:
        labels[-1] = ids[-1]
    return [(ids, labels)]


def _encode_chat(tokenizer: PreTrainedTokenizerBase, messages: object) -> list[Encoded]:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages
    ):
        raise DataError(
            f"format 'chat': found {_short(messages)}; it must be a list of messages with role and "
            "content"
        )
    # Arrow gives every message the keys of all; templates ask whether a key is there.
    turns = [{k: v for k, v in message.items() if v is not None} for message in messages]
    whole = _render(tokenizer, turns)
    answers: list[tuple[str, tuple[int, int]]] = []
    for index, message in enumerate(turns):
        if message["role"] == "assistant":
            before = _render(tokenizer, turns[:index], add_generation_prompt=True)
            after = _render(tokenizer, turns[: index + 1])
            if not after.startswith(before):
                raise DataError(
                    "format 'chat': the chat template's rendering of an answer does not go on from "
                    "its generation prompt, so that the answer cannot be found"
                )
            answers.append((after, (len(before), _end_of_answer(after, message["content"]))))
    if all(whole.startswith(after) for after, _ in answers):
        return [_encode_spans(tokenizer, whole, [span for _, span in answers])]
    return [_encode_spans(tokenizer, after, [span]) for after, span in answers]


def _render(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, KeyError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"format 'chat': the chat template refuses a row: {text}") from None
    return str(rendered)


def _end_of_answer(text: str, content: object) -> int:
    """Where the answer at the end of ``text`` ends, the token that ends its turn included.

    White space after that token belongs to the template; where there is no such token, white space
    is all that ends a turn and must be learned.
    """
    bare = text.rstrip()
    unmarked = isinstance(content, str) and bare.endswith(content.rstrip())
    return len(text) if unmarked else len(bare)


def _encode_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> Encoded:
    """Tokens of a rendered chat; those that reach into ``spans`` of characters are learned."""
    encoding = _tokens(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    labels = [IGNORE] * len(ids)
    for index, (begin, end) in enumerate(encoding["offset_mapping"]):
        if any(begin < stop and start < end for start, stop in spans):
            labels[index] = ids[index]
    return ids, labels


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> Any:
    # Documents longer than the model's context are cut later: no warning about them.
    return tokenizer(text, return_attention_mask=False, verbose=False, **options)


def _end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """``ids`` with the end-of-sequence token, where the tokenizer has one, once."""
    eos: Any = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _string(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"data: found {_short(value)} as {what}; it must be text")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
