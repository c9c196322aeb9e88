"""Tables, plots and cited figures: made of rows and of nothing else, and checked against them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from bench import methods, plots, rows
from bench.plots import METHODS, OPERATORS, THEMES
from bench.report import pictures
from bench.report.__main__ import main
from bench.report.blocks import Block, blocks, rewritten
from bench.report.learned import StudyPlot
from bench.report.select import HELD_TO_AVX2, PROCESSOR, Source, provenance, tokens
from bench.report.specs import PLOTS, TABLES
from bench.report.tables import Column, Line, Table, duration, seconds, times
from ladder_kernels.errors import ConfigError
from tests.bench.reported_rows import CPU, SMOL, op_rows, row, step_rows, timeline_rows

AVX2 = f"{CPU}, held to AVX2"
DRAWN = [name for name in PLOTS if not name.endswith("-bfloat16")]


@pytest.fixture
def results(monkeypatch, tmp_path):
    folder = tmp_path / "results"
    monkeypatch.setattr(rows, "RESULTS", folder)
    return folder


@pytest.fixture
def written(results):
    rows.write(step_rows(), "train_step.csv")
    rows.write(op_rows(), "ops.csv")
    rows.write(timeline_rows(points=20), "timeline.csv")
    return results


def lines_of(name):
    """Cells by the first one of each line."""
    found = {}
    for line in TABLES[name].text().splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found[cells[0]] = cells[1:]
    return found


def tiny(**more):
    source = Source(file="tiny.csv", command="python -m bench.tiny", **more)
    lines = [Line((name,), {"candidate": name}) for name in ("a", "b")]
    return Table(
        name="tiny", source=source, lines=lines, columns=[Column(header="a step", text=seconds)]
    )


# Tables


def test_train_step(written):
    found = lines_of("train-step-float32")
    assert list(found)[1:] == list(METHODS)
    assert found["ladder"] == [
        "1.12 M", "1,000", "1,500", "6.7x", "6.7x", "1.02 / 0.92 / 0.10 s", "160 MB", "576 MB",
    ]  # fmt: skip
    assert found["QLoRA, checkpointed"][3] == "0.80x"
    text = TABLES["train-step-float32"].text()
    assert text.endswith(
        "<sub>Measured by `python -m bench.train_step --dtype float32 bfloat16 --answers 1 10` on "
        f"{CPU}, 2 threads; commit abc1234567.</sub>"
    )


def test_best_of_the_rivals(written):
    faster = row("train_step", "QLoRA, Liger loss", "seconds", 4.096)
    rows.write([faster], "train_step.csv")
    assert lines_of("train-step-float32")["ladder"][3] == "2.0x"
    assert lines_of("comparison")["tokens/s, fp32: ladder against the best QLoRA"][0] == "2.0x"


def test_comparison(written):
    found = lines_of("comparison")
    assert found["bytes beyond the weights, fp32: QLoRA, checkpointed against ladder"] == [
        "8.8x", "",
    ]  # fmt: skip
    assert found["tokens/s, fp32: ladder, kept taps against the best QLoRA"][0] == "16.0x"
    assert "tokens/s, bf16: ladder against the best QLoRA" not in found  # no row, no line


def test_contexts_and_a_run_that_did_not_fit(written):
    speed, memory = lines_of("contexts-speed-float32"), lines_of("contexts-memory-float32")
    assert speed["tokens/s at a context of"] == ["512", "1,024", "2,048", "4,096", "8,192"]
    assert speed["QLoRA"] == ["176", "167", "150", "125", "over 20 GB"]
    assert memory["QLoRA"][-2:] == ["15,405 MB", "over 20 GB"]
    assert not TABLES["contexts-speed-float32"].missing()


def test_not_run_is_no_figure(written):
    cells = lines_of("train-step-float32")["QLoRA, Liger loss"]
    assert cells[:4] == ["not run", "not run", "", ""]


def test_missing_rows_are_empty_and_said(written):
    assert TABLES["train-step-float32"].missing() == [
        "table train-step-float32: train_step.csv has no row for QLoRA, Liger loss: "
        "tokens/s, loss on 1 in 10; against QLoRA, 1 in 10."
    ]
    assert list(lines_of("train-step-bfloat16")) == ["method"]  # its header
    assert "| ladder |" not in TABLES["train-step-bfloat16"].text()
    assert "| ladder |" in TABLES["train-step-float32"].text()
    assert len(TABLES["train-step-bfloat16"].missing()) == len(METHODS)
    last = TABLES["train-step-bfloat16"].text().splitlines()[-1]
    assert last.startswith("<sub>No rows yet: `python -m bench.train_step")
    assert last.endswith("` measures them.</sub>")
    assert TABLES["ops-bfloat16"].missing() == ["table ops-bfloat16: ops.csv has no rows for it."]


def test_operations(written):
    found = TABLES["ops-float32"].text()
    dense = "torch on dequantised weights"
    assert (
        f"| nf4_linear, backward | 2,048 | 75 % to 80 % | 2.1x to 2.2x {dense} |\n"
        f"| nf4_linear | 1 | 61 % to 65 % | 6.8x to 7.2x {dense}, 33.9x to 36.1x bitsandbytes |\n"
        "| nf4_linear_int8 | 2,048 | 179 % to 190 % | "
        "2.3x to 2.4x our exact products, 9.9x to 10.6x our reference |" in found
    )
    assert "| nf4_quantize |  |  | 5.0x bitsandbytes |" in found
    assert "ops/peak" not in found
    assert not TABLES["ops-float32"].missing()


def test_operations_of_many_tokens_against_named_rivals(written):
    found = lines_of("ops")
    assert {cells[0] for cells in found.values()} == {"tokens", "2,048", ""}
    header = found["operation"]
    cells = dict(zip(header, found["nf4_linear, backward"], strict=True))
    assert cells["against PyTorch, fp32"] == "2.1x to 2.2x"
    assert cells["against bitsandbytes, fp32"] == ""
    assert cells["against PyTorch, bf16"] == ""  # no rows of it
    cells = dict(zip(header, found["nf4_quantize"], strict=True))
    assert cells["against bitsandbytes, fp32"] == "5.0x"


def test_every_operation(written):
    found = TABLES["every-op-float32"].text()
    assert (
        "| nf4_linear | Qwen2.5-7B: mlp.down M=2048 N=3584 | 37.9 ms | 88 % | "
        "2.0x NumPy on dequantised weights, 2.2x torch on dequantised weights, "
        "2.3x bitsandbytes, 3.3x our reference |" in found
    )
    assert not TABLES["every-op-float32"].missing()


def test_machines_are_not_mixed(results):
    held = [row("tiny", name, "seconds", 4.0, device=AVX2) for name in "ab"]
    rows.write([row("tiny", "a", "seconds", 1.0), *held], "tiny.csv")
    table = tiny(machine=PROCESSOR)
    assert table.text().splitlines()[2:4] == ["| a | 1.00 s |", "| b |  |"]
    assert table.missing() == ["table tiny: tiny.csv has no row for b: a step."]
    assert tiny(machine=HELD_TO_AVX2).text().splitlines()[2:4] == [
        "| a | 4.00 s |",
        "| b | 4.00 s |",
    ]


def test_the_machine_with_the_most_rows_and_of_those_the_later(results):
    other = "AMD EPYC (family 25 model 17, avx512_bf16)"
    rows.write([row("tiny", "a", "seconds", 1.0), row("tiny", "a", "seconds", 2.0, device=other)],
               "tiny.csv")  # fmt: skip
    assert "| a | 2.00 s |" in tiny().text()
    rows.write([row("tiny", "b", "seconds", 3.0)], "tiny.csv")
    assert "| a | 1.00 s |" in tiny().text()
    rows.write([row("tiny", name, "seconds", 9.0, threads=1) for name in "abc"], "tiny.csv")
    assert "| a | 9.00 s |" in tiny().text()


def test_what_was_not_measured_is_no_measurement(results):
    modelled = row("tiny", "a", "seconds", 1.0, evidence="modelled")
    rows.write([modelled], "tiny.csv")
    assert "| a |  |" in tiny().text()
    assert "Modelled by" in tiny(evidence=("modelled",)).text()


def test_two_rows_for_one_cell(results):
    rows.write([row("tiny", "a", "seconds", 1.0, dtype=name) for name in ("x", "y")], "tiny.csv")
    with pytest.raises(ConfigError, match=r"tiny.csv: 2 rows have .*'candidate': 'a'"):
        tiny().text()
    assert "| a | 1.00 s |" in tiny(where={"dtype": "x"}).text()


def test_texts_of_figures():
    took = [row("x", "a", "seconds", value) for value in (12.34, 0.01234, 0.00001234)]
    assert [duration(each) for each in took] == ["12.3 s", "12.3 ms", "12.3 µs"]
    assert [times(x) for x in (0.8, 1.0, 1.49, 1.5, 12.34, 123.4)] == [
        "0.80x", "1.00x", "1.49x", "1.5x", "12.3x", "123x",
    ]  # fmt: skip
    assert tokens(row("x", "a", "seconds", 1.0, shape="B=4 S=512 loss on 1 in 10")) == 2048
    with pytest.raises(ConfigError, match="S="):
        tokens(row("x", "a", "seconds", 1.0, shape="M=1"))


def test_provenance_names_every_commit_and_machine():
    gpu = row("x", "a", "seconds", 1.0, device="NVIDIA H100 80GB HBM3", commit="b+", threads=4)
    here = row("x", "a", "seconds", 1.0, commit="a", threads=1)
    assert provenance("make bench", [gpu, here]) == (
        f"Measured by `make bench` on NVIDIA H100 80GB HBM3 and {CPU}, 1 thread; commits a, b+."
    )


@pytest.mark.parametrize(
    "name",
    ["gpu-step", "gpu-memory", "smallest", "tap-cache", "quantization", "planner", "learned"],
)
def test_rows_of_the_repository_fill_their_tables(name):
    assert TABLES[name].missing() == []
    assert "commit" in TABLES[name].text()


def test_costs_of_the_learning_study_leave_out_what_another_machine_timed():
    cost = TABLES["learning-cost"]
    assert cost.cited("recommended ladder, gradient checkpointing", "trained") == "3.02 M"
    assert cost.cited("recommended ladder, gradient checkpointing", "memory beyond the base")
    with pytest.raises(ConfigError, match="no row for recommended ladder, gradient checkpoint"):
        cost.cited("recommended ladder, gradient checkpointing", "a step")


def test_means_over_seeds():
    found = lines_of("learned")
    docstrings = "docstrings, perplexity of the answers (lower is better)"
    assert found[docstrings][:2] == ["43.5", "16.1 ± 0.1"]
    assert found[docstrings][-1] == "23.2 (one seed)"
    glosses = "WordNet glosses to 25 classes, accuracy"
    assert found[glosses][:3] == ["", "74.0 % ± 0.8", "not run: ahead already"]
    line = "docstrings/docstrings, calibrated, qlora, 40 steps, rates x 1"
    assert TABLES["trials"].cited(line, "perplexity") == "16.14 ± 0.10"
    with pytest.raises(ConfigError, match=r"no row for .*, accuracy"):
        TABLES["trials"].cited(line, "accuracy")


# Blocks of a page

PAGE = f"""# Title

