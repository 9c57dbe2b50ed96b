"""Networks of the package transformers, small and randomly initialized: convert, fuse, fold, and back."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import batchnorm as bn
from tests.networks import settle
from tests.test_surgery import shape_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from transformers.models.speecht5.modeling_speecht5 import SpeechT5SpeechDecoderPostnet

pytestmark = pytest.mark.filterwarnings("ignore")


def image(size=32):
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))}


def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], num_labels=5)
    return transformers.ResNetForImageClassification(config), image()


def regnet():
    config = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], groups_width=8, num_labels=5
    )
    return transformers.RegNetForImageClassification(config), image()


def mobilenet():
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=5)
    return transformers.MobileNetV2ForImageClassification(config), image()


def efficientnet():
    config = transformers.EfficientNetConfig(
        image_size=32, width_coefficient=0.25, num_labels=5, hidden_dim=320, in_channels=[32, 16, 24], out_channels=[16, 24, 40],
        kernel_sizes=[3, 3, 5], strides=[1, 2, 2], num_block_repeats=[1, 2, 1], expand_ratios=[1, 6, 6], depthwise_padding=[],
        num_hidden_layers=16,
    )  # fmt: skip
    return transformers.EfficientNetForImageClassification(config), image()


def levit():
    config = transformers.LevitConfig(
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8],
        num_labels=5,
        down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]],
    )  # fmt: skip
    return transformers.LevitForImageClassification(config), image(64)


def conformer():
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=[8, 8], conv_stride=[5, 2],
        conv_kernel=[10, 3], num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
        conv_depthwise_kernel_size=3, apply_spec_augment=False, layerdrop=0.0,
    )  # fmt: skip
    wave = torch.randn(2, 400, generator=torch.Generator().manual_seed(1))
    return transformers.Wav2Vec2ConformerModel(config), {"input_values": wave}


def postnet():
    config = transformers.SpeechT5Config(num_mel_bins=6, reduction_factor=1, speech_decoder_postnet_units=8)
    states = torch.randn(2, 7, config.hidden_size, generator=torch.Generator().manual_seed(1))
    return SpeechT5SpeechDecoderPostnet(config), {"hidden_states": states}


# How many batch norms folding may leave.
NETWORKS: list[tuple[Callable, int]] = [
    (resnet, 0), (regnet, 0), (mobilenet, 0), (efficientnet, 0), (levit, 0), (conformer, 0), (postnet, 0),
]  # fmt: skip
IDS = [build.__name__ for build, _ in NETWORKS]


def built(build, dtype) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    model, given = build()
    return model.to(dtype), {name: value.to(dtype) for name, value in given.items()}


def tensors(output):
    return [
        value for value in (output.values() if hasattr(output, "values") else output) if isinstance(value, torch.Tensor)
    ]


def trained(model: nn.Module, given: dict):
    """Outputs and gradients of a training step; dropout is the same every time."""
    torch.manual_seed(5)
    outputs = tensors(model.train()(**given))
    sum(value.square().sum() for value in outputs).backward()
    return outputs, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(("build", "_"), NETWORKS, ids=IDS)
@pytest.mark.parametrize("surgery", [bn.convert, bn.fuse], ids=["convert", "fuse"])
def test_there_and_back(build, _, surgery):
    model, given = built(build, torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda *_: None)
            break
    expected = copy.deepcopy(model)
    before, state = shape_of(model), copy.deepcopy(model.state_dict())
    surgery(model)
    assert not any(type(module).__module__.startswith("torch.nn.modules.batchnorm") for module in model.modules())
    found, wanted = trained(model, given), trained(expected, given)
    assert wanted[1]
    scale = max(value.abs().max().item() for value in wanted[1].values())
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-10, atol=1e-10 * max(1.0, scale))
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-10, atol=1e-10)
    bn.revert(model)
    model.load_state_dict(state)
    flags = [row[3].pop("training") for row in before]
    assert [{**row[3]}.pop("training") for row in shape_of(model)] == [True] * len(flags)
    assert [
        (*row[:3], {k: v for k, v in row[3].items() if k != "training"}, *row[4:]) for row in shape_of(model)
    ] == before


@pytest.mark.parametrize(("build", "left"), NETWORKS, ids=IDS)
def test_folded(build, left):
    model, given = built(build, torch.float32)
    settle(model)
    state = copy.deepcopy(model.state_dict())
    folded, report = bn.fold(model, given)
    assert report.max_error < 1e-4
    assert report.batch_norms_after == left, str(report)
    assert type(folded) is type(model)
    with torch.no_grad():
        other = {name: value.flip(-1) for name, value in given.items()}
        found, wanted = tensors(folded(**other)), tensors(model.eval()(**other))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
