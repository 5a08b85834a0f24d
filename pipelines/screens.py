"""Dot products of all elements of many sets: fast, and with a proven bound on how far each is from the true one.

A screen writes a vector a as q(a), which its precision can hold. Whatever a and b are,

    |a.b - q(a).q(b)| <= |a - q(a)| |q(b)| + |a| |b - q(b)|

and the lengths on the right are measured, so the bound holds for any embeddings, however badly a screen suits them.
What is left is the rounding of the product itself: none for int8, which is summed in int32, and at most
(D + 64) * 2^-24 * |a| |b| for float32, in whatever order it is summed.

Shape suffixes: R sets of one block, C of the other, K and J their elements, D width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from setwise.pipelines import exact_scores

Screen = Literal["int8", "bf16", "float32"]
Precision = Literal["int8", "bf16", "float32", "float64"]
LARGEST = 127
MULTIPLE = 32
"""int8 blocks are padded to so many sets, and their width to a quarter of it: GPUs multiply no others."""


@dataclass(frozen=True)
class Encoded:
    """A block of sets as a screen holds it.

    values (K*R,D): first the first element of each set, then the second of each, so that what is pooled later lies in
    K slabs; scales (K*R,) of int8 alone; lengths (R,): that of the longest element of each set; residuals (R,): the
    largest length that encoding took off one. Both are upper bounds.
    """

    values: Tensor
    scales: Tensor | None
    elements: int
    lengths: Tensor
    residuals: Tensor
    precision: Precision

    def of(self, sets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Lengths and residuals of some sets; None: the largest of all."""
        if sets is None:
            return self.lengths.amax(), self.residuals.amax()
        return self.lengths[sets], self.residuals[sets]


