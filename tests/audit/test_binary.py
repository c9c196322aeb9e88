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


@pytest.mark.parametrize(
    ("target", "kind", "bits"),
    [("sm_86", "HMMA.16816.F32.BF16", 128), ("gfx942", "v_mfma_f32_32x32x8_bf16_1k", None)],
)
def test_kinds_of_matrix_instructions_and_widths_of_loads(target, kind, bits):
    code = product(target).whole
    assert sum(code.matrix_kinds.values()) == code.matrix
    assert all(name.startswith(kind[:6]) for name in code.matrix_kinds)
    if bits is not None:
        assert list(code.matrix_kinds) == [kind]
        assert list(code.load_bits) == [bits]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("LDG.E.128", 128),
        ("LDG.E.64.CONSTANT", 64),
        ("LDG.E", 32),
        ("LDG.E.U16", 16),
        ("LDG.E.S8.CONSTANT", 8),
        ("LDG.E.ENL2.256", 256),
        ("LDGSTS.E.BYPASS.LTC128B.128", 128),
        ("LDGSTS.E.LTC128B", 32),
        ("global_load_dwordx4", 128),
        ("global_load_b96", 96),
        ("buffer_load_dwordx2", 64),
        ("global_load_dword", 32),
        ("global_load_b32", 32),
        ("global_load_short_d16_hi", 16),
        ("global_load_u16", 16),
        ("global_load_d16_b16", 16),
        ("buffer_load_ubyte", 8),
        ("global_load_d16_u8", 8),
    ],
)
def test_bits_that_a_load_brings(name, bits):
    others = {"STG.E.128": 1, "LDS.64": 1, "global_store_dwordx4": 1, "ds_load_b128": 1}
    code = Instructions(total=6, classes={}, names={name: 2, **others})
    assert code.load_bits == {bits: 2}


def test_wide_loads_come_first():
    code = Instructions(total=4, classes={}, names={"LDG.E.U8": 1, "LDG.E": 1, "LDG.E.128": 2})
    assert list(code.load_bits.items()) == [(128, 2), (32, 1), (8, 1)]


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
