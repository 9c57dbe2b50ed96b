"""Meta-learning: TaskNorm and episodes, statistics and weights of inner steps, fast weights, `torch.func`, `higher`."""

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import ArgumentError, DTypeError, InputError, StateError
from batchnorm.statistics import Batch, Domains, MovingAverage, Running, TaskNorm
from tests import test_sweep as sweep
from tests.layer_table import Row

LEARNED = ("statistics_scale", "statistics_offset")
SUPPORT, QUERIES = torch.randn(5, 3, 4, 2), torch.randn(7, 3, 4, 2) * 2 + 1

ROWS = [
    Row("task-norm", lambda **k: bn.BatchNorm2d(3, statistics=TaskNorm(), **k), (4, 3, 5, 2)),
    Row("task-norm-layer", lambda **k: bn.BatchNorm1d(3, statistics=TaskNorm("layer"), **k), (8, 3)),
    Row("task-norm-none", lambda **k: bn.BatchNorm2d(3, statistics=TaskNorm("none"), **k), (4, 3, 5, 2)),
]


def after_support(layer: nn.Module, support: Tensor, queries: Tensor, episode: bn.Episode | None = None) -> Tensor:
    """The queries' output, in an episode with this support set."""
    episode = bn.Episode() if episode is None else episode
    with episode.support():
        layer(support)
    with episode.query():
        return layer(queries)


def learned(blend: str, **options) -> bn.BatchNorm2d:
    torch.manual_seed(3)
    layer = bn.BatchNorm2d(3, statistics=TaskNorm(blend), dtype=torch.float64, **options)
    for value in layer.parameters():
        value.data.uniform_(-0.5, 0.5)
    return layer


def task_norm(x: Tensor, support: Tensor, layer: nn.Module, blend: str) -> Tensor:
    """The formula of Bronskill et al. 2020 (arXiv:2003.03284) as written."""
    mean_s, var_s = support.mean((0, 2, 3), keepdim=True), support.var((0, 2, 3), correction=0, keepdim=True)
    axes = {"instance": (2, 3), "layer": (1, 2, 3), "none": (2, 3)}[blend]
    mean_i, var_i = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    alpha = torch.ones(1, dtype=x.dtype)
    if blend != "none":
        alpha = torch.sigmoid(layer.statistics_scale * support.shape[0] + layer.statistics_offset)
    mean = alpha * mean_s + (1 - alpha) * mean_i
    variance = alpha * (var_s + (mean_s - mean) ** 2) + (1 - alpha) * (var_i + (mean_i - mean) ** 2)
    x_hat = (x - mean) / torch.sqrt(variance + layer.eps)
    return layer.weight.view(1, -1, 1, 1) * x_hat + layer.bias.view(1, -1, 1, 1)


