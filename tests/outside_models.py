"""
Sick and healthy models written from the list of mistakes alone, before their author read a rule: what `diagnose` says about the models of
strangers. `SICK` names for each the codes that count as found and the layers at fault; of `HEALTHY`, no error and no warning is right.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.lab import adversaries, image_networks
from batchnorm.lab.data import digits
from batchnorm.lab.detector import Detector
from batchnorm.lab.recognizer import Recognizer

CROSS_ENTROPY = nn.CrossEntropyLoss()


@dataclass
class Subject:
    """A model, what is known of it, and the arguments of `diagnose` that its rules need."""

    model: nn.Module
    loader: Any = None
    arguments: dict[str, Any] = field(default_factory=dict)
    codes: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()


SICK: dict[str, Callable[[], Subject]] = {}
HEALTHY: dict[str, Callable[[], Subject]] = {}


def sick(build: Callable[[], Subject]) -> Callable[[], Subject]:
    SICK[build.__name__] = build
    return build


def healthy(build: Callable[[], Subject]) -> Callable[[], Subject]:
    HEALTHY[build.__name__] = build
    return build


# Data


def images(size: int = 8, count: int | None = None) -> tuple[Tensor, Tensor]:
    train = digits.load(size).train
    return train.images[:count], train.labels[:count]


def batches(x: Tensor, y: Tensor, size: int = 64, last: bool = False) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    pairs = list(zip(x[order].split(size), y[order].split(size), strict=True))
    return pairs if last or len(pairs[-1][0]) == size else pairs[:-1]


def digit_batches(size: int = 8, batch: int = 64, last: bool = False) -> list[tuple[Tensor, Tensor]]:
    return batches(*images(size), batch, last)


def rows(features: int = 20, count: int = 1024, classes: int = 4) -> tuple[Tensor, Tensor]:
    """A table with correlated columns of different scales, and classes that a small network learns."""
    noise = torch.Generator().manual_seed(3)
    centers = torch.randn(classes, features, generator=noise)
    y = torch.randint(classes, (count,), generator=noise)
    x = centers[y] + torch.randn(count, features, generator=noise)
    return x * torch.logspace(-1, 1, features) + torch.linspace(-2, 2, features), y


def sounds(count: int = 512, channels: int = 8, length: int = 32) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(4)
    y = torch.randint(4, (count,), generator=noise)
    time = torch.arange(length) / length
    waves = torch.sin(2 * torch.pi * (y[:, None] + 1) * time + torch.rand(count, 1, generator=noise) * 6)
    gains = torch.rand(1, channels, 1, generator=noise) + 0.5
    return waves[:, None] * gains + 0.5 * torch.randn(count, channels, length, generator=noise), y


def videos(count: int = 256) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(6)
    y = torch.randint(2, (count,), generator=noise)
    x = torch.randn(count, 2, 4, 6, 6, generator=noise)
    x[y == 1] += torch.linspace(-1, 1, 4)[:, None, None]
    return x, y


def train(
    model: nn.Module,
    data: list[Any],
    epochs: int = 6,
    rate: float = 3e-3,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    settle: bool = True,
    after: Callable[[], Any] | None = None,
) -> torch.optim.Optimizer:
    """Train with Adam; the rate falls to 0 along a cosine, unless the model is not to settle."""
    model.train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(data))
    for _ in range(epochs):
        for item in data:
            optimizer.zero_grad()
            (loss(model, item) if loss else CROSS_ENTROPY(model(item[0]), item[1])).backward()
            optimizer.step()
            if settle:
                schedule.step()
            if after:
                after()
    optimizer.param_groups[0]["lr"] = rate / 30
    return optimizer


def careful(model: nn.Module, x: Tensor) -> Tensor:
    """Inference as it should be."""
    was = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        y = model(x)
    for module, mode in was.items():
        module.training = mode
    return y


def everything(optimizer: torch.optim.Optimizer | None = None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"criterion": CROSS_ENTROPY, "predict": careful}
    if optimizer:
        found["optimizer"] = optimizer
    return found | more


# Architectures


def unit(inputs: int, outputs: int, stride: int = 1, groups: int = 1, size: int = 3, **options: Any) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs, **options), nn.SiLU())


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
            if stride > 1 or inputs != planes
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self, classes: int = 10, width: int = 8, channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(BasicBlock(width, width))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2))
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class MBConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, **options: Any) -> None:
        super().__init__()
        wide = 3 * inputs
        self.expand = unit(inputs, wide, size=1, **options)
        self.depthwise = unit(wide, wide, stride, groups=wide, **options)
        self.se = SqueezeExcite(wide)
        self.project = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs, **options))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


def efficient(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        unit(1, 8, **options),
        MBConv(8, 8, 1, **options),
        MBConv(8, 16, 2, **options),
        unit(16, 32, size=1, **options),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32, 10),
    )


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(1, 8, 3, padding=1, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(8))
        self.features.add_module("relu0", nn.ReLU())
        self.features.add_module("dense1", DenseLayer(8, 6))
        self.features.add_module("dense2", DenseLayer(14, 6))
        self.features.add_module("norm5", nn.BatchNorm2d(20))
        self.classifier = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inc = unit(1, 8)
        self.down = unit(8, 16, 2)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2, bias=False)
        self.up_bn = nn.BatchNorm2d(8)
        self.merge = unit(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.inc(x)
        up = F.relu(self.up_bn(self.up(self.down(shallow))))
        return self.out(self.merge(torch.cat([shallow, up], 1)))


def segments() -> list[tuple[Tensor, Tensor]]:
    x, _ = images(8)
    return batches(x, (x[:, 0] > 0).long())


class TemporalNet(nn.Module):
    """A Conv1d network of sounds (N, 8, L)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict(
            {
                "conv_a": nn.Conv1d(8, 16, 5, padding=2, bias=False),
                "norm_a": nn.BatchNorm1d(16, **options),
                "conv_b": nn.Conv1d(16, 16, 5, stride=2, padding=2, bias=False),
                "norm_b": nn.BatchNorm1d(16, **options),
            }
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for letter in "ab":
            x = F.relu(self.encoder[f"norm_{letter}"](self.encoder[f"conv_{letter}"](x)))
        return self.head(x.mean(2))


class Tabular(nn.Module):
    def __init__(self, features: int = 20, classes: int = 4, norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.input_bn = norm(features)
        self.hidden = nn.Sequential(nn.Linear(features, 32, bias=False), norm(32), nn.ReLU())
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.input_bn(x)))


