"""Values of parameters and of storages: they go with what they are of, outlive moves, and refer to no tensor."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from quartet.runtime.slots.owners import ByParameter
from quartet.runtime.slots.storages import ByStorage


@pytest.fixture
def swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def kept_of(layer):
    kept = ByParameter()
    kept.put([(layer.weight, "its own")])
    return kept


@pytest.mark.parametrize("move", [
    lambda layer: layer.to(torch.bfloat16),
    lambda layer: setattr(layer.weight, "data", torch.zeros(3, 4)),
    lambda layer: layer.load_state_dict({name: t + 1 for name, t in layer.state_dict().items()}),
], ids=["dtype", "data", "load_state_dict"])
@pytest.mark.parametrize("swap", [False, True], ids=["in place", "swapped"])
def test_moves_keep_the_value(request, move, swap):
    if swap:
        request.getfixturevalue("swapping")
    layer = nn.Linear(4, 3)
    kept = kept_of(layer)
    for _ in range(2):
        move(layer)
        gc.collect()
    assert kept.get(layer.weight) == "its own"


def test_nothing_refers_to_the_parameter():
    layer = nn.Linear(4, 3)
    kept = kept_of(layer)
    assert not weakref.getweakrefs(layer.weight)
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.ones(3, 4)))
    assert kept.get(layer.weight) == "its own" and layer.weight[0, 0] == 1


def test_the_value_goes_with_the_model():
    layer = nn.Linear(4, 3)
    kept, parameter = kept_of(layer), weakref.ref(layer.weight)
    del layer
    assert parameter() is None and len(kept) == 0


def test_the_value_goes_with_the_model_after_a_move():
    layer = nn.Linear(4, 3)
    kept = kept_of(layer)
    layer.double()
    del layer
    assert len(kept) == 0


def test_the_value_goes_with_a_model_that_is_a_cycle():
    layer = nn.Linear(4, 3)
    layer.itself = [layer]
    kept = kept_of(layer)
    del layer
    gc.collect()
    assert len(kept) == 0


def test_a_parameter_without_a_module_is_known_by_its_memory():
    parameter = nn.Parameter(torch.zeros(2))
    kept = ByParameter()
    kept.put([(parameter, 1)])
    assert kept.get(parameter) == 1
    del parameter
    assert len(kept) == 0


def test_every_object_is_looked_at_once(monkeypatch):
    looked, get_objects = [], gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda: looked.append(1) or get_objects())
    layers, alone = nn.ModuleList(nn.Linear(4, 3) for _ in range(3)), [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    kept = ByParameter()
    kept.put([(p, "its own") for p in (*layers.parameters(), *alone)])
    assert looked == [1] and kept.get(layers[2].bias) == kept.get(alone[2]) == "its own"
    kept.put([(layers[0].weight, "another")])
    assert looked == [1] and kept.get(layers[0].weight) == "another"


def test_a_new_parameter_in_its_place_is_another():
    layer = nn.Linear(4, 3)
    kept = kept_of(layer)
    for _ in range(20):  # one of them has the address of an earlier one
        layer.weight = nn.Parameter(torch.zeros(3, 4))
        assert kept.get(layer.weight) is None
    assert len(kept) == 0


def test_models_made_where_others_were_have_no_values():
    kept = ByParameter()
    for _ in range(20):
        layer = nn.Linear(4, 3)
        assert kept.get(layer.weight) is None and len(kept) <= 1
        kept.put([(layer.weight, "its own")])


def test_a_parameter_outlives_its_module():
    layer = nn.Linear(4, 3)
    kept, parameter = kept_of(layer), layer.weight
    del layer
    assert kept.get(parameter) == "its own"
    other = nn.Linear(4, 3)
    other.weight = parameter
    assert kept.get(other.weight) == "its own"


def test_a_copy_has_none():
    layer = nn.Linear(4, 3)
    kept = kept_of(layer)
    assert kept.get(copy.deepcopy(layer).weight) is None


def test_a_storage_keeps_its_number_and_its_value_goes_with_it():
    dropped = []
    kept = ByStorage(dropped.append)
    x = torch.zeros(4)
    kept.put(x, "x")
    numbers = {id(x.untyped_storage()) for _ in range(3)}
    view = x[2:]
    del x
    gc.collect()
    assert kept.get(view) == "x" and not dropped
    del view
    assert len(kept) == 0 and dropped == list(numbers)
