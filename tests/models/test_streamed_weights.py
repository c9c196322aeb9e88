"""Weights that are read layer by layer while a model runs: the same bits as resident ones."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ladder_kernels import LadderConfig, LadderForCausalLM
from ladder_kernels.errors import (
    CheckpointError,
    ConfigError,
    MissingFileError,
    UnsupportedModelError,
)
from ladder_kernels.memory import streaming
from ladder_kernels.memory.ledger import is_file_mapped
from ladder_kernels.memory.streaming import LayerFiles
from ladder_kernels.memory.tensor_file import TensorFile
from ladder_kernels.memory.tracing import fake_cuda
from ladder_kernels.models.backbone import Backbone
from ladder_kernels.models.frozen_pass import FrozenInput
from ladder_kernels.models.loading import (
    backbone_from_config,
    backbone_from_transformers,
    load_backbone,
)
from ladder_kernels.models.native_backbone import NativeBackbone
from ladder_kernels.models.weights import DigestsTakenWarning
from ladder_kernels.nf4 import NF4Weight
from ladder_kernels.nn.attention import SequenceLayout

FAMILIES = ("llama", "qwen3", "smollm3")
LADDERS = {
    "lst": LadderConfig.lst(reduction=4),
    "re-entry": LadderConfig.lst(reduction=4, reentry=2, adapter_rank=3),
    "all": LadderConfig.adapters(reentry=5, rank=4),
}
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0


@pytest.fixture(scope="module")
def folder_of(
    make: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A folder of packed weights of five layers; "smollm3" has tied embeddings."""
    made: dict[Any, Path] = {}

    def get(family: str = "llama", **options: Any) -> Path:
        key = (family, *sorted(options.items()))
        if key not in made:
            layers = {"num_hidden_layers": 5}
            if family == "smollm3":
                layers |= {"no_rope_layers": [1, 0, 1, 0, 1], "layer_types": ["full_attention"] * 5}
            made[key] = tmp_path_factory.mktemp("packed") / family
            backbone = backbone_from_transformers(make(family, **layers), **options)
            backbone.save_pretrained(made[key])
        return made[key]

    return get


def both(folder: Path, **options: Any) -> tuple[Backbone, NativeBackbone]:
    streamed = load_backbone(folder, weights="streamed", **options)
    assert isinstance(streamed, NativeBackbone)
    return load_backbone(folder, **options), streamed