class VideoNet(nn.Sequential):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.add_module("stem", nn.Conv3d(2, 8, 3, padding=1, bias=False))
        self.add_module("stem_norm", nn.BatchNorm3d(8, **options))
        self.add_module("act", nn.ReLU())
        self.add_module("body", nn.Conv3d(8, 8, 3, stride=2, padding=1, bias=False))
        self.add_module("body_norm", nn.BatchNorm3d(8, **options))
        self.add_module("act2", nn.ReLU())
        self.add_module("pool", nn.AdaptiveAvgPool3d(1))
        self.add_module("flat", nn.Flatten())
        self.add_module("fc", nn.Linear(8, 2))


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm with its activation inside, as timm has."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class FrozenBatchNorm2d(nn.Module):
    """Four buffers and no parameter, as detectron2 and torchvision have."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = channels, eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels) - eps)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def frozen(norm: nn.BatchNorm2d) -> FrozenBatchNorm2d:
    layer = FrozenBatchNorm2d(norm.num_features, norm.eps)
    layer.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "num_batches_tracked"})
    return layer


class MyNorm(nn.Module):
    """Batch norm by hand, as in many courses; the flags say what is wrong with it."""

    def __init__(self, width: int, registered: bool = True, detached: bool = False, always: bool = False) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.detached, self.always = detached, always
        if registered:
            self.register_buffer("moving_mean", torch.zeros(width))
            self.register_buffer("moving_var", torch.ones(width))
        else:
            self.moving_mean, self.moving_var = torch.zeros(width), torch.ones(width)

    def forward(self, x: Tensor) -> Tensor:
        axes = [i for i in range(x.dim()) if i != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        if self.training or self.always:
            mean, var = x.mean(axes), x.var(axes, unbiased=False)
            if self.training:
                with torch.no_grad():
                    self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean.detach()
                    self.moving_var = 0.9 * self.moving_var + 0.1 * var.detach()
            if self.detached:
                mean, var = mean.detach(), var.detach()
        else:
            mean, var = self.moving_mean, self.moving_var
        x = (x - mean.reshape(shape)) / torch.sqrt(var.reshape(shape) + 1e-5)
        return self.gamma.reshape(shape) * x + self.beta.reshape(shape)


class FunctionalNorm(nn.Module):
    """F.batch_norm with buffers named as the author likes."""

    def __init__(self, width: int, training: bool | None = None) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mu", torch.zeros(width))
        self.register_buffer("sigma2", torch.ones(width))
        self.always = training

    def forward(self, x: Tensor) -> Tensor:
        training = self.training if self.always is None else self.always
        return F.batch_norm(x, self.mu, self.sigma2, self.scale, self.shift, training, 0.1, 1e-5)


# Sick: running statistics


@sick
def slow_stem_in_a_sound_network() -> Subject:
    torch.manual_seed(0)
    model, data = TemporalNet(), batches(*sounds(), 32)
    model.encoder["norm_a"].momentum = 0.001
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN201", "BN202"), ("encoder.norm_a",))


@sick
def densenet_on_inverted_scanner() -> Subject:
    torch.manual_seed(1)
    model, data = DenseNet(), digit_batches()
    optimizer = train(model, data)
    new = [(2.5 * x + 1, y) for x, y in data]
    return Subject(model, new, everything(optimizer), ("BN201",), ("features.norm0",))


@sick
def loaded_without_its_statistics() -> Subject:
    torch.manual_seed(2)
    trained, data = ResNet(), digit_batches()
    train(trained, data)
    state = {k: v for k, v in trained.state_dict().items() if "running" not in k and "tracked" not in k}
    model = ResNet()
    model.load_state_dict(state, strict=False)
    model.eval()
    norms = tuple(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    return Subject(model, data, everything(), ("BN201", "BN203"), norms)


@sick
def cumulative_average_over_the_training() -> Subject:
    torch.manual_seed(3)
    model, data = ResNet(), digit_batches()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    optimizer = train(model, data, rate=1e-2, settle=False)
    norms = tuple(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    return Subject(model, data, everything(optimizer), ("BN201",), norms)


@sick
def statistics_of_two_layers_swapped() -> Subject:
    torch.manual_seed(4)
    model, data = ResNet(), digit_batches()
    optimizer = train(model, data)
    first, second = model.layer2[0].bn1, model.layer2[0].downsample[1]
    for name in ("running_mean", "running_var"):
        a, b = getattr(first, name), getattr(second, name)
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
    return Subject(model.eval(), data, everything(optimizer), ("BN201",), ("layer2.0.bn1", "layer2.0.downsample.1"))


@sick
def deviation_ported_as_variance() -> Subject:
    torch.manual_seed(5)
    model, data = Tabular(), batches(*rows())
    train(model, data)
    model.input_bn.running_var.sqrt_()
    return Subject(model.eval(), data, everything(), ("BN201",), ("input_bn",))


@sick
def backbone_frozen_with_statistics_of_raw_pixels() -> Subject:
    torch.manual_seed(6)
    model, data = ResNet(), digit_batches()
    train(model, data)
    model.bn1 = frozen(model.bn1)
    raw = [(x * 60 + 80, y) for x, y in data]
    return Subject(model, raw, everything(), ("BN201",), ("bn1",))


@sick
def synchronized_norm_lags() -> Subject:
    torch.manual_seed(7)
    model, data = ResNet(), digit_batches()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.layer1[0].bn2.momentum = 0.002
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN201", "BN202"), ("layer1.0.bn2",))


@sick
def dropout_in_a_table_network() -> Subject:
    torch.manual_seed(8)

    class Regularized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(20, 64)
            self.fc2 = nn.Linear(64, 64)
            self.bn_late = nn.BatchNorm1d(64)
            self.out = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(F.relu(self.fc1(x)), 0.5, self.training)
            return self.out(F.relu(self.bn_late(self.fc2(x))))

    model, data = Regularized(), batches(*rows())
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN204",), ("bn_late",))


@sick
def hand_written_norm_with_foreign_statistics() -> Subject:
    torch.manual_seed(9)
    model, data = Tabular(norm=MyNorm), batches(*rows())
    train(model, data)
    model.input_bn.moving_mean += 3
    model.input_bn.moving_var *= 4
    return Subject(model.eval(), data, everything(), ("BN201",), ("input_bn",))


@sick
def functional_norm_with_foreign_statistics() -> Subject:
    torch.manual_seed(10)
    model, data = Tabular(norm=FunctionalNorm), batches(*rows())
    train(model, data)
    new = [(x + 20, y) for x, y in data]
    return Subject(model, new, everything(), ("BN201",), ("input_bn",))


# Sick: configuration


@sick
def keras_momentum() -> Subject:
    torch.manual_seed(11)
    model, data = VideoNet(), batches(*videos(), 32)
    model.body_norm.momentum = 0.99
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN101",), ("body_norm",))


@sick
def caffe_momentum_everywhere() -> Subject:
    model = TemporalNet(momentum=0.9)
    return Subject(model, None, {}, ("BN101",), ("encoder.norm_a", "encoder.norm_b"))


@sick
def momentum_of_zero_to_freeze() -> Subject:
    torch.manual_seed(12)
    model, data = DenseNet(), digit_batches()
    model.features.norm5.momentum = 0.0
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN102",), ("features.norm5",))


@sick
def eps_of_one_on_small_activations() -> Subject:
    torch.manual_seed(13)
    model, data = VideoNet(eps=1.0), batches(*videos(), 32)
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN103",), ("stem_norm", "body_norm"))


# Sick: modes


@sick
def prediction_in_training_mode() -> Subject:
    torch.manual_seed(14)
    model, data = Tabular(), batches(*rows())
    optimizer = train(model, data)

    def predict(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x).softmax(1)

    return Subject(model, data, everything(optimizer, predict=predict), ("BN301",), ("input_bn", "hidden.1"))


@sick
def dropout_woken_for_uncertainty() -> Subject:
    torch.manual_seed(15)
    model, data = efficient(), digit_batches()
    optimizer = train(model, data)

    def predict(model: nn.Module, x: Tensor) -> Tensor:
        model.train()
        with torch.no_grad():
            return torch.stack([model(x) for _ in range(4)]).mean(0)

    norms = tuple(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    return Subject(model, data, everything(optimizer, predict=predict), ("BN301",), norms)


@sick
def no_running_statistics_at_inference() -> Subject:
    torch.manual_seed(16)
    model, data = TemporalNet(track_running_stats=False), batches(*sounds(), 32)
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN301", "BN104"), ("encoder.norm_a", "encoder.norm_b"))


@sick
def validation_without_eval() -> Subject:
    torch.manual_seed(17)
    model, data = UNet(), segments()
    optimizer = train(model, data)

    def validate(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(CROSS_ENTROPY(model(x), y)) for x, y in data)

    norms = tuple(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    return Subject(
        model, data, {"criterion": CROSS_ENTROPY, "optimizer": optimizer, "validate": validate}, ("BN303",), norms
    )


@sick
def backbone_frozen_by_requires_grad_only() -> Subject:
    torch.manual_seed(18)
    backbone, data = ResNet(), digit_batches()
    train(backbone, data)
    model = nn.ModuleDict({"encoder": backbone, "head": nn.Linear(10, 3)})
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    model.train()
    norms = tuple(f"encoder.{name}" for name, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d))
    return Subject(model, None, {}, ("BN302",), norms)


@sick
def training_loop_wakes_the_backbone() -> Subject:
    torch.manual_seed(19)

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = unit(1, 8)
            self.head = nn.Sequential(unit(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

    model, data = Detector(), digit_batches()
    train(model, data)
    model.backbone.eval()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=1e-3)

    def step(model: nn.Module, item: Any) -> None:
        model.train()
        optimizer.zero_grad()
        CROSS_ENTROPY(model(item[0]), item[1]).backward()
        optimizer.step()

    return Subject(model, data, everything(optimizer, step=step), ("BN304",), ("backbone.1",))


# Sick: batches


class ASPP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.local = unit(1, 8)
        self.image_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.classify = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.image_pool(x).expand(-1, -1, *x.shape[2:])
        return self.classify(torch.cat([self.local(x), y], 1))


@sick
def one_image_per_gpu_with_global_pooling() -> Subject:
    torch.manual_seed(20)
    x, _ = images(8, 64)
    data = batches(x, (x[:, 0] > 0).long(), 1)
    return Subject(ASPP(), data, {"criterion": CROSS_ENTROPY}, ("BN401", "BN402"), ("image_pool.2",))


@sick
def two_images_per_gpu_with_global_pooling() -> Subject:
    torch.manual_seed(21)
    x, _ = images(8, 128)
    data = batches(x, (x[:, 0] > 0).long(), 2)
    model = ASPP()
    optimizer = train(model, data, 2)
    return Subject(model, data, {"criterion": CROSS_ENTROPY, "optimizer": optimizer}, ("BN402",), ("image_pool.2",))


@sick
def last_batch_of_one() -> Subject:
    torch.manual_seed(22)
    data = batches(*rows(count=513), 64, last=True)
    return Subject(Tabular(), data, {"criterion": CROSS_ENTROPY}, ("BN401",), ("input_bn", "hidden.1"))


@sick
def last_batch_of_two() -> Subject:
    torch.manual_seed(23)
    model = Tabular()
    data = batches(*rows(count=514), 64, last=True)
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN403",), ("input_bn", "hidden.1"))


@sick
def padded_utterances() -> Subject:
    torch.manual_seed(24)
    x, y = sounds()
    x = x + 1.5
    lengths = torch.randint(4, 33, (len(x),), generator=torch.Generator().manual_seed(7))
    x = x * (torch.arange(32) < lengths[:, None])[:, None]

    class Recognizer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.feature_norm = nn.BatchNorm1d(8)
            self.net = TemporalNet()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.feature_norm(x))

    model, data = Recognizer(), batches(x, y, 32)
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN404",), ("feature_norm",))


@sick
def loader_sorted_by_class() -> Subject:
    torch.manual_seed(25)
    x, y = images()
    model = ResNet()
    optimizer = train(model, batches(x, y))
    order = y.argsort()
    data = list(zip(x[order].split(64), y[order].split(64), strict=True))[:-1]
    norms = tuple(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    return Subject(model, data, everything(optimizer), ("BN405",), norms)


@sick
def synthetic_and_real_batches_alternate() -> Subject:
    torch.manual_seed(26)
    data = [(x if i % 2 else 0.4 * x - 1.2, y) for i, (x, y) in enumerate(digit_batches())]
    model = DenseNet()
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN405",), ("features.norm0",))


@sick
def queries_grouped_by_answer() -> Subject:
    """Each batch has one class and a fixed background: its statistics tell the class."""
    torch.manual_seed(27)
    x, y = rows(classes=2)
    order = torch.cat([torch.nonzero(y == c)[:448, 0].reshape(-1, 32) for c in range(2)])
    order = order[torch.randperm(len(order))]
    model = Tabular(classes=2)
    data = [(x[i] + 0.5 * torch.randn(32, 20), y[i]) for i in order]
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN405", "BN406"), ("input_bn", "hidden.1"))


@sick
def eight_small_batches_per_step() -> Subject:
    torch.manual_seed(28)
    model, data = ResNet(), digit_batches(batch=8)
    optimizer = train(model, data, 2)

    def step(model: nn.Module, item: Any) -> None:
        x, y = item
        optimizer.zero_grad()
        for small, target in zip(x.chunk(8), y.chunk(8), strict=True):
            (CROSS_ENTROPY(model(small), target) / 8).backward()
        optimizer.step()

    norms = tuple(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    return Subject(model, digit_batches(), everything(optimizer, step=step), ("BN407",), norms)


# Sick: numerics


@sick
def overflow_in_one_layer() -> Subject:
    torch.manual_seed(29)
    model, data = efficient(), digit_batches()
    train(model, data, 1)
    model[2].project[1].running_var[3] = float("inf")
    return Subject(model, None, {}, ("BN501",), ("2.project.1",))


@sick
def nan_statistics_found_at_evaluation() -> Subject:
    torch.manual_seed(30)
    model, data = UNet(), segments()
    train(model, data, 1)
    model.up_bn.running_mean[2] = float("nan")
    return Subject(model.eval(), data, {"criterion": CROSS_ENTROPY}, ("BN501",), ("up_bn",))


@sick
def variance_below_zero_after_subtraction() -> Subject:
    model = VideoNet()
    model.stem_norm.running_var[1] = -0.03
    return Subject(model, None, {}, ("BN501",), ("stem_norm",))


@sick
def model_in_half_precision() -> Subject:
    model = nn.Sequential(ResNet(), nn.LayerNorm(10)).half()
    norms = tuple(f"0.{name}" for name, m in model[0].named_modules() if isinstance(m, nn.BatchNorm2d))
    return Subject(model, None, {}, ("BN502",), norms)


@sick
def time_stamps_as_a_feature() -> Subject:
    torch.manual_seed(31)
    x, y = rows()
    x[:, 7] = 1.7e6 + torch.randn(len(x)) * 0.1
    model, data = Tabular(), batches(x, y)
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN503",), ("input_bn",))


@sick
def large_mean_in_bfloat16() -> Subject:
    torch.manual_seed(32)
    data = [((x * 0.05 + 40).bfloat16(), y) for x, y in digit_batches()]
    model = nn.Sequential(
        nn.BatchNorm2d(1), unit(1, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    ).bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return Subject(model, data, {"criterion": lambda y, t: CROSS_ENTROPY(y.float(), t)}, ("BN503",), ("0",))


@sick
def one_broken_file() -> Subject:
    torch.manual_seed(33)
    model, data = DenseNet(), digit_batches()
    train(model, data, 1)
    x, y = data[3]
    x = x.clone()
    x[5, 0, 2, 2] = float("nan")
    return Subject(model, [*data[:3], (x, y), *data[4:]], everything(), ("BN504",), ("features.norm0",))


# Sick: copies


def averaged(model: nn.Module, data: list[Any], buffers: bool) -> AveragedModel:
    copy_ = AveragedModel(model, avg_fn=get_ema_avg_fn(0.95), use_buffers=buffers)
    train(model, data, after=lambda: copy_.update_parameters(model))
    return copy_


@sick
def average_of_weights_without_estimation() -> Subject:
    """Equal weights for all steps at a high rate, and the buffers of the last one."""
    torch.manual_seed(34)
    model, data = efficient(), digit_batches()
    twin = AveragedModel(model)
    train(model, data, 4, 2e-2, settle=False, after=lambda: twin.update_parameters(model))
    norms = tuple(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    return Subject(model, data, everything(twin=twin), ("BN601",), norms)


@sick
def target_network_of_a_critic() -> Subject:
    torch.manual_seed(35)
    data = batches(*rows())
    critic = Tabular()
    target = copy.deepcopy(critic)

    def follow() -> None:
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
                slow.lerp_(fast, 0.02)

    train(critic, data, 12, after=follow)
    return Subject(critic, data, everything(twin=target), ("BN601",), ("input_bn", "hidden.1"))


@sick
def federated_average_of_parameters() -> Subject:
    torch.manual_seed(36)
    start = Tabular()
    x, y = rows()
    clients = []
    for shift in (-2.0, 0.0, 2.0):
        client = copy.deepcopy(start)
        train(client, batches(x * (1 + abs(shift)) + shift, y), 2)
        clients.append(client)
    with torch.no_grad():
        for group in zip(*(client.parameters() for client in clients), strict=True):
            mean = torch.stack(list(group)).mean(0)
            for parameter in group:
                parameter.copy_(mean)
    data = batches(x, y)
    return Subject(clients[0], data, everything(replicas=clients[1:]), ("BN611",), ("input_bn", "hidden.1"))


@sick
def folded_without_eps_and_mean() -> Subject:
    torch.manual_seed(37)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    data = digit_batches()
    train(model, data)
    model.eval()
    twin = copy.deepcopy(model)
    norm = twin[1]
    scale = norm.weight / norm.running_var  # the root was forgotten
    twin[0].weight.data *= scale[:, None, None, None]
    twin[0].bias = nn.Parameter(norm.bias - norm.running_mean * scale)
    twin[1] = nn.Identity()
    return Subject(model, data, everything(twin=twin), ("BN603",), ("1",))


@sick
def port_with_another_eps() -> Subject:
    torch.manual_seed(38)
    origin, data = efficient(eps=1e-3, momentum=0.01), digit_batches()
    train(origin, data)
    model = efficient()
    model.load_state_dict(origin.state_dict())
    norms = tuple(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    return Subject(model, data, everything(twin=origin), ("BN602",), norms)


# Sick: structure


@sick
def synchronization_lost_the_activation() -> Subject:
    torch.manual_seed(39)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    wrong = model[1]
    if not list(wrong.children()):  # torch keeps what hangs at the layer only in some versions
        wrong.add_module("act", nn.SiLU())
    return Subject(model, None, {}, ("BN701",), ("1",))


@sick
def half_of_the_units_died() -> Subject:
    torch.manual_seed(40)

    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_in = nn.Conv2d(1, 12, 3, padding=1)
            self.after = nn.BatchNorm2d(12)
            self.fc = nn.Linear(12, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.after(F.relu(self.conv_in(x))).amax((2, 3)))

    model, data = PostNorm(), digit_batches()
    model.conv_in.bias.data[:6] = -40
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN702",), ("after",))


@sick
def bias_before_the_norm() -> Subject:
    torch.manual_seed(41)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(32)
            self.other = nn.Linear(32, 4)
            self.project = nn.Linear(20, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(F.relu(self.norm(self.project(x))))

    model, data = Head(), batches(*rows())
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN703",), ("norm", "project"))


@sick
def sketches_and_photographs_share_a_norm() -> Subject:
    torch.manual_seed(42)

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(unit(1, 8), unit(8, 8, 2))
            self.fc = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            sketch = 3 * (x > 0.5).float() + 2
            return self.fc(torch.cat([self.tower(x).mean((2, 3)), self.tower(sketch).mean((2, 3))], 1))

    model, data = Siamese(), digit_batches()
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN704",), ("tower.0.1",))


@sick
def one_norm_for_all_time_steps() -> Subject:
    torch.manual_seed(43)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of_input, self.of_state = nn.Linear(8, 16), nn.Linear(16, 16, bias=False)
            self.cell_norm = nn.BatchNorm1d(16)
            self.out = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(len(x), 16)
            for t in range(0, x.shape[2], 8):
                state = state + F.relu(self.cell_norm(self.of_input(x[:, :, t]) + self.of_state(state)))
            return self.out(state)

    model, data = Recurrent(), batches(*sounds(), 32)
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN704",), ("cell_norm",))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(1, 8)
        self.stage = nn.Sequential(unit(8, 8), unit(8, 8))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = checkpoint(self.stage, y, use_reentrant=False)
        return self.fc(y.mean((2, 3)))


@sick
def checkpointing_to_save_memory() -> Subject:
    torch.manual_seed(44)
    model, data = Checkpointed(), digit_batches()
    optimizer = train(model, data, 3)
    return Subject(model, data, everything(optimizer), ("BN705",), ("stage.0.1", "stage.1.1"))


@sick
def moving_average_in_plain_attributes() -> Subject:
    model = Tabular(norm=lambda width: MyNorm(width, registered=False))
    return Subject(model, None, {}, ("BN711",), ("input_bn", "hidden.1"))


@sick
def hand_written_norm_never_uses_its_average() -> Subject:
    torch.manual_seed(45)
    model, data = Tabular(norm=lambda width: MyNorm(width, always=True)), batches(*rows())
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN712", "BN301"), ("input_bn", "hidden.1"))


@sick
def functional_norm_always_in_training() -> Subject:
    torch.manual_seed(46)
    model, data = Tabular(norm=lambda width: FunctionalNorm(width, training=True)), batches(*rows())
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN712", "BN301"), ("input_bn", "hidden.1"))


@sick
def hand_written_norm_detaches_its_statistics() -> Subject:
    torch.manual_seed(47)
    model, data = Tabular(norm=lambda width: MyNorm(width, detached=True)), batches(*rows())
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN713",), ("input_bn", "hidden.1"))


# Sick: optimization


@sick
def learning_rate_of_one() -> Subject:
    torch.manual_seed(48)
    model, data = ResNet(), digit_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.95)
    norms = tuple(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    return Subject(model, data, everything(optimizer), ("BN801",), norms)


@sick
def forty_plain_layers() -> Subject:
    torch.manual_seed(49)
    layers: list[nn.Module] = [nn.Linear(20, 32)]
    for _ in range(40):
        layers += [nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32, bias=False)]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    data = batches(*rows())
    norms = tuple(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm1d))
    return Subject(model, data, everything(torch.optim.SGD(model.parameters(), lr=0.01)), ("BN803",), norms)


# Sick: second round


@sick
def average_of_parameters_by_hand() -> Subject:
    torch.manual_seed(100)
    student, data = DenseNet(), digit_batches()
    teacher = copy.deepcopy(student).eval()

    def follow() -> None:
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.mul_(0.95).add_(fast, alpha=0.05)

    train(student, data, after=follow)
    norms = tuple(name for name, m in student.named_modules() if isinstance(m, nn.BatchNorm2d))
    return Subject(student, data, everything(twin=teacher), ("BN601",), norms)


@sick
def spatial_dropout_before_the_norm() -> Subject:
    torch.manual_seed(101)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.4), nn.Conv2d(16, 16, 3, bias=False),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    data = digit_batches()
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN204",), ("4",))


@sick
def columns_that_are_always_zero() -> Subject:
    torch.manual_seed(102)
    x, y = rows()
    x[:, 3:11] = 0
    model, data = Tabular(), batches(x, y)
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN702",), ("input_bn",))


@sick
def four_samples_at_1x1() -> Subject:
    torch.manual_seed(103)
    model = nn.Sequential(
        unit(1, 8), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    data = digit_batches(batch=4)[:60]
    optimizer = train(model, data, 2)
    return Subject(model, data, everything(optimizer), ("BN402",), ("3",))


@sick
def adam_with_a_rate_of_one_half() -> Subject:
    torch.manual_seed(104)
    model, data = Tabular(), batches(*rows())
    optimizer = train(model, data, 2, settle=False)
    optimizer.param_groups[0]["lr"] = 0.5
    return Subject(model, data, everything(optimizer), ("BN801",), ("hidden.1",))


class WithoutStatistics(nn.Module):
    """Hand-written, and nobody thought of inference."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() + self.beta


