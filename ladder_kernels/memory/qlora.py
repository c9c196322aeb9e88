"""What a step of QLoRA holds: PEFT on bitsandbytes' layers in transformers, computed from shapes.

Adapters on every linear layer, their weights in float32 as PEFT makes them, no dropout, the head
in the compute dtype, AdamW. What autograd keeps of a block:

* the input of each adapter, cast to float32, one copy for each of the seven (the products with
  bitsandbytes' weights keep none); what the narrow matrix makes of it;
* what both norms read, in float32;
* gate, up and the activated gate; queries and keys after their turn, values, attention's result.

In float32 the casts are no copies: the three that read one norm's result share it. Logits are kept
in float32, and so are their logarithmic softmax and its gradient.
"""

from __future__ import annotations

from ladder_kernels.memory.settings import PARTS, Settings, Stage, optimizer_bytes
from ladder_kernels.memory.sizes import FLOAT32, ModelSizes

__all__ = ["qlora_stages"]


def qlora_stages(
    model: ModelSizes, settings: Settings, *, rank: int = 16, checkpointing: bool = False
) -> list[Stage]:
    """The stages of a step.

    Args:
        model: The frozen model; its head is not quantised.
        settings: Device, context, rows, accumulation, dtype and optimizer count; the rest is the
            ladder's.
        rank: Of the adapters.
        checkpointing: Whether blocks are recomputed in the backward pass.

    Returns:
        The stages; the largest is the peak.
    """
    tokens, element = settings.tokens, settings.element
    tensors = [
        rank * size
        for shape in model.linears.values()
        for size in shape
        for _ in range(model.layers)
    ]
    trained = FLOAT32 * sum(tensors)
    kept_gradients = trained if settings.gradient_accumulation > 1 else 0
    base = {
        "weights": model.blocks() + model.others(),
        "embeddings": model.embeddings(),
        "head": model.head(),
        "ladder": trained,
        "optimizer": optimizer_bytes(tensors, settings.optimizer),
    }

    def stage(name: str, **parts: int) -> Stage:
        return Stage(name, {part: base.get(part, 0) + parts.get(part, 0) for part in PARTS})

    block = _block(model, tokens, element, rank)
    state = tokens * model.width * element
    activations = model.layers * (state if checkpointing else block)
    mlp = tokens * model.mlp_width
    # On a GPU, a weight is dequantised as a whole for its product.
    dense = max(rows * columns for rows, columns in model.linears.values()) * element
    dense = dense if settings.device == "cuda" else 0
    # Of the largest layer: what its adapter makes, or the product that this is added to.
    product = max(mlp * FLOAT32, mlp * element + dense)
    logits = tokens * model.vocabulary * FLOAT32
    loss = FLOAT32 * tokens * model.width + state
    inside = block if checkpointing else 0
    return [
        stage(
            "forward pass",
            activations=activations,
            transients=inside + product,
            gradients=kept_gradients,
        ),
        stage(
            "loss",
            activations=activations,
            transients=loss + max(3 * logits, 2 * logits + logits * element // FLOAT32),
            gradients=kept_gradients,
        ),
        stage(
            "backward pass",
            activations=activations,
            transients=inside + product + 2 * state,
            gradients=max(kept_gradients, trained if checkpointing else trained // model.layers),
        ),
        stage("optimizer step", gradients=trained),
    ]


def _block(model: ModelSizes, tokens: int, element: int, rank: int) -> int:
    """What autograd keeps of a block."""
    width, mlp, q, k = model.width, model.mlp_width, model.query_width, model.key_width
    narrow = FLOAT32 * len(model.linears) * rank
    attention = element * (2 * q + 2 * k) + FLOAT32 * model.heads
    if model.architecture.qk_norm:
        attention += FLOAT32 * (q + k)
    if element == FLOAT32:
        return tokens * (FLOAT32 * (4 * width + 4 * mlp) + attention + narrow)
    casts = FLOAT32 * (5 * width + q + mlp)
    norms = FLOAT32 * 2 * width
    return tokens * (casts + norms + element * 3 * mlp + attention + narrow)
