"""Slot Attention's original module and its autoencoder: the steps written out, padding, order, keys, and learning."""

from typing import Any

import pytest
import torch
from torch import Tensor

from reference.slot_autoencoder import read
from setwise.models.dropout import sample_normal
from setwise.models.pretext_config import SlotAutoencoderConfig
from setwise.models.slot_autoencoder import FIRST_SLOTS, RecurrentSlotAttention, SlotAutoencoder, SoftPositions

IS_PADDING = torch.tensor([[0, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
KEYS = torch.tensor([11, 12])


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def module(iterations: int = 3) -> RecurrentSlotAttention:
    torch.manual_seed(0)
    return RecurrentSlotAttention(4, 6, 5, 8, iterations).double()


def autoencoder(image_size: int = 16, **more: Any) -> SlotAutoencoder:
    torch.manual_seed(0)
    settings = {"num_slots": 3, "slot_dim": 6, "channels": 5, "mlp_hidden": 8, "broadcast_size": 4} | more
    config = SlotAutoencoderConfig.model_validate({"kind": "slot_autoencoder", **settings})
    return SlotAutoencoder(config, image_size)


def pixels(count: int = 3, side: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)


@pytest.mark.parametrize("training", [False, True])
def test_agrees_with_the_algorithm_written_out_in_output_and_gradients(training: bool) -> None:
    slots, inputs = module().train(training), random(1, 2, 7, 5).requires_grad_()
    found, attention = slots(inputs, IS_PADDING, KEYS)
    noise = sample_normal(KEYS, (4, 6), FIRST_SLOTS) if training else slots.noise.expand(2, -1, -1)
    first_BKD = slots.slots_mu + slots.slots_log_sigma.exp() * noise.double()
    steps = torch.stack([read(slots, first_BKD[b], inputs[b][~IS_PADDING[b]]) for b in (0, 1)])
    torch.testing.assert_close(found, steps, rtol=0, atol=1e-10)
    assert attention.shape == (2, 4, 7)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    assert not attention[0][:, IS_PADDING[0]].any() and attention[1].all()
    wanted = [inputs, *slots.parameters()]
    gradients = [torch.autograd.grad(result, wanted, random(2, 2, 4, 6)) for result in (found, steps)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_the_gradient_is_that_of_the_function() -> None:
    slots, inputs = module(2).eval(), random(1, 2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: slots(x)[0], (inputs,))
    model = autoencoder(8, num_slots=2).double().eval()
    images = random(3, 1, 3, 8, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x).squared, (images,))


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_what_stands_at_padding_has_no_influence_and_gets_no_gradient(garbage: float) -> None:
    slots, results = module().train(), []
    for value in (0.0, garbage):
        inputs = random(1, 2, 7, 5).masked_fill(IS_PADDING[..., None], value).requires_grad_()
        found, attention = slots(inputs, IS_PADDING, KEYS)
        gradients = torch.autograd.grad(found, [inputs, *slots.parameters()], random(2, 2, 4, 6))
        assert torch.equal(gradients[0].any(-1), ~IS_PADDING)
        results.append([found, attention, *gradients])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_the_order_of_inputs_says_nothing_and_that_of_first_slots_only_which_is_which() -> None:
    slots, inputs = module().eval(), random(1, 2, 7, 5)
    order, slot_order = torch.randperm(7), torch.tensor([2, 0, 3, 1])
    found, attention = slots(inputs)
    shuffled, of_shuffled = slots(inputs[:, order])
    torch.testing.assert_close(shuffled, found, rtol=0, atol=1e-10)
    torch.testing.assert_close(of_shuffled, attention[:, :, order], rtol=0, atol=1e-10)
    slots.noise.copy_(slots.noise[slot_order].clone())
    torch.testing.assert_close(slots(inputs)[0], found[:, slot_order], rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_an_image_depends_neither_on_its_batch_nor_on_chance(training: bool) -> None:
    model, images, keys = autoencoder().double().train(training), pixels(), torch.arange(3)
    together = model(images, keys).squared
    assert torch.equal(model(images, keys).squared, together)
    for b in range(3):
        torch.testing.assert_close(model(images[b : b + 1], keys[b : b + 1]).squared, together[b : b + 1])
    differs = (model(images, keys + 7).squared - together).abs().max() > 1e-9
    assert differs == training


def test_the_masks_divide_every_pixel_and_weigh_the_parts() -> None:
    model = autoencoder().double().eval()
    found = model.decompose(pixels())
    assert found.masks.shape == (3, 3, 16, 16) and found.parts.shape == (3, 3, 3, 16, 16)
    torch.testing.assert_close(found.masks.sum(1), torch.ones(3, 16, 16, dtype=torch.float64))
    drawn = sum(found.masks[:, k, None] * found.parts[:, k] for k in range(3))
    torch.testing.assert_close(found.drawn, drawn)
    expected = (found.drawn - (pixels().double() / 255 * 2 - 1)).square().mean((1, 2, 3))
    torch.testing.assert_close(model(pixels()).squared, expected)


def test_a_slot_is_drawn_the_same_wherever_it_stands() -> None:
    model = autoencoder().double().eval()
    before = model.decompose(pixels())
    model.slots.noise.copy_(model.slots.noise.flip(0).clone())
    after = model.decompose(pixels())
    torch.testing.assert_close(after.parts, before.parts.flip(1))
    torch.testing.assert_close(after.drawn, before.drawn)


def test_soft_positions_are_linear_in_the_distances_from_the_edges() -> None:
    torch.manual_seed(0)
    positions = SoftPositions(2).double()
    added = positions(torch.zeros(1, 2, 3, 5, dtype=torch.float64))[0]
    weight, bias = positions.project.weight, positions.project.bias
    for row, column in ((0, 0), (2, 4), (1, 3)):
        x, y = column / 4, row / 2
        expected = weight @ torch.tensor([x, y, 1 - x, 1 - y], dtype=torch.float64) + bias
        torch.testing.assert_close(added[:, row, column], expected)


@pytest.mark.parametrize(("stride", "inputs"), [(1, 256), (2, 64), (4, 16), (8, 4)])
def test_the_encoder_makes_one_input_of_a_square_of_pixels(stride: int, inputs: int) -> None:
    assert autoencoder(encoder_stride=stride).decompose(pixels()).attention.shape == (3, 3, inputs)


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_give_the_same_numbers_and_gradients(size: int) -> None:
    model, results = autoencoder().double().train(), []
    for micro_batch in (None, size):
        errors = model(pixels(), torch.arange(3), micro_batch=micro_batch).squared
        results.append([errors, *torch.autograd.grad(errors.mean(), list(model.parameters()))])
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)


def test_a_worker_without_images_still_has_a_gradient_of_every_weight() -> None:
    model = autoencoder().train()
    errors = model(pixels(0), torch.zeros(0, dtype=torch.int64)).squared
    assert errors.shape == (0,)
    assert not any(gradient.any() for gradient in torch.autograd.grad(errors.sum(), list(model.parameters())))


def test_autocast_competes_in_single_precision() -> None:
    model = autoencoder().eval()
    expected = model(pixels()).squared
    with torch.autocast("cpu", torch.bfloat16):
        found = model.decompose(pixels())
        errors = model(pixels()).squared
    assert found.attention.dtype == found.masks.dtype == errors.dtype == torch.float32
    torch.testing.assert_close(errors, expected, rtol=0.05, atol=0)
    assert not torch.equal(errors, expected)


def test_it_learns_to_draw_an_image() -> None:
    model = autoencoder(num_slots=2, channels=8, slot_dim=8).train()
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    images[0, 0, 2:7, 3:9], images[1, 1, 8:14, 9:14] = 255, 255
    adam, first = torch.optim.Adam(model.parameters(), 4e-3), model(images, KEYS).squared.mean().item()
    for _ in range(150):
        loss = model(images, KEYS).squared.mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss < 0.1 * first


@pytest.mark.parametrize(("image_size", "settings"), [(24, {}), (2, {}), (18, {}), (4, {"encoder_stride": 8})])
def test_a_size_that_the_decoder_does_not_reach_is_refused(image_size: int, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"an image of {image_size} pixels a side needs a model.broadcast_size"):
        autoencoder(image_size, **settings)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="the decoder is made for one size"):
        autoencoder()(pixels(side=32))