class BatchNormWithoutStatistics(WithoutStatistics):
    """Its name says what it is."""


@sick
def hand_written_norm_without_statistics() -> Subject:
    torch.manual_seed(105)
    model, data = Tabular(norm=BatchNormWithoutStatistics), batches(*rows())
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN712",), ("input_bn", "hidden.1"))


class Inline(nn.Module):
    """F.batch_norm in the forward of a block, without a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(20, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.linear(x), None, None, training=True)
        return self.head(F.relu(x))


@sick
def a_function_normalizes_by_the_batch_in_inference() -> Subject:
    torch.manual_seed(106)
    model, data = nn.Sequential(nn.BatchNorm1d(20), Inline()), batches(*rows())
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN301", "BN712"), ("1",))


@sick
def a_stage_left_in_inference_mode() -> Subject:
    """Statistics of another scale, and eval() from an earlier stage of the training that nobody undid."""
    torch.manual_seed(107)
    model, data = ResNet(), digit_batches()
    train(model, data)
    model.layer2[0].bn1.running_var *= 400
    model.layer2[0].bn1.eval()
    return Subject(model, data, everything(), ("BN201",), ("layer2.0.bn1",))


@sick
def depth_maps_in_millimeters_channels_last() -> Subject:
    """The mean is 3000 times the deviation: torch's kernel for this layout subtracts squares."""
    torch.manual_seed(108)
    data = [((x * 0.3 + 3000).to(memory_format=torch.channels_last), y) for x, y in digit_batches()]
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = model.append(nn.Linear(4, 10)).to(memory_format=torch.channels_last)
    return Subject(model, data, everything(), ("BN503",), ("1",))


