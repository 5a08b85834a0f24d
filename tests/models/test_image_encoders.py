"""Image encoders: shapes, normalisation, what is left out in training, and independence of the batch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
import torchvision
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms.functional import normalize

from setwise.models.batch_norm import has_batch_statistics, synchronize
from setwise.models.config import ConvNetConfig, GridConfig, ImageHeadConfig, ModelConfig, RegionsConfig
from setwise.models.dropout import name_layers
from setwise.models.image_encoders import ConvNet, Grid, Regions, image_encoder


def encoder(channels: tuple[int, ...] = (8, 16, 24)) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(ConvNetConfig(kind="cnn", channels=channels), embed_size=20)


def pixels(num: int = 3, height: int = 32, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [(8, 16, 24), (8, 24), (8, 16, 16, 24)])
def test_a_cell_of_the_grid_stands_for_eight_by_eight_pixels(channels: tuple[int, ...]) -> None:
    features = encoder(channels)(pixels())
    assert features.grid == (4, 6)
    assert features.local.shape == (3, 24, 20) and encoder(channels).local_dim == 20
    assert features.pooled.shape == (3, 20) and features.is_padding is None


def test_bytes_are_normalised_and_floats_taken_as_they_are() -> None:
    images = pixels()
    from_bytes, from_floats = encoder()(images), encoder()((images.float() / 255 - 0.5) / 0.25)
    torch.testing.assert_close(from_bytes.local, from_floats.local)


def test_neighbours_have_no_influence_and_training_equals_evaluation() -> None:
    images = pixels()
    together, alone = encoder().double()(images), encoder().double().eval()(images[1:2])
    torch.testing.assert_close(together.local[1:2], alone.local, rtol=0, atol=1e-12)
    torch.testing.assert_close(together.pooled[1:2], alone.pooled, rtol=0, atol=1e-12)


def test_features_run_along_the_rows_of_the_grid() -> None:
    images = pixels(1)
    changed = images.clone()
    changed[:, :, :8, -8:] = 255 - changed[:, :, :8, -8:]  # top right: the sixth cell of the first row of 4 x 6
    difference = (encoder()(images).local - encoder()(changed).local).norm(dim=-1)[0]
    assert difference.argmax() == 5


def test_features_say_where_they_are() -> None:
    """On a plain image all cells away from the border see the same; only the position code tells them apart."""
    grey = torch.full((1, 3, 128, 128), 100, dtype=torch.uint8)
    with_code = encoder()
    inner = with_code(grey).local.view(16, 16, -1)[4:12, 4:12].flatten(0, 1)
    assert torch.pdist(inner).min() > 1e-3
    torch.nn.init.zeros_(with_code.place.weight)
    inner = with_code(grey).local.view(16, 16, -1)[4:12, 4:12].flatten(0, 1)
    assert torch.pdist(inner).max() < 1e-5


def test_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="no padding"):
        encoder()(pixels(), torch.tensor([1, 2, 3]))


def test_every_parameter_learns() -> None:
    net = encoder()
    features = net(pixels())
    (features.local.square().sum() + features.pooled.square().sum()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- cells left out ---------------------------------------------------------------------------------------------


def with_cell_drop(kind: str, share: float) -> ConvNet | Grid:
    torch.manual_seed(0)
    if kind == "cnn":
        encoder: ConvNet | Grid = ConvNet(ConvNetConfig(kind="cnn", channels=(8, 16), cell_drop=share), embed_size=20)
    else:
        head = ImageHeadConfig(dropout=0)
        encoder = Grid(GridConfig(kind="grid", architecture="resnet18", cell_drop=share, head=head), embed_size=20)
    name_layers(encoder)
    return encoder.double()


def cells(kind: str, batch: int, rows: int = 6, columns: int = 8) -> Tensor:
    """Pixels of which the small encoder makes cells, or the map that a backbone made of them."""
    if kind == "cnn":
        return pixels(batch, 8 * rows, 8 * columns)
    return torch.randn(batch, 512, rows, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


each_grid = pytest.mark.parametrize("kind", ["cnn", "grid"])


@each_grid
def test_a_share_of_the_cells_is_left_out_in_training_and_none_in_evaluation(kind: str) -> None:
    encoder, images = with_cell_drop(kind, 0.3), cells(kind, 60)
    for keys in (None, torch.arange(60)):
        features = encoder(images, keys=keys)
        assert features.grid == (6, 8) and features.is_padding.shape == (60, 48)
        assert 0.26 < features.is_padding.double().mean() < 0.34
        valid = [local[~row].amax(0) for local, row in zip(features.local, features.is_padding, strict=True)]
        torch.testing.assert_close(features.pooled, torch.stack(valid), rtol=0, atol=1e-12)
    assert with_cell_drop(kind, 0)(images).is_padding is None
    evaluated, whole = encoder.eval()(images[:2]), with_cell_drop(kind, 0).eval()(images[:2])
    assert evaluated.is_padding is None
    if kind == "cnn":  # the head of a grid moved its statistics above
        torch.testing.assert_close(evaluated[:2], whole[:2], rtol=0, atol=0)


@each_grid
def test_which_cells_are_left_out_is_the_keys_choice(kind: str) -> None:
    encoder, images, keys = with_cell_drop(kind, 0.5), cells(kind, 5), torch.arange(5) * 3
    chosen, order = encoder(images, keys=keys).is_padding, torch.tensor([3, 0])
    assert torch.equal(encoder(images[order], keys=keys[order]).is_padding, chosen[order])
    assert not torch.equal(encoder(images, keys=keys + 1).is_padding, chosen)
    regions_alike = regions(region_drop=0.5)(torch.zeros(5, 48, 6, dtype=torch.float64), keys=keys).is_padding
    assert torch.equal(regions_alike, chosen), "regions are left out by the same rule"


@each_grid
def test_an_image_that_would_lose_all_cells_keeps_them(kind: str) -> None:
    features = with_cell_drop(kind, 0.999)(cells(kind, 9, 2, 2), keys=torch.arange(9))
    kept = (~features.is_padding).sum(1)
    assert features.pooled.isfinite().all() and kept.max() == 4 and kept.min() >= 1


def test_cells_that_are_left_out_have_no_influence() -> None:
    images, keys = cells("grid", 5), torch.arange(5)
    is_padding, found = with_cell_drop("grid", 0.5)(images, keys=keys).is_padding, []
    for value in (0.0, 100.0):
        encoder = with_cell_drop("grid", 0.5)
        features = encoder(images.masked_fill(is_padding.view(5, 1, 6, 8), value), keys=keys)
        found.append((features.local[~is_padding], features.pooled, dict(encoder.named_buffers())))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_the_configuration_picks_the_encoder() -> None:
    configs = (ConvNetConfig(kind="cnn"), RegionsConfig(kind="butd"), GridConfig(kind="grid", architecture="resnet18"))
    assert [type(image_encoder(config, 16)) for config in configs] == [ConvNet, Regions, Grid]


# --- regions ----------------------------------------------------------------------------------------------------


def regions(**settings: Any) -> Regions:
    torch.manual_seed(0)
    encoder = Regions(RegionsConfig.model_validate({"kind": "butd", "feature_dim": 6} | settings), embed_size=8)
    name_layers(encoder)
    return encoder.double()


def detected(batch: int = 5, num: int = 7) -> Tensor:
    return torch.randn(batch, num, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_regions_become_local_features_and_a_global_one() -> None:
    encoder = regions().eval()
    lengths = torch.tensor([7, 1, 3, 4, 7])
    features = encoder(detected(), lengths)
    assert features.local.shape == (5, 7, 8) and features.pooled.shape == (5, 8) and features.grid is None
    assert (~features.is_padding).sum(1).tolist() == lengths.tolist()
    torch.testing.assert_close(features[:2], encoder.head(detected(), features.is_padding))
    assert encoder(detected()).is_padding is None
    raw = regions(head={"projection": "none", "global_feature": "linear"})
    assert raw.local_dim == 6 and raw.eval()(detected()).local.shape == (5, 7, 6)


def test_an_images_regions_do_not_depend_on_batch_and_padding() -> None:
    encoder, lengths = regions().eval(), torch.tensor([4, 7])
    together = encoder(detected(2), lengths)
    alone = encoder(detected(2)[:1, :4])
    torch.testing.assert_close(together.local[:1, :4], alone.local, rtol=0, atol=1e-12)
    torch.testing.assert_close(together.pooled[:1], alone.pooled, rtol=0, atol=1e-12)


def test_a_share_of_the_regions_is_left_out_in_training() -> None:
    encoder, lengths = regions(region_drop=0.3), torch.full((400,), 30)
    lengths[::2] = 20
    for keys in (None, torch.arange(400)):
        is_padding = encoder(detected(400, 36), lengths, keys).is_padding
        real = torch.arange(36) < lengths[:, None]
        assert is_padding[~real].all()
        assert 0.28 < is_padding[real].double().mean() < 0.32
    assert encoder(detected(), keys=torch.arange(5)).is_padding.any(), "without lengths too"
    assert regions(region_drop=0)(detected()).is_padding is None


def test_which_regions_are_left_out_is_the_keys_choice() -> None:
    encoder, keys = regions(region_drop=0.5), torch.arange(5) * 3
    chosen = encoder(detected(), keys=keys).is_padding
    order = torch.tensor([3, 0])
    assert torch.equal(encoder(detected()[order], keys=keys[order]).is_padding, chosen[order])
    padded = encoder(detected(), torch.full((5,), 4), keys).is_padding
    assert torch.equal(encoder(detected()[:, :4], keys=keys).is_padding, padded[:, :4])
    assert not torch.equal(encoder(detected(), keys=keys + 1).is_padding, chosen)


def test_what_is_left_out_has_no_influence() -> None:
    encoder, keys, found = regions(region_drop=0.5, head={"dropout": 0.1}), torch.arange(5), []
    is_padding = encoder(detected(), keys=keys).is_padding
    for value in (0.0, 100.0):
        encoder = regions(region_drop=0.5, head={"dropout": 0.1})
        features = encoder(detected().masked_fill(is_padding[..., None], value), keys=keys)
        found.append((features.local[~is_padding], features.pooled, dict(encoder.named_buffers())))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_an_image_that_would_lose_all_regions_keeps_them() -> None:
    encoder, lengths = regions(region_drop=0.999), torch.tensor([1, 3, 7, 2, 5])
    features = encoder(detected(), lengths, torch.arange(5))
    assert (~features.is_padding).sum(1).tolist() == lengths.tolist()
    assert features.pooled.isfinite().all()


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected region features \(B,N,6\), got \(2, 3, 5\)"):
        regions()(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="expected region features"):
        regions()(torch.zeros(2, 6))


# --- grids ------------------------------------------------------------------------------------------------------


def grid(**settings: Any) -> Grid:
    torch.manual_seed(0)
    config = GridConfig.model_validate({"kind": "grid", "architecture": "resnet18"} | settings)
    encoder = Grid(config, embed_size=8)
    name_layers(encoder)
    return encoder


def test_the_backbone_is_torchvisions_without_its_end() -> None:
    network, backbone = torchvision.models.resnet18(weights=None).eval(), grid().eval().backbone
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    assert list(backbone.state_dict()) == list(weights)
    backbone.load_state_dict(weights)
    network.avgpool = network.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 96)
    features_map = backbone(images)
    assert features_map.shape == (2, 512, 2, 3)
    assert torch.equal(features_map.flatten(1), network(images))


def test_a_cell_is_a_local_feature_row_by_row() -> None:
    encoder = grid().eval()
    features = encoder(pixels(2, 64, 96))
    assert features.grid == (2, 3) and features.is_padding is None
    assert features.local.shape == (2, 6, 8) and features.pooled.shape == (2, 8)
    feature_map = encoder.backbone(pixels(2, 64, 96))
    cells = torch.stack([feature_map[:, :, row, column] for row in range(2) for column in range(3)], dim=1)
    torch.testing.assert_close(features[:2], encoder.head(cells))


def test_bytes_are_normalised_as_imagenet_was() -> None:
    backbone, images = grid().eval().backbone, pixels(2, 64, 64)
    floats = normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(backbone(images), backbone(floats), rtol=1e-4, atol=1e-4)
    assert torch.equal(images, pixels(2, 64, 64))


def test_the_backbone_may_run_apart_and_in_pieces() -> None:
    encoder, images = grid(), pixels(3, 64, 64)
    keys = torch.arange(3)
    apart = torch.cat([encoder.backbone(images[:2]), encoder.backbone(images[2:])])
    torch.testing.assert_close(encoder(apart, keys=keys), encoder(images, keys=keys))


def test_frozen_statistics_stay_and_scales_learn() -> None:
    encoder = grid()
    norms = [module for module in encoder.backbone.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) == 20
    for train in (lambda: None, lambda: encoder.train(), lambda: torch.nn.Sequential(encoder).eval().train()):
        train()
        assert encoder.training and encoder.head.mlp.norm.training
        assert not any(norm.training for norm in norms)
    before = {name: value.clone() for name, value in encoder.backbone.named_buffers()}
    encoder(pixels(2, 64, 64)).local.square().sum().backward()
    torch.testing.assert_close(dict(encoder.backbone.named_buffers()), before, rtol=0, atol=0)
    assert all(norm.weight.grad.any() and norm.bias.grad.any() for norm in norms)
    assert has_batch_statistics(encoder) and not has_batch_statistics(encoder.backbone)
    synchronize(encoder)
    assert not has_batch_statistics(encoder.train().backbone)


def test_statistics_that_are_not_frozen_move() -> None:
    encoder = grid(frozen_batch_norm=False)
    assert has_batch_statistics(encoder.backbone)
    encoder(pixels(2, 64, 64))
    assert all(module.running_mean.any() for module in encoder.backbone.modules() if isinstance(module, _BatchNorm))
    assert not has_batch_statistics(encoder.eval())


def test_channels_last_is_kept_and_not_copied() -> None:
    encoder, plain = grid().eval().to(memory_format=torch.channels_last), grid().eval()
    images = pixels(2, 64, 96).contiguous(memory_format=torch.channels_last)
    read: list[Tensor] = []
    encoder.head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    feature_map = encoder.backbone(images)
    features = encoder(feature_map)
    assert feature_map.is_contiguous(memory_format=torch.channels_last)
    assert read[0].is_contiguous() and read[0].data_ptr() == feature_map.data_ptr()
    expected = plain(images)
    torch.testing.assert_close(features.local, expected.local, rtol=1e-4, atol=1e-4)


def test_every_architecture_has_the_width_that_its_model_expects() -> None:
    for architecture in get_args(GridConfig.model_fields["architecture"].annotation):
        config = GridConfig(
            kind="grid",
            architecture=architecture,
            head=ImageHeadConfig(projection="none", global_feature="linear"),
        )
        model = ModelConfig.model_validate({"image_encoder": config, "text_encoder": {"kind": "bigru"}})
        with torch.device("meta"):
            encoder = Grid(config, model.embed_size)
        assert encoder.local_dim == encoder.backbone.width == model.image_local_dim
        assert all(value.is_meta for value in encoder.state_dict().values())


def test_a_grid_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="no padding"):
        grid()(pixels(), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"feature map \(B,512,h,w\), got \(2, 4, 64, 64\)"):
        grid()(torch.zeros(2, 4, 64, 64))


def test_torchvision_is_imported_for_a_backbone_alone() -> None:
    code = "import sys, setwise.models.image_encoders; print('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False"]
