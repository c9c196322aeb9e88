from __future__ import annotations

import pytest

from ladder_kernels.audit.ptx import Kernel, PTXError, UnsupportedInstructionError, execute
from ladder_kernels.audit.ptx.operands import Address, Immediate, Register, Symbol
from ladder_kernels.audit.ptx.parser import parse

_MODULE = """
.version 8.7
.target sm_86
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.global .align 4 .b8 table[8] = {1, 0, 0, 0, 2};
/* two
   lines */
.visible .entry first(.param .u32 first_0) { ret; }
.visible .entry second(
    .param .u64 .ptr .global .align 16 second_0,
    .param .u8 second_1,
    .param .f32 second_2, .param .align 8 .b8 second_3[12]
)
.reqntid 64
{
    .shared .align 8 .b8 fixed[20];
    .reg .pred %p<2>;
    .reg .b32 %r<3>; .reg .b64 %rd<2>;
$L__start:
    .loc 1 12 5
    ld.param.b64 %rd0, [second_0+8];  // a comment; with a semicolon
    {
    .reg .b32 %r0;
    mov.u32 %r0,
            7;
    }
    .loc 1 13 7 // kernel.py:13:7
    @!%p1 mov.u32 %r0, 0x1F;
    @%p1 bra $L__start;
    ret;
}
.file 1 "/some/where/module.py"
"""


def test_parameters_are_aligned_to_their_size():
    program = parse(_MODULE, "second")
    assert [(p.offset, p.nbytes) for p in program.parameters] == [(0, 8), (8, 1), (12, 4), (16, 12)]
    assert program.parameter_bytes == 28
    assert program.block_threads == 64


def test_the_first_entry_is_taken_unless_one_is_named():
    assert parse(_MODULE).name == "first"
    assert Kernel.parse(_MODULE, "second").name == "second"
    with pytest.raises(PTXError, match="no entry third"):
        parse(_MODULE, "third")


def test_variables():
    program = parse(_MODULE, "second")
    # What is declared without a size comes after what has one.
    assert program.variables["fixed"].offset == 0
    assert program.variables["dynamic"].offset == program.shared_bytes == 32
    assert bytes(program.module_data) == bytes([1, 0, 0, 0, 2, 0, 0, 0])


def test_instructions():
    load, inner, guarded, branch, _ = parse(_MODULE, "second").instructions
    assert (load.opcode, load.modifiers) == ("ld", ("param", "b64"))
    assert load.operands[1] == Address(Symbol("second_0"), 8)
    assert load.source == "module.py:12"
    assert guarded.source == "kernel.py:13:7"
    assert guarded.operands[1] == Immediate(31)
    assert guarded.guard == Register(branch.guard.index, negated=True)
    # The name in braces is another register than the one outside.
    assert inner.operands[0] != guarded.operands[0]
    assert inner.operands[1] == Immediate(7)


def test_labels_lead_to_the_next_instruction():
    assert parse(_MODULE, "second").labels == {"$L__start": 0}


@pytest.mark.parametrize("ending", ["ret;", "ret; } mov.u32"])
def test_a_text_that_ends_too_early(ending):
    text = ".visible .entry k() { .reg .b32 %r<2>; mov.u32 %r0, 1 }"
    with pytest.raises(PTXError, match="ends inside"):
        parse(text if "}" in ending else f".visible .entry k() {{ {ending}")


@pytest.mark.parametrize(
    "line",
    [
        "wgmma.fence.sync.aligned;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0,%r1}, %rd0, %rd1, 1, 1, 1;",
        "tcgen05.wait::ld.sync.aligned;",
        "mbarrier.init.shared::cta.b64 [%r0], 1;",
        "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes "
        "[%r0], [%rd0, {%r1, %r1}], [%r2];",
        "bar.sync 1, 32;",
        "barrier.cluster.arrive.aligned;",
        "ld.shared::cluster.b32 %r0, [%r1];",
        "ld.b32 %r0, [%rd0];",
        "call.uni (%r0), function, (%r1);",
    ],
)
def test_what_is_not_modelled_raises_when_reached_and_not_before(line):
    body = ".reg .b32 %r<3>; .reg .b64 %rd<3>; .reg .pred %p<2>;"
    skipped = Kernel.parse(f".visible .entry k() {{ {body} bra $L; {line} $L: ret; }}")
    execute(skipped, [], (1,), warps=1, shared_bytes=0)
    reached = Kernel.parse(f".visible .entry k() {{ {body} {line} ret; }}")
    with pytest.raises(UnsupportedInstructionError) as caught:
        execute(reached, [], (1,), warps=1, shared_bytes=0)
    assert line.split()[0].rstrip(";") in str(caught.value)
