"""``travel``: quantisers before the collectives that move their rows (``tests/distributed`` runs them)."""

from around import around, linear, matrix

import quartet


def test_nothing_without_collectives():
    assert not around("travel", linear(), matrix(64, 32), policy=quartet.Policy("quartet").on("*", "quartet")).text
