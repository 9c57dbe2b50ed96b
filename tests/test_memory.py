"""Saving memory: gradients to the last bit, what is kept and for how long, and everything else that hooks into autograd."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.kernels import KERNELS, cpu
from batchnorm.lab.networks import resnet50
from batchnorm.measure import saved_bytes
from batchnorm.memory import contexts
from batchnorm.memory.recipes import Recipe
from batchnorm.memory.saver import DEPTH
from tests.layer_table import ACTIVATIONS, ROWS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Block(nn.Module):
    """A residual block that uses the layers' own residual and activation, or torch's as users write them."""

    def __init__(self, activation, fused):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = bn.BatchNorm2d(4, activation=activation)
        self.last = bn.BatchNorm2d(4, activation=activation if fused else None)
        self.fused, self.activation = fused, self.norm.activation

    def forward(self, x, mask=None):
        y = self.second(self.norm(self.first(x), mask=mask))
        if self.fused:
            return self.last(y, residual=x, mask=mask)
        y = self.last(y)
        y += x
        return y if self.activation is None else self.activation(y)


def network(activation="relu", fused=True, blocks=3) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), bn.BatchNorm2d(4, activation=activation),
        *(Block(activation, fused) for _ in range(blocks)), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, bn.BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def sample(dtype=torch.float32, layout=torch.contiguous_format) -> torch.Tensor:
    x = torch.randn(4, 3, 6, 7, generator=torch.Generator().manual_seed(4)).to(dtype)
    return x.contiguous(memory_format=layout)


def step(model, x=None, call=None) -> list[torch.Tensor]:
    """Output, gradients and buffers of one step, the input's gradient with them."""
    x = (sample() if x is None else x).clone().requires_grad_()
    y = (call or model)(x)
    (y.float().square().sum() + y.float().sum()).backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def saving(function):
    def call(*args):
        with bn.save_memory():
            return function(*args)

    return call


