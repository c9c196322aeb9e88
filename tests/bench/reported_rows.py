"""Invented rows of every kind that tables and plots are made of."""

from __future__ import annotations

from bench.rows import Row

CPU = "AMD EPYC (family 26 model 2, avx512_bf16)"
SMOL = "SmolLM2-135M-Instruct"
CONTEXTS = (512, 1024, 2048, 4096, 8192)

# tokens/s and MB beyond the weights at 2,048 tokens with the loss on each.
METHODS = {
    "ladder": (1000, 160),
    "ladder, int8 activations": (1250, 165),
    "ladder, recomputed": (940, 110),
    "ladder, kept taps": (2400, 190),
    "ladder, streamed": (640, 75),
    "ladder at every layer": (620, 300),
    "recommended ladder": (480, 900),
    "recommended ladder, recomputed": (380, 330),
    "adapters on all layers": (310, 1830),
    "adapters on all layers, recomputed": (230, 363),
    "QLoRA": (150, 7900),
    "QLoRA, checkpointed": (120, 1400),
    "QLoRA on our kernels": (290, 4000),
    "QLoRA on our kernels, checkpointed": (220, 700),
    "plain LST": (330, 2100),
    "plain QST": (300, 2500),
}


def row(bench: str, candidate: str, metric: str, median: float, **more: object) -> Row:
    about: dict[str, object] = {
        "model": SMOL, "shape": "B=1 S=2048 loss on 1 in 1", "dtype": "float32", "threads": 2,
        "device": CPU, "evidence": "measured", "versions": "torch=2.13.0", "commit": "abc1234567",
        **more,
    }  # fmt: skip
    return Row(
        bench=bench, candidate=candidate, metric=metric, median=median,
        low=0.98 * median, high=1.03 * median, **about,
    )  # type: ignore[arg-type]  # fmt: skip


def step_rows(dtype: str = "float32", device: str = CPU, model: str = SMOL) -> list[Row]:
    """Training steps by method, context and share of the tokens with a loss."""
    rows = []
    for method, (rate, megabytes) in METHODS.items():
        for context in CONTEXTS:
            for answers in (1, 10):
                about = {
                    "dtype": dtype,
                    "device": device,
                    "model": model,
                    "shape": f"B=1 S={context} loss on 1 in {answers}",
                }
                live = 1e6 * megabytes * (0.05 + 0.95 * context / 2048)
                if live > 2.2e10:
                    limit = "bytes: limit that did not suffice"
                    rows.append(row("train_step", method, limit, 2e10, **about))
                    continue
                speed = rate * (1 + 0.5 * (answers > 1)) / (0.8 + 0.2 * context / 2048)
                second = context / speed
                rows += [
                    row("train_step", method, metric, value, **about)
                    for metric, value in (
                        ("seconds", second),
                        ("seconds: forward", 0.5 * second),
                        ("seconds: backward", 0.45 * second),
                        ("seconds: optimizer", 0.05 * second),
                        ("parameters: trained", 1.12e6 if "ladder" in method else 2.44e6),
                    )
                ]
                if answers == 1:
                    rows += [
                        row("train_step", method, metric, value, **about)
                        for metric, value in (
                            ("bytes: live beyond the weights", live),
                            ("bytes: live at the peak", live + 1.7e8),
                            ("bytes: resident", 1.1 * live + 4e8),
                        )
                    ]
    rows.append(row("train_step", "QLoRA, Liger loss", "not run", 0, dtype=dtype, device=device))
    return rows


