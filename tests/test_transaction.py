"""Surgery is done completely or not at all: whatever line of it raises, the model is what it was, object by object and bit by bit."""

import linecache
import logging
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn
from batchnorm import folding
from batchnorm.surgery import transaction, walk
from tests.networks import FrozenBatchNorm2d, settle

PACKAGE = Path(bn.__file__).parent
FILES = tuple(str(PACKAGE / name) for name in ("surgery", "layers", "memory", "distributed", "agreement", "population"))
CLEANING_UP = tuple(str(PACKAGE / "surgery" / name) for name in ("transaction.py", "guards.py"))


class Fault(BaseException):
    """Not an Exception, which tracing survives."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU()
        self.tail = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.tail(self.act(self.norm(self.conv(x)) + x))


def network():
    torch.manual_seed(0)
    model = settle(
        nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).half(), nn.ReLU(), Block(), FrozenBatchNorm2d(4), nn.Flatten()
        )
    )
    model.append(nn.SyncBatchNorm(36))
    model[1].eval()
    model[1].note = "mine"
    model[1].weight.requires_grad_(False)
    model[0].register_forward_hook(lambda *_: None)
    return model


def batches():
    return [torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def everything(model):
    """All that can be seen of a model: objects by identity, tensors by identity and value."""
    found = list[object]()
    for slot in walk(model):
        module = slot.module
        found.append((slot.path, id(module), type(module)))
        for name, value in vars(module).items():
            found.append((slot.path, name, id(value)))
            inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            inner = enumerate(sorted(value, key=str)) if isinstance(value, set) else inner
            found += [(slot.path, name, key, id(part)) for key, part in inner]
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                found.append(
                    (slot.path, name, value.requires_grad, value.dtype, value.detach().double().reshape(-1).tolist())
                )
    return found


def prepared(*surgeries):
    def build():
        model = network()
        for surgery in surgeries:
            surgery(model)
        return model

    return build


def _fold(model):
    bn.fold(model, batches()[0])


def _copy(model):
    source = network()
    for layer in source.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
    bn.copy_statistics(source, model)


OPERATIONS = {
    "convert": (
        network,
        lambda model: bn.convert(model, statistics=bn.statistics.Renorm(), fuse=True, save_memory=True),
    ),
    "fuse": (network, bn.fuse),
    "freeze": (network, bn.freeze),
    "revert": (prepared(bn.fuse, bn.freeze), bn.revert),
    "unfreeze": (prepared(bn.freeze), bn.unfreeze),
    "synchronize": (network, bn.synchronize),
    "unsynchronize": (prepared(bn.synchronize), bn.unsynchronize),
    "average_buffers": (network, bn.average_buffers),
    "recalibrate": (
        prepared(lambda model: model.float(), bn.convert),
        lambda model: bn.recalibrate(model, batches()),
    ),
    "copy_statistics": (network, _copy),
    "fold": (prepared(lambda model: model.float(), bn.fuse), _fold),
}
# Lines that come when all is done: the line of a `with` comes once more, at its end.
DONE = (
    "with transaction(",
    "with contextlib.closing(",
    "for _ in steps",
    "yield done",
    "return target",
    "return model",
    "pass",
)
UNCHANGED = ("fold", "average_buffers")  # fold makes a copy; averages over one replica are its own


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run(operation, model, stop=None):
    """The lines that an operation ran, with how often; it raises in the place `stop` says, a line and which of its turns."""
    lines = Counter[tuple[str, int]]()

    def trace(frame, event, _):
        name = frame.f_code.co_filename
        if not name.startswith(FILES) or name in CLEANING_UP:
            return None
        if event == "line" and not linecache.getline(name, frame.f_lineno).lstrip().startswith(DONE):
            line = (name, frame.f_lineno)
            lines[line] += 1
            if stop == (line, lines[line]):
                raise Fault
        return trace

    before, grad = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(trace)
    try:
        operation(model)
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(grad)  # a line that raises at the end of a `with no_grad()` comes before its exit
    return lines


@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_line_raises_the_model_is_as_before(name, group, monkeypatch):
    monkeypatch.setattr(folding, "_SECONDS", 0.0)
    build, operation = OPERATIONS[name]
    operation(build())  # what is imported and remembered at the first call is no line of the others
    lines = run(operation, build())
    assert len(lines) > 5
    model = build()
    before = everything(model)
    steps = [(line, turn) for line, times in lines.items() for turn in {1, times}]
    # Some run many lines many times. All of them are tried in `make test-all`.
    every = {"fold": 25, "fuse": 4, "convert": 4, "synchronize": 3, "freeze": 3}.get(name, 1)
    for step in steps[:: 1 if os.environ.get("BATCHNORM_ALL_EXAMPLES") else every]:
        with pytest.raises(Fault):
            run(operation, model, step)
        assert everything(model) == before, step
    if name not in UNCHANGED:
        operation(model)
        assert everything(model) != before


def test_the_check_can_fail(group, monkeypatch):
    monkeypatch.setattr(transaction.Snapshot, "restore", lambda _: None)
    model = network()
    before = everything(model)
    lines = run(bn.convert, network())
    with pytest.raises(Fault):
        run(bn.convert, model, (list(lines)[-1], 1))
    assert everything(model) != before


def test_a_snapshot_restores_all_it_holds():
    model = network()
    x = batches()[0]
    before, expected = everything(model), model[0](x)
    snapshot = transaction.Snapshot(model, values=True)
    model.requires_grad_(False)
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[3].conv = nn.Identity()
    del model[3].act
    model[1].__class__ = nn.BatchNorm3d
    model[1].note, model[1].later = "yours", 1
    model.register_buffer("extra", torch.ones(1), persistent=False)
    model[4].running_mean.zero_()
    snapshot.restore()
    torch.testing.assert_close(model[0](x), expected, rtol=0, atol=0)
    values = [row for row in everything(model) if isinstance(row[-1], list)]
    assert len(values) == len([row for row in before if isinstance(row[-1], list)])
    assert [row for row in everything(model) if not isinstance(row[-1], list)] == [
        row for row in before if not isinstance(row[-1], list)
    ]


def test_an_error_in_what_is_said_undoes_too():
    class Broken(logging.Handler):
        def handle(self, record):
            raise Fault

    model, handler = network(), Broken()
    before = everything(model)
    logger = logging.getLogger("batchnorm")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(Fault):
            bn.freeze(model)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert everything(model) == before
