"""The oracle, judged by what does not come from us: autograd over the definition, and numbers worked by hand."""

import pytest
import torch

from batchnorm import reference


def definition(x, gamma, beta, eps=1e-5):
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean, variance = x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)
    return gamma.view(shape) * (x - mean) / (variance + eps).sqrt() + beta.view(shape)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 3, 2, 4)], ids=str)
def test_forward_and_backward_are_the_definition(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gamma, beta = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dy = torch.randn(shape, dtype=torch.float64)
    y = definition(x, gamma, beta)
    torch.testing.assert_close(reference.forward(x, gamma, beta).y, y)
    grads = torch.autograd.grad(y, (x, gamma, beta), dy)
    torch.testing.assert_close(tuple(reference.backward(dy, x.detach(), gamma.detach())), grads)


def test_the_tutorials_example():
    """Section 4 of the tutorial: mean 1, variance 0.025; it normalizes to ±2, ±1, which divides by 0.1 for sqrt(0.025)."""
    batch = reference.forward(
        torch.tensor([[0.8], [1.2], [0.9], [1.1]]).double(), torch.tensor([0.5]), torch.tensor([2.0])
    )
    torch.testing.assert_close(batch.mean, torch.tensor([1.0]).double())
    torch.testing.assert_close(batch.variance, torch.tensor([0.025]).double())
    xhat = torch.tensor([[-1.2647], [1.2647], [-0.6323], [0.6323]]).double()
    torch.testing.assert_close(batch.xhat, xhat, rtol=0, atol=5e-5)
    torch.testing.assert_close(batch.y, 0.5 * xhat + 2, rtol=0, atol=5e-5)


def test_inference_and_running_statistics_by_hand():
    x = torch.tensor([[1.0], [3.0]])
    mean, variance = reference.running(torch.tensor([0.0]), torch.tensor([1.0]), x, momentum=0.25)
    assert mean == 0.5
    assert variance == 0.75 + 0.25 * 2  # biased variance 1, unbiased 2
    _, biased = reference.running(torch.tensor([0.0]), torch.tensor([1.0]), x, momentum=0.25, unbiased=False)
    assert biased == 1.0
    y = reference.inference(
        x, torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([2.0]), torch.tensor([1.0]), eps=1.0
    )
    assert y.tolist() == [[1.0], [3.0]]
