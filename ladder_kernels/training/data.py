"""From a source of rows to rows of tokens, and the tokenizer between them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladder_kernels.errors import CheckpointError, ConfigError, DataError, MissingFileError
from ladder_kernels.training.formats import encode_rows
from ladder_kernels.training.options import DataOptions
from ladder_kernels.training.packing import pack_rows
from ladder_kernels.training.sources import DATA_FILES, load_rows

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DataOptions",
    "calibration_rows",
    "load_tokenizer",
    "pad_token_id_of",
    "prepare_data",
]


def prepare_data(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, context: int
) -> datasets.Dataset:
    """Load rows, turn them into tokens, and pack them or cut them to the context.

    Args:
        options: Where the rows come from and what they are.
        tokenizer: See :func:`~.formats.encode_rows`.
        context: Most tokens a row; packed rows have exactly so many.

    Returns:
        Rows of tokens: see :func:`~.packing.pack_rows`, or :func:`~.formats.encode_rows` when they
        are not packed.

    Raises:
        MissingFileError: If the source does not exist.
        DataError: If it is empty, unreadable, or lacks a column.
        ConfigError: If an option is not allowed.
    """
    encoded = encode_rows(
        load_rows(options.source, split=options.split, limit=options.limit),
        tokenizer,
        format=options.format,
        text_column=options.text_column,
        prompt_column=options.prompt_column,
        completion_column=options.completion_column,
        messages_column=options.messages_column,
        max_length=None if options.pack else context,
    )
    if not options.pack:
        return encoded
    return pack_rows(encoded, context, pad_token_id=pad_token_id_of(tokenizer))


def calibration_rows(
    sources: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    context: int,
) -> list[list[int]]:
    """Token ids to calibrate a model with (:func:`~ladder_kernels.models.loading.load_backbone`).

    Args:
        sources: Each a file of text, whatever its suffix; or what :func:`~.sources.load_rows`
            reads, texts or chats. Each gives as much as the others, as far as it can.
        tokenizer: Of the model.
        tokens: Of all rows, at most (but one row of each source, at least).
        context: Tokens a row; documents follow each other, and what is left of a source's last row
            may be shorter.

    Returns:
        Rows spread evenly over each source.

    Raises:
        MissingFileError: If a source does not exist.
        DataError: If it is empty or unreadable.
    """
    rows = []
    for source in sources:
        ids = _token_stream(source, tokenizer)
        starts = range(0, len(ids), context)
        wanted = min(len(starts), max(1, tokens // len(sources) // context))
        chosen = [starts[index * len(starts) // wanted] for index in range(wanted)]
        rows += [ids[start : start + context] for start in chosen]
    return rows


def _token_stream(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of all documents of a source, one after the other."""
    import datasets

    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() not in DATA_FILES:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: not a text file in UTF-8 ({error.reason})") from None
        if not text.strip():
            raise DataError(f"{source}: found no text")
        rows = datasets.Dataset.from_dict({"text": [text]})
    else:
        rows = load_rows(source)
    return [token for ids in encode_rows(rows, tokenizer)["input_ids"] for token in ids]


def pad_token_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id to pad with: the tokenizer's, else its end-of-sequence token, else 0. It is masked."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(value, int):
            return value
    return 0


def load_tokenizer(
    name_or_path: str | Path, *, gguf_file: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        name_or_path: Hub name or folder of a model, a GGUF file, or the folder of a saved ladder,
            whose base's tokenizer is taken if it holds none itself.
        gguf_file: Name of a GGUF file in the folder or repository.

    Returns:
        The tokenizer.

    Raises:
        MissingFileError: If there is no such model, or it has no tokenizer.
        CheckpointError: If the tokenizer's files cannot be read.
        ConfigError: If a saved ladder names no base and holds no tokenizer.
    """
    path = Path(name_or_path).expanduser()
    name = str(path) if path.exists() else str(name_or_path)
    if path.is_file():
        return _from_pretrained(str(path.parent), gguf_file=path.name)
    if gguf_file is not None:
        return _from_pretrained(name, gguf_file=gguf_file)
    if path.is_dir() and not _holds_tokenizer(path):
        base = _base_of(path)
        if base is not None:
            return load_tokenizer(base[0], gguf_file=base[1])
    return _from_pretrained(name)


def _holds_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return any((folder / name).is_file() for name in names)


def _base_of(folder: Path) -> tuple[str, str | None] | None:
    """Name and GGUF file of a saved ladder's base; ``None`` if the folder holds no ladder."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or values.get("model_type") != "ladder":
        return None
    base = str(values.get("base_name_or_path") or "")
    if not base:
        raise ConfigError(f"{folder}: this ladder names no base and holds no tokenizer")
    beside = folder / base
    gguf_file = (values.get("base_quantization") or {}).get("gguf_file")
    return str(beside) if not Path(base).exists() and beside.exists() else base, gguf_file


def _from_pretrained(name: str, **options: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except OSError as error:
        raise MissingFileError(f"'{name}' has no tokenizer: {_line(error)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{name}': its tokenizer cannot be read: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