class TestTaskNorm:
    @pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
    @pytest.mark.parametrize("blend", ["instance", "layer", "none"])
    def test_outputs_and_gradients_are_the_formulas(self, blend, training):
        layer = learned(blend).train(training)
        support, queries = SUPPORT.double().requires_grad_(), QUERIES.double().requires_grad_()
        inputs = [support, queries, *layer.parameters()]
        assert len(inputs) == (4 if blend == "none" else 6)
        episode, weights = bn.Episode(), torch.randn(7, 3, 4, 2, dtype=torch.float64)
        with episode.support():
            of_support = layer(support)
        with episode.query():
            of_queries = layer(queries)
        results = [
            (a, b, *torch.autograd.grad((a * weights[:5]).sum() + b.pow(3).sum(), inputs))
            for a, b in (
                (of_support, of_queries),
                (task_norm(support, support, layer, blend), task_norm(queries, support, layer, blend)),
            )
        ]
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
        assert all(value.abs().max() > 1e-4 for value in results[0])

    def test_derivatives_of_queries_to_any_order(self):
        layer = learned("layer")
        names = [name for name, _ in layer.named_parameters()]

        def call(support, queries, *parameters):
            state = dict(zip(names, parameters, strict=True)) | {k: v.clone() for k, v in layer.named_buffers()}
            episode = bn.Episode()
            with episode.support():
                functional_call(layer, state, (support,))
            with episode.query():
                return functional_call(layer, state, (queries,))

        inputs = [SUPPORT[:3].double(), QUERIES[:2].double(), *layer.parameters()]
        inputs = [value.detach().clone().requires_grad_() for value in inputs]
        assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)

    def test_no_query_depends_on_another_one_and_nothing_is_updated_by_queries(self):
        layer, episode = learned("instance"), bn.Episode()
        together = after_support(layer, SUPPORT.double(), QUERIES.double(), episode)
        before = copy.deepcopy(layer.state_dict())
        with episode.query():
            alone = torch.cat([layer(query) for query in QUERIES.double().split(1)])
        torch.testing.assert_close(alone, together)
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
        assert layer.num_batches_tracked == 1
        plain = nn.BatchNorm2d(3, dtype=torch.float64)
        plain(SUPPORT.double())
        torch.testing.assert_close(layer.running_var, plain.running_var)

    def test_a_mask_hides_whatever_is_behind_it(self):
        layer = bn.BatchNorm1d(3, statistics=TaskNorm(), activation="silu", dtype=torch.float64)
        x, lengths = torch.randn(4, 3, 6, dtype=torch.float64), torch.tensor([6, 3, 5, 2])
        hidden = x.masked_fill(torch.arange(6) >= lengths.view(-1, 1, 1), torch.nan)
        results = []
        for values in (x.clone(), hidden):
            layer.reset_parameters()
            values.requires_grad_()
            y = layer(values, values * 2, lengths=lengths)
            grads = torch.autograd.grad(y.square().sum(), [values, *layer.parameters()])
            results.append((y, *grads, layer.running_mean, layer.running_var))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        episode = bn.Episode()
        with episode.support():
            layer(x, lengths=lengths)
        with episode.query():
            torch.testing.assert_close(layer(x[:1], lengths=torch.tensor([3]))[..., :3], layer(x[:1, :, :3]))

    def test_refusals(self):
        with pytest.raises(InputError, match="blend must be one of 'instance', 'layer', 'none'"):
            TaskNorm("group")
        with pytest.raises(InputError, match=r"more than one value per channel.*\(4, 3\); use TaskNorm\('layer'\)"):
            bn.BatchNorm1d(3, statistics=TaskNorm())(torch.randn(4, 3))
        with pytest.raises(DTypeError, match="real input"):
            bn.BatchNorm2d(3, statistics=TaskNorm(), dtype=torch.complex64)(SUPPORT.to(torch.complex64))
        layer = bn.BatchNorm2d(3, statistics=TaskNorm())
        with pytest.raises(StateError, match="as_one_batch"):
            bn.as_one_batch(layer, list(SUPPORT.split(1)))
        for reentrant in (True, False):
            y = checkpoint(layer, SUPPORT.clone().requires_grad_(), use_reentrant=reentrant)
            with pytest.raises(StateError, match="without checkpointing"):
                y.sum().backward()
        with pytest.raises(InputError, match="more than 1 value per channel"), bn.Episode().support():
            bn.BatchNorm1d(3, statistics=TaskNorm("layer")).eval()(torch.randn(1, 3))
        with pytest.raises(StateError, match="in inference, but there is no episode"):
            layer.eval()(SUPPORT)

    @pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
    def test_the_sweeps_of_layers_that_train(self, row):
        sweep.test_gradcheck(row, True)
        sweep.test_meta_device(row)
        for clone in (copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))):
            sweep.test_copies_are_equal_and_apart(row, clone)
        for dtype in (torch.float16, torch.bfloat16):
            sweep.test_half_precision_keeps_float32_statistics(row, dtype)
        sweep.test_vmap_over_stacked_state_equals_a_loop(row)
        sweep.test_func_grad_and_jvp(row)
        sweep.test_is_a_leaf_of_fx(row)
        sweep.test_autocast(row)

    def test_compiles_in_one_graph_outside_of_an_episode(self):
        layer, twin = (bn.BatchNorm2d(3, statistics=TaskNorm()) for _ in range(2))
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(SUPPORT), twin(SUPPORT))
        torch.testing.assert_close(layer.state_dict(), twin.state_dict())
        with bn.Episode().support(), pytest.raises(Exception, match=r"StateError|an episode stores moments"):
            compiled(SUPPORT)