Words before. The ladder makes <!-- figure: train-step-float32 > ladder > tokens/s -->?<!-- end --> tokens/s.

<!-- table: train-step-float32 -->
old
<!-- end -->

Words between.

<!-- plot: frontier-float32 --><!-- end -->

Last words about {SMOL}.
"""  # noqa: E501


@pytest.fixture
def page(monkeypatch, tmp_path):
    path = tmp_path / "PAGE.md"
    path.write_text(PAGE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return path


def test_update_and_check(written, page, capsys):
    assert main(["--check", str(page)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "PAGE.md: the figure train-step-float32 > ladder > tokens/s differs from the rows.",
        "PAGE.md: the table train-step-float32 differs from the rows.",
        "PAGE.md: the plot frontier-float32 differs from the rows.",
        "PAGE.md: the files of the plot frontier-float32 are not of these rows.",
    ]
    assert page.read_text(encoding="utf-8") == PAGE
    assert main([str(page)]) == 0
    said = capsys.readouterr().out
    assert "has no row for QLoRA, Liger loss" in said
    assert "frontier-float32-dark.png written" in said
    assert "PAGE.md: rewritten" in said
    new = page.read_text(encoding="utf-8")
    assert "> tokens/s -->1,000<!-- end --> tokens/s." in new
    assert TABLES["train-step-float32"].text() in new
    assert 'srcset="results/frontier-float32-dark.png"' in new
    assert "python -m bench.report" in new
    rest = [line for line in PAGE.splitlines() if "ords" in line and "figure" not in line]
    assert [line for line in new.splitlines() if line in rest] == rest
    assert main(["--check", str(page)]) == 0
    assert main([str(page)]) == 0
    assert page.read_text(encoding="utf-8") == new
    assert not list(page.parent.glob("*.new"))


def test_a_newer_row_is_noticed_everywhere(written, page, capsys):
    main([str(page)])
    rows.write([row("train_step", "ladder", "seconds", 1.024)], "train_step.csv")
    capsys.readouterr()
    assert main(["--check", str(page)]) == 1
    assert capsys.readouterr().out.count("PAGE.md:") == 3  # the plot's block says nothing of it
    main([str(page)])
    assert main(["--check", str(page)]) == 0
    assert "-->2,000<!-- end --> tokens/s" in page.read_text(encoding="utf-8")


def test_an_edited_figure_is_noticed(written, page, capsys):
    main([str(page)])
    page.write_text(page.read_text(encoding="utf-8").replace("-->1,000<", "-->1,001<"))
    capsys.readouterr()
    assert main(["--check", str(page)]) == 1
    assert "figure train-step-float32 > ladder > tokens/s differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- table: none -->\n<!-- end -->", "there is no table 'none'; there are comparison"),
        ("<!-- plot: none -->\n<!-- end -->", "there is no plot 'none'"),
        ("a <!-- figure: x -->1<!-- end -->", "'TABLE > LINE > COLUMN', not as 'x'"),
        ("a <!-- figure: comparison > x > y -->1<!-- end -->", "table comparison has no line 'x'"),
        ("a <!-- figure: train-step-float32 > ladder > y -->1<!-- end -->", "has no column 'y'"),
        (
            "a <!-- figure: train-step-bfloat16 > ladder > tokens/s -->1<!-- end -->",
            "train-step-bfloat16 has no row for ladder, tokens/s",
        ),
        (" <!-- figure: comparison > x > y -->1<!-- end -->", "begins a line"),
        ("<!-- table: gpu-step -->\n", "the last block does not end"),
        ("<!-- table: a -->\n<!-- table: b -->\n<!-- end -->", "'table: a' does not end"),
    ],
)
def test_wrong_blocks(written, page, capsys, text, said):
    page.write_text(f"Words.\n\n{text}\n", encoding="utf-8")
    for arguments in (["--check", str(page)], [str(page)]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert page.read_text(encoding="utf-8") == f"Words.\n\n{text}\n"


def test_blocks_and_nothing_else_are_replaced():
    text = "a <!-- figure: x > y -->1<!-- end --> b\n<!-- table: t -->\nold\n<!-- end -->\nc\n"
    assert blocks(text) == [Block("figure", "x > y", "1"), Block("table", "t", "\nold\n")]
    new = rewritten(text, lambda block: block.name.upper())
    assert new == (
        "a <!-- figure: x > y -->X > Y<!-- end --> b\n<!-- table: t -->\n\nT\n\n<!-- end -->\nc\n"
    )


def test_list_and_show(written, capsys):
    assert main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"table {name}: " in said for name in TABLES)
    assert all(f"plot {name}: " in said for name in PLOTS)
    assert main(["--show", "comparison"]) == 0
    assert TABLES["comparison"].text() in capsys.readouterr().out
    assert main(["--show", "roofline-bfloat16"]) == 0
    assert "ops.csv has not the rows for it; nothing was drawn" in capsys.readouterr().out
    assert main(["--show", "none"]) == 2


def test_the_pages_are_as_the_rows_are(capsys):
    assert main(["--check"]) == 0, capsys.readouterr()


# Plots


def texts_of(figure):
    """What is written in a figure, and where."""
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in itertools.chain.from_iterable((axes, *axes.child_axes) for axes in figure.axes):
        found += [axes.xaxis.label, axes.yaxis.label, axes._left_title, *axes.texts]
        for legend in axes.findobj(Legend):
            found += [legend.get_title(), *legend.get_texts()]
        for axis in (axes.xaxis, axes.yaxis):
            found += [tick.label1 for tick in axis._update_ticks() if tick.label1.get_visible()]
    renderer = figure.canvas.get_renderer()
    # An annotation's own extent has its arrow in it.
    return [(each, Text.get_window_extent(each, renderer)) for each in found if each.get_text()]


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def share_of(colour, pixels):
    wanted = np.round(255 * np.array(to_rgb(colour))).astype(int)
    return (np.abs(pixels.astype(int) - wanted).max(axis=-1) <= 2).mean()


@pytest.mark.parametrize("name", DRAWN)
def test_plots_are_drawn_for_both_pages(written, name):
    plot = PLOTS[name]
    assert not pictures.is_of(plot, written)
    files = pictures.write(plot, written)
    assert [file.name for file in files] == [f"{name}-light.png", f"{name}-dark.png"]
    assert pictures.is_of(plot, written)
    drawn = {
        "Timeline": [plots.CATEGORIES[each] for each in ("weights", "activations", "transients")],
        "Roofline": [OPERATORS[each].colour for each in ("cpu", "bitsandbytes", "torch")],
        "StudyPlot": [METHODS[each].colour for each in ("recommended ladder",)],
    }.get(type(plot).__name__, [METHODS[each].colour for each in ("ladder", "QLoRA")])
    for file, theme in zip(files, THEMES, strict=True):
        pixels = pixels_of(file)
        assert pixels.shape == (round(200 * plot.size[1]), round(200 * plot.size[0]), 3)
        assert 0.2 < share_of(theme.paper, pixels) < 0.99
        assert share_of(theme.ink, pixels) > 0.002
        for colour in drawn:
            assert share_of(colour, pixels) > 0.0002


@pytest.mark.parametrize("name", DRAWN)
def test_plots_can_be_read(written, name):
    plot = PLOTS[name]
    for theme in THEMES:
        figure = plots.make(plot.size, theme, plot.draw)
        figure.canvas.draw()
        texts = texts_of(figure)
        for text, box in texts:
            assert figure.bbox.x0 <= box.x0, text
            assert box.x1 <= figure.bbox.x1, text
            assert figure.bbox.y0 <= box.y0, text
            assert box.y1 <= figure.bbox.y1, text
            assert to_rgb(text.get_color()) == to_rgb(theme.ink)
            assert text.get_fontsize() >= 8
        for (one, first), (other, second) in itertools.combinations(texts, 2):
            common = Bbox.intersection(first, second)
            assert common is None or min(common.width, common.height) < 1, (one, other)
        axes = figure.axes[0]
        assert axes.get_ylabel() in (
            "tokens/s", "GFLOP/s", "live bytes of tensors, GB", "live bytes beyond the weights, GB",
            "held-out perplexity of the answers", "loss, nats",
        )  # fmt: skip
        assert axes.get_xlabel() in (
            "context, tokens (batch 1)", "live bytes of tensors at the peak of the step, GB",
            "share of the step's time, %", "arithmetic intensity, FLOP/byte",
            "time, in steps of QLoRA on the same kernels", "trained parameters, millions",
        )  # fmt: skip
        if not isinstance(plot, StudyPlot):
            assert plot.title in [text.get_text() for text, _ in texts]


def test_lines_hold_what_was_measured(written):
    figure = plots.make((8, 5), THEMES[0], PLOTS["memory-context-float32"].draw)
    lines = {line.get_color(): line for line in figure.axes[0].lines if line.get_linestyle() == "-"}
    ladder, qlora = (lines[METHODS[name].colour] for name in ("ladder", "QLoRA"))
    assert list(ladder.get_xdata()) == [512, 1024, 2048, 4096, 8192]
    assert ladder.get_ydata()[2] == pytest.approx(0.160)
    assert list(qlora.get_xdata()) == [512, 1024, 2048, 4096]
    said = [text.get_text() for text in figure.texts]
    assert said == ["Did not fit: QLoRA at 8,192 tokens in 20 GB"]


def test_a_single_context_is_no_line(results):
    once = [row for row in step_rows() if "S=2048" in row.shape or row.candidate == "ladder"]
    rows.write(once, "train_step.csv")
    assert {row.candidate for row in PLOTS["speed-context-float32"].rows()} == {"ladder"}


def test_frontier_goes_through_what_nothing_beats(written):
    figure = plots.make((8, 5), THEMES[0], PLOTS["frontier-float32"].draw)
    corners = figure.axes[0].lines[0]
    best = {"ladder, streamed": 640, "ladder, recomputed": 940, "ladder": 1000,
            "ladder, int8 activations": 1250, "ladder, kept taps": 2400}  # fmt: skip
    assert sorted(set(np.round(corners.get_ydata()))) == sorted(best.values())


def test_magnified_only_what_is_small(written):
    figure = plots.make((8, 4.4), THEMES[0], PLOTS["timeline-float32"].draw)
    left, right = figure.axes
    assert (len(left.child_axes), len(right.child_axes)) == (1, 0)
    assert left.get_ylim() == right.get_ylim()
    assert left.child_axes[0].get_ylim()[1] < left.get_ylim()[1] / 4
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["weights", "taps", "activations", "ladder", "optimizer", "transients"]


def test_a_roof_for_each_kind_of_product_and_of_memory(written):
    figure = plots.make((8, 5.6), THEMES[0], PLOTS["roofline-float32"].draw)
    said = [text.get_text() for text in figure.axes[0].texts]
    assert said == [
        "40 GB/s from memory", "300 GB/s from caches", "300 GFLOP/s", "900 GFLOP/s int8",
    ]  # fmt: skip
    exact = [each for each in op_rows("bfloat16") if not each.bench.endswith("int8")]
    rows.write([each for each in exact if "KiB" not in each.metric], "ops.csv")
    drawn = PLOTS["roofline-bfloat16"].rows()
    assert {each.median for each in drawn if each.bench == "ops/peak"} == {4e10, 3e11, 6e11}
    assert {each.model for each in drawn if each.bench != "ops/peak"} == {"Qwen2.5-7B"}
    assert "Measured and modelled by" in pictures.block(PLOTS["roofline-bfloat16"], "x")


def test_no_roof_no_plot(results):
    rows.write([each for each in op_rows() if each.metric != "bytes/s"], "ops.csv")
    assert PLOTS["roofline-float32"].rows() == []


def test_no_rows_no_plot(results):
    for plot in PLOTS.values():
        if isinstance(plot, StudyPlot):  # whose results are elsewhere
            continue
        assert plot.rows() == []
        assert pictures.block(plot, "results").startswith("<sub>No rows yet: `python -m bench.")


def test_every_method_looks_different():
    assert METHODS.keys() == methods.METHODS.keys()
    assert len({(mark.colour, mark.marker) for mark in METHODS.values()}) == len(METHODS)
    assert len({mark.colour for mark in OPERATORS.values()}) == len(OPERATORS)


@given(
    wanted=st.lists(st.floats(0, 1), min_size=1, max_size=16).map(sorted),
    gap=st.floats(0.01, 0.1),
)
def test_labels_keep_their_distance_and_order(wanted, gap):
    places = plots._spread(wanted, gap)
    assert all(after - before > gap - 1e-9 for before, after in itertools.pairwise(places))
    far = [after - before >= gap for before, after in itertools.pairwise(wanted)]
    if all(far):
        assert places == pytest.approx(wanted)
    assert sum(places) == pytest.approx(sum(wanted))