def same(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture
def recomputed(monkeypatch) -> list[Recipe]:
    """The recipes that are carried out, in that order."""
    done = []
    compute = Recipe._compute
    monkeypatch.setattr(Recipe, "_compute", lambda recipe: done.append(recipe) or compute(recipe))
    return done


def bytes_in_hooks(function, besides) -> int:
    """What autograd saves, each storage once, without those of `besides`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    storages: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    del result
    return sum(storages.values())


class TestGradients:
    @pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
    @pytest.mark.parametrize(
        "activation",
        [
            pytest.param(name, marks=() if name in (None, "relu", "silu") else pytest.mark.slow)
            for name in (None, *ACTIVATIONS)
        ],
        ids=str,
    )
    @pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
    def test_are_equal_to_the_last_bit(self, activation, training, fused, recomputed):
        for kernels in ("all", "eager"):
            with pytest.MonkeyPatch.context() as patch:
                if kernels == "eager":
                    patch.setattr("batchnorm.kernels.KERNELS", KERNELS[-1:])
                for dtype in DTYPES:
                    for layout in (torch.contiguous_format, torch.channels_last):
                        model = network(activation, fused).to(dtype).train(training)
                        twin, x = copy.deepcopy(model), sample(dtype, layout)
                        expected = step(model, x)
                        assert not recomputed
                        same(step(twin, x, saving(twin)), expected)
                        assert len(recomputed) >= 7
                        recomputed.clear()

    @pytest.mark.parametrize("activation", [None, "relu", "gelu"], ids=str)
    def test_with_masks(self, activation, recomputed):
        mask = torch.rand(4, 6, 7) > 0.3

        def call(model, x):
            y = model[1](model[0](x), mask=mask)
            return model[-1](model[2](y, mask=mask))

        model = network(activation, blocks=1)
        twin = copy.deepcopy(model)
        expected = step(model, call=lambda x: call(model, x))
        same(step(twin, call=saving(lambda x: call(twin, x))), expected)
        assert len(recomputed) == 3

    @pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
    def test_of_every_layer(self, row):
        torch.manual_seed(1)
        layer = row.ours()
        model = nn.Sequential(nn.Identity(), layer, nn.Linear(row.shape[-1], 2))
        twin, x = copy.deepcopy(model), torch.randn(row.shape)
        same(step(twin, x, saving(twin)), step(model, x))

    @pytest.mark.parametrize(
        "module",
        [nn.ReLU(), nn.ReLU(True), nn.ReLU6(), nn.ReLU6(True), nn.LeakyReLU(0.2, True), nn.SiLU(True), nn.Hardswish(True),
         nn.GELU("tanh"), nn.Sigmoid(), nn.Tanh(), nn.Mish(), nn.ELU(0.5), nn.SELU(True), nn.CELU(), nn.Hardtanh(-2, 2, True),
         nn.Hardsigmoid()],
        ids=repr,
    )  # fmt: skip
    def test_of_activations_after_a_layer(self, module, recomputed):
        model = nn.Sequential(bn.BatchNorm2d(3), module, nn.Conv2d(3, 2, 1))
        twin = copy.deepcopy(model)
        expected = step(model)
        same(step(twin, call=saving(twin)), expected)
        assert len(recomputed) == 2

    def test_of_views(self, recomputed):
        torch.manual_seed(5)
        weights = [torch.randn(5, n, requires_grad=True) for n in (42, 7, 7, 168)]

        def call(layer, x):
            y = layer(x)
            parts = [y.flatten(2), y[:, 1:, ::2], y.chunk(2, 2)[1], y.reshape(4, 1, -1)[..., 2:]]
            last = weights[3][:, : parts[3].shape[-1]]
            products = [F.linear(part, weight) for part, weight in zip(parts, [*weights[:3], last], strict=True)]
            return torch.cat([product.flatten() for product in products])

        layer = bn.BatchNorm2d(3, activation="silu")
        twin = copy.deepcopy(layer)
        expected = [*step(layer, call=lambda x: call(layer, x)), *(w.grad.clone() for w in weights)]
        for weight in weights:
            weight.grad = None
        same([*step(twin, call=saving(lambda x: call(twin, x))), *(w.grad for w in weights)], expected)
        assert len(recomputed) == 1

    def test_second_derivatives(self):
        results = []
        for context in (lambda f: f, saving):
            model = network("silu", blocks=1).double()
            x = sample(torch.float64).requires_grad_()
            y = context(model)(x)
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            dx.square().sum().backward()
            results.append([dx.detach(), x.grad, *(p.grad for p in model.parameters())])
        same(*results)

    def test_second_derivatives_taken_inside(self):
        results = []
        for context in (lambda f: f, saving):
            model = network("gelu", False, blocks=1).double()

            def call(x, model=model):
                (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
                return dx.square()

            results.append(step(model, sample(torch.float64), context(call)))
        same(*results)

    def test_gradgradcheck(self):
        model = nn.Sequential(bn.BatchNorm1d(3, activation="gelu", dtype=torch.float64), nn.Linear(3, 2).double())
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(saving(model), x)
        assert torch.autograd.gradgradcheck(saving(model), x)

    def test_batched_gradients(self):
        model = network("relu", blocks=1)
        x, directions = sample().requires_grad_(), torch.randn(3, 4, 2, 6, 7)
        model.eval()
        grads = [
            torch.autograd.grad(call(x), x, directions, is_grads_batched=True)[0] for call in (model, saving(model))
        ]
        same(*([g] for g in grads))


class TestMemory:
    def test_of_a_resnet_step(self):
        """Against torch's layers as users write them, with the ReLU in place."""
        torch.manual_seed(0)
        x, labels = torch.randn(4, 3, 64, 64), torch.randint(1000, (4,))
        eager = resnet50()
        ours = bn.convert(copy.deepcopy(eager), save_memory=True)
        kept = [saved_bytes(lambda model=model: F.cross_entropy(model(x), labels)) for model in (eager, ours)]
        assert kept[1] <= 0.6 * kept[0]

    def test_the_measure_agrees_with_the_hooks(self):
        model, x = network(), sample()
        hooks = bytes_in_hooks(lambda: model(x).sum(), [*model.parameters(), *model.buffers(), x])
        assert saved_bytes(lambda: model(x).sum()) == pytest.approx(hooks, rel=0.02)

    def test_the_output_alone_is_freed(self, recomputed):
        layer, linear = bn.BatchNorm1d(8, activation="relu"), nn.Linear(8, 2)
        x = torch.randn(1000, 8, requires_grad=True)

        def call():
            return linear(layer(x * 1))

        size = x.numel() * 4
        assert saved_bytes(call) // size == 2
        assert saved_bytes(saving(call)) // size == 1

    def test_a_residual_in_nobodys_keeping_is_not_kept(self, recomputed):
        layer, conv = bn.BatchNorm2d(3, activation="relu"), nn.Conv2d(3, 3, 1)
        x = sample().requires_grad_()
        with bn.save_memory():
            y = conv(layer(x, residual=x.sigmoid().neg()))
        y.sum().backward()
        assert not recomputed

    def test_each_output_is_computed_once_in_a_backward_and_freed(self, recomputed):
        model = network("relu", fused=False, blocks=4)
        loss = saving(model)(sample()).square().sum()
        for _ in range(2):
            loss.backward(retain_graph=True)
            counts = {recipe: recomputed.count(recipe) for recipe in recomputed}
            referenced = [recipe for recipe in counts if len(recipe.references)]
            assert len(referenced) == 9
            assert all(counts[recipe] == 1 for recipe in referenced)
            assert all(recipe._result is None for recipe in counts)
            recomputed.clear()

    def test_a_backward_through_one_branch_leaves_nothing(self, recomputed):
        layer, one, other = bn.BatchNorm1d(3, activation="relu"), nn.Linear(3, 2), nn.Linear(3, 2)
        with bn.save_memory():
            y = layer(torch.randn(5, 3))
            a, b = one(y), other(y)
            del y
        torch.autograd.grad(a.sum(), one.weight)
        (recipe,) = recomputed
        assert recipe._result is None
        torch.autograd.grad(b.sum(), other.weight)
        assert recomputed == [recipe, recipe]

    def test_nothing_outlives_the_graph(self, recomputed):
        """Neither cycles nor caches: counted without the collector."""
        gc.collect()
        gc.disable()
        try:
            model = network("relu", fused=False)
            with bn.save_memory():
                loss = model(sample()).square().sum()
                loss.backward()
                del loss
                recipes = [weakref.ref(recipe) for recipe in recomputed]
                recomputed.clear()
                assert recipes
                assert all(recipe() is None for recipe in recipes)
                assert not contexts.thread.saver._entries
        finally:
            gc.enable()

    def test_a_long_open_context_grows_by_nothing(self):
        model = network("relu", fused=False)
        counts = []
        with bn.save_memory():
            for index in range(20):
                step(model)
                if index in (4, 19):
                    gc.collect()
                    counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
            assert not contexts.thread.saver._entries
        assert counts[1] <= counts[0]  # other tests leave things that go meanwhile

    def test_chains_are_cut(self, recomputed):
        model = network("relu", fused=False, blocks=20)
        twin = copy.deepcopy(model)
        expected = step(model)
        same(step(twin, call=saving(twin)), expected)
        deepest = max(recipe.depth for recipe in recomputed)
        assert deepest in (DEPTH - 1, DEPTH)
        assert len({recipe for recipe in recomputed if recipe.depth == deepest}) == 2


class TestModifiedInPlace:
    def test_input(self):
        layer, linear = bn.BatchNorm1d(3, activation="relu"), nn.Linear(3, 2)
        x = torch.randn(5, 3, requires_grad=True) * 1
        y = saving(lambda x: linear(layer(x)))(x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_anything_else_that_is_saved(self):
        """Torch does not check what goes through hooks; we do in its place."""
        a, b = torch.randn(3, requires_grad=True), torch.randn(3)
        with bn.save_memory():
            y = a * b
        b.add_(1)
        with pytest.raises(RuntimeError, match=r"is at version 1; expected version 0"):
            y.sum().backward()

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_parameters(self, name):
        """The next layer's gradient is that of what it got, as without the context."""
        grads = []
        for context in (lambda f: f, saving):
            torch.manual_seed(0)
            layer, linear = bn.BatchNorm1d(3, activation="relu"), nn.Linear(3, 2)
            y = context(lambda x, layer=layer, linear=linear: linear(layer(x)))(torch.randn(5, 3))
            with torch.no_grad():
                getattr(layer, name).mul_(3)
            grads += [torch.autograd.grad(y.sum(), linear.weight, retain_graph=True)]
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        same(*grads)

    def test_output_by_the_user(self):
        """What became of y afterwards is kept; it has no recipe."""
        results = []
        for context in (lambda f: f, saving):
            torch.manual_seed(0)
            model = nn.Sequential(bn.BatchNorm1d(3), nn.Linear(3, 2))

            def call(x, model=model):
                y = model[0](x)
                y[:, 0] = 0
                y.mul_(2)
                return model[1](F.relu(y, inplace=True))

            results.append(step(model, torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), context(call)))
        same(*results)

    def test_the_output_is_the_users(self):
        model = network("relu", blocks=1)
        plain, saved = model(sample()), saving(model)(sample())
        torch.testing.assert_close(saved, plain, rtol=0, atol=0)
        with bn.save_memory():
            y = model[1](model[0](sample()))
            model[2](y)
        assert type(y) is torch.Tensor
        assert not vars(y)


def test_a_freed_graph_says_so():
    loss = saving(network())(sample()).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class TestComposition:
    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    @pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
    def test_checkpoint(self, reentrant, inside):
        def pieces(model, call):
            def run(x):
                x = model[1](model[0](x))
                x = checkpoint(call(model[2]), x, use_reentrant=reentrant)
                return model[3:](x)

            return run

        plain, twin = network(), network()
        expected = step(plain, call=pieces(plain, lambda block: block))
        call = pieces(twin, saving) if inside else saving(pieces(twin, lambda block: block))
        same(step(twin, call=call), expected)

    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
    def test_checkpointed_models(self, reentrant):
        plain, twin = network(), bn.convert(network(), save_memory=True)
        expected = step(plain, call=lambda x: checkpoint(plain, x, use_reentrant=reentrant))
        same(step(twin, call=lambda x: checkpoint(twin, x, use_reentrant=reentrant)), expected)

    @pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
    def test_other_hooks_decide(self, inside, recomputed):
        def offloaded(function):
            def call(x):
                with torch.autograd.graph.save_on_cpu():
                    return function(x)

            return call

        plain, twin = network(), network()
        expected = step(plain)
        same(step(twin, call=offloaded(saving(twin)) if inside else saving(offloaded(twin))), expected)
        assert not recomputed

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast(self, dtype, recomputed):
        def autocast(model):
            def call(x):
                with torch.autocast("cpu", dtype=dtype):
                    return model(x)

            return call

        for fused in (True, False):
            plain, twin = network("silu", fused), network("silu", fused)
            expected = step(plain, call=autocast(plain))
            recomputed.clear()
            same(step(twin, call=saving(autocast(twin))), expected)
            assert recomputed

    def test_backward_under_autocast(self):
        results = []
        for context in (lambda f: f, saving):
            torch.manual_seed(0)
            model = nn.Sequential(bn.BatchNorm1d(3), nn.Softplus(), nn.Mish(), nn.Linear(3, 2))
            y = context(model)(torch.linspace(-1, 1, 15).view(5, 3))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y.sum().backward()
            results.append([p.grad for p in model.parameters()])
        same(*results)

    def test_functional_transforms(self):
        model = network("silu", blocks=1)
        parameters, x = dict(model.named_parameters()), sample()

        def loss(model, parameters, x):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        model.eval()
        converted = bn.convert(copy.deepcopy(model), save_memory=True)
        grad = torch.func.grad(loss, argnums=1)
        expected = grad(model, parameters, x)
        same(list(saving(grad)(model, parameters, x).values()), list(expected.values()))
        same(list(grad(converted, parameters, x).values()), list(expected.values()))
        each = torch.vmap(lambda x: model(x[None])[0])(x)
        same([saving(torch.vmap(lambda x: model(x[None])[0]))(x)], [each])
        jvp = torch.func.jvp(model, (x,), (x,))
        same(saving(torch.func.jvp)(model, (x,), (x,)), jvp)

    def test_compiled_code_is_left_to_the_compiler(self, recomputed):
        def small():
            return network(blocks=0)

        expected = step(small())
        outside, within, converted = small(), small(), bn.convert(small(), save_memory=True)
        results = [
            step(outside, call=saving(torch.compile(outside, fullgraph=True, backend="aot_eager"))),
            step(within, call=torch.compile(saving(within), fullgraph=True, backend="aot_eager")),
            step(converted, call=torch.compile(converted, fullgraph=True, backend="aot_eager")),
        ]
        for result in results:
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        assert not recomputed

    @pytest.mark.slow
    def test_inductor_too(self, recomputed):
        model, twin = network(blocks=0), bn.convert(network(blocks=0), save_memory=True)
        result = step(twin, call=saving(torch.compile(twin, fullgraph=True)))
        torch.testing.assert_close(result, step(model), rtol=1e-4, atol=1e-4)
        assert not recomputed

    def test_distributed_data_parallel(self, tmp_path, recomputed):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        try:
            plain, twin = network(), network()
            expected = step(plain)
            parallel = nn.parallel.DistributedDataParallel(bn.convert(twin, save_memory=True))
            same(step(twin, call=parallel), expected)
            assert recomputed
        finally:
            dist.destroy_process_group()

    def test_threads(self):
        """Each has a context of its own; backwards may run in another one than their forward."""
        expected, failures, outputs = step(network()), [], {}
        models = {index: [network() for _ in range(4)] for index in range(4)}

        def work(index):
            try:
                for model in models[index][:3]:
                    same(step(model, call=saving(model) if index % 2 else model), expected)
                outputs[index] = saving(models[index][3])(sample())
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        for index, y in outputs.items():
            (y.square().sum() + y.sum()).backward()
            parameters = list(models[index][3].parameters())
            same([p.grad for p in parameters], expected[2 : 2 + len(parameters)])

    def test_running_statistics_move_once(self):
        model = network()
        y = saving(model)(sample())
        state = copy.deepcopy(dict(model.named_buffers()))
        y.sum().backward()
        same(list(model.buffers()), list(state.values()))
        assert model[1].num_batches_tracked == 1

    def test_without_gradients_nothing_happens(self, recomputed):
        model = network()
        with bn.save_memory(), torch.no_grad():
            model(sample())
            assert not contexts.thread.saver._entries
        with bn.save_memory(), torch.inference_mode():
            model.eval()(sample())

    def test_tensors_of_other_kinds(self):
        """Sparse, complex and subclassed tensors are saved as ever."""

        class Special(torch.Tensor):
            pass

        special = torch.randn(3, 3).as_subclass(Special).requires_grad_()
        real, sparse = torch.randn(3, 3, requires_grad=True), torch.eye(3).to_sparse()
        wave = torch.randn(4, 2, 3, dtype=torch.complex64, requires_grad=True)
        layer = bn.BatchNorm1d(2, dtype=torch.complex64)
        with bn.save_memory():
            y = (special * special).sum() + torch.sparse.mm(sparse, real).square().sum() + layer(wave).abs().sum()
        y.backward()
        torch.testing.assert_close(torch.Tensor(special.grad), 2 * special.detach().as_subclass(torch.Tensor))


class TestContext:
    def test_closes_and_nests(self):
        with bn.save_memory():
            with bn.save_memory():
                pass
            assert contexts.thread.saver is not None
            assert torch.autograd.graph.saved_tensors_hooks is not None
        assert contexts.thread.saver is None
        with pytest.raises(ZeroDivisionError), bn.save_memory():
            raise ZeroDivisionError
        assert contexts.thread.saver is None
        assert not torch.overrides._get_current_function_mode_stack()

    def test_is_a_decorator(self, recomputed):
        model = network()
        expected = step(copy.deepcopy(model))
        same(step(model, call=bn.save_memory()(model)), expected)
        assert recomputed

    def test_a_failing_call_leaves_no_hooks(self):
        with bn.save_memory():
            with pytest.raises(RuntimeError):
                torch.randn(2, 3, requires_grad=True) @ torch.randn(2, 3)
            assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def torchs() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    )


