"""What a training step holds at each of its stages, computed from shapes.

Nothing is run or traced. Each stage lists what lives while it takes most; the largest stage is the
peak. The lists follow the code of the frozen pass (``models/native_backbone.py``), of the side pass
(``models/ladder.py``, ``nn/block.py``, ``nn/output.py``), of the loss
(``ops/linear_cross_entropy``) and of the stores, in bytes of tensors as the live-byte meter counts
them; ``tests/memory/test_planner.py`` holds the two against each other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from ladder_kernels.memory.settings import PARTS, Settings, Stage, optimizer_bytes
from ladder_kernels.memory.sizes import FLOAT32, LadderSizes, ModelSizes
from ladder_kernels.nn.slices import token_slices

__all__ = ["step_stages"]

# Shape-independent temporaries: of int8 taps, of the output, of the gradients of downs.
_TAP_NUMBERS = 1 << 22
_OUTPUT_NUMBERS = 1 << 20
_DOWN_PARTIALS = 256 * 64 * 64 * FLOAT32
_LOSS_TOKENS, _LOSS_ROWS = 4096, 4096
_LOSS_TILE = 128
# A weight whose rows do not begin with a block is unpacked for more rows than this.
_FEW_ROWS = 16
_GATED_BACKWARD_GPU, _GATED_BACKWARD_CPU, _SMALLEST_BLOCK = 1 << 24, 1 << 21, 64
# Ids, labels, positions, places of labels and the like.
_BYTES_OF_A_TOKEN = 128


def step_stages(model: ModelSizes, ladder: LadderSizes, settings: Settings) -> list[Stage]:
    """The stages of an optimizer step, in their order.

    Args:
        model: The frozen model.
        ladder: Beside it.
        settings: How it is run.

    Returns:
        The stages; the largest is the peak.

    Raises:
        ConfigError: If the optimizer is not known.
    """
    return _Step(model, ladder, settings).stages()


class _Step:
    """The stages of one step; every number is bytes, unless it says otherwise."""

    def __init__(self, model: ModelSizes, ladder: LadderSizes, settings: Settings) -> None:
        self.model, self.ladder, self.settings = model, ladder, settings
        self.tokens = settings.tokens
        self.labelled = max(1, round(self.tokens * settings.answers))
        self.on_gpu = settings.device == "cuda"
        self.state = self.tokens * model.width * settings.element
        self.row = self.tokens * ladder.width * FLOAT32
        self.wide_row = self.tokens * model.width * FLOAT32
        self.mlp_row = self.tokens * ladder.mlp_width * FLOAT32
        self.tap = self._tap_bytes(settings.tap_dtype)
        self.rotary = self.tokens * model.head_dim * settings.element
        tensors = ladder.tensors()
        self.trained = FLOAT32 * sum(tensors)
        self.largest_trained = FLOAT32 * max(tensors, default=0)
        self.base = {
            "weights": model.blocks(settings.weights) + model.others(),
            "embeddings": model.embeddings() if settings.embeddings == "device" else 0,
            "head": model.head(),
            "ladder": self.trained,
            "optimizer": optimizer_bytes(tensors, settings.optimizer),
        }
        # Of the micro-batch at hand: gradients of those before it, and those whose taps wait.
        self.kept_gradients = 0
        self.others = 0
        self.all_gradients = self.trained
        if settings.free_gradients and settings.gradient_accumulation == 1:
            self.all_gradients = 2 * self.largest_trained
        self.recompute = settings.recompute
        self.recompute_top = settings.recompute or settings.streams

    def _tap_bytes(self, dtype: str) -> int:
        if dtype == "int8":
            return self.tokens * (self.model.width + FLOAT32)
        return self.tokens * self.model.width * (4 if dtype == "float32" else 2)

    def _stage(self, name: str, **parts: int) -> Stage:
        merged = {part: self.base.get(part, 0) + parts.get(part, 0) for part in PARTS}
        merged["transients"] += _BYTES_OF_A_TOKEN * self.tokens * self.settings.together
        return Stage(name, merged)

    def stages(self) -> list[Stage]:
        """The stages of all micro-batches that differ."""
        together, accumulation = self.settings.together, self.settings.gradient_accumulation
        stages = []
        if together > 1:
            stages += self._frozen()
        micro_batches = [(together - 1, 0)]
        if accumulation > 1:
            micro_batches.append((max(0, together - 2), self.trained))
        for self.others, self.kept_gradients in micro_batches:
            stages += self._micro_batch()
        stages.append(
            self._stage(
                "optimizer step",
                gradients=max(self.all_gradients, self.kept_gradients),
                transients=0 if self.on_gpu else 2 * self.largest_trained,
            )
        )
        return stages

    def _micro_batch(self) -> list[Stage]:
        stages = list(self._frozen()) if self.settings.together == 1 else []
        if self.ladder.rungs:
            stages += self._side()
        if self.ladder.reentry:
            stages += self._top()
        stages += self._loss()
        if self.ladder.reentry:
            stages += self._top_backward()
        if self.ladder.rungs:
            stages += self._side_backward()
        return stages

    # Products -------------------------------------------------------------------------------------

    def _workspace(self, product: str, rows: int, shape: tuple[int, int]) -> int:
        """Workspace of a product of ``rows`` rows with an NF4 weight."""
        if not self.on_gpu:
            return 0
        return _product_workspace(
            self.settings.target, product, rows, shape, self.settings.element, self.model.blocksize
        )

    def _linear(self, role: str, rows: int) -> int:
        return self._workspace("forward", rows, self.model.linears[role])

    # Taps -----------------------------------------------------------------------------------------

    @property
    def _hidden_is_a_tap(self) -> bool:
        names = {2: ("bfloat16", "float16"), 4: ("float32",)}
        same = self.settings.tap_dtype in names[self.settings.element]
        return self.ladder.stop in self.ladder.tap_layers and same

    def _kept_taps(self) -> int:
        """Taps of a micro-batch, and its last state, once the frozen pass is done."""
        if self.settings.taps == "disk" or (self.settings.taps == "host" and self.on_gpu):
            return 0
        hidden = 0 if self._hidden_is_a_tap else self.state
        return len(self.ladder.tap_layers) * self.tap + hidden

    def _read(self) -> int:
        """A tap while it is used: copies of it, and of the next one on its way."""
        decoded = self.state if self.settings.tap_dtype == "int8" else 0
        if self.settings.taps == "device" or (self.settings.taps == "host" and not self.on_gpu):
            return decoded
        if self.settings.taps == "host":
            return decoded + 2 * self.tap
        return decoded + (0 if self._reads_files_in_place else self.tap)

    @property
    def _reads_files_in_place(self) -> bool:
        """Whether states are read where a file is mapped; those of several rows are copied."""
        settings = self.settings
        return settings.taps == "disk" and not self.on_gpu and settings.batch_size == 1

    def _hidden(self) -> int:
        """The last state while it is used, beside what is kept."""
        return 0 if self._kept_taps() or self._reads_files_in_place else self.state

    # The frozen pass ------------------------------------------------------------------------------

    def _frozen(self) -> Iterator[Stage]:
        settings = self.settings
        together = settings.together
        streams = together * (self.state + self.rotary)
        waiting = self.tap if settings.taps == "host" and self.on_gpu else 0
        kept, gradients = together * self._kept_taps(), self.kept_gradients
        # While the last layer runs, what will be kept of it is not there yet.
        last = self.tap if self.ladder.stop in self.ladder.tap_layers else 0
        last += 0 if self._hidden_is_a_tap else self.state
        yield self._stage(
            "frozen pass",
            taps=max(0, kept - last) + waiting,
            transients=streams + self._block(),
            gradients=gradients,
        )
        copied = 0 if kept else max(self.tap, self.state)
        yield self._stage(
            "taps kept",
            taps=kept + waiting + copied,
            transients=streams + self._encoding(),
            gradients=gradients,
        )

    def _encoding(self) -> int:
        """Temporaries of taps in int8."""
        if self.settings.tap_dtype != "int8":
            return 0
        return 4 * FLOAT32 * min(_TAP_NUMBERS + self.model.width, self.tokens * self.model.width)

    def _block(self) -> int:
        """What a frozen block takes beside the stream."""
        model, settings = self.model, self.settings
        parts = token_slices(settings.batch_size, settings.context, settings.slice_tokens)
        longest = max(part.stop - part.start for part in parts) * settings.batch_size
        element = settings.element
        sliced = len(parts) > 1
        # Rows of a batch that is cut are apart in memory, and copied for a product.
        apart = longest * model.width * element if sliced and settings.batch_size > 1 else 0
        mlp = longest * element * model.mlp_width
        state = longest * element * model.width
        swiglu = (model.mlp_width, model.width)
        gated = state + mlp + self._workspace("gated", longest, swiglu)
        down = mlp + state + self._linear("down", longest) + apart
        if sliced and not self.on_gpu:
            keys = 2 * self.tokens * model.key_width * element
            q = longest * element * model.query_width
            own = longest * element * 2 * model.key_width
            heads = state + q + own + (q + own // 2 if model.architecture.qk_norm else 0)
            return keys + max(heads, 2 * q + state, state + q + apart, apart + gated, down)
        q = self.tokens * element * model.query_width
        k = self.tokens * element * model.key_width
        heads = self.state + q + 2 * k + (q + k if model.architecture.qk_norm else 0)
        heads += max(0, self._linear("q", self.tokens) - 2 * k, self._linear("k", self.tokens))
        sums = FLOAT32 * self.tokens * model.heads if self.on_gpu else 0
        attention = 2 * q + 2 * k + sums + self._mask(element)
        out = q + state + self._linear("o", longest) + apart
        return max(heads, attention, out, apart + gated, down)

    def _mask(self, element: int) -> int:
        """What attention among documents takes on a GPU: a mask, what it adds, repeated keys."""
        if not (self.on_gpu and self.settings.documents):
            return 0
        pairs = self.tokens * self.settings.context
        repeated = 2 * self.tokens * (self.model.query_width - self.model.key_width) * element
        return pairs * (1 + 2 * element) + repeated

    # The side pass --------------------------------------------------------------------------------

    def _rung(self, taps: int) -> int:
        """What a rung keeps for its gradients, its result included."""
        merged = self.row if taps else 0
        kept = merged + 4 * self.mlp_row + 2 * self.row
        if self.ladder.has_attention:
            kept += 5 * self.row + self.row + FLOAT32 * self.tokens * self.ladder.heads
            kept += self._scores()
            if self.on_gpu and self.settings.documents:
                kept += FLOAT32 * self.tokens * self.settings.context
        return kept

    def _scores(self) -> int:
        """Scores of the side attention where no kernel takes its heads."""
        if not self.on_gpu or self.ladder.head_dim % 4 == 0:
            return 0
        return FLOAT32 * self.tokens * self.settings.context * self.ladder.heads

    def _side_rotary(self) -> int:
        if not self.ladder.has_attention:
            return 0
        return FLOAT32 * self.tokens * self.ladder.head_dim

    def _activations(self) -> int:
        """What the side pass keeps once it has passed all rungs."""
        if self.recompute:
            return (len(self.ladder.rungs) + 1) * self.row + self._side_rotary()
        kept = self.wide_row + self.row + sum(self._rung(taps) for taps in self.ladder.rungs)
        return kept + self._side_rotary()

    def _fetched_taps(self) -> int:
        """Taps that autograd keeps on the device, where they wait elsewhere or are decoded."""
        if self.recompute:
            return 0
        if self.settings.tap_dtype == "int8":
            return sum(self.ladder.rungs) * self.state
        if self._kept_taps():
            return 0
        return sum(self.ladder.rungs) * self.tap

    def _side(self) -> Iterator[Stage]:
        """The side pass's forward half: its start, and its output."""
        kept = self._kept_taps()
        common = {"gradients": self.kept_gradients}
        # The first tap is let go once it is float32, when the next one is on its way.
        ahead = self.tap if self.settings.taps == "host" and self.on_gpu else 0
        yield self._stage(
            "start of the side pass",
            taps=self._waiting() + kept + ahead + self._hidden(),
            transients=2 * self.wide_row + self.row,
            **common,
        )
        # Without recomputation, what is inside the rungs is among the activations.
        inside = max(map(self._rung, self.ladder.rungs)) if self.recompute else 2 * self.row
        yield self._stage(
            "rungs",
            taps=self._waiting() + kept + self._read() + self._hidden() + self._fetched_taps(),
            activations=self._activations(),
            transients=inside,
            **common,
        )
        yield self._stage(
            "output of the ladder",
            taps=self._waiting() + kept + self._hidden() + self._fetched_taps(),
            activations=self._activations(),
            transients=self._output(),
            **common,
        )

    def _waiting(self) -> int:
        """Taps of the other micro-batches that had their frozen pass together with this one."""
        return self.others * self._kept_taps()

    def _selected(self) -> int:
        """Tokens for which the output is computed."""
        return self.tokens if self.ladder.reentry else self.labelled

    def _output(self) -> int:
        """What the output takes while it is computed."""
        width, tokens, element = self.model.width, self._selected(), self.settings.element
        projected = FLOAT32 * tokens * width
        result = tokens * width * element
        # The labelled tokens' states are copies; above a re-entry, all tokens are needed.
        copies = 0 if self.ladder.reentry else result + FLOAT32 * tokens * self.ladder.width
        if self.ladder.config.output == "residual":
            numbers = min(_OUTPUT_NUMBERS + width, tokens * width)
            each = FLOAT32 if element == FLOAT32 else 2 * FLOAT32 + element
            return projected + result + copies + numbers * each
        if self.ladder.config.output == "interpolate":
            return copies + 5 * projected + result
        return copies + projected + result

    # The loss -------------------------------------------------------------------------------------

    def _loss(self) -> Iterator[Stage]:
        settings, model = self.settings, self.model
        result = self.labelled * model.width * settings.element
        copied = self.state if self.ladder.reentry else 0
        block = min(self.labelled, _LOSS_TOKENS)
        workspace = 0
        if self.on_gpu:
            rows = min(_LOSS_ROWS, model.vocabulary)
            head = rows * model.width * settings.element if model.head_is_nf4 else 0
            tiles = FLOAT32 * block * -(-rows // _LOSS_TILE)
            workspace = block * model.width * (settings.element + FLOAT32)
            workspace += block * rows * settings.element + head + 2 * tiles
        kept = self._kept_taps() + self._waiting() + self._fetched_taps()
        common = {
            "taps": kept if self.ladder.rungs else self._waiting(),
            "activations": self._all_activations(),
            "gradients": self.kept_gradients,
        }
        # Before the norm, after it, and the gradient.
        yield self._stage("loss", transients=copied + 3 * result + workspace, **common)
        up = FLOAT32 * self._selected() * model.width
        yield self._stage(
            "gradient of the output",
            transients=copied + 3 * result + (up if self.ladder.rungs else 0),
            **common,
        )

    def _all_activations(self) -> int:
        side = self._activations() if self.ladder.rungs else 0
        if self.ladder.reentry:
            return side + self._top_activations()
        # The labelled tokens of the top of the side stream are copied; it is let go if recomputed.
        selected = FLOAT32 * self.labelled * self.ladder.width
        return side + selected - (self.row if self.recompute else 0)

    # Above a re-entry -----------------------------------------------------------------------------

    def _adapter_casts(self) -> int:
        """An adapter's matrices in the compute dtype, all of a block, and what lies between."""
        rank = self.ladder.config.adapter_rank
        if not rank:
            return 0
        numbers = sum(rank * (rows + columns) for rows, columns in self.model.linears.values())
        casts = numbers * self.settings.element if self.settings.element != FLOAT32 else 0
        return casts + len(self.model.linears) * rank * self.tokens * self.settings.element

    def _top_layer(self) -> int:
        """What a layer above a re-entry keeps for the gradients."""
        model, element = self.model, self.settings.element
        q = self.tokens * element * model.query_width
        k = self.tokens * element * model.key_width
        mlp = self.tokens * element * model.mlp_width
        attention = q + 2 * k + q + FLOAT32 * self.tokens * model.heads
        if model.architecture.qk_norm:
            attention += q + k
        attention += self._mask(element)
        adapted = bool(self.ladder.config.adapter_rank)
        # The stream before the attention and before the MLP; both norms' results are kept where
        # something is trained on them, or the MLP's gradient needs its input.
        states = 4 * self.state if adapted else 3 * self.state
        return states + attention + (4 * mlp if adapted else 0) + self._adapter_casts()

    def _top_activations(self) -> int:
        """What all layers above a re-entry keep."""
        if self.recompute_top:
            return self.ladder.reentry * self.state + 2 * self.rotary
        return self.ladder.reentry * self._top_layer() + 2 * self.rotary

    def _top(self) -> Iterator[Stage]:
        kept = self._kept_taps() + self._waiting() + self._fetched_taps() + self._hidden()
        side = self._activations() if self.ladder.rungs else 0
        mlp = self.tokens * self.settings.element * self.model.mlp_width
        adapted = bool(self.ladder.config.adapter_rank)
        # What a layer keeps, if it is to be run again, lives until the layer is done.
        inside = self._top_layer() if self.recompute_top and adapted else 0
        inside += 0 if adapted else mlp + 2 * self.state
        yield self._stage(
            "layers above the re-entry",
            taps=kept,
            activations=side + self._top_activations(),
            transients=inside + self.state + self._top_workspace("forward"),
            gradients=self.kept_gradients,
        )

    def _top_workspace(self, product: str) -> int:
        shapes = self.model.linears.values()
        return max(self._workspace(product, self.tokens, shape) for shape in shapes)

    def _top_backward(self) -> Iterator[Stage]:
        mlp = self.tokens * self.settings.element * self.model.mlp_width
        kept = self._kept_taps() + self._waiting() + self._fetched_taps()
        side = self._activations() if self.ladder.rungs else 0
        # What enters the layer is among the activations already.
        inside = self._top_layer() - self.state if self.recompute_top else 0
        workspace = self._top_workspace("transposed")
        if self.ladder.config.adapter_rank:
            # Where gate and up meet: what was kept of them, and their product's gradient, which is
            # the sum of two.
            moving = mlp + max(mlp, workspace) + self.state
        else:
            moving = mlp + self._gated_backward() + workspace + 2 * self.state
        yield self._stage(
            "gradient above the re-entry",
            taps=kept,
            activations=side + self._top_activations(),
            transients=inside + moving,
            gradients=max(self.kept_gradients, 2 * self.largest_trained),
        )

    def _gated_backward(self) -> int:
        """What the gradient of a fused SwiGLU takes for the tokens that it does at a time."""
        width, element = self.model.mlp_width, self.settings.element
        numbers = _GATED_BACKWARD_GPU if self.on_gpu else _GATED_BACKWARD_CPU
        rows = min(self.tokens, max(_SMALLEST_BLOCK, numbers // width))
        if self.on_gpu:
            return rows * (3 * width + 2 * self.model.width) * element
        # Both products, their derivative and its pieces; rounded numbers have copies in float32.
        return rows * (6 if element == FLOAT32 else 7) * FLOAT32 * width

    # The side pass's gradient ---------------------------------------------------------------------

    def _side_backward(self) -> Iterator[Stage]:
        kept = self._kept_taps() + self._waiting()
        gradients = max(self.kept_gradients, self.all_gradients)
        inside = max((self._rung(taps) for taps in self.ladder.rungs), default=0)
        # Beside what a rung keeps: the gradients of three products as wide as its MLP, less what is
        # done with by then, and that of the stream.
        moving = 2 * self.mlp_row + 2 * self.row
        rungs = self.ladder.rungs
        # The first one's gradient is the last to come. Between rungs of one kind, what is kept and
        # what has come change evenly: the ends have the largest.
        ends = {0, len(rungs) - 1}
        ends |= {i for i in range(1, len(rungs)) if rungs[i] != rungs[i - 1]}
        for index in sorted(ends, reverse=True):
            share = (len(rungs) - index) / len(rungs)
            if self.recompute:
                taps, activations = self._read(), (index + 1) * self.row + self._side_rotary()
                transients = inside - self.row + moving
            else:
                taps = round(self._fetched_taps() * (index + 1) / len(rungs))
                gone = sum(self._rung(taps) for taps in rungs[index + 1 :])
                activations, transients = self._activations() - gone, moving
            yield self._stage(
                f"gradient of rung {index + 1}",
                taps=kept + taps,
                activations=activations,
                transients=transients,
                gradients=max(self.kept_gradients, round(gradients * share)),
            )
        partials = _DOWN_PARTIALS + 2 * FLOAT32 * self.ladder.width * self.model.width
        yield self._stage(
            "gradient of the start",
            taps=kept,
            activations=self.row,
            transients=2 * self.wide_row + 2 * self.row + (partials if self.on_gpu else 0),
            gradients=gradients,
        )


@functools.cache
def _product_workspace(
    target: str, product: str, rows: int, shape: tuple[int, int], element: int, blocksize: int
) -> int:
    """Bytes that a GPU's product with an NF4 weight needs besides its operands and result."""
    import torch

    from ladder_kernels.ops.nf4_linear.configurations import WORKSPACE_BYTES, look_up, piece

    (N, K), most = shape, WORKSPACE_BYTES
    if K % blocksize == 0:
        dtype = torch.bfloat16 if element == 2 else torch.float32
        configuration = look_up(target, product, dtype, rows, N * K).configuration  # type: ignore[arg-type]
        most = configuration.workspace_bytes
        if configuration.way != "unpacked":
            splits = configuration.splits
            width = K if product == "transposed" else N
            return FLOAT32 * splits * rows * width if splits > 1 else 0
    elif rows <= _FEW_ROWS:
        return 0
    numbers = most // element
    if product == "gated":
        # Beside rows of a weight, both products of them.
        each = K + 2 * rows
        return element * each * piece(N, max(1, numbers // each))
    if product == "transposed":
        columns = max(1, numbers // N // blocksize) * blocksize
        return element * N * min(K, piece(K, columns))
    return element * K * piece(N, max(1, numbers // K))
