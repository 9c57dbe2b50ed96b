"""Parts of a batch that are forwarded one by one and normalized as one: outputs, gradients and statistics are those of the one."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import InputError, StateError
from batchnorm.statistics import Batch, Domains, Ghost, MovingAverage, Renorm
from tests.replicas import on_replicas

SIZES = [3, 1, 4]


class Block(nn.Module):
    """Convolutions, with batch norms of all kinds of calls; a checkpoint if asked for."""

    def __init__(self, channels: int, source=None, reentrant=None) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = bn.BatchNorm2d(6, activation="relu", statistics=source)
        self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.sum = bn.BatchNorm2d(6, activation="silu", statistics=source)
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant is None or not torch.is_grad_enabled():
            return self.through(x)
        return checkpoint(self.through, x, use_reentrant=self.reentrant)

    def through(self, x):
        shortcut = self.norm(self.first(x))
        return self.sum(self.second(shortcut), shortcut)


def network(source=None, reentrant=None, dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    blocks = Block(3, source, reentrant), Block(6, source, reentrant)
    plain = bn.BatchNorm1d(6, affine=False, statistics=source)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), plain, nn.Linear(6, 4)).to(dtype)


def batch(dtype=torch.float64, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(SIZES), 3, 5, 4, generator=numbers, dtype=torch.float64) * 2 + 1
    return x.to(dtype).requires_grad_(), torch.randint(4, (sum(SIZES),), generator=numbers)


def as_one(model, x, labels, sizes=SIZES):
    """The loss of the whole batch from those of the micro-batches."""
    micro_batches = zip(x.split(sizes), labels.split(sizes), strict=True)
    losses = bn.as_one_batch(
        lambda micro_batch: F.cross_entropy(model(micro_batch[0]), micro_batch[1], reduction="sum"), micro_batches
    )
    return torch.stack(losses).sum() / len(labels)


def compare(model, one, tolerance=1e-11, steps=3, dtype=torch.float64, sizes=SIZES):
    """Train both for a few steps, by micro-batches and by one batch."""
    for step in range(steps):
        (x, labels), (whole, _) = batch(dtype, step), batch(dtype, step)
        loss, wanted = as_one(model, x, labels, sizes), F.cross_entropy(one(whole), labels)
        loss.backward()
        wanted.backward()
        torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(x.grad, whole.grad, rtol=tolerance, atol=tolerance)
        for (name, parameter), other in zip(model.named_parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(
                parameter.grad,
                other.grad,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        torch.testing.assert_close(model.state_dict(), one.state_dict(), rtol=tolerance, atol=tolerance)
        for each in (model, one):
            torch.optim.SGD(each.parameters(), 0.1).step()
            each.zero_grad()


@pytest.mark.parametrize(
    "source",
    [Batch(), Renorm(r_max=1.5, d_max=0.5, warmup=0), Domains(("a", "b")), Domains(("a",), within=Renorm())],
    ids=repr,
)
def test_training_by_micro_batches_is_training_by_the_batch(source):
    with bn.domain("a"):
        compare(network(source), network(source))


def test_the_check_can_fail():
    model = network()
    with pytest.raises(AssertionError):
        compare(nn.Sequential(nn.Dropout(0.1), model), nn.Sequential(nn.Identity(), network()))


def test_single_precision_and_one_micro_batch():
    compare(network(dtype=torch.float32), network(dtype=torch.float32), 2e-4, dtype=torch.float32)
    compare(network(), network(), sizes=[sum(SIZES)])


def test_checkpoints_use_the_merged_statistics():
    compare(network(reentrant=False), network())
    source = Renorm(r_max=1.5, d_max=0.5, warmup=0)
    compare(network(source, reentrant=False), network(source))
    model, (x, labels) = network(reentrant=True), batch()
    with pytest.raises(StateError, match="use_reentrant=False"):
        as_one(model, x, labels)


def test_a_checkpoint_outside_uses_the_statistics_of_its_own_batch():
    """Live graphs of micro-batches do not change it."""
    model, one = network(reentrant=False), network()
    x, labels = batch()
    alive = as_one(model, x, labels)
    F.cross_entropy(one(x), labels)
    for each in (model, one):
        each.zero_grad()
        F.cross_entropy(each(x.detach() * 2), labels).backward()
    for parameter, other in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-11, atol=1e-11)
    assert alive.requires_grad


def test_micro_batches_of_several_sizes():
    """One tensor would need padding and a mask for them."""
    layer, padded = (bn.BatchNorm1d(3, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([7, 2, 5])
    whole = torch.randn(3, 3, 7, dtype=torch.float64, requires_grad=True)
    micro_batches = [whole[i : i + 1, :, :length] for i, length in enumerate(lengths)]
    outputs = bn.as_one_batch(layer, micro_batches)
    wanted = padded(whole, lengths=lengths)
    for i, (output, length) in enumerate(zip(outputs, lengths, strict=True)):
        torch.testing.assert_close(output, wanted[i : i + 1, :, :length], rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad([(y**3).sum() for y in ys], whole) for ys in (outputs, [wanted])]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.state_dict(), padded.state_dict())


def test_masks_residuals_and_complex_input():
    for dtype in (torch.float64, torch.complex128):
        layer, one = (bn.BatchNorm2d(3, dtype=dtype) for _ in range(2))
        x, residual = (torch.randn(6, 3, 4, 2, dtype=dtype, requires_grad=True) for _ in range(2))
        mask = torch.rand(6, 4, 2) > 0.4
        cut = [value.split([1, 5]) for value in (x, residual, mask)]
        y = torch.cat(bn.as_one_batch(lambda micro_batch, layer=layer: layer(*micro_batch), zip(*cut, strict=True)))
        wanted = one(x, residual, mask)
        torch.testing.assert_close(y, wanted)
        dy = torch.randn_like(y)
        grads = [torch.autograd.grad(value, (x, residual), dy) for value in (y, wanted)]
        torch.testing.assert_close(*grads)
        torch.testing.assert_close(layer.state_dict(), one.state_dict())


def test_groups_stay_within_the_micro_batches():
    layer, one = (bn.BatchNorm1d(3, statistics=Ghost(2), dtype=torch.float64) for _ in range(2))
    x = torch.randn(8, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.cat(bn.as_one_batch(layer, x.split([2, 6]))), one(x))
    torch.testing.assert_close(layer.state_dict(), one.state_dict())


def test_a_micro_batch_without_a_loss_counts_too():
    layer = bn.BatchNorm1d(3, dtype=torch.float64)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    first, _ = bn.as_one_batch(lambda micro_batch: layer(micro_batch, micro_batch), x.split(3))
    wanted = layer(x, x)[:3]
    grads = [torch.autograd.grad((y**3).sum(), x)[0] for y in (first, wanted)]
    assert grads[0][3:].abs().max() > 0.01
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


def test_a_constant_micro_batch_passes_gradients_of_the_others_on():
    layer = bn.BatchNorm1d(3, affine=False, dtype=torch.float64)
    x, constant = torch.randn(2, 3, 3, dtype=torch.float64)
    x.requires_grad_()
    first, _ = bn.as_one_batch(layer, [constant, x])
    wanted = layer(torch.cat([constant, x]))[:3]
    grads = [torch.autograd.grad((y**3).sum(), x)[0] for y in (first, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


def test_without_gradients_and_in_inference():
    layer, one = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    x = torch.randn(6, 3)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            outputs = bn.as_one_batch(layer, x.split(2))
            torch.testing.assert_close(torch.cat(outputs), one(x))
            assert not outputs[0].requires_grad
            assert outputs[0].is_inference() == torch.is_inference_mode_enabled()
    torch.testing.assert_close(layer.state_dict(), one.state_dict())
    layer.eval()
    torch.testing.assert_close(torch.cat(bn.as_one_batch(layer, x.split(2))), layer(x))


def test_single_values_together_are_a_batch():
    layer, one = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    x = torch.randn(4, 3)
    torch.testing.assert_close(torch.cat(bn.as_one_batch(layer, x.split(1))), one(x))


def test_contexts_around_the_call_hold_within():
    model = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3, statistics=Domains(("real", "fake"))))
    with torch.autocast("cpu", torch.bfloat16), bn.domain("fake"), bn.accumulate(2):
        for number, x in enumerate(torch.randn(2, 6, 4)):
            outputs = bn.as_one_batch(model, x.split(2))
            assert outputs[0].dtype == torch.bfloat16
            assert model[1].num_batches_tracked_fake == number
    assert (model[1].num_batches_tracked, model[1].num_batches_tracked_fake) == (0, 1)


def test_memory_is_saved_within():
    model, one = network(), network()
    x, labels = batch()

    @bn.save_memory()
    def loss(micro_batch):
        return F.cross_entropy(model(micro_batch[0]), micro_batch[1], reduction="sum")

    losses = bn.as_one_batch(loss, zip(x.split(SIZES), labels.split(SIZES), strict=True))
    torch.stack(losses).sum().backward()
    F.cross_entropy(one(x), labels, reduction="sum").backward()
    for parameter, other in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-11, atol=1e-11)


def test_compiled_models_run_as_written():
    layer, one = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    compiled, x = (
        torch.compile(lambda micro_batch: layer(micro_batch), backend="eager", fullgraph=True),
        torch.randn(6, 3),
    )
    compiled(x)
    one(x)
    torch.testing.assert_close(torch.cat(bn.as_one_batch(compiled, x.split(2))), one(x))
    torch.testing.assert_close(layer.state_dict(), one.state_dict())
    with pytest.raises(Exception, match=r"StateError|Observed exception"):
        torch.compile(lambda: bn.as_one_batch(layer, x.split(2)), backend="eager", fullgraph=True)()


def test_a_checkpoint_around_the_call():
    layer, one = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    x = torch.randn(6, 3, requires_grad=True)
    y = checkpoint(lambda x: torch.cat(bn.as_one_batch(layer, x.split(2))), x, use_reentrant=False)
    wanted = one(x)
    grads = [torch.autograd.grad((value**3).sum(), x)[0] for value in (y, wanted)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(layer.state_dict(), one.state_dict())


def test_errors_end_all_micro_batches_and_say_what_is_wrong():
    layer, other, x = bn.BatchNorm1d(3), bn.BatchNorm1d(3), torch.randn(6, 3)
    before, threads = copy.deepcopy(layer.state_dict()), threading.active_count()

    def fails(micro_batch):
        if micro_batch is micro_batches[1]:
            raise KeyError("mine")
        return layer(micro_batch)

    def strays(micro_batch):
        return layer(micro_batch) if micro_batch is micro_batches[1] else other(micro_batch)

    micro_batches = x.split(2)
    for forward, error, message in (
        (fails, KeyError, "mine"),
        (strays, StateError, r"micro-batch 1 was at BatchNorm1d\(3\) while micro-batch 0 was at BatchNorm1d\(3\)"),
        (
            lambda micro_batch: layer(micro_batch) if micro_batch is micro_batches[0] else micro_batch,
            StateError,
            "micro-batch 1 had ended while micro-batch 0 was at",
        ),
        (nn.BatchNorm1d(3), StateError, r"BatchNorm1d\(3\) is torch's; pass the model through batchnorm.convert"),
        (bn.BatchNorm1d(3, statistics=MovingAverage()), StateError, "averages whole batches"),
        (lambda micro_batch: torch.func.vmap(layer)(micro_batch.expand(2, 2, 3)), StateError, "torch.func"),
    ):
        with pytest.raises(error, match=message):
            bn.as_one_batch(forward, micro_batches)
        assert threading.active_count() == threads
    torch.testing.assert_close(layer.state_dict(), before)
    nn.BatchNorm1d(3)(x)  # is refused no longer
    with pytest.raises(InputError, match="at least one micro-batch"):
        bn.as_one_batch(layer, [])
    y = torch.cat(bn.as_one_batch(layer, x.requires_grad_().split(2)))
    (grad,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def micro_batches_of_replicas(rank, size):
    whole, labels = batch()
    model, one = bn.synchronize(network()), network()
    mine = slice(0, 5) if rank == 0 else slice(5, None)
    x = whole.detach()[mine].clone().requires_grad_()
    as_one(model, x, labels[mine], [2, len(x) - 2]).mul(len(x)).backward()
    F.cross_entropy(one(whole), labels, reduction="sum").backward()
    assert whole.grad is not None
    torch.testing.assert_close(x.grad, whole.grad[mine], rtol=1e-10, atol=1e-10)
    for (name, buffer), wanted in zip(model.named_buffers(), one.buffers(), strict=True):
        torch.testing.assert_close(buffer, wanted, msg=name)


def test_replicas_with_micro_batches():
    on_replicas(micro_batches_of_replicas, 2)