class TestConvert:
    def test_layers_remember(self, recomputed):
        model = bn.convert(torchs(), save_memory=True)
        assert model[1].save_memory
        assert "save_memory=True" in repr(model[1])
        expected = step(bn.convert(torchs()))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
            recomputed.clear()
            same(step(twin), expected)
            assert recomputed

    def test_reverts(self, recomputed):
        model = torchs()
        before = copy.deepcopy(vars(model))
        bn.revert(bn.convert(bn.convert(model, save_memory=True), save_memory=True))
        assert type(model[1]) is nn.BatchNorm2d
        assert "save_memory" not in vars(model[1])
        assert vars(model).keys() == before.keys()
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
        assert not model._forward_hooks_always_called
        step(model)
        assert not recomputed

    def test_layers_that_say_no(self, recomputed):
        model = bn.convert(torchs(), save_memory=True)
        model[1].save_memory = False
        step(model)
        assert not recomputed
        step(model, call=saving(model))
        assert recomputed

    def test_layers_of_ours_take_part(self, recomputed):
        model = bn.convert(network(), save_memory=True)
        step(model)
        assert len(recomputed) >= 7
        bn.revert(model)
        assert not model[1].save_memory

    def test_a_failing_forward_closes_the_context(self):
        model = bn.convert(torchs(), save_memory=True)
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 5, 8, 8))
        assert contexts.thread.saver is None
        assert not torch.overrides._get_current_function_mode_stack()

    def test_parts_of_a_converted_model_are_as_ever(self, recomputed):
        model = bn.convert(torchs(), save_memory=True)
        step(model, call=lambda x: model[3:](model[:3](x)))
        assert contexts.thread.saver is None


@pytest.mark.skipif(cpu.unavailable() is not None, reason="without the C++ kernels")
def test_small_and_large_float32_calls_are_computed_again_alike():
    for shape in ((4, 3, 5, 5), (8, 16, 40, 40)):
        layer = bn.BatchNorm2d(shape[1])
        x = (torch.randn(shape) * 3 + 1e3).requires_grad_()
        weight = torch.randn(shape, requires_grad=True)
        grads = [torch.autograd.grad(call(x).sum(), weight)[0] for call in (
            lambda x, layer=layer, weight=weight: layer(x) * weight,
            saving(lambda x, layer=layer, weight=weight: layer(x) * weight),
        )]  # fmt: skip
        same(*([grad] for grad in grads))
