"""`num_nonfinite_batches`: right wherever a layer came from, and no buffer that others stumble over."""

import copy
import pickle

import pytest
import torch
from torch import nn

import batchnorm as bn

BAD = torch.full((4, 3), float("nan"))
GOOD = torch.randn(4, 3)


def junk():
    """Memory that was written, for what is not initialized to find."""
    del [torch.full((), 987654321) for _ in range(10000)][:]


def by_skip_init():
    return torch.nn.utils.skip_init(bn.BatchNorm1d, 3)


def on_meta():
    with torch.device("meta"):
        return bn.BatchNorm1d(3)


def emptied():
    layer = on_meta().to_empty(device="cpu")
    layer.load_state_dict(nn.BatchNorm1d(3).state_dict())
    return layer


def assigned():
    layer = on_meta()
    layer.load_state_dict(nn.BatchNorm1d(3).state_dict(), assign=True)
    return layer


def set_one_by_one():
    """As libraries do that load a checkpoint tensor by tensor; what is not in it they fill with empty memory."""
    layer = on_meta()
    for name, value in nn.BatchNorm1d(3).state_dict().items():
        store = layer._parameters if name in layer._parameters else layer._buffers
        store[name] = nn.Parameter(value) if name in layer._parameters else value
    for name, value in layer.named_buffers():
        if value.is_meta:
            layer._buffers[name] = torch.empty_like(value, device="cpu")
    return layer


def converted_on_meta():
    with torch.device("meta"):
        layer = bn.convert(nn.BatchNorm1d(3))
    return layer.to_empty(device="cpu")


def converted_after_skip_init():
    return bn.convert(torch.nn.utils.skip_init(nn.BatchNorm1d, 3))


def lazy():
    layer = bn.LazyBatchNorm1d()
    layer.eval()(GOOD)
    return layer.train()


MAKERS = [
    by_skip_init, emptied, assigned, set_one_by_one, converted_on_meta, converted_after_skip_init, lazy
]  # fmt: skip


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("masked", [False, True], ids=["fast", "general"])
def test_a_new_layer_has_counted_nothing_and_counts(make, masked):
    for _ in range(5):
        junk()
        layer = make()
        layer.load_state_dict(nn.BatchNorm1d(3).state_dict())
        assert layer.num_nonfinite_batches == 0
    junk()
    layer = make()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        layer._buffers[name] = torch.zeros_like(layer._buffers[name])
    mask = torch.ones(4, dtype=torch.bool) if masked else None
    layer(BAD, mask=mask)
    layer(GOOD, mask=mask)
    layer(BAD, mask=mask)
    assert layer.num_nonfinite_batches == 2
    assert layer.num_nonfinite_batches.dtype == torch.int64
    assert layer.num_batches_tracked == 1


def test_it_is_no_buffer():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    copied = bn.convert(copy.deepcopy(model))
    assert [name for name, _ in copied.named_buffers()] == [name for name, _ in model.named_buffers()]
    assert list(copied.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("convert_first", [False, True])
def test_averages_of_weights_pair_the_buffers(convert_first):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    if convert_first:
        bn.convert(model)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    bn.convert(model)
    for _ in range(2):
        model(GOOD)
        average.update_parameters(model)
    assert average.module[1].running_mean.ne(0).all()
    assert len(list(average.module.buffers())) == len(list(model.buffers()))


def test_it_follows_copies_pickles_and_moves():
    layer = bn.BatchNorm1d(3)
    layer(BAD)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other(BAD)
        assert other.num_nonfinite_batches == 2
    assert layer.num_nonfinite_batches == 1
    assert layer.double().float().share_memory().num_nonfinite_batches == 1
    layer.reset_running_stats()
    assert layer.num_nonfinite_batches == 0
    layer(BAD)
    assert layer.to("meta").num_nonfinite_batches.is_meta
    assert layer.to_empty(device="cpu").num_nonfinite_batches == 0
    assert bn.BatchNorm1d(3, track_running_stats=False).num_nonfinite_batches is None


def test_a_pickle_of_when_it_was_a_buffer_loads():
    layer = bn.BatchNorm1d(3)
    del layer._nonfinite_batches
    layer.register_buffer("_was", torch.tensor(7), persistent=False)
    layer._buffers["num_nonfinite_batches"] = layer._buffers.pop("_was")
    layer._non_persistent_buffers_set = {"num_nonfinite_batches"}
    found = pickle.loads(pickle.dumps(layer))
    found(BAD)
    assert found.num_nonfinite_batches == 8
    assert "num_nonfinite_batches" not in dict(found.named_buffers())
    assert found._non_persistent_buffers_set == set()


def test_revert_takes_it_away():
    layer = bn.revert(bn.convert(nn.BatchNorm1d(3)))
    assert not hasattr(layer, "num_nonfinite_batches")
    assert vars(layer).keys() == vars(nn.BatchNorm1d(3)).keys()


def test_an_ensemble_counts_each_of_its_batches():
    models = [bn.BatchNorm1d(3) for _ in range(4)]
    parameters, buffers = torch.func.stack_module_state(models)
    layer = bn.BatchNorm1d(3)
    x = torch.stack([GOOD, BAD, GOOD, BAD])
    torch.vmap(lambda p, b, x: torch.func.functional_call(layer, (p, b), (x,)))(parameters, buffers, x)
    assert layer.num_nonfinite_batches == 2
    assert buffers["num_batches_tracked"].tolist() == [1, 0, 1, 0]
    torch.func.grad(lambda x: layer(x).sum())(BAD)
    assert layer.num_nonfinite_batches == 3


def test_compiled_code_writes_to_fixed_addresses_alone():
    """CUDA graphs are refused otherwise."""
    layer, graphs = bn.BatchNorm1d(3), []

    def backend(graph, inputs):
        graphs.append(graph.graph)
        return graph.forward

    torch.compile(layer, fullgraph=True, backend=backend)(BAD)
    assert layer.num_nonfinite_batches == 1
    (graph,) = graphs
    (call,) = (node for node in graph.nodes if str(node.target).startswith("batchnorm.train_in_graph"))
    operator = call.target
    arguments = zip(operator._schema.arguments, call.args, strict=True)
    written = {node for argument, node in arguments if argument.alias_info is not None and argument.alias_info.is_write}
    assert len(written) == 4  # mean, variance, both counters
    for node in written:
        assert node.meta["tensor_dict"].get("_dynamo_static_input_type"), node