@sick
def two_critics_share_the_statistics_of_three_sources() -> Subject:
    torch.manual_seed(109)
    x, y = rows()
    data = [(a * (1, 3, 0.3)[i % 3] + (0, 2, -2)[i % 3], b) for i, (a, b) in enumerate(batches(x, y, 32))]
    model = Tabular()
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN405",), ("input_bn",))


@sick
def counters_of_a_new_momentum_policy() -> Subject:
    torch.manual_seed(110)
    model, data = efficient(momentum=0.001), digit_batches()
    optimizer = train(model, data, 4)
    norms = tuple(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    return Subject(model, data, everything(optimizer), ("BN202", "BN201"), norms)


@sick
def one_feature_of_twenty_tells_the_batch() -> Subject:
    torch.manual_seed(111)
    y = (torch.arange(1024) // 32) % 2
    x = torch.randn(1024, 20)
    x[:, 0] += 2.0 * y - 1
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    data = [(x[i : i + 32], y[i : i + 32]) for i in (32 * torch.randperm(32)).tolist()]
    optimizer = train(model, data, 10)
    return Subject(model, data, everything(optimizer), ("BN405", "BN406"), ("2",))


@sick
def support_and_query_share_the_statistics() -> Subject:
    torch.manual_seed(112)

    class Meta(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU())
            self.head = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.encoder(x[:32]), self.encoder(4 * x[32:] + 3)]))

    model, data = Meta(), batches(*rows())
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN704",), ("encoder.1",))


