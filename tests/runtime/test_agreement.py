"""What ranks ask each other, with a store that has the answers of the other one; with processes: tests/distributed."""

import pytest

from quartet.runtime import agreement, compat


class Store:
    """The other rank has said ``theirs`` to whatever is asked."""

    def __init__(self, theirs):
        self.theirs, self.told = theirs, []

    def set(self, key, value):
        self.told.append(value)

    def wait(self, keys, limit):
        pass

    def get(self, key):
        return self.theirs.encode()


def test_a_question_is_asked_once_a_store_and_anew_of_the_next(monkeypatch):
    """Also of a store that lies where one of an earlier process group did."""
    for theirs in ("kernels", "no compiler") * 8:
        store = Store(theirs)
        monkeypatch.setattr(compat, "default_store", lambda store=store: store)
        if theirs == "kernels":
            assert [agreement.same_kernels("q", lambda: "kernels", [1]) for _ in range(2)] == ["kernels"] * 2
        else:
            with pytest.raises(agreement.RanksDiffer, match="other kernels"):
                agreement.same_kernels("q", lambda: "kernels", [1])
        assert store.told == ["kernels"]
        monkeypatch.undo()
        del store
