from __future__ import annotations

import sys

import pytest

from benchmarks import startup


@pytest.mark.slow
def test_commands_that_need_no_torch_take_a_quarter_of_its_import():
    base, shares = startup.ratios(3)
    assert base > 0 and max(shares.values()) < startup.MOST, shares


def test_the_processor_time_of_a_command_is_its_own():
    idle = startup.seconds([sys.executable, "-S", "-c", "import time; time.sleep(.1)"])
    busy = startup.seconds([sys.executable, "-S", "-c", "sum(range(10_000_000))"])
    assert 0 < idle < busy