def op_rows(dtype: str = "float32") -> list[Row]:
    """Operations by shape and by who computes them, and the processor's peaks."""
    peaks = {"float32": 3e11, "bfloat16": 6e11, "int8": 9e11}
    memory, cache = 4e10, 3e11
    about = {"model": "", "shape": "", "dtype": ""}
    rows = [
        row("ops/peak", "processor", "FLOP/s", rate, **{**about, "dtype": kind})
        for kind, rate in peaks.items()
    ]
    rows.append(row("ops/peak", "processor", "bytes/s", memory, **about))
    again = "bytes/s: 1024 KiB again and again"
    rows.append(row("ops/peak", "processor", again, cache, **about))
    dense = "torch on dequantised weights"
    works = {
        ("nf4_linear", "mlp.down M=2048"): (
            250.0,
            {"cpu": 0.88, "bitsandbytes": 0.42, dense: 0.44, "reference": 0.3,
             "NumPy on dequantised weights": 0.5},
        ),
        ("nf4_linear", "attn.q, backward M=2048"): (200.0, {"cpu": 0.8, dense: 0.4}),
        ("nf4_linear", "mlp.down M=1"): (3.8, {"cpu": 0.65, "bitsandbytes": 0.02, dense: 0.1}),
        ("nf4_linear_int8", "mlp.down M=2048"): (
            250.0, {"cpu": 1.9, "exact products": 0.88, "reference": 0.2},
        ),
        ("nf4_swiglu", "mlp M=2048"): (320.0, {"cpu": 0.86, dense: 0.4}),
        ("rms_norm", "norm M=2048"): (0.6, {"cpu": 0.8, "torch": 0.2, "reference": 0.18}),
        ("rotary", "rotary M=2048"): (0.4, {"cpu": 0.9, "torch": 0.3, "reference": 0.2}),
        ("rung_merge", "rung M=2048"): (2.5, {"cpu": 0.7, "torch": 0.25}),
        ("linear_cross_entropy", "head, loss and gradient M=2048"): (
            180.0, {"cpu": 0.8, "torch": 0.3, "Liger": 0.5},
        ),
        ("ranged_attention", "attention S=2048"): (60.0, {"cpu": 0.6, "torch": 0.35}),
        ("side_mlp", "side block M=2048"): (40.0, {"cpu": 0.66, "torch": 0.4}),
    }  # fmt: skip
    for (op, shape), (intensity, shares) in works.items():
        for model, scale in (("Qwen2.5-7B", 1.0), ("SmolLM2-135M", 0.4)):
            bound = min(peaks[dtype], memory * intensity * scale)
            for who, share in shares.items():
                about = {"model": model, "shape": f"{shape} N={3584 * scale:.0f}", "dtype": dtype}
                # A small model's work takes others' caches; its share differs a little.
                rate = bound * share * (0.9 + 0.1 * scale * (who == "cpu"))
                rows += [
                    row(f"ops/{op}", who, metric, value, evidence=evidence, **about)
                    for metric, value, evidence in (
                        ("seconds", 1e10 / rate, "measured"),
                        ("share of the bound", rate / bound, "measured"),
                        ("FLOP/byte", intensity * scale, "modelled"),
                        ("FLOP/s", rate, "measured"),
                    )
                ]
    about = {"model": "Qwen2.5-7B", "shape": "mlp.down N=3584 K=18944", "dtype": dtype}
    rows += [
        row("ops/nf4_quantize", who, "seconds", value, **about)
        for who, value in (("cpu", 0.02), ("bitsandbytes", 0.1))
    ]
    return rows


def timeline_rows(dtype: str = "float32", points: int = 60) -> list[Row]:
    """What lives over a step of a ladder, and of QLoRA."""
    rows = []
    for method, megabytes in (("ladder", 160), ("QLoRA", 7900)):
        for point in range(points + 1):
            time = point / points
            tent = min(time / 0.5, (1 - time) / 0.5)
            heights = {
                "weights": 1.7e8,
                "taps": 3e7 * min(1, 2 * time) * (method == "ladder"),
                "activations": 1e6 * megabytes * tent * (method != "ladder"),
                "transients": 1e6 * megabytes * (0.4 + 0.2 * (point % 10 < 5)) * (0 < time < 0.9),
                "ladder": 5e6,
                "optimizer": 1e7,
                "gradients": 0.0,
            }
            rows += [
                row(
                    "train_step_timeline", method,
                    f"bytes: live {name} at {point}/{points} of the step", value, dtype=dtype,
                )
                for name, value in heights.items()
            ]  # fmt: skip
    return rows
