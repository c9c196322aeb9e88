"""Runs, with numpy on a CPU, the PTX that Triton compiles for NVIDIA GPUs.

What is checked is thereby a kernel's *compiled* form, bfloat16 and tensor-core instructions
included, for sm_75, sm_80, sm_86, sm_89 and sm_120::

    from ladder_kernels.audit.ptx import executing

    with executing(86, lockstep=False) as launches:
        kernel[grid](x, y, n, BLOCK=128)   # CPU tensors; y holds the result

Checked on the way, with an error that names the argument, the byte and the source line:

- every access of global, shared and local memory is within bounds and aligned, reads too;
- shared memory and registers start as garbage, and ``cp.async`` lands only when waited for;
- all threads of a block meet at a barrier. With ``lockstep=False`` one warp runs after the other
  between barriers, ``reverse=True`` from the last to the first: a missing barrier shows in one of
  both orders, mostly.

Not modelled: what came with sm_90 and sm_100 (``wgmma``, ``tcgen05``, bulk copies, ``mbarrier``,
clusters), which raises when reached; time; races between blocks; the roundings inside a tensor core
and of approximate functions. PTX is what runs, not the machine code made of it.
"""

from __future__ import annotations

from ladder_kernels.audit.ptx.counters import Counters, GlobalTraffic, SharedTraffic
from ladder_kernels.audit.ptx.errors import (
    BarrierError,
    MemoryAccessError,
    PTXError,
    UnsupportedInstructionError,
)
from ladder_kernels.audit.ptx.execution import Kernel, execute
from ladder_kernels.audit.ptx.launch import LaunchRecord, executing
from ladder_kernels.audit.ptx.state import Schedule

__all__ = [
    "BarrierError",
    "Counters",
    "GlobalTraffic",
    "Kernel",
    "LaunchRecord",
    "MemoryAccessError",
    "PTXError",
    "Schedule",
    "SharedTraffic",
    "UnsupportedInstructionError",
    "execute",
    "executing",
]