class TestEpisode:
    def test_the_calls_of_a_shared_layer_are_apart(self):
        layer, episode = bn.BatchNorm1d(3, statistics=TaskNorm("none")), bn.Episode()
        with episode.support():
            layer(torch.randn(9, 3)), layer(torch.randn(9, 3) + 100)
        with episode.query():
            for _ in range(2):  # two forwards
                assert layer(torch.randn(5, 3)).abs().max() < 10
                assert layer(torch.randn(5, 3) + 100).abs().max() < 10
        with (
            pytest.raises(StateError, match="called 1 times with queries and 2 times with the support set"),
            episode.query(),
        ):
            layer(torch.randn(5, 3))

    def test_the_last_support_set_counts_unless_it_failed(self):
        layer, episode = bn.BatchNorm1d(3, statistics=TaskNorm("none")), bn.Episode()
        for shift in (0.0, 50.0):
            with episode.support():
                layer(torch.randn(9, 3) + shift)
        with pytest.raises(ZeroDivisionError), episode.support():
            layer(torch.randn(9, 3)).view(1 // 0)
        with episode.query():
            assert layer(torch.randn(5, 3) + 50).abs().max() < 10
        assert layer.train()(torch.randn(5, 3)).abs().max() < 10  # outside, a batch is its own support set

    def test_queries_need_a_support_set_that_reached_the_layer(self):
        layer, episode = bn.BatchNorm1d(3, statistics=Domains(range(2), TaskNorm("layer"))), bn.Episode()
        with pytest.raises(StateError, match=r"did not reach this layer; forward it first"), episode.query():
            layer(torch.randn(4, 3))
        with bn.domain(1), episode.support():
            layer(torch.randn(4, 3))
        with pytest.raises(StateError, match="did not reach this layer;"), episode.query():
            layer(torch.randn(4, 3))
        with bn.domain(1), episode.query():
            layer(torch.randn(4, 3))
        with pytest.raises(InputError, match="at least one sample"), episode.support():
            layer(torch.randn(0, 3))

    def test_episodes_belong_to_a_thread_and_may_take_turns(self):
        layer = bn.BatchNorm1d(3, statistics=TaskNorm("none"))
        supports = [torch.randn(9, 3), torch.randn(9, 3) * 3 + 5]
        episodes = [bn.Episode(), bn.Episode()]
        for episode, support in zip(episodes, supports, strict=True):
            with episode.support():
                layer(support)
        queries, outputs = torch.randn(4, 3), []
        for episode in episodes:
            with episode.query():
                outputs.append(layer(queries))
                thread = threading.Thread(target=lambda: outputs.append(layer(queries)))
                thread.start()
                thread.join()
        for y, statistics in zip(outputs, (supports[0], queries, supports[1], queries), strict=True):
            expected = (queries - statistics.mean(0)) / (statistics.var(0, correction=0) + layer.eps).sqrt()
            torch.testing.assert_close(y, expected)

    def test_vmap_over_tasks_equals_a_loop(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        bn.convert(model, statistics=TaskNorm("layer"))
        torch.func.replace_all_batch_norm_modules_(model)
        supports, queries = torch.randn(5, 6, 3), torch.randn(5, 4, 3)

        def one(support, query):
            return after_support(model, support, query)

        expected = torch.stack([one(*pair) for pair in zip(supports, queries, strict=True)])
        torch.testing.assert_close(torch.vmap(one)(supports, queries), expected)


class TestParametersOfSources:
    def test_they_come_and_go_with_the_source(self):
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
        keys = list(model.state_dict())
        bn.convert(model, statistics=TaskNorm())
        assert [name for name, _ in model[1].named_parameters()] == ["weight", "bias", *LEARNED]
        model[1].statistics_scale.data.fill_(0.3)
        bn.freeze(model)
        assert not any(value.requires_grad for value in model[1].parameters())
        model(torch.randn(1, 1, 8, 8))
        bn.unfreeze(model)
        assert all(value.requires_grad for value in model[1].parameters())
        bn.convert(model, to="group")
        assert [name for name, _ in model[1].named_parameters()] == ["weight", "bias"]
        bn.revert(model)
        assert type(model[1]) is nn.BatchNorm2d
        assert list(model.state_dict()) == keys

    def test_alternatives_give_them_back(self):
        layer = bn.BatchNorm2d(8, statistics=TaskNorm())
        layer.statistics_scale.data.fill_(0.3)
        state = copy.deepcopy(layer.state_dict())
        bn.revert(bn.convert(layer, to="group"))
        torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)
        assert layer.statistics == TaskNorm()

    def test_an_assignment_keeps_what_was_learned_unless_the_source_is_another(self):
        layer = learned("instance")
        before = layer.statistics_scale
        layer.statistics = TaskNorm("layer")
        assert layer.statistics_scale is before
        layer.statistics = Batch()
        assert "statistics_scale" not in layer.state_dict()
        layer.statistics = TaskNorm()
        assert layer.statistics_scale == 0
        layer.statistics_scale.data.fill_(1.0)
        layer.reset_parameters()
        assert layer.statistics_scale == 0

    @pytest.mark.parametrize("source", [TaskNorm(), Domains(range(2), TaskNorm(), affine=True)], ids=repr)
    @pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
    def test_checkpoints_load_into_any_source(self, source, assign):
        plain, layer = bn.BatchNorm2d(3), bn.BatchNorm2d(3, statistics=source)
        for value in layer.parameters():
            value.data.uniform_()
        state = layer.state_dict()
        plain.load_state_dict(state, assign=assign)
        again = bn.BatchNorm2d(3, statistics=source)
        again.load_state_dict(state, assign=assign)
        torch.testing.assert_close(again.state_dict(), state, rtol=0, atol=0)
        nn.init.constant_(plain.weight, 2.0)
        again.load_state_dict(plain.state_dict(), assign=assign)
        for name, value in again.named_parameters():
            assert value.requires_grad
            if "weight" in name:
                assert (value == 2).all(), name
            elif name.startswith(LEARNED):
                assert value == 0, name

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_lazy_layers_and_layers_without_weights(self, dtype):
        source = Domains(("a", "b"), TaskNorm(), affine=True)
        lazy = bn.LazyBatchNorm2d(statistics=source, dtype=dtype)
        with bn.domain("b"):
            lazy(torch.randn(2, 5, 3, 3, dtype=dtype))
        assert {name: (tuple(value.shape), value.dtype) for name, value in lazy.named_parameters()} == {
            name: (shape, dtype)
            for name, shape in {
                **dict.fromkeys(("weight", "bias", "statistics_weight_b", "statistics_bias_b"), (5,)),
                **{name + suffix: (1,) for name in LEARNED for suffix in ("", "_b")},
            }.items()
        }
        bare = bn.BatchNorm2d(3, affine=False, statistics=source, device="meta", dtype=dtype)
        assert {(value.is_meta, value.dtype) for value in bare.parameters()} == {(True, dtype)}
        assert len(list(bare.parameters())) == 4

    def test_the_conversion_of_a_pruned_layer_leaves_its_parameters(self):
        layer = bn.BatchNorm1d(4)
        prune.l1_unstructured(layer, "weight", 2)
        layer.statistics = Domains(("a", "orig"), affine=True)
        layer.statistics = Batch()
        assert {name for name, _ in layer.named_parameters()} == {"weight_orig", "bias"}


class TestSteps:
    """The inner steps of MAML++ as domains."""

    def test_each_step_is_a_layer_of_its_own(self):
        layer = bn.BatchNorm2d(3, statistics=Domains(range(3), affine=True), dtype=torch.float64)
        steps = [nn.BatchNorm2d(3, dtype=torch.float64) for _ in range(3)]
        x = [torch.randn(4, 3, 5, 2, dtype=torch.float64) + step for step in range(3)]
        for step, own in enumerate(steps):
            with bn.domain(step):
                y = layer(x[step])
            expected = own(x[step])
            torch.testing.assert_close(y, expected)
            y.pow(3).sum().backward()
            expected.pow(3).sum().backward()
        for step, own in enumerate(steps):
            weight, bias = ("weight", "bias") if step == 0 else (f"statistics_weight_{step}", f"statistics_bias_{step}")
            torch.testing.assert_close(getattr(layer, weight).grad, own.weight.grad)
            torch.testing.assert_close(getattr(layer, bias).grad, own.bias.grad)
            getattr(layer, bias).data.fill_(step)
            own.bias.data.fill_(step)
            with bn.domain(str(step)):
                torch.testing.assert_close(layer.eval()(x[0]), own.eval()(x[0]))
            layer.train()

    def test_domains_within_have_their_own_window_and_weight(self):
        layer = bn.BatchNorm1d(2, statistics=Domains(("a", "b"), MovingAverage(2, warmup=0), affine=True))
        with bn.domain("b"):
            layer(torch.randn(4, 2)).sum().backward()
        assert layer.weight.grad is None
        assert layer.statistics_bias_b.grad.eq(4).all()

    def test_layers_without_weight_or_bias(self):
        for options in ({"affine": False}, {"bias": False}):
            layer = bn.BatchNorm1d(2, statistics=Domains((0, 1), affine=True), **options)
            with bn.domain(1):
                torch.testing.assert_close(layer(torch.eye(2)), bn.BatchNorm1d(2, affine=False)(torch.eye(2)))
            assert len(list(layer.parameters())) == (0 if "affine" in options else 2)

    def test_a_frozen_layer_keeps_the_weights_of_its_domains(self):
        layer = bn.BatchNorm1d(2, statistics=Domains((0, 1), affine=True))
        nn.init.constant_(layer.statistics_bias_1, 7.0)
        bn.freeze(layer)
        assert isinstance(layer.statistics, Running)
        with bn.domain(1):
            assert layer(torch.zeros(3, 2)).eq(7).all()

    def test_names(self):
        assert Domains(range(2)) == Domains(("0", "1"))
        for names in ((True, False), (1.0, 2.0), 3, {"a", "b"}):
            with pytest.raises(ArgumentError, match="sequence of strings or integers"):
                Domains(names)
        with pytest.raises(InputError, match="all different"):
            Domains((1, "1"))


def network(statistics=None, *, converted: bool = True) -> nn.Sequential:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 3)).double()
    return bn.convert(model, statistics=statistics) if converted else model


