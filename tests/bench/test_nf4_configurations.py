"""The benchmark of configurations of NF4 products: what it tries, and what it prints."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bench import nf4_configurations
from bench.nf4_configurations import CANDIDATES, line_of, name_of, trials
from bench.timing import Quantiles
from ladder_kernels.audit.launches import recording
from ladder_kernels.ops.nf4_linear.configurations import TABLE, using


def seconds(median):
    return Quantiles(low=median, median=median, high=median, calls=9)


def test_candidates_are_known_to_their_product_and_have_names_of_their_own():
    for product, candidates in CANDIDATES.items():
        assert len({name_of(each) for each in candidates}) == len(candidates)
        measured = [
            row.configuration
            for row in TABLE
            if row.evidence == "measured" and product in row.products
        ]
        assert set(measured) <= set(candidates)


def test_every_candidate_launches_what_was_asked_for():
    for trial in trials([16, 2048]):
        assert trial.candidates
        for candidate in trial.candidates:
            with recording("sm_90") as launches, using(candidate):
                trial.call("meta")()
            assert launches
            if candidate.way == "fused":
                (first,) = [launch for launch in launches if "forward" in launch.name] or [
                    launch for launch in launches if "transposed" in launch.name
                ]
                assert first.constants["BLOCK_M"] == candidate.block_m
                assert first.options["num_warps"] == candidate.num_warps


def test_a_line_names_the_fastest():
    trial = next(trials([128]))
    line = line_of(trial, {"table": seconds(3e-5), "a": seconds(2e-5), "b": seconds(4e-5)})
    assert line == ["forward", "q", "128", "a", "20.0 us", "30.0 us", "b 40"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert nf4_configurations.main([]) == 0
    assert "nothing was measured" in capsys.readouterr().out