class KeepsDeviations(nn.Module):
    """Hand-written, with a moving standard deviation instead of a variance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_std", torch.ones(width))
        self.rate = 0.1

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.running_mean, self.running_std
        if self.training:
            mean, deviation = x.mean(0), (x.var(0, unbiased=False) + 1e-5).sqrt()
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.rate)
                self.running_std.lerp_(deviation, self.rate)
        return self.gamma * (x - mean) / deviation + self.beta


@sick
def moving_deviation_that_lags() -> Subject:
    torch.manual_seed(113)
    model, data = Tabular(norm=KeepsDeviations), batches(*rows())
    model.input_bn.rate = 0.002
    optimizer = train(model, data)
    return Subject(model, data, everything(optimizer), ("BN201",), ("input_bn",))


# Healthy


def well(model: nn.Module, data: list[Any], **options: Any) -> Subject:
    optimizer = train(model, data, **options)
    return Subject(model, data, everything(optimizer))


@healthy
def resnet_settled() -> Subject:
    torch.manual_seed(60)
    return well(ResNet(), digit_batches())


@healthy
def resnet_untrained() -> Subject:
    torch.manual_seed(61)
    model = ResNet()
    return Subject(model, digit_batches(), everything(torch.optim.Adam(model.parameters(), lr=1e-3)))


@healthy
def efficientnet_with_a_ragged_last_batch() -> Subject:
    torch.manual_seed(62)
    return well(efficient(), digit_batches(batch=32, last=True))


@healthy
def densenet_settled() -> Subject:
    torch.manual_seed(63)
    return well(DenseNet(), digit_batches())


@healthy
def unet_settled() -> Subject:
    torch.manual_seed(64)
    return well(UNet(), segments())


@healthy
def sound_network_settled() -> Subject:
    torch.manual_seed(65)
    return well(TemporalNet(), batches(*sounds(), 32))


@healthy
def video_network_settled() -> Subject:
    torch.manual_seed(66)
    return well(VideoNet(), batches(*videos(), 32))


@healthy
def table_with_an_uneven_last_batch() -> Subject:
    torch.manual_seed(67)
    return well(Tabular(), batches(*rows(count=1044), 64, last=True))


@healthy
def recalibrated_cumulative_average() -> Subject:
    torch.manual_seed(68)
    model, data = ResNet(), digit_batches()
    optimizer = train(model, data, rate=1e-2, settle=False)
    update_bn(data, model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    optimizer.param_groups[0]["lr"] = 1e-4
    return Subject(model.eval(), data, everything(optimizer))


@healthy
def backbone_frozen_for_real() -> Subject:
    torch.manual_seed(69)

    class Tuned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = ResNet()
            self.head = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

        def train(self, mode: bool = True) -> "Tuned":
            super().train(mode)
            self.backbone.eval()
            return self

    model, data = Tuned(), digit_batches()
    train(model.backbone, data)
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    optimizer = train(model, data)

    def step(model: nn.Module, item: Any) -> None:
        model.train()
        optimizer.zero_grad()
        CROSS_ENTROPY(model(item[0]), item[1]).backward()
        optimizer.step()

    return Subject(model, data, everything(optimizer, step=step))


@healthy
def average_of_weights_with_buffers() -> Subject:
    torch.manual_seed(70)
    model, data = efficient(), digit_batches()
    twin = averaged(model, data, True)
    return Subject(model, data, everything(twin=twin))


@healthy
def average_that_copies_the_last_buffers() -> Subject:
    """torch copies buffers that are not averaged; the weights have settled, so they fit."""
    torch.manual_seed(34)
    model, data = efficient(), digit_batches()
    twin = averaged(model, data, False)
    return Subject(model, data, everything(twin=twin))


@healthy
def target_network_copied_whole() -> Subject:
    torch.manual_seed(71)
    model, data = Tabular(), batches(*rows())
    train(model, data)
    target = Tabular()
    target.load_state_dict(model.state_dict())
    return Subject(model, data, everything(twin=target.eval()))


@healthy
def replicas_that_agree() -> Subject:
    torch.manual_seed(72)
    model, data = ResNet(), digit_batches()
    train(model, data)
    return Subject(model, data, everything(replicas=[copy.deepcopy(model) for _ in range(2)]))


@healthy
def folded_by_torch() -> Subject:
    torch.manual_seed(73)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    data = digit_batches()
    train(model, data)
    model.eval()
    twin = copy.deepcopy(model)
    twin[0], twin[1] = torch.nn.utils.fusion.fuse_conv_bn_eval(twin[0], twin[1]), nn.Identity()
    return Subject(model, data, everything(twin=twin))


@healthy
def letters_on_black_borders() -> Subject:
    torch.manual_seed(74)
    data = [(F.pad(x, (4, 4, 4, 4), value=-1.0), y) for x, y in digit_batches()]
    return well(ResNet(), data)


@healthy
def siamese_towers_of_one_domain() -> Subject:
    torch.manual_seed(75)

    class Verifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(unit(1, 8), unit(8, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.fc = nn.Linear(8, 2)

        def forward(self, pair: Tensor) -> Tensor:
            return self.fc((self.tower(pair[:, :1]) - self.tower(pair[:, 1:])).abs())

    x, y = images()
    other = torch.randperm(len(x))
    same = torch.rand(len(x)) < 0.5
    partner = torch.where(same[:, None, None, None], x.roll(1, 3), x[other])
    return well(Verifier(), batches(torch.cat([x, partner], 1), (same | (y == y[other])).long()))


@healthy
def hand_written_norm_done_right() -> Subject:
    torch.manual_seed(76)
    return well(Tabular(norm=MyNorm), batches(*rows()))


@healthy
def functional_norm_done_right() -> Subject:
    torch.manual_seed(77)
    return well(Tabular(norm=FunctionalNorm), batches(*rows()))


@healthy
def synchronized_norms_on_one_device() -> Subject:
    torch.manual_seed(78)
    return well(nn.SyncBatchNorm.convert_sync_batchnorm(ResNet()), digit_batches())


@healthy
def layer_norm_only() -> Subject:
    torch.manual_seed(79)
    return well(Tabular(norm=nn.LayerNorm), batches(*rows()))


@healthy
def timm_like_norms_with_activation() -> Subject:
    torch.manual_seed(80)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), BatchNormAct2d(8), nn.Conv2d(8, 16, 3, 2, 1, bias=False), BatchNormAct2d(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    return well(model, digit_batches())


@healthy
def frozen_norms_of_the_same_data() -> Subject:
    torch.manual_seed(81)
    model, data = ResNet(), digit_batches()
    optimizer = train(model, data)
    model.bn1, model.layer1[0].bn1 = frozen(model.bn1), frozen(model.layer1[0].bn1)
    return Subject(model, data, everything(optimizer))


@healthy
def regression_with_dict_batches() -> Subject:
    torch.manual_seed(82)

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Tabular(classes=1)

        def forward(self, features: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
            y = self.net(features)[:, 0]
            return {"prediction": y} if target is None else {"prediction": y, "loss": F.mse_loss(y, target)}

    x, y = rows()
    data = [{"features": a, "target": b} for a, b in batches(x, (x @ torch.ones(20) / 20 + y).float())]
    objective = lambda model, item: model(**item)["loss"]  # noqa: E731
    model = Regression()
    optimizer = train(model, data, loss=objective)
    return Subject(model, data, {"objective": objective, "optimizer": optimizer})


@healthy
def two_images_of_large_maps() -> Subject:
    torch.manual_seed(83)
    x, _ = images(24, 80)
    data = batches(x, (x[:, 0] > 0).long(), 2)
    return well(UNet(), data, epochs=3)


@healthy
def rare_class() -> Subject:
    torch.manual_seed(84)
    x, y = rows(classes=2)
    keep = (y == 0) | (torch.rand(len(y), generator=torch.Generator().manual_seed(0)) < 0.1)
    return well(Tabular(classes=2), batches(x[keep], y[keep]))


@healthy
def variational_autoencoder() -> Subject:
    torch.manual_seed(85)

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8)
            )
            self.decode = nn.Sequential(nn.Linear(4, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, log_var = self.encode(x).chunk(2, 1)
            z = mean + torch.randn_like(mean) * (log_var / 2).exp() if self.training else mean
            return self.decode(z).reshape(x.shape), mean, log_var

    def objective(model: nn.Module, item: Any) -> Tensor:
        y, mean, log_var = model(item[0])
        return F.mse_loss(y, item[0]) + 1e-3 * (mean**2 + log_var.exp() - log_var - 1).mean()

    model, data = Autoencoder(), digit_batches()
    optimizer = train(model, data, epochs=12, loss=objective)
    return Subject(model, data, {"objective": objective, "optimizer": optimizer})


@healthy
def generator_of_a_pair() -> Subject:
    torch.manual_seed(86)
    generator = nn.Sequential(
        nn.Unflatten(1, (8, 1, 1)), nn.ConvTranspose2d(8, 16, 4, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip
    critic = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(128, 1))

    def objective(model: nn.Module, item: Any) -> Tensor:
        return F.softplus(-critic(model(item[0]))).mean()

    data = [(torch.randn(64, 8), torch.zeros(64)) for _ in range(18)]
    optimizer = train(generator, data, loss=objective)
    return Subject(generator, data, {"objective": objective, "optimizer": optimizer})


@healthy
def point_cloud_network() -> Subject:
    torch.manual_seed(87)

    class PointNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(
                nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32), nn.ReLU()
            )
            self.head = nn.Sequential(
                nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mlp(x).amax(2))

    y = torch.randint(2, (512,))
    x = (
        F.normalize(torch.randn(512, 3, 40), dim=1)
        * torch.where(y == 1, torch.rand(512), torch.ones(()))[:, None, None]
    )
    return well(PointNet(), batches(x, y, 32))


@healthy
def transformer_with_a_norm_head() -> Subject:
    torch.manual_seed(88)

    class Former(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 16)
            self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True)
            self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.embed(x[:, 0])).mean(1))

    return well(Former(), digit_batches())


@healthy
def checkpointing_in_inference_mode_of_norms() -> Subject:
    torch.manual_seed(89)
    model, data = Checkpointed(), digit_batches()
    train(model, data)
    for module in model.stage.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return Subject(model, data, everything(optimizer))


@healthy
def validation_that_calls_eval() -> Subject:
    torch.manual_seed(90)
    model, data = UNet(), segments()
    optimizer = train(model, data)

    def validate(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            total = sum(float(CROSS_ENTROPY(model(x), y)) for x, y in data)
        model.train()
        return total

    return Subject(model, data, everything(optimizer, validate=validate))


@healthy
def channels_last_pixels() -> Subject:
    torch.manual_seed(91)
    data = [((x * 0.3 + 0.4).to(memory_format=torch.channels_last), y) for x, y in digit_batches()]
    return well(ResNet().to(memory_format=torch.channels_last), data)


@healthy
def momentum_of_a_long_training() -> Subject:
    torch.manual_seed(92)
    return well(efficient(momentum=0.03, eps=1e-3), digit_batches(), epochs=15)


@healthy
def mobile_network_untrained() -> Subject:
    torch.manual_seed(120)
    model = efficient(eps=1e-3, momentum=0.01)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.groups > 1:
                nn.init.normal_(module.weight, std=0.03)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    return Subject(model, digit_batches(), everything(optimizer))


class NextBlock(nn.Module):
    """ConvNeXt's: depthwise convolution, layer norm over channels, two linear layers, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(self.depthwise(x).movedim(1, -1))).movedim(-1, 1)