def damage(path: Path, key: str) -> None:
    """Change one byte of a tensor in a file."""
    entry = TensorFile(path).entries[key]
    with path.open("r+b") as file:
        file.seek(entry.offset + entry.nbytes // 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))


def storage_bytes(backbone: Backbone) -> int:
    """Bytes of all memory that a backbone's buffers lie in, each counted once, mapped ones not."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in backbone.buffers()
        if not is_file_mapped(tensor)
    }
    return sum(storages.values())


def passes(backbone: Backbone, *, activations: str = "exact", stop: int | None = None) -> Any:
    layouts = [
        SequenceLayout.build(2, 12, attention_mask=MASK),
        SequenceLayout.build(1, 9),
    ]
    inputs = [
        FrozenInput(tokens, layout)
        for tokens, layout in zip((IDS, IDS[:1, :9]), layouts, strict=True)
    ]
    return backbone.frozen_passes(
        inputs, tap_layers=range((stop or 5) + 1), activations=activations, stop=stop
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize_head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_pass_has_the_same_bits(
    folder_of: Any, family: str, quantize_head: bool, dtype: torch.dtype
) -> None:
    folder = folder_of(family, quantize_head=quantize_head, dtype=dtype, blocksize=32)
    resident, streamed = both(folder, quantize_head=quantize_head, dtype=dtype)
    assert (resident.streams, streamed.streams) == (False, True)
    assert streamed.fingerprint == resident.fingerprint
    assert (streamed.dtype, streamed.device) == (resident.dtype, resident.device)
    assert streamed.num_parameters() == resident.num_parameters()
    assert streamed.nf4_bytes() == resident.nf4_bytes()
    assert streamed.float_linears() == resident.float_linears()
    for activations in ("exact", "int8"):
        for stop in (5, 2, 5):
            ours = passes(streamed, activations=activations, stop=stop)
            for mine, theirs in zip(
                ours, passes(resident, activations=activations, stop=stop), strict=True
            ):
                assert torch.equal(mine.hidden, theirs.hidden)
                assert all(torch.equal(mine.taps[t], theirs.taps[t]) for t in theirs.taps)
                assert torch.equal(streamed.logits(mine.hidden), resident.logits(theirs.hidden))


def test_nothing_is_held_but_two_layers(folder_of: Any) -> None:
    """Embeddings and a float head in the file's dtype are pages of the file."""
    resident, streamed = both(folder_of())
    passes(streamed)
    layer = resident.nf4_bytes() / resident.num_layers
    assert is_file_mapped(streamed.embedding)
    assert isinstance(streamed.head, torch.Tensor)
    assert is_file_mapped(streamed.head)
    floats = sum(t.nbytes for _, t in resident.named_weights() if isinstance(t, torch.Tensor))
    floats -= resident.embedding.nbytes + resident.head.nbytes
    assert storage_bytes(streamed) <= 2.5 * layer + 2 * floats
    assert storage_bytes(resident) > 5 * layer
    on_device = load_backbone(folder_of(), weights="streamed", embeddings="device")
    assert not is_file_mapped(on_device.embedding)
    assert torch.equal(passes(on_device)[0].hidden, passes(resident)[0].hidden)


def test_embeddings_on_the_host_alone(folder_of: Any) -> None:
    resident = load_backbone(folder_of())
    model = load_backbone(folder_of(), embeddings="host")
    assert is_file_mapped(model.embedding)
    assert not model.streams
    assert model.fingerprint == resident.fingerprint
    assert torch.equal(passes(model)[1].hidden, passes(resident)[1].hidden)
    narrow, wide = (
        load_backbone(folder_of(), dtype=torch.bfloat16, embeddings=place)
        for place in ("host", "device")
    )
    assert narrow.embedding.dtype == torch.float32
    assert torch.equal(passes(narrow)[0].taps[0], passes(wide)[0].taps[0])
    assert torch.equal(passes(narrow)[0].hidden, passes(wide)[0].hidden)
    rows = [
        LadderForCausalLM.from_backbone(each, LADDERS["lst"]).get_input_embeddings()(IDS)
        for each in (narrow, wide)
    ]
    assert torch.equal(*rows)


def trained_step(model: LadderForCausalLM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.add_(noise.to(parameter.device))
    model.train()
    model.zero_grad()
    loss: Any = sum(
        model(ids.to(model.device), attention_mask=mask, labels=ids.to(model.device)).loss
        for ids, mask in ((IDS, MASK.to(model.device)), (IDS[:, :7], None))
    )
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_have_the_same_bits(folder_of: Any, family: str, ladder: str) -> None:
    """Layers above a re-entry are brought again, downwards, in the backward pass."""
    results = []
    for backbone in both(folder_of(family)):
        model = LadderForCausalLM.from_backbone(backbone, LADDERS[ladder])
        first = trained_step(model)
        results.append((first, trained_step(model)))
    for (loss, gradients), (other, theirs) in zip(*results, strict=True):
        assert torch.equal(loss, other)
        assert gradients.keys() == theirs.keys()
        assert gradients
        for name, gradient in gradients.items():
            assert torch.equal(gradient, theirs[name]), name


@pytest.mark.parametrize("ladder", ["lst", "re-entry"])
def test_it_generates_the_same(folder_of: Any, ladder: str) -> None:
    texts, logits = [], []
    for backbone in both(folder_of()):
        model = LadderForCausalLM.from_backbone(backbone, LADDERS[ladder])
        texts.append(model.generate(IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False))
        with torch.no_grad():
            logits.append(model(IDS, attention_mask=MASK).logits)
    assert torch.equal(*texts)
    assert torch.equal(*logits)


def test_saved_ladders_find_their_base(folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of()
    model = LadderForCausalLM.from_pretrained(folder, ladder=LADDERS["lst"], weights="streamed")
    assert model.backbone.placement.weights == "streamed"
    trained_step(model)
    model.save_pretrained(tmp_path / "ladder")
    for options in ({}, {"weights": "streamed"}, {"base": model.backbone}):
        again = LadderForCausalLM.from_pretrained(tmp_path / "ladder", **options)
        assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_a_streamed_backbone_can_be_saved_and_initialise_a_ladder(
    folder_of: Any, tmp_path: Path
) -> None:
    resident, streamed = both(folder_of())
    streamed.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    first = load_file(folder_of() / "model.safetensors")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    config = LadderConfig.lst(reduction=4, init="pruned")
    ladders = [LadderForCausalLM.from_backbone(each, config) for each in (resident, streamed)]
    for one, two in zip(*(model.parameters() for model in ladders), strict=True):
        assert torch.equal(one, two)


def test_each_layer_is_read_once_a_pass(folder_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = LayerFiles.read

    def counted(self: LayerFiles, layer: int, memory: torch.Tensor) -> None:
        read.append(layer)
        original(self, layer, memory)

    monkeypatch.setattr(LayerFiles, "read", counted)
    _, streamed = both(folder_of())
    passes(streamed)
    assert read == [0, 1, 2, 3, 4]
    read.clear()
    model = LadderForCausalLM.from_backbone(streamed, LADDERS["all"])
    model.train()
    model(IDS, labels=IDS).loss.backward()
    # Up and down again; the two at the top are there already.
    assert read == [0, 1, 2, 3, 4, 2, 1, 0]


def test_several_threads_read_what_one_reads(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_PIECE", 1000)
    backbone_from_transformers(make("llama")).save_pretrained(tmp_path / "packed")
    model: Any = load_backbone(tmp_path / "packed", weights="streamed", embeddings="device")
    layouts = model._stream.layouts
    alone, together = LayerFiles(layouts), LayerFiles(layouts, readers=3)
    for layer, layout in enumerate(layouts):
        one, two = torch.zeros(2, layout.nbytes, dtype=torch.uint8)
        alone.read(layer, one)
        together.read(layer, two)
        assert torch.equal(one, two)
        assert one.any()
    with (tmp_path / "packed" / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)
    with pytest.raises(CheckpointError, match="it was cut short after it was opened"):
        together.read(2, two)
    for files in (alone, together):
        files.close()


# Files from elsewhere ---------------------------------------------------------------------------


def test_files_without_digests_are_read_once(folder_of: Any, tmp_path: Path) -> None:
    """Whatever the order and the alignment of their tensors, and cut into shards or not."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(folder_of() / "config.json", folder)
    tensors = load_file(folder_of() / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, part in shards.items():
        save_file({key: tensors[key] for key in part}, folder / name)
    weight_map = {key: name for name, part in shards.items() for key in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.warns(DigestsTakenWarning, match="does not say the digests"):
        streamed = load_backbone(folder, weights="streamed")
    resident = load_backbone(folder_of())
    assert streamed.fingerprint == resident.fingerprint
    assert torch.equal(passes(streamed)[0].hidden, passes(resident)[0].hidden)


def test_layers_that_are_float_on_purpose_stay_resident(make: Any, tmp_path: Path) -> None:
    """As those that bitsandbytes was told to skip."""
    backbone = backbone_from_transformers(make("llama"))
    backbone.save_pretrained(tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    tensors, name = load_file(path), "model.layers.1.mlp.up_proj.weight"
    weight = next(weight for key, weight in backbone.named_weights() if key == name)
    assert isinstance(weight, NF4Weight)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
    save_file({**tensors, name: weight.dequantize(torch.float32)}, path)
    with pytest.warns(DigestsTakenWarning):
        resident, streamed = both(tmp_path / "packed")
    ladder = LadderConfig.lst(reduction=4, reentry=2)
    outcomes = [
        trained_step(LadderForCausalLM.from_backbone(each, ladder)) for each in (resident, streamed)
    ]
    assert torch.equal(outcomes[0][0], outcomes[1][0])


# What goes wrong --------------------------------------------------------------------------------


@pytest.fixture
def own(folder_of: Any, tmp_path: Path) -> Path:
    """A folder that a test may spoil."""
    return Path(shutil.copytree(folder_of(), tmp_path / "own"))


def test_truncated_before_training(own: Path) -> None:
    path = own / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors' is truncated or corrupt: it is"
    ):
        load_backbone(own, weights="streamed")


def test_truncated_while_training(own: Path) -> None:
    model = load_backbone(own, weights="streamed", embeddings="device")
    passes(model)
    path = own / "model.safetensors"
    key = "model.layers.3.mlp.down_proj.weight"
    with path.open("r+b") as file:
        file.truncate(TensorFile(path).entries[key].offset + 5)
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors' ends at .*'{key}': it was cut"
    ):
        passes(model)
    # What is still there can still be read.
    passes(model, stop=3)


@pytest.mark.parametrize("part", ["", ".absmax", ".nested_absmax"])
def test_a_damaged_weight_is_found_when_it_is_first_read(own: Path, part: str) -> None:
    name = "model.layers.4.self_attn.q_proj.weight"
    damage(own / "model.safetensors", name + part)
    model = load_backbone(own, weights="streamed")
    passes(model, stop=4)
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=rf"'{name}' in '.*model\.safetensors' is damaged"
        ):
            passes(model)


def test_files_may_go_away_while_they_are_in_use(own: Path) -> None:
    model = load_backbone(own, weights="streamed")
    before = passes(model)[0].hidden
    shutil.rmtree(own)
    assert torch.equal(passes(model)[0].hidden, before)
    with pytest.raises(MissingFileError, match="does not exist"):
        load_backbone(own, weights="streamed")


def test_an_error_of_the_reading_thread_comes_through(own: Path) -> None:
    model = load_backbone(own, weights="streamed")
    assert isinstance(model, NativeBackbone)
    assert model._stream is not None
    assert model._stream._files is not None
    model._stream._files.close()
    with pytest.raises(ValueError, match="closed file"):
        passes(model)


def test_it_closes(own: Path) -> None:
    before = set(threading.enumerate())
    model = load_backbone(own, weights="streamed")
    assert set(threading.enumerate()) <= before
    passes(model)
    (thread,) = set(threading.enumerate()) - before
    model.close()
    assert not thread.is_alive()
    with pytest.raises(ConfigError, match="was closed"):
        passes(model)
    model.close()
    load_backbone(own).close()


def test_garbage_collection_closes_it(own: Path) -> None:
    before = set(threading.enumerate())
    model: Any = load_backbone(own, weights="streamed")
    passes(model)
    (thread,) = set(threading.enumerate()) - before
    stream, files = weakref.ref(model._stream), model._stream._files
    del model
    gc.collect()
    assert stream() is None
    assert all(file.closed for reader in files._readers for file in reader._files.values())
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_a_process_ends_without_closing(own: Path) -> None:
    code = (
        "import torch; from ladder_kernels.models.loading import load_backbone\n"
        "from ladder_kernels.nn.attention import SequenceLayout\n"
        f"model = load_backbone({str(own)!r}, weights='streamed')\n"
        "layout = SequenceLayout.build(1, 3)\n"
        "model.frozen_pass(torch.tensor([[5, 6, 7]]), layout=layout, stop=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


def test_moves_and_casts(folder_of: Any) -> None:
    resident, streamed = both(folder_of())
    for model in (resident, streamed):
        model.to("cpu").to(torch.bfloat16)
    assert streamed.dtype == torch.bfloat16
    assert is_file_mapped(streamed.embedding)
    assert torch.equal(passes(streamed)[0].hidden, passes(resident)[0].hidden)
    model = LadderForCausalLM.from_backbone(streamed, LADDERS["lst"])
    with pytest.raises(ConfigError, match="weights are streamed stays on cpu; load it with device"):
        model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    tied = load_backbone(folder_of("smollm3"), embeddings="host")
    for move in (torch.bfloat16, "meta"):
        with pytest.raises(
            ConfigError, match=r"embeddings: found 'host'.* they are the output head"
        ):
            tied.to(move)
    assert torch.equal(
        passes(tied)[0].hidden, passes(load_backbone(folder_of("smollm3")))[0].hidden
    )


def test_refusals(folder_of: Any, make: Any, tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(ConfigError, match=r"holds no NF4 weights.*ladder-kernels quantize"):
        load_backbone(tmp_path / "float", weights="streamed")
    with pytest.raises(ConfigError, match="weights: found 'elsewhere'; allowed are 'resident', 's"):
        load_backbone(folder_of(), weights="elsewhere")
    with pytest.raises(ConfigError, match="embeddings: found 'disk'; allowed are 'device', 'host'"):
        LadderForCausalLM.from_pretrained(folder_of(), embeddings="disk")
    with pytest.raises(ConfigError, match="weights: found 'host' on a CPU"):
        load_backbone(folder_of(), weights="host")
    with pytest.raises(ConfigError, match=r"embeddings: found 'host'.*in float32.*in bfloat16"):
        load_backbone(folder_of("smollm3"), weights="streamed", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="calibration: found texts"):
        load_backbone(tmp_path / "float", embeddings="host", calibration=[[1, 2, 3]])
    with pytest.raises(ConfigError, match="weights: found 'streamed', but the given backbone"):
        LadderForCausalLM.from_backbone(load_backbone(folder_of()), weights="streamed")
    make("olmo2").save_pretrained(tmp_path / "olmo2")
    for options in ({"weights": "streamed"}, {"embeddings": "host"}):
        with pytest.raises(
            UnsupportedModelError, match="'olmo2' runs on the layers of transformers"
        ):
            load_backbone(tmp_path / "olmo2", **options)


# A GPU that is not there ------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["streamed", "host"])
def test_two_layers_on_a_gpu(make: Any, weights: str) -> None:
    config = make("qwen2", use_sliding_window=False, num_hidden_layers=6).config
    with fake_cuda() as device:
        options: dict[str, Any] = {"device": device, "quantize_head": True}
        backbone: Any = backbone_from_config(config, weights=weights, embeddings="host", **options)
        resident = backbone_from_config(config, **options)
        assert backbone.embedding.device.type == "cpu"
        assert {tensor.device for tensor in backbone.buffers()} == {device}
        slots = [slot.memory for slot in backbone._stream._slots]
        assert {slot.device for slot in slots} == {device}
        per_layer = sum(
            weight.nbytes
            for name, weight in resident.described_weights()
            if isinstance(weight, NF4Weight) and name.startswith("model.layers.0.")
        )
        for slot in slots:
            assert per_layer <= slot.nbytes <= 1.5 * per_layer
        for config_of_ladder in LADDERS.values():
            model = LadderForCausalLM.from_backbone(backbone, config_of_ladder).train()
            ids = torch.zeros(1, 9, dtype=torch.int64, device=device)
            model(ids, labels=ids).loss.backward()
            assert all(p.grad.device == device for p in model.parameters() if p.requires_grad)
    empty = backbone_from_config(config, device="meta", weights="streamed", quantize_head=True)
    assert {tensor.device.type for tensor in (*empty.buffers(), empty.embedding)} == {"meta"}


def test_a_tied_float_head_is_needed_on_the_gpu(make: Any) -> None:
    config = make("smollm3").config
    with fake_cuda() as device:
        with pytest.raises(ConfigError, match="needed on cuda:0; allowed are quantize_head=True"):
            backbone_from_config(config, device=device, weights="streamed")
        model = backbone_from_config(config, device=device, weights="streamed", embeddings="device")
        assert model.embedding.device == device


# A GPU that is there ----------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("weights", ["streamed", "host"])
def test_the_same_bits_on_a_gpu(make: Any, tmp_path: Path, weights: str, ladder: str) -> None:
    """With layers so large that a copy that comes too early or too late is seen."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5}
    backbone_from_transformers(make("llama", **sizes, head_dim=256)).save_pretrained(tmp_path / "a")
    results = []
    for place in ("resident", weights):
        backbone = load_backbone(
            tmp_path / "a", weights=place, embeddings="host", device="cuda", quantize_head=True
        )
        model = LadderForCausalLM.from_backbone(backbone, LADDERS[ladder])
        results.append([trained_step(model) for _ in range(3)])
        assert backbone.streams == (place != "resident")
    for (loss, gradients), (other, theirs) in zip(*results, strict=True):
        assert torch.equal(loss, other)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, theirs[name]), name