def encode(sets_RKD: Tensor, precision: Precision) -> Encoded:
    """Sets (R,K,D) of finite float32 or float64."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    slabs_KRD = sets_RKD.transpose(0, 1).to(dtype).contiguous()
    lengths_R = exact_scores.longest(slabs_KRD.transpose(0, 1))
    residuals_R = torch.zeros_like(lengths_R)
    values_KRD, scales = slabs_KRD, None
    if precision == "int8":
        # A scale of its own for each vector, up to its largest component: clipping would cost more than it saves. Then
        # the nearest multiple of the rounded vector is taken, which is never longer than the vector.
        scales_KR1 = slabs_KRD.abs().amax(2, keepdim=True).div_(LARGEST).clamp_(min=torch.finfo(dtype).tiny)
        rounded_KRD = (slabs_KRD / scales_KR1).round_().clamp_(-LARGEST, LARGEST)
        squares_KR1 = torch.linalg.vecdot(rounded_KRD, rounded_KRD)[:, :, None].clamp_(min=1)
        scales_KR1 = torch.linalg.vecdot(rounded_KRD, slabs_KRD)[:, :, None] / squares_KR1
        shape = (len(slabs_KRD), _padded(len(sets_RKD), MULTIPLE), _padded(sets_RKD.shape[2], MULTIPLE // 4))
        values_KRD = slabs_KRD.new_zeros(shape, dtype=torch.int8)
        values_KRD[:, : len(sets_RKD), : sets_RKD.shape[2]] = rounded_KRD
        scales = slabs_KRD.new_zeros(shape[:2])
        scales[:, : len(sets_RKD)] = scales_KR1[:, :, 0]
        residuals_R = exact_scores.longest(rounded_KRD.mul_(scales_KR1).sub_(slabs_KRD).transpose(0, 1))
    elif precision == "bf16":
        values_KRD = slabs_KRD.bfloat16()
        residuals_R = exact_scores.longest(values_KRD.to(dtype).sub_(slabs_KRD).transpose(0, 1))
    if precision in ("int8", "bf16"):
        residuals_R += lengths_R * 2**-22  # what measuring them in float32 may hide
    flat = None if scales is None else scales.flatten()
    return Encoded(values_KRD.flatten(0, 1), flat, len(slabs_KRD), lengths_R, residuals_R, precision)


def dots(rows: Encoded, columns: Encoded, factor: float) -> Tensor:
    """`factor` times the dot products of two blocks of one precision, (K,R,J,C) float32, or float64 of float64."""
    a_ND, b_MD = rows.values, columns.values
    match rows.precision:
        case "int8":
            assert rows.scales is not None and columns.scales is not None
            product_NM = torch._int_mm(a_ND, b_MD.T)
            dots_NM = torch.mul(product_NM, (rows.scales * factor)[:, None]).mul_(columns.scales)
        case "bf16" if a_ND.is_cuda:
            dots_NM = torch.mm(a_ND, b_MD.T, out_dtype=torch.float32).mul_(factor)
        case "bf16":
            dots_NM = (a_ND @ b_MD.T).float().mul_(factor)
        case _:
            dots_NM = torch.addmm(a_ND.new_zeros(()), a_ND, b_MD.T, beta=0, alpha=factor)
    by_set = dots_NM.view(rows.elements, -1, columns.elements, b_MD.shape[0] // columns.elements)
    return by_set[:, : len(rows.lengths), :, : len(columns.lengths)]


def errors(
    lengths: Tensor, residuals: Tensor, other_lengths: Tensor, other_residuals: Tensor, rounding: float
) -> Tensor:
    """By how much dot products of vectors with others may be wrong, from their lengths and residuals."""
    encoding = residuals * (other_lengths + other_residuals) + lengths * other_residuals
    return encoding + lengths * other_lengths * rounding


def rounding(precision: Precision, width: int) -> float:
    """Of the computation, relative to the product of the two lengths."""
    match precision:
        case "int8":
            return 2**-20
        case "bf16":  # it comes out of a CPU in bf16, which is rounded by a share of 2^-8
            return 1.1 * 2**-8 + (width + 64) * 2**-22
        case "float32":
            return 1.1 * (width + 64) * 2**-24
        case "float64":
            return 1.1 * (width + 64) * 2**-53


@cache
def fastest(device: torch.device, width: int) -> Screen:
    """The screen that multiplies vectors of this width fastest here, of those that are found to keep their bound.

    Processors differ by more than ten times in what int8 and bf16 gain over float32; a few milliseconds tell. Nothing
    but time depends on the answer.
    """
    own = torch.Generator().manual_seed(0)  # a training's stream is not to be drawn from
    rows, columns = (torch.randn(items, 1, width, generator=own).to(device) for items in (128, 512))
    # Sums that grow as large as they can, and small terms behind a large one: what saturates or is summed in low
    # precision shows itself.
    rows[0], columns[:, 0] = 1, columns[:, 0].sign()
    columns[0], columns[1] = 1, -1
    rows[1], rows[1, 0, 0] = 2**-8, 1
    true_NM = rows[:, 0].double() @ columns[:, 0].double().T
    times: dict[Screen, float] = {}
    for screen in get_args(Screen):
        try:
            a, b = encode(rows, screen), encode(columns, screen)
            found_NM = dots(a, b, 1.0)[0, :, 0]
        except RuntimeError:  # this device has no such product
            continue
        bound_N = errors(a.lengths, a.residuals, b.lengths.amax(), b.residuals.amax(), rounding(screen, width))
        if ((found_NM - true_NM).abs() <= bound_N[:, None]).all():
            times[screen] = min(_seconds(a, b) for _ in range(3))
    return min(times, key=times.__getitem__)


def _seconds(a: Encoded, b: Encoded) -> float:
    if a.values.is_cuda:
        torch.cuda.synchronize(a.values.device)
    start = time.perf_counter()
    dots(a, b, 1.0)
    if a.values.is_cuda:
        torch.cuda.synchronize(a.values.device)
    return time.perf_counter() - start


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products are of float32, whatever was allowed for training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
