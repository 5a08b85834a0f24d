"""The convolutional encoder: shapes, normalisation, places, and independence of the batch."""

import pytest
import torch
from torch import Tensor

from setwise.models.config import ConvNetConfig
from setwise.models.image_encoders import ConvNet


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
    assert features.pooled.shape == (3, 20) and features.lengths is None


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
