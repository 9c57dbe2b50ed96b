"""The public interface is a contract: names, signatures, documentation."""

import inspect

import pytest

import batchnorm as bn

SIGNATURES = {
    bn.BatchNorm: "(num_features, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, device=None, dtype=None, *, "
    "bias=True, activation=None, statistics=None, channel_axis=1, running_variance='unbiased', on_single='error', "
    "on_nonfinite='skip', padded='zero')",
    bn.BatchNorm.forward: "(self, input, residual=None, mask=None, lengths=None, *, activation=None)",
    bn.functional.batch_norm: "(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, "
    "eps=1e-05, *, activation=None, residual=None, mask=None, lengths=None, reducer=None)",
    bn.functional.normalize: "(input, weight=None, bias=None, eps=1e-05, *, activation=None, residual=None, mask=None, "
    "lengths=None, reducer=None, group_size=None, moments=None, renormalization=None)",
    bn.functional.normalize_with: "(input, mean, variance, weight=None, bias=None, eps=1e-05, *, activation=None, "
    "residual=None, mask=None, lengths=None)",
    bn.convert: "(model, *, statistics=None, fuse=False, save_memory=False)",
    bn.fold: "(model, example_input, *, tolerance=0.0001)",
    bn.freeze: "(model, *, affine=True)",
    bn.fuse: "(model)",
    bn.save_memory: "()",
    bn.recalibrate: "(model, loader, *, forward=None, method='joint', process_group=None, limit=None)",
    bn.revert: "(model)",
    bn.average_buffers: "(model, process_group=None)",
    bn.replicas_agree: "(model, process_group=None)",
    bn.synchronize: "(model, process_group=None)",
    bn.unsynchronize: "(model)",
    bn.explain: "(values, gamma=1.0, beta=0.0, eps=1e-05, momentum=0.1, *, grad_output=None)",
    bn.Moments.merge: "(self, other)",
    bn.Moments.variance: "(self, *, unbiased=False)",
}


def bare(function) -> str:
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signatures(function):
    assert bare(function) == SIGNATURES[function]


def test_all_names_exist_are_sorted_and_documented():
    assert bn.__all__ == sorted(bn.__all__)
    for name in bn.__all__:
        assert inspect.getdoc(getattr(bn, name)), name


@pytest.mark.parametrize(
    "function", [f for f in SIGNATURES if f is not bn.BatchNorm.forward], ids=lambda f: f.__qualname__
)
def test_everything_public_is_annotated(function):
    target = function.__init__ if inspect.isclass(function) else function
    signature = inspect.signature(target)
    assert signature.return_annotation is not inspect.Signature.empty
    for name, parameter in signature.parameters.items():
        assert name == "self" or parameter.annotation is not inspect.Parameter.empty, name


def test_a_version_is_known():
    assert bn.__version__.count(".") >= 2