TASK = (
    torch.randn(6, 1, 6, 6, dtype=torch.float64),
    torch.arange(6) % 3,
    torch.randn(9, 1, 6, 6, dtype=torch.float64),
    torch.arange(9) % 3,
)


def with_autograd(model: nn.Module, steps: int = 2) -> Tensor:
    """The loss of MAML's queries (Finn et al. 2017), with gradients of second order."""
    support, labels, queries, answers = TASK
    weights = dict(model.named_parameters())
    for _ in range(steps):
        loss = cross_entropy(functional_call(model, weights, support), labels)
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {name: value - 0.5 * grad for (name, value), grad in zip(weights.items(), grads, strict=True)}
    return cross_entropy(functional_call(model, weights, queries), answers)


def with_func(model: nn.Module, parameters: dict[str, Tensor], steps: int = 2) -> Tensor:
    """The same with `torch.func.grad`."""
    support, labels, queries, answers = TASK
    weights = parameters
    for _ in range(steps):
        grads = torch.func.grad(lambda w: cross_entropy(functional_call(model, w, support), labels))(weights)
        weights = {name: value - 0.5 * grads[name] for name, value in weights.items()}
    return cross_entropy(functional_call(model, weights, queries), answers)


class TestMAML:
    def test_meta_gradients_and_running_statistics_are_torchs(self):
        ours, torchs = network(), network(converted=False)
        for model in (ours, torchs):
            with_autograd(model).backward()
        torch.testing.assert_close(*([p.grad for p in m.parameters()] for m in (ours, torchs)), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
        assert ours[1].num_batches_tracked == 3
        by_func = network()
        parameters = {name: value.detach() for name, value in by_func.named_parameters()}
        grads = torch.func.grad(lambda w: with_func(by_func, w))(parameters)
        expected = {name: value.grad for name, value in torchs.named_parameters()}
        torch.testing.assert_close(grads, expected, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(by_func.state_dict(), torchs.state_dict())

    def test_second_order_terms_matter(self):
        model = network()
        with_autograd(model).backward()
        parameters = {name: value.detach() for name, value in model.named_parameters()}
        step, losses = 1e-5, []
        for sign in (1, -1):
            moved = {name: value + sign * step * (name == "0.weight") for name, value in parameters.items()}
            losses.append(with_func(model, moved))
        slope = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close(model[0].weight.grad.sum(), slope, rtol=1e-5, atol=1e-8)

    def test_vmap_over_tasks_says_what_to_do_and_each_remedy_works(self):
        x = torch.randn(5, 4, 1, 6, 6, dtype=torch.float64)
        model = network()
        with pytest.raises(StateError, match=r"functional_call.*batchnorm\.freeze.*replace_all_batch_norm_modules_"):
            torch.vmap(model)(x)
        before = copy.deepcopy(model.state_dict())
        buffers = {name: value.expand(5, *value.shape).clone() for name, value in model.named_buffers()}
        y = torch.vmap(lambda own, batch: functional_call(model, own, (batch,)))(buffers, x)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        for task, batch in enumerate(x):
            alone = network()
            torch.testing.assert_close(alone(batch), y[task])
            torch.testing.assert_close(dict(alone.named_buffers()), {name: b[task] for name, b in buffers.items()})
        frozen = bn.freeze(network())
        torch.testing.assert_close(torch.vmap(frozen)(x), torch.stack([frozen(batch) for batch in x]))
        torch.func.replace_all_batch_norm_modules_(model)
        torch.testing.assert_close(torch.vmap(model)(x), y)

    def test_higher(self):
        higher = pytest.importorskip("higher", reason="higher is not installed")
        gradients = []
        for model in (network(converted=False), network()):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(2):
                    inner.step(cross_entropy(fast(TASK[0]), TASK[1]))
                cross_entropy(fast(TASK[2]), TASK[3]).backward()
            gradients.append([value.grad for value in model.parameters()])
            assert model[1].num_batches_tracked == 0  # `higher` updates a copy
        with_autograd(model := network()).backward()
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(gradients[1], [p.grad for p in model.parameters()], rtol=1e-8, atol=1e-12)


def test_with_query_statistics_a_prediction_depends_on_the_other_queries():
    layer = bn.BatchNorm2d(3, statistics=TaskNorm())
    first = QUERIES[:1]
    mates = [torch.cat([first, QUERIES[1:] + shift]) for shift in (0.0, 3.0)]
    transductive = bn.BatchNorm2d(3)
    moved = (transductive(mates[0])[0] - transductive(mates[1])[0]).abs().max()
    assert moved > 0.3
    one, other = (after_support(layer, SUPPORT, mate)[0] for mate in mates)
    torch.testing.assert_close(one, other)
