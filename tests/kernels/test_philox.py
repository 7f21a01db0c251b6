"""Philox4x32-10 against the Random123 vectors and a scalar implementation; the layout of the bits we draw."""

import pytest
import torch

from quartet.kernels.reference import Draw, philox4x32, random_bits, random_signs

ALL = 0xFFFFFFFF


def scalar_philox(counter, key):
    """Salmon et al., SC 2011, in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & ALL, (p0 >> 32) ^ c[3] ^ k[1], p0 & ALL]
        k = [(k[0] + 0x9E3779B9) & ALL, (k[1] + 0xBB67AE85) & ALL]
    return c


KNOWN = (  # kat_vectors of the Random123 distribution: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
)


@pytest.mark.parametrize("counter,key,expected", KNOWN)
def test_known_answers(counter, key, expected):
    assert tuple(scalar_philox(counter, key)) == expected
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(w.item() for w in words) == expected


def test_random_words_against_scalar(gen):
    c = torch.randint(0, 2**32, (4, 200), generator=gen)
    k = torch.randint(0, 2**32, (2,), generator=gen)
    words = torch.stack(philox4x32(tuple(c), tuple(k)))
    for i in range(200):
        assert words[:, i].tolist() == scalar_philox(c[:, i].tolist(), k.tolist())


@pytest.mark.parametrize("seed", (0, 7, 0x1234_5678_9ABC_DEF0, -2, 2**63 - 1, -(2**63)))
@pytest.mark.parametrize("site", (0, 5, 2**32 - 1))
def test_layout_of_bits_and_signs(seed, site):
    """Element 16g + j of a row-major tensor has nine bits of word j//4 of the call at counter (g, 0, site, 0)."""
    key = (seed & ALL, (seed >> 32) & ALL)
    words = [scalar_philox((g, 0, site, 0), key) for g in range(12)]
    expected = [(word >> shift) & 0x1FF for call in words for word in call for shift in (0, 7, 16, 23)]
    assert random_bits(torch.tensor(seed), site, 4, 48).flatten().tolist() == expected
    call = scalar_philox((0, 0, site, 1), key)
    signs = [-1.0 if (word >> bit) & 1 else 1.0 for word in call for bit in range(32)]
    for n in (16, 32, 128):
        assert random_signs(torch.tensor(seed), site, n).tolist() == signs[:n]


def test_bits_do_not_depend_on_the_shape():
    seed = torch.tensor(11)
    flat = random_bits(seed, 3, 1, 6 * 32)
    assert torch.equal(random_bits(seed, 3, 6, 32).reshape(1, -1), flat)
    assert random_bits(seed, 3, 0, 32).shape == (0, 32)


def test_seeds_sites_and_streams_are_independent():
    """Of two independent streams 1/512 of the places agree; both halves of the seed matter."""
    n = 1 << 16
    which = ((1, 0), (2, 0), (1 << 32 | 1, 0), (1, 1))
    streams = [random_bits(torch.tensor(seed), site, 1, n) for seed, site in which]
    for i in range(4):
        for j in range(i):
            agree = (streams[i] == streams[j]).double().mean().item()
            assert abs(agree - 1 / 512) < 5 * (1 / 512 / n) ** 0.5


@pytest.mark.parametrize("window", range(4))
def test_bits_are_uniform(window):
    n = 1 << 18
    draws = random_bits(torch.tensor(3), 0, 4, n).reshape(-1, 4)[:, window]
    chi2 = ((torch.bincount(draws, minlength=512) - n / 512).double() ** 2 / (n / 512)).sum().item()
    assert abs(chi2 - 511) < 5 * (2 * 511) ** 0.5


def test_neighbours_share_two_bits():
    """Bits 7 and 8 of elements 0 and 2 of four are bits 0 and 1 of 1 and 3; every other pair of bits is independent."""
    n = 1 << 16
    draws = random_bits(torch.tensor(4), 0, 4, n).reshape(-1, 4)
    assert torch.equal(draws[:, 0::2] >> 7, draws[:, 1::2] & 3)
    bits = ((draws.unsqueeze(-1) >> torch.arange(9)) & 1).reshape(n, 36).double() * 2 - 1
    shared = torch.eye(36, dtype=torch.bool)
    for first, second in ((7, 9), (8, 10), (25, 27), (26, 28)):
        shared[first, second] = shared[second, first] = True
    correlation = bits.t() @ bits / n
    assert bool((correlation[shared] == 1).all())
    assert correlation[~shared].abs().max() < 5 / n**0.5


def test_signs_are_balanced():
    s = torch.stack([random_signs(torch.tensor(i), 0, 128) for i in range(200)])
    assert s.mean().abs() < 5 / (128 * 200) ** 0.5
    assert s.mean(0).abs().max() < 5 / 200**0.5


def test_draw_numbers_are_pinned():
    expected = {"DGRAD_SIGNS": 0, "DGRAD_A": 1, "DGRAD_B": 2, "WGRAD_SIGNS": 3, "WGRAD_A": 4, "WGRAD_B": 5,
                "FPROP_SIGNS": 6, "FPROP_A": 7, "FPROP_B": 8}
    assert {d.name: int(d) for d in Draw} == expected
    assert Draw.WGRAD_A.of(0) == 4 and Draw.DGRAD_B.of(9) == 146
    ids = [d.of(site) for site in (0, 1, 2, 2**28 - 1) for d in Draw]
    assert len(set(ids)) == len(ids) and max(ids) < 2**32
    for site in (-1, 2**28):
        with pytest.raises(ValueError, match=f"site {site} .*0…268435455"):
            Draw.DGRAD_A.of(site)
