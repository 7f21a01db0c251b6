"""What torchtitan does not let pass, of a stand-in with the function that refuses; the page says what of it was run."""

import sys
from types import ModuleType

import pytest

from quartet.integrations.torchtitan import accept_backend


@pytest.fixture
def titan(monkeypatch):
    """``torchtitan.distributed.compile`` of a program that has nothing else of torchtitan."""
    compiling = ModuleType("torchtitan.distributed.compile")
    distributed = ModuleType("torchtitan.distributed")
    distributed.compile = compiling
    for name, module in {"torchtitan": ModuleType("torchtitan"), "torchtitan.distributed": distributed,
                         "torchtitan.distributed.compile": compiling}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return compiling


def test_flex_attention_is_compiled_by_this_backend_and_refused_for_others(titan):
    def refuse(model, backend):
        if backend != "inductor":
            raise ValueError(f"compile backend {backend!r}")
        return backend

    titan._maybe_regional_inductor_backend = refuse
    accept_backend()
    accepting = titan._maybe_regional_inductor_backend
    accept_backend()
    assert titan._maybe_regional_inductor_backend is accepting, "once is enough"
    assert [accepting(None, name) for name in ("quartet", "inductor")] == ["quartet", "inductor"]
    with pytest.raises(ValueError, match="eager"):
        accepting(None, "eager")


def test_another_version_of_it_is_told(titan):
    with pytest.raises(ImportError, match=r"tested with torchtitan 0\.3\.0"):
        accept_backend()
