"""The learning study from the command line; see the package.

python -m bench.learning run                  every trial that has no row yet
python -m bench.learning run tasks            those of one study
python -m bench.learning report               tables of what there is (bench.report draws it)
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from bench.learning import cost, report, results
from bench.learning.studies import PEFT, STUDIES
from bench.learning.trial import run_trial

_MEASURED = (
    PEFT, "qlora", "qlora, recomputed", "re-entry 3/4 + r16", "re-entry 1/2 + r16",
    "re-entry 1/2 + r16, recomputed",
    "re-entry 1/2", "re-entry 1/4", "ladder",
)  # fmt: skip
_CLAIMS = Path("build/learning/claims")


def main() -> None:
    """Run trials, or report those that were run."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("what", choices=["run", "report", "cost"])
    parser.add_argument("studies", nargs="*", choices=[[], *STUDIES], default=[])
    parser.add_argument("--threads", type=int, help="of this process; several share the trials")
    options = parser.parse_args()
    if options.what == "report":
        report.write(results.read())
        return
    if options.what == "cost":
        cost.measure(_MEASURED)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    for study in options.studies or STUDIES:
        for trial in STUDIES[study]():
            with results.claimed(trial, _CLAIMS) as free:
                known = {result.trial.key for result in results.read()}
                if not free or trial.key in known:
                    continue
                result = run_trial(trial)
                results.append(result)
                figures = {name: round(value, 3) for name, value in result.figures.items()}
                print(
                    f"{study}: {trial.task}, {trial.method}, {trial.base}, seed {trial.seed}, "
                    f"{trial.steps} steps of {result.seconds_per_step:.2f} s: {figures}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