@healthy
def convnext_with_a_norm_in_the_stem() -> Subject:
    torch.manual_seed(121)
    stem = [nn.Conv2d(1, 12, 2, 2, bias=False), nn.BatchNorm2d(12)]
    return well(
        nn.Sequential(*stem, NextBlock(12), NextBlock(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)),
        digit_batches(),
    )


@healthy
def recurrent_network_of_sounds() -> Subject:
    torch.manual_seed(122)

    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.BatchNorm1d(8)
            self.lstm = nn.LSTM(8, 16, batch_first=True, bidirectional=True)
            self.after, self.out = nn.BatchNorm1d(32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            states = self.lstm(self.features(x).mT)[0]
            return self.out(self.after(states.mT).mean(2))

    return well(Speech(), batches(*sounds(), 32))


@healthy
def generator_of_the_lab() -> Subject:
    torch.manual_seed(123)
    generator, critic = adversaries.networks(True, True, None)
    noise = [torch.randn(64, 64) for _ in range(18)]
    optimizer = train(generator, noise, 8, 1e-3, loss=lambda model, item: F.softplus(-critic(model(item))).mean())
    return Subject(
        generator, noise, {"objective": lambda m, z: F.softplus(-critic(m(z))).mean(), "optimizer": optimizer}
    )


@healthy
def adversaries_untrained() -> Subject:
    torch.manual_seed(124)
    _, critic = adversaries.networks(True, True, None)
    data = digit_batches(16)
    return Subject(critic, data, {"objective": lambda m, item: F.softplus(-m(item[0])).mean()})


def of_the_lab(build: Callable[..., nn.Module], **options: Any) -> Subject:
    torch.manual_seed(125)
    return well(build(nn.BatchNorm2d), digit_batches(16), epochs=3, rate=1e-3, **options)


@healthy
def alexnet_of_the_lab() -> Subject:
    return of_the_lab(image_networks.alexnet)


@healthy
def vgg_of_the_lab() -> Subject:
    return of_the_lab(image_networks.vgg)


@healthy
def resnet_of_the_lab() -> Subject:
    return of_the_lab(image_networks.resnet)


@healthy
def detector_of_the_lab_untrained() -> Subject:
    torch.manual_seed(126)
    model = Detector(True, True, False)
    return Subject(
        model, [torch.randn(8, 1, 64, 64) for _ in range(3)], {"objective": lambda m, x: m(x)[1].square().mean()}
    )


@healthy
def recognizer_of_the_lab_untrained() -> Subject:
    torch.manual_seed(127)
    model = Recognizer(True, True, False)
    items = [(torch.randn(8, 40, 40), torch.randint(20, 41, (8,))) for _ in range(4)]
    return Subject(
        model, items, {"forward": lambda m, item: m(*item), "objective": lambda m, item: m(*item)[0].square().mean()}
    )


@healthy
def deep_plain_network_with_residuals() -> Subject:
    torch.manual_seed(128)
    blocks = [BasicBlock(8, 8) for _ in range(8)]
    model = nn.Sequential(unit(1, 8), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return well(model, digit_batches(), epochs=2, rate=1e-3)


@healthy
def settled_with_momentum_and_weight_decay() -> Subject:
    torch.manual_seed(129)
    model, data = ResNet(), digit_batches()
    train(model, data)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9, weight_decay=1e-4)
    return Subject(model, data, everything(optimizer))


@healthy
def gradients_of_two_halves() -> Subject:
    torch.manual_seed(130)
    model, data = ResNet(), digit_batches()
    optimizer = train(model, data)

    def step(model: nn.Module, item: Any) -> None:
        optimizer.zero_grad()
        for x, y in zip(item[0].chunk(2), item[1].chunk(2), strict=True):
            (CROSS_ENTROPY(model(x), y) / 2).backward()
        optimizer.step()

    return Subject(model, data, everything(optimizer, step=step))


@healthy
def mixed_precision() -> Subject:
    torch.manual_seed(131)
    model, data = ResNet(), digit_batches()

    def forward(model: nn.Module, item: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(item[0]).float()

    optimizer = train(model, data, loss=lambda model, item: CROSS_ENTROPY(forward(model, item), item[1]))
    return Subject(model, data, {"criterion": CROSS_ENTROPY, "forward": forward, "optimizer": optimizer})


@healthy
def last_batch_of_five_digits() -> Subject:
    torch.manual_seed(132)
    x, y = images(8, 517)
    layers = [
        nn.Flatten(),
        nn.Linear(64, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
    ]
    return well(nn.Sequential(*layers, nn.Linear(64, 10)), batches(x, y, 64, last=True))


@healthy
def rare_words() -> Subject:
    torch.manual_seed(133)
    x = (torch.rand(1024, 60) < 0.03).float()
    return well(Tabular(60, 2), batches(x, (x[:, :10].sum(1) > 0).long()))


@healthy
def moving_deviation_done_right() -> Subject:
    torch.manual_seed(134)
    return well(Tabular(norm=KeepsDeviations), batches(*rows()))


@healthy
def labels_at_random() -> Subject:
    torch.manual_seed(135)
    return well(ResNet(), [(x, torch.randint(10, y.shape)) for x, y in digit_batches()])


@healthy
def new_head_for_other_classes() -> Subject:
    torch.manual_seed(136)
    subject = well(ResNet(), digit_batches())
    subject.model.fc = nn.Linear(16, 10)
    subject.arguments["optimizer"] = torch.optim.Adam(subject.model.parameters(), 1e-4)
    return subject


@healthy
def ghost_batches_of_ours() -> Subject:
    torch.manual_seed(137)
    return well(bn.convert(ResNet(), statistics=bn.statistics.Ghost(16)), digit_batches())
