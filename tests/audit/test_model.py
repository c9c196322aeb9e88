from __future__ import annotations

import pytest

from ladder_kernels.audit.binary import Binary, Instructions
from ladder_kernels.audit.model import Work, modelled_seconds, wavefronts
from ladder_kernels.audit.targets import DEVICES, TARGETS, Device, target_of
from ladder_kernels.errors import ConfigError

DEVICE = Device(
    name="small", target="sm_86", multiprocessors=2, clock=1e9, bf16=512, int8=2048, bandwidth=1e9
)


def code(**names: int) -> Instructions:
    found = {name.replace("_", "."): count for name, count in names.items()}
    return Instructions(total=sum(found.values()), classes={}, names=found)


def test_by_hand():
    loop = code(HMMA_16816=4, LDSM_16_M88_4=2, FADD=10)
    binary = Binary(
        registers=128, spilled=0, stack=0, shared=0,
        whole=code(HMMA_16816=4, LDSM_16_M88_4=2, FADD=34), loop=loop,
    )  # fmt: skip
    work = Work(operations=1e6, moved=5000, trips=11)
    # Two programs of eight warps fit each of two multiprocessors: six programs are two turns, of
    # which three quarters are used.
    found = modelled_seconds(binary, work, DEVICE, programs=6, warps=8)
    assert found["matrix"] == pytest.approx(1e6 / (512 * 2 * 1e9) / 0.75)
    assert found["issue"] == pytest.approx((40 + 10 * 16) * 2 * 16 / 4 / 1e9)
    assert found["shared"] == pytest.approx((8 + 10 * 8) * 2 * 16 / 1e9)
    assert found["memory"] == pytest.approx(5e-6)
    fast = Work(operations=1e6, moved=5000, trips=11, int8=True)
    quicker = modelled_seconds(binary, fast, DEVICE, programs=6, warps=8)
    assert quicker["matrix"] == pytest.approx(found["matrix"] / 4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LDSM.16.M88.4", 4),
        ("LDSM.16.MT88.4", 4),
        ("LDSM.16.M88", 1),
        ("LDS.128", 4),
        ("LDS.U.64", 2),
        ("LDS", 1),
        ("STS.U8", 1),
        ("LDGSTS.E.BYPASS.128", 4),
        ("SHFL.IDX", 1),
        ("LDG.E.128", 0),
        ("HMMA.16816.F32.BF16", 0),
    ],
)
def test_wavefronts(name, expected):
    assert wavefronts(Instructions(total=3, classes={}, names={name: 3})) == 3 * expected


def test_devices_have_targets_and_plausible_rates():
    for device in DEVICES:
        assert target_of(device.target) is TARGETS[device.target]
        rate = device.bf16 * device.multiprocessors * device.clock
        assert 1e13 < rate < 1e15
    with pytest.raises(ConfigError, match="target 'sm_12': found no such target; there are sm_75"):
        target_of("sm_12")
