"""``info``: anywhere, quickly, and what it says is so."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import torch

import ladder_kernels as lk
from ladder_kernels import native, ops

OPERATIONS = {path.parent.name for path in Path(ops.__file__).parent.glob("*/reference.py")}


def test_json(call):
    run = call("info", "--json")
    assert (run.code, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    assert found["versions"]["ladder_kernels"] == lk.__version__
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert len(found["gpus"]["devices"]) == torch.cuda.device_count()
    assert bool(found["gpus"]["reason"]) == (torch.cuda.device_count() == 0)
    assert found["native"]["available"] == native.status().available
    assert set(found["operations"]) == OPERATIONS
    for places in found["operations"].values():
        for choice in places.values():
            assert choice["reason"] or choice["backend"] in ("cpu", "triton")


def test_table(call):
    run = call("info")
    assert (run.code, run.stderr) == (0, "")
    for name in (*OPERATIONS, "transformers", "CPU features", "threads", "memory", "GPU"):
        assert name in run.stdout


def test_nothing_is_imported_for_versions(spawn):
    code = (
        "import sys\nfrom ladder_kernels.cli import main\n"
        "try: main(['info'])\n"
        "finally: print('imported:', sorted(set(sys.modules) & "
        "{'transformers', 'datasets', 'bitsandbytes', 'triton', 'accelerate', 'peft'}))"
    )
    run = spawn(code=code)
    assert run.code == 0
    assert "imported: []" in run.stdout


def test_without_the_native_library(spawn, tmp_path):
    package = Path(lk.__file__).parent
    ignored = shutil.ignore_patterns("_library*", "__pycache__")
    shutil.copytree(package, tmp_path / "site" / "ladder_kernels", ignore=ignored)
    # An editable install of the package would find it, and its library, before any path is looked
    # at.
    code = (
        "import sys\nfrom importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder\n"
        "sys.meta_path[:] = [BuiltinImporter, FrozenImporter, PathFinder]\n"
        "from ladder_kernels.cli import main\nmain(sys.argv[1:])"
    )
    run = spawn("info", "--json", code=code, PYTHONPATH=str(tmp_path / "site"))
    assert (run.code, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    assert not found["native"]["available"]
    assert found["native"]["reason"]
    on_cpu = found["operations"]["nf4_linear"]["cpu"]
    assert on_cpu == {"backend": "reference", "reason": found["native"]["reason"]}
    shown = spawn("info", code=code, PYTHONPATH=str(tmp_path / "site"))
    assert shown.code == 0
    assert "native library" in shown.stdout


def test_the_environment_is_shown(spawn):
    run = spawn("info", "--json", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    found = json.loads(run.stdout)
    assert found["environment"]["OMP_NUM_THREADS"] == "1"
    assert found["threads"]["torch"] == 1


def test_a_forced_instruction_set(spawn):
    forced = native.status().isas[-1]
    run = spawn("info", "--json", LADDER_KERNELS_CPU_ISA=forced)
    assert json.loads(run.stdout)["native"]["isa"] == forced
    spawn("info", LADDER_KERNELS_CPU_ISA="abacus").assert_refused("'abacus'", forced)
