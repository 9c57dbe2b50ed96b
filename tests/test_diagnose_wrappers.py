"""`diagnose` of models in wrappers, and of odd ones: the fault is found under the name of `named_modules`, and every bit stays."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import batchnorm as bn
from tests.replicas import on_replicas
from tests.sick_models import images, lagging
from tests.test_diagnose import codes, same, state_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::FutureWarning:torch.*")


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Whole(nn.Module):
    """A Sequential that is compiled in place is not compiled."""

    def __init__(self):
        super().__init__()
        self.net = lagging().model

    def forward(self, x):
        return self.net(x)


def compiled_in_place() -> nn.Module:
    model = Whole()
    model.compile(backend="eager")
    return model


def half_compiled() -> nn.Module:
    model = lagging().model
    return nn.Sequential(torch.compile(model[:3], backend="eager"), torch.compile(model[3:], backend="eager"))


def fully_sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Whole()
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


WRAPPED = {
    "data parallel": (lambda: DistributedDataParallel(lagging().model), "module.4"),
    "threads": (lambda: nn.DataParallel(lagging().model), "module.4"),
    "compiled": (lambda: torch.compile(lagging().model, backend="eager"), "_orig_mod.4"),
    "compiled in place": (compiled_in_place, "net.4"),
    "pieces compiled": (half_compiled, "1._orig_mod.4"),
    "compiled data parallel": (
        lambda: torch.compile(DistributedDataParallel(lagging().model), backend="eager"),
        "_orig_mod.module.4",
    ),
    "average": (lambda: AveragedModel(lagging().model), "module.4"),
    "checkpointed": (
        lambda: checkpoint_wrapper(lagging().model),
        "_checkpoint_wrapped_module.4",
    ),
    "fully sharded": (fully_sharded, "net.4"),
}


def everything(model) -> dict:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step(model, item):
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(item[0]), item[1]).backward()
        optimizer.step()

    def predict(model, x):
        model.eval()
        return model(x)

    return {
        "criterion": nn.CrossEntropyLoss(),
        "optimizer": optimizer,
        "step": step,
        "predict": predict,
        "validate": lambda model: predict(model, images(1)[0][0]),
    }


@pytest.mark.parametrize("name", WRAPPED)
def test_the_layer_is_named_as_in_named_modules_and_nothing_changes(name, one_process):
    build, layer = WRAPPED[name]
    model = build()
    arguments = everything(model)
    arguments["step"](model, images(1)[0])  # compiles, and leaves gradients and momentum
    assert layer in dict(model.named_modules())
    before, inner = state_of(model), copy.deepcopy(arguments["optimizer"].state_dict())
    diagnosis = bn.diagnose(model, images(), **arguments)
    found = [(each.code, each.layers[0]) for each in diagnosis.findings if each.code == "BN201"]
    assert found == [("BN201", layer)], str(diagnosis)
    assert {each.severity for each in diagnosis.findings if each.code != "BN705"} == {"error"}
    assert same(state_of(model), before)
    assert same(arguments["optimizer"].state_dict(), inner)
    fixed = diagnosis.fix(model, "BN201")
    assert [each.gone for each in fixed.changes] == [True]
    fixed.undo()
    assert same(state_of(model), before)


def on_two_ranks(rank, _size):
    """Each rank diagnoses its own data, with plain layers and synchronized ones; and one diagnoses alone."""
    items = images(4, seed=rank)
    for synchronized in (False, True):
        model = lagging().model
        model = DistributedDataParallel(bn.synchronize(model) if synchronized else model)
        before = state_of(model)
        diagnosis = bn.diagnose(model, items, **everything(model))
        assert [each.layers for each in diagnosis.findings if each.code == "BN201"] == [("module.4",)]
        assert same(state_of(model), before)
        assert bn.replicas_agree(model)
    few = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    small = [torch.randn(10, 16, generator=torch.Generator().manual_seed(n + 100 * rank)) for n in range(30)]
    assert codes(bn.diagnose(few, small, select="BN402")) == ["BN402"]
    both = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(few)), bn.synchronize(few)
    assert [codes(bn.diagnose(each, small, select="BN402")) for each in both] == [[], []]
    model = DistributedDataParallel(lagging().model)
    if rank == 0:  # nothing in it waits for the other
        assert codes(bn.diagnose(model, items, select="BN201")) == ["BN201"]
    dist.barrier()


def test_two_ranks():
    on_replicas(on_two_ranks, 2)


def test_a_large_embedding_costs_no_more_than_its_copy():
    class Recommender(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.EmbeddingBag(10**6, 8, sparse=True)
            self.norm = nn.BatchNorm1d(8, momentum=1e-3)
            self.out = nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.norm(self.embedding(x) * 5 + 3))

    torch.manual_seed(0)
    model = Recommender()
    items = [(torch.randint(10**6, (64, 20)), torch.randint(2, (64,))) for _ in range(4)]
    F.cross_entropy(model(items[0][0]), items[0][1]).backward()  # a sparse gradient
    grad = model.embedding.weight.grad
    before = {name: value.clone() for name, value in model.state_dict().items()}
    diagnosis = bn.diagnose(model, items, criterion=nn.CrossEntropyLoss())
    assert codes(diagnosis)[0] == "BN201"
    assert model.embedding.weight.grad is grad
    assert same(dict(model.state_dict()), before)


def test_a_loader_that_raises_at_the_third_batch_leaves_every_bit(one_process):
    model = DistributedDataParallel(lagging().model)
    F.cross_entropy(model(images(1)[0][0]), images(1)[0][1]).backward()

    def loader():
        yield from images(2)
        raise OSError("no disk")

    before = state_of(model)
    with pytest.raises(OSError, match="no disk"):
        bn.diagnose(model, loader(), criterion=nn.CrossEntropyLoss())
    assert same(state_of(model), before)


def test_an_empty_loader_of_a_compiled_model():
    model = torch.compile(lagging().model, backend="eager")
    with pytest.raises(bn.errors.InputError, match="at least one batch"):
        bn.diagnose(model, [])


def test_names_with_markup_and_dots_reach_every_format(tmp_path):
    inner = lagging().model
    model = nn.ModuleDict({"<img src=x onerror=alert(1)>": inner})
    diagnosis = bn.diagnose(model, images(), forward=lambda _, item: inner(item[0]), criterion=nn.CrossEntropyLoss())
    assert "<img" in str(diagnosis)
    for form in ("html", "json", "sarif"):
        getattr(diagnosis, f"to_{form}")(tmp_path / f"d.{form}")
    assert "<img" not in (tmp_path / "d.html").read_text()
