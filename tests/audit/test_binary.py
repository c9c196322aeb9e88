from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl

from ladder_kernels.audit.binary import Binary, Instructions, compile_kernel, read_amd
from ladder_kernels.audit.targets import TARGETS
from ladder_kernels.errors import BackendError
from tests.audit.kernels import _product_kernel, _scale_kernel

DIVISIBLE = [["tt.divisibility", 16]]


def product(target: str, *, block: int = 64, **options: int) -> Binary:
    signature = dict.fromkeys("xwy", "*bf16") | dict.fromkeys("MNK", "i32")
    constants = {"BLOCK_M": block, "BLOCK_N": block, "BLOCK_K": 32}
    return compile_kernel(
        _product_kernel,
        signature | dict.fromkeys(constants, "constexpr"),
        constants,
        TARGETS[target],
        attributes={(place,): DIVISIBLE for place in range(6)},
        options={"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True, **options},
    )


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_120"])
def test_a_product_on_matrix_units_of_warps(target):
    binary = product(target)
    # 64 x 64 x 32 in products of 16 x 8 x 16, shared by four warps.
    assert binary.loop is not None
    assert binary.loop.matrix == (64 // 16) * (64 // 8) * (32 // 16) // 4
    assert {name.split(".")[0] for name in binary.whole.names} >= {"HMMA", "LDSM", "LDGSTS"}
    assert (binary.spilled, binary.stack) == (0, 0)
    assert 2 * 2 * 64 * 32 <= binary.shared <= TARGETS[target].shared_limit
    assert 32 <= binary.registers <= 255
    assert sum(binary.whole.classes.values()) == sum(binary.whole.names.values())
    assert sum(binary.whole.names.values()) == binary.whole.total > binary.loop.total


@pytest.mark.parametrize(("target", "name"), [("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")])
def test_larger_matrix_units(target, name):
    binary = product(target, block=128)
    assert binary.loop is not None
    assert binary.loop.matrix > 0
    assert any(found.startswith(name) for found in binary.loop.names)


@pytest.mark.parametrize("target", ["gfx90a", "gfx942", "gfx1100", "gfx1201"])
def test_amd(target):
    binary = product(target)
    assert binary.loop is not None
    assert binary.loop.matrix > 0
    assert binary.spilled == 0
    assert 16 <= binary.registers <= 512


def test_without_matrix_units_none_are_used():
    assert product("sm_75").whole.matrix == 0


def test_a_kernel_with_too_few_registers_spills():
    binary = product("sm_86", maxnreg=40)
    assert binary.spilled > 0
    assert binary.stack > 0
    assert binary.registers <= 40


def test_no_loop():
    signature = {
        "x": "*fp32", "bias": "constexpr", "y": "*fp32", "factor": "fp32", "N": "i32",
        "stride": "i32", "BLOCK": "constexpr",
    }  # fmt: skip
    binary = compile_kernel(
        _scale_kernel,
        signature,
        {"bias": None, "BLOCK": 128},
        TARGETS["sm_86"],
        attributes={},
        options={"num_warps": 1, "enable_fp_fusion": True},
    )
    assert binary.loop is None
    assert binary.shared == 0
    assert binary.whole.classes["global"] == 8  # four loads and four stores of single elements


def test_what_does_not_compile_names_kernel_and_target():
    @triton.jit
    def _broken_kernel(
        x,  # [1]
    ):
        tl.store(x, tl.load(x) + undefined)  # noqa: F821

    with pytest.raises(BackendError, match="_broken_kernel for sm_86: it does not compile"):
        compile_kernel(
            _broken_kernel,
            {"x": "*fp32"},
            {},
            TARGETS["sm_86"],
            attributes={},
            options={"enable_fp_fusion": True},
        )


def test_assembly_without_counts_is_refused():
    with pytest.raises(BackendError, match=r"found no '\.vgpr_count'"):
        read_amd("s_endpgm", shared=0)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (32, 0, 8, 48),  # all that sm_86 has
        (128, 0, 8, 16),  # 65,536 registers / (128 * 32)
        (255, 0, 8, 8),  # in portions of eight: 256
        (64, 51200, 8, 16),  # two programs' shared memory
        (64, 99 * 1024, 4, 4),
    ],
)
def test_resident_warps(registers, shared, warps, expected):
    nothing = Instructions(total=0, classes={}, names={})
    binary = Binary(
        registers=registers, spilled=0, stack=0, shared=shared, whole=nothing, loop=None
    )
    assert binary.resident_warps(TARGETS["sm_86"], warps) == expected
