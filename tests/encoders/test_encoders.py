"""The encoders against counts done by hand, functional forms written out here, and the samples they are for."""

import math
import time
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cauc_dist import config
from cauc_dist.encoders import Model, Projector, build
from cauc_dist.errors import BadInput

SHAPES: dict[str, tuple[int, ...]] = {
    "cnn3d": (1, 24, 25, 26),
    "densenet121_3d": (1, 32, 33, 34),
    "resnet18_3d": (1, 24, 25, 26),
    "resnet18_2d": (3, 32, 32),
    "mlp": (20,),
}
EVERY = [(name, norm) for name in SHAPES for norm in ("group", "batch")]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def make(name: str, norm: str = "group", width: int | None = None, shape: tuple[int, ...] | None = None, seed: int = 0):
    torch.manual_seed(seed)
    return build(config.Encoder(name=name, norm=norm, width=width), shape or SHAPES[name])


def test_densenet_with_its_projector_has_the_published_number_of_parameters() -> None:
    encoder = make("densenet121_3d")
    assert encoder.width == 1024
    assert parameters(Model(encoder, Projector(1024, 512, 128))) == 11_831_040


def test_densenet_filters_start_as_he_et_al_and_norms_as_the_identity() -> None:
    for module in make("densenet121_3d", "batch").modules():
        if isinstance(module, nn.Conv3d):
            wanted = math.sqrt(2 / module.weight[0].numel())
            tolerance = 5 * wanted / math.sqrt(2 * module.weight.numel())  # five standard errors
            assert module.bias is None
            assert module.weight.std().item() == pytest.approx(wanted, abs=tolerance)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert torch.all(module.weight == 1)
            assert torch.all(module.bias == 0)


def test_densenet_keeps_every_earlier_feature_map_to_the_end_of_a_block() -> None:
    encoder = make("densenet121_3d")
    stem = encoder.stem(torch.randn(1, *SHAPES["densenet121_3d"]))
    block = encoder.stages[0](stem)
    assert stem.shape == (1, 64, 8, 9, 9)
    assert block.shape == (1, 64 + 6 * 32, 8, 9, 9)
    assert torch.equal(block[:, :64], stem)
    assert torch.equal(block[:, 64:96], encoder.stages[0][0].new(stem))


def test_densenet_pools_what_the_last_block_gives_without_another_norm() -> None:
    encoder = make("densenet121_3d")
    x = torch.randn(1, 1, 64, 64, 32)
    features = encoder.stages(encoder.stem(x))
    assert features.shape == (1, 1024, 2, 2, 1)
    assert torch.allclose(encoder(x), features.clamp_min(0).sum((2, 3, 4)) / 4, rtol=1e-5, atol=1e-6)


def resnet_parameters(channels: int, stem: int, axes: int, w: int = 64) -> int:
    """Stem; a stage: four 3^axes convolutions (one widens), a 1x1 shortcut where it widens, norms."""
    total = channels * w * stem**axes + 2 * w + 4 * w * w * 3**axes + 4 * 2 * w
    for before, after in pairwise((w, 2 * w, 4 * w, 8 * w)):
        total += (before * after + 3 * after * after) * 3**axes + before * after + 5 * 2 * after
    return total


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_resnets_have_the_parameters_of_the_architecture(norm: str) -> None:
    assert parameters(make("resnet18_3d", norm)) == resnet_parameters(1, 7, 3) == 33_160_000
    assert parameters(make("resnet18_2d", norm)) == resnet_parameters(3, 3, 2) == 11_168_832
    assert parameters(make("resnet18_2d", norm, width=8)) == resnet_parameters(3, 3, 2, 8)
    assert make("resnet18_3d", norm, width=8).width == 64


