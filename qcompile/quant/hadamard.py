"""Hadamard matrices of every order that Sylvester, Paley and Kronecker products reach, and the rotations made of them.

H H^T = n I with entries +-1 (Paley 1933; Sylvester 1867).  The construction is a search over the factors of n, not a chain of
special cases: Paley I gives q + 1 for prime powers q = 3 mod 4, Paley II 2 (q + 1) for q = 1 mod 4, and products of reached
orders are reached.  Orders such as 92, 156 and 172 need other constructions: `rotation` falls back to equal blocks there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

I8 = NDArray[np.int8]
F64 = NDArray[np.float64]

_BLOCK = 4096


def hadamard(n: int) -> I8:
    """A Hadamard matrix [n, n] of +-1.

    Raises:
        ValueError: no construction known here reaches n.
    """
    build = _construction(n)
    if build is None:
        raise ValueError(f"no Hadamard matrix of order {n} can be built from Sylvester, Paley and Kronecker products")
    return build()


def reachable(n: int) -> bool:
    """Whether `hadamard(n)` exists here."""
    return _construction(n) is not None


def block_order(n: int, largest: int = _BLOCK) -> int:
    """The largest reachable b <= `largest` that divides n: I (x) H_b / sqrt(b) is exactly orthogonal (1 when n is odd)."""
    return next(b for b in range(min(n, largest), 0, -1) if n % b == 0 and reachable(b))


def rotation(n: int, rng: np.random.Generator, block: int | None = None) -> F64:
    """A random rotation [n, n] = D (I (x) H_b) / sqrt(b), D random signs, b = n where it is reachable, else the largest block
    (QuaRot, arXiv:2404.00456, section 3; the signs matter: plain Hadamard is worse).

    Raises:
        ValueError: `block` does not divide n, or no Hadamard matrix of that order is known.
    """
    size = block or (n if reachable(n) else block_order(n))
    if n % size:
        raise ValueError(f"blocks of {size} do not divide {n}")
    signs = rng.integers(0, 2, n) * 2.0 - 1.0
    return signs[:, None] * np.kron(np.eye(n // size), hadamard(size) / np.sqrt(size))


def klt_rotation(second_moment: F64, rng: np.random.Generator) -> F64:
    """K D (I (x) H_b) / sqrt(b) with the eigenvectors K of the uncentred second moment [n, n] (MambaQuant, arXiv:2501.13484).

    Where H has the full order all channels of x R get the same energy trace / n, since |H_ij| is constant.
    """
    _, vectors = np.linalg.eigh((second_moment + second_moment.T) / 2)
    return vectors @ rotation(len(second_moment), rng)


@lru_cache(maxsize=512)
def _construction(n: int) -> Callable[[], I8] | None:
    if n == 1:
        return lambda: np.ones((1, 1), np.int8)
    if n == 2:
        return lambda: np.array([[1, 1], [1, -1]], np.int8)
    if n < 4 or n % 4:
        return None
    if _prime_power(n - 1) and (n - 1) % 4 == 3:
        return lambda: _paley1(n - 1)
    if n // 2 - 1 > 2 and _prime_power(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        return lambda: _paley2(n // 2 - 1)
    return next((_product(a, n // a) for a in _divisors(n) if reachable(a) and reachable(n // a)), None)


def _product(a: int, b: int) -> Callable[[], I8]:
    return lambda: np.kron(hadamard(b), hadamard(a)).astype(np.int8)


def _divisors(n: int) -> list[int]:
    return [a for a in range(2, isqrt(n) + 1) if n % a == 0]


def _paley1(q: int) -> I8:
    """I + S, S the skew bordered Jacobsthal matrix of GF(q), q = 3 mod 4."""
    border = np.zeros((q + 1, q + 1), np.int8)
    border[0, 1:], border[1:, 0] = 1, -1
    border[1:, 1:] = _jacobsthal(q)
    return (border + np.eye(q + 1, dtype=np.int8)).astype(np.int8)


def _paley2(q: int) -> I8:
    """C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]], C the symmetric conference matrix of GF(q), q = 1 mod 4."""
    conference = np.zeros((q + 1, q + 1), np.int8)
    conference[0, 1:] = conference[1:, 0] = 1
    conference[1:, 1:] = _jacobsthal(q)
    cores = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return (np.kron(conference, cores[0]) + np.kron(np.eye(q + 1, dtype=np.int8), cores[1])).astype(np.int8)


def _jacobsthal(q: int) -> I8:
    """Q[i, j] = chi(a_i - a_j): 1 where the difference is a square in GF(q), -1 where not, 0 on the diagonal."""
    p, k = _prime_power(q) or (q, 1)
    digits = np.stack([np.arange(q) // p**i % p for i in range(k)], axis=1)
    weights = p ** np.arange(k)
    chi = np.full(q, -1, np.int8)
    chi[_squares(digits, p, k) @ weights] = 1
    chi[0] = 0
    difference = (digits[:, None, :] - digits[None, :, :]) % p
    return chi[difference @ weights]


def _squares(digits: NDArray[np.int64], p: int, k: int) -> NDArray[np.int64]:
    """The squares of all elements of GF(p^k), as digits."""
    modulus = _irreducible(p, k)
    wide = np.zeros((len(digits), 2 * k - 1), np.int64)
    for i in range(k):
        for j in range(k):
            wide[:, i + j] += digits[:, i] * digits[:, j]
    for top in range(2 * k - 2, k - 1, -1):  # x^top = -(lower terms of the modulus) x^(top - k)
        wide[:, top - k : top] -= wide[:, top : top + 1] * modulus[:k]
    return wide[:, :k] % p


def _irreducible(p: int, k: int) -> NDArray[np.int64]:
    """Coefficients (lowest first) of a monic irreducible polynomial of degree k over GF(p)."""
    for low in range(p**k):
        candidate = np.array([low // p**i % p for i in range(k)] + [1])
        if k == 1 or not _has_factor(candidate, p, k):
            return candidate
    raise AssertionError(f"GF({p}^{k}) exists")


def _has_factor(polynomial: NDArray[np.int64], p: int, k: int) -> bool:
    """Whether a monic polynomial of degree 1 .. k/2 divides it."""
    for degree in range(1, k // 2 + 1):
        for low in range(p**degree):
            divisor = np.array([low // p**i % p for i in range(degree)] + [1])
            if not _remainder(polynomial, divisor, p).any():
                return True
    return False


def _remainder(a: NDArray[np.int64], b: NDArray[np.int64], p: int) -> NDArray[np.int64]:
    rest, degree = a.copy() % p, len(b) - 1
    for top in range(len(rest) - 1, degree - 1, -1):
        rest[top - degree : top + 1] = (rest[top - degree : top + 1] - rest[top] * b) % p
    return rest[:degree]


@lru_cache(maxsize=4096)
def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, isqrt(q) + 1) if q % d == 0), q)
    k, rest = 0, q
    while rest % p == 0:
        rest, k = rest // p, k + 1
    return (p, k) if rest == 1 else None
