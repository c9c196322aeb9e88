"""``ladder-kernels generate``: continue a prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ladder_kernels.cli.console import Verbose, one_line
from ladder_kernels.cli.hub import go_offline_without_hub
from ladder_kernels.cli.loading import ModelOptions, load, tokenizer_of
from ladder_kernels.cli.options import flags_of, make, with_flags
from ladder_kernels.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

__all__ = ["command"]

_SAMPLING = "Sampling"


@with_flags(flags_of(ModelOptions, panels={"model": "Model"}))
def command(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; without one, or with -, it is read from stdin."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Put the prompt into the chat template, or continue it as it is. Default: chat if "
            "the tokenizer has a template.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message, for a chat.", metavar="TEXT")
    ] = None,
    ladder: Annotated[
        bool, typer.Option(help="Without it, a saved ladder is left out: the base model answers.")
    ] = True,
    stream: Annotated[
        bool, typer.Option(help="Print text as it comes, or only when it is complete.")
    ] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop at this text too (may be given several times).", metavar="TEXT"),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Divides the logits: 0 takes the likeliest token each time, and ignores the other "
            "sampling options.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0,
    top_k: Annotated[
        int,
        typer.Option(min=0, help="Only the k likeliest; 0: all.", rich_help_panel=_SAMPLING),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Only the likeliest of this sum.", rich_help_panel=_SAMPLING
        ),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Only those of this share of the likeliest one's probability.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            min=0.01, help="Above 1: against words that came before.", rich_help_panel=_SAMPLING
        ),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, help="The same seed draws the same.", rich_help_panel=_SAMPLING)
    ] = 0,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Continue a prompt with a base model or a saved ladder. Only the answer goes to stdout."""
    text = _prompt(prompt)
    of_model = make(ModelOptions, flags)
    go_offline_without_hub(of_model.model, of_model.base)

    import transformers

    model, saved = load(of_model)
    tokenizer = tokenizer_of(of_model)
    tokens = _encode(tokenizer, text, chat, system)
    if not tokens:
        raise ConfigError("prompt: found one without any token")
    limit = model.backbone.max_context
    room = max_new_tokens if limit is None else limit - len(tokens)
    if room < 1:
        raise ConfigError(
            f"prompt: found {len(tokens)} tokens; the model has a context of {limit}, which must "
            "hold the answer too"
        )

    options: dict[str, Any] = {
        "max_new_tokens": min(max_new_tokens, room),
        "do_sample": temperature > 0,
        "repetition_penalty": repetition_penalty,
        "num_beams": 1,
    }
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    else:
        # Else those of the model's own generation_config.json count, and are warned about.
        options |= {"temperature": None, "top_k": None, "top_p": None, "min_p": None}
    if stop:
        options |= {"stop_strings": stop, "tokenizer": tokenizer}
    if stream:
        options["streamer"] = transformers.TextStreamer(
            tokenizer, skip_prompt=True, skip_special_tokens=True
        )
    transformers.set_seed(seed)
    answer = _generate(model, tokens, options, ladder=ladder and saved)
    if not stream:
        print(tokenizer.decode(answer[len(tokens) :], skip_special_tokens=True))


def _prompt(argument: str | None) -> str:
    text = argument
    if text is None and sys.stdin.isatty():
        raise ConfigError(
            "prompt: found none; give it as an argument, or through a pipe: "
            "echo 'your prompt' | ladder-kernels generate ..."
        )
    if text is None or text == "-":
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise DataError(f"prompt: stdin is not text in {error.encoding}") from None
    if not text.strip():
        raise ConfigError("prompt: found an empty one")
    return text


def _encode(tokenizer: Any, text: str, chat: bool | None, system: str | None) -> list[int]:
    """Token ids of the prompt, in the chat template unless it is raw."""
    if chat is None:
        chat = tokenizer.chat_template is not None
    if not chat:
        if system is not None:
            raise ConfigError("system: only a chat has a system message, and this prompt is raw")
        return tokenizer(text)["input_ids"]
    if tokenizer.chat_template is None:
        raise ConfigError("chat: the model's tokenizer has no chat template; use --raw")
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # whatever the template's own code raises
        raise ConfigError(f"chat: the template refuses these messages: {one_line(error)}") from None
    # The template writes the special tokens itself.
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def _generate(
    model: Any, tokens: list[int], options: dict[str, Any], *, ladder: bool
) -> torch.Tensor:
    """The whole sequence, ``[S]``: prompt and answer."""
    import contextlib

    import torch

    input_ids = torch.tensor([tokens], device=model.device)
    with contextlib.nullcontext() if ladder else model.disable_ladder():
        return model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options
        )[0]
