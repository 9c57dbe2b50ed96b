"""Plans with tiles so small that a tensor of a test has several, and shapes for them."""

from __future__ import annotations

from typing import Any

from batchnorm.kernels.gpu import dispatch, plans
from batchnorm.kernels.gpu.plans import Plan

SPLIT = Plan("split", "split", "a test", tile=64, widest=16, chain=8, programs=6, warps=4, stages=2)
WHOLE = Plan("whole", "whole", "a test", tile=64, widest=16, chain=64, warps=4, stages=2)
FLAT = Plan(
    "flat", "split", "a test", layout="planar", tile=64, widest=16, chain=8, programs=6, warps=4, stages=2, flat=True
)
IN_REGISTERS = Plan("in registers", "in_registers", "a test", tile=512, widest=512, chain=1, warps=4)
WAYS = {plan.way: plan for plan in (SPLIT, WHOLE, IN_REGISTERS)}
ALL = {**WAYS, "flat": FLAT}


def use(monkeypatch: Any, *found: Plan) -> None:
    """These plans are the table."""
    monkeypatch.setattr(plans, "table", lambda: found)
    dispatch._cuts.clear()