def residual_network(x: Tensor, weights: dict[str, Tensor], axes: int) -> Tensor:
    """He et al., written with functions; BatchNorm with the running statistics."""
    conv = F.conv3d if axes == 3 else F.conv2d

    def convolve(x: Tensor, name: str, stride: int, padding: int) -> Tensor:
        return conv(x, weights[f"{name}.weight"], stride=stride, padding=padding)

    def normalise(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    x = normalise(convolve(x, "stem.0", *((2, 3) if axes == 3 else (1, 1))), "stem.1").relu()
    x = F.max_pool3d(x, 3, 2, 1) if axes == 3 else x
    for i, stride in enumerate((1, 1, 2, 1, 2, 1, 2, 1)):
        block = f"blocks.{i}"
        new = normalise(convolve(x, f"{block}.residual.0", stride, 1), f"{block}.residual.1").relu()
        new = normalise(convolve(new, f"{block}.residual.3", 1, 1), f"{block}.residual.4")
        if stride == 2:
            x = normalise(convolve(x, f"{block}.shortcut.0", 2, 0), f"{block}.shortcut.1")
        x = (x + new).relu()
    return x.flatten(2).mean(2)


@pytest.mark.parametrize(("name", "axes"), [("resnet18_3d", 3), ("resnet18_2d", 2)])
def test_resnet_computes_the_residual_network(name: str, axes: int) -> None:
    encoder, x = make(name, "batch").double(), torch.randn(3, *SHAPES[name]).double()
    encoder(x)  # moves the running statistics off their start
    encoder.eval()
    assert torch.allclose(encoder(x), residual_network(x, encoder.state_dict(), axes), rtol=1e-10, atol=1e-10)


def test_cnn3d_is_four_convolutions_then_mean_and_maximum() -> None:
    encoder, x = make("cnn3d", width=8), torch.randn(2, 1, 31, 40, 24)
    h = x
    for i, groups in enumerate((2, 4, 8, 16)):  # four channels a group
        state = encoder.stages[i].state_dict()
        h = F.conv3d(h, state["0.weight"], stride=2, padding=1)
        h = F.group_norm(h, groups, state["1.weight"], state["1.bias"]).relu()
    assert h.shape == (2, 64, 2, 3, 2)
    wanted = torch.cat([h.mean((2, 3, 4)), h.flatten(2).max(2).values], 1)
    assert torch.allclose(encoder(x), wanted, rtol=1e-5, atol=1e-6)


def test_cnn3d_has_the_documented_size() -> None:
    convolutions = 27 * (1 * 16 + 16 * 32 + 32 * 64 + 64 * 128)
    assert parameters(make("cnn3d")) == convolutions + 2 * (16 + 32 + 64 + 128) == 291_216


@pytest.mark.parametrize("shape", [(1, 24, 24, 24), (1, 31, 40, 24), (2, 9, 9, 9), (1, 48, 57, 48)])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_cnn3d_takes_small_and_odd_volumes(shape: tuple[int, ...], norm: str) -> None:
    h = make("cnn3d", norm, shape=shape)(torch.randn(3, *shape))
    assert h.shape == (3, 256)
    assert h.isfinite().all()


def test_cnn3d_trains_thirty_two_volumes_in_well_under_a_second_on_one_core() -> None:
    encoder, x = make("cnn3d"), torch.randn(32, 1, 48, 48, 48)
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            start = time.process_time()
            encoder(x).sum().backward()
            seconds.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(seconds) < 1.0  # about .2


def test_mlp_is_two_layers() -> None:
    encoder, x = make("mlp", "batch", width=32).eval(), torch.randn(5, 20)
    state = encoder.state_dict()
    h = (x @ state["layers.0.0.weight"].T / math.sqrt(1 + 1e-5)).relu()
    h = (h @ state["layers.1.0.weight"].T / math.sqrt(1 + 1e-5)).relu()
    assert torch.allclose(encoder(x), h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_h_has_the_width_it_says_in_fp32_and_every_parameter_gets_a_gradient(name: str, norm: str) -> None:
    encoder = make(name, norm)
    h = encoder(torch.randn(3, *SHAPES[name]))
    assert h.shape == (3, encoder.width)
    assert h.dtype == torch.float32
    (h * torch.randn_like(h)).sum().backward()
    for parameter in encoder.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", SHAPES)
def test_under_bf16_autocast_h_and_z_come_out_in_fp32(name: str) -> None:
    encoder = make(name, "batch")
    model = Model(encoder, Projector(encoder.width, 8, 4))
    with torch.autocast("cpu", torch.bfloat16):
        h, z = encoder(torch.randn(3, *SHAPES[name])), model(torch.randn(3, *SHAPES[name]))
    assert h.dtype == z.dtype == torch.float32
    assert torch.allclose(z.norm(dim=1), torch.ones(3), atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_group_norm_keeps_samples_apart(name: str) -> None:
    encoder, x = make(name), torch.randn(3, *SHAPES[name])
    assert torch.allclose(encoder(x)[1:2], encoder(x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_seed_builds_the_same_weights(name: str) -> None:
    once, again, other = (make(name, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert not all(torch.equal(once[key], other[key]) for key in once)


def test_projector_is_linear_relu_linear_with_biases_that_start_at_zero() -> None:
    projector, h = Projector(6, 5, 4), torch.randn(3, 6)
    first, last = projector.layers[0].weight, projector.layers[2].weight
    assert torch.allclose(projector(h), (h @ first.T).relu() @ last.T, atol=1e-6)
    assert parameters(projector) == 6 * 5 + 5 + 5 * 4 + 4


def test_model_gives_unit_rows_or_the_projection_as_it_is() -> None:
    encoder, x = make("mlp", width=32), torch.randn(7, 20)
    projector = Projector(32, 16, 8)
    raw = projector(encoder(x))
    z = Model(encoder, projector)(x)
    assert torch.allclose(z.norm(dim=1), torch.ones(7), atol=1e-6)
    assert torch.allclose(z, raw / raw.pow(2).sum(1, keepdim=True).sqrt(), atol=1e-6)
    assert torch.equal(Model(encoder, projector, normalise=False)(x), raw)


def test_model_leaves_a_row_of_zeros_finite() -> None:
    z = Model(nn.Identity(), nn.Identity())(torch.zeros(1, 4, requires_grad=True))
    z.sum().backward()
    assert torch.equal(z, torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("name", "shape", "fitting"),
    [
        ("resnet18_2d", (1, 48, 48, 48), "cnn3d or densenet121_3d or resnet18_3d"),
        ("densenet121_3d", (1, 48, 48, 28), "cnn3d or resnet18_3d"),
        ("resnet18_3d", (1, 16, 48, 48), "cnn3d"),
        ("cnn3d", (3, 32, 32), "resnet18_2d"),
        ("cnn3d", (20,), "mlp"),
        ("mlp", (3, 32, 32), "resnet18_2d"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused_and_one_that_fits_is_named(
    name: str, shape: tuple[int, ...], fitting: str
) -> None:
    with pytest.raises(BadInput) as refused:
        make(name, shape=shape)
    assert f"{name} on samples of shape {shape}" in refused.value.found
    assert refused.value.do == f"Use {fitting}"


def test_refusals_say_what_the_encoder_takes() -> None:
    with pytest.raises(BadInput, match=r"wanted \(c, X, Y, Z\) with sides of 29 or more"):
        make("densenet121_3d", shape=(3, 32, 32))
    with pytest.raises(BadInput, match=r"wanted table rows \(c,\)"):
        make("mlp", shape=(3, 32, 32))


def test_samples_that_no_encoder_takes_are_refused() -> None:
    with pytest.raises(BadInput, match="No encoder takes such samples"):
        make("cnn3d", shape=(1, 8, 8, 8))


def test_an_unknown_name_and_an_empty_width_are_refused() -> None:
    with pytest.raises(BadInput, match="Did you mean cnn3d"):
        make("cnn3", shape=(1, 24, 24, 24))
    with pytest.raises(BadInput, match=r"encoder\.width 0"):
        make("cnn3d", width=0)
    with pytest.raises(BadInput, match=r"encoder\.width 32 of densenet121_3d; wanted the published 64"):
        make("densenet121_3d", width=32)


@pytest.mark.parametrize(
    ("name", "side"), [("cnn3d", 9), ("densenet121_3d", 29), ("resnet18_3d", 17), ("resnet18_2d", 5)]
)
def test_the_smallest_side_that_is_accepted_works(name: str, side: int) -> None:
    shape = (1, *[side] * (2 if name == "resnet18_2d" else 3))
    h = make(name, "batch", shape=shape)(torch.randn(2, *shape))
    assert h.isfinite().all()
    assert h.std() > 0


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e19, 1e30])
def test_rows_are_of_unit_length_whatever_their_size(size: float) -> None:
    """Squares of 1e19 overflow fp32: such rows must not come out as zeros with a gradient of zero."""
    from cauc_dist.encoders.projector import unit_rows

    x = torch.tensor([[3.0, -4.0, 0.0], [1.0, 1.0, 1.0]]) * size
    z = unit_rows(x.requires_grad_())
    torch.testing.assert_close(z, torch.tensor([[0.6, -0.8, 0.0], [3**-0.5] * 3]))
    wanted = torch.autograd.functional.jacobian(lambda v: v / v.norm(), torch.tensor([3.0, -4, 0], dtype=torch.float64))
    (found,) = torch.autograd.grad(z[0, 0], x)
    torch.testing.assert_close(found[0].double() * size, wanted[0], rtol=1e-5, atol=1e-7)


def test_a_row_of_zeros_stays_zero() -> None:
    from cauc_dist.encoders.projector import unit_rows

    assert unit_rows(torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]


def test_the_norm_is_the_published_one_unless_another_is_asked_for() -> None:
    def kinds(name: str, norm: str) -> set[str]:
        model = build(config.Encoder(name=name, norm=norm), SHAPES[name])  # type: ignore[arg-type]
        return {type(m).__name__ for m in model.modules()} & {"BatchNorm", "GroupNorm"}

    assert kinds("densenet121_3d", "published") == kinds("resnet18_3d", "published") == {"BatchNorm"}
    assert kinds("cnn3d", "published") == kinds("mlp", "published") == {"GroupNorm"}
    assert kinds("densenet121_3d", "group") == {"GroupNorm"}
    assert kinds("cnn3d", "batch") == {"BatchNorm"}
