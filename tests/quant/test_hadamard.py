"""Every Hadamard order of the literature that the constructions reach, exact in integers (T5, T6)."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.quant.hadamard import block_order, hadamard, klt_rotation, reachable, rotation

PALEY_1, PALEY_2 = (12, 20, 44, 60, 68, 108, 140), (28, 36, 76, 148)
PRIME_POWERS = (28, 52, 82 * 2, 100, 244, 340, 344)
MODELS = (64, 72, 80, 96, 112, 128, 160, 192, 256, 384, 768, 1152, 1280, 1536, 2304, 2560, 2880, 3072, 3584)
WIDE = (4608, 5120, 4864, 5632, 6656, 6912, 8960, 13824, 14336, 17408, 17920, 18944, 28672)
UNREACHED = (92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324, 356, 372, 376)


@pytest.mark.parametrize("n", sorted({1, 2, 4, 8, 16, *PALEY_1, *PALEY_2, *PRIME_POWERS, *MODELS}))
def test_order(n: int) -> None:
    h = hadamard(n).astype(np.int32)
    assert set(np.unique(h)) <= {-1, 1}
    gram = (h.astype(np.float32) @ h.T.astype(np.float32)).astype(np.int64)
    assert np.array_equal(gram, n * np.eye(n, dtype=np.int64))


@pytest.mark.parametrize("n", WIDE)
def test_orders_of_large_models(n: int) -> None:
    """H = A (x) B with A, B Hadamard is: (A A^T) (x) (B B^T) = n I.  The factors are checked whole."""
    a, b = factors(n)
    for m in (a, b):
        h = hadamard(m).astype(np.float32)
        assert np.array_equal((h @ h.T).astype(np.int64), m * np.eye(m, dtype=np.int64))
    assert reachable(n)


def factors(n: int) -> tuple[int, int]:
    """Two reachable orders with product n, as alike as can be."""
    return next((a, n // a) for a in range(int(n**0.5), 1, -1) if n % a == 0 and reachable(a) and reachable(n // a))


def test_every_multiple_of_four_up_to_400_but_the_known_ones() -> None:
    assert [n for n in range(4, 401, 4) if not reachable(n)] == list(UNREACHED)


@pytest.mark.parametrize("n", [3, 6, 92, 172, 344 // 2])
def test_unreachable_orders_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"order {n} "):
        hadamard(n)


@pytest.mark.parametrize(("n", "block"), [(11008, 256), (172, 4), (92, 4), (80, 80), (2880, 2880), (7, 1), (14336 + 128, 128)])
def test_block_fallback(n: int, block: int) -> None:
    assert block_order(n) >= block and n % block_order(n) == 0 and reachable(block_order(n))


@pytest.mark.parametrize("n", [16, 92, 96, 172, 192])
def test_rotations_are_orthogonal_and_seeded(n: int) -> None:
    r = rotation(n, np.random.default_rng(3))
    assert np.abs(r @ r.T - np.eye(n)).max() < 1e-12
    assert np.array_equal(r, rotation(n, np.random.default_rng(3)))
    assert not np.array_equal(r, rotation(n, np.random.default_rng(4)))


def test_blocks_must_divide() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        rotation(96, np.random.default_rng(0), block=64)
    assert np.count_nonzero(rotation(96, np.random.default_rng(0), block=32)) == 96 * 32


def test_klt_gives_every_channel_the_same_energy() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 64)) * np.geomspace(1, 150, 64) @ rng.normal(size=(64, 64))
    h = x.T @ x / len(x)
    r = klt_rotation(h, rng)
    energy = np.diag(r.T @ h @ r)
    assert np.abs(r @ r.T - np.eye(64)).max() < 1e-12
    assert energy.max() / energy.min() <= 1 + 1e-9
    plain = rotation(64, np.random.default_rng(0))
    assert np.ptp(np.diag(plain.T @ h @ plain)) > 0.1 * energy.mean()
