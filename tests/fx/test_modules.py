"""Modules and parameters by name, where one object has several names."""

from __future__ import annotations

import pytest
from torch import nn

from gs_algos.core.modules import canonical_names, get_module, leaves, names_of, parameter_owners, set_module


def shared() -> nn.Module:
    conv = nn.Conv2d(2, 2, 1)
    return nn.ModuleDict({"a": nn.Sequential(conv, nn.ReLU()), "b": conv})


def test_get_by_name():
    net = shared()
    assert get_module(net, "a.0") is net["b"] and get_module(net, "") is net


def test_a_wrong_name_is_told_what_there_is():
    with pytest.raises(ValueError, match=r"got 'a\.conv'; a has 0, 1"):
        get_module(shared(), "a.conv")


def test_a_shared_module_is_replaced_at_all_its_names():
    net, new = shared().eval(), nn.Identity()
    set_module(net, "b", new)
    assert net["a"][0] is new and net["b"] is new and not new.training


def test_a_module_can_be_wrapped_in_its_place():
    net = nn.Sequential(nn.Dropout().eval(), nn.ReLU())
    old = net[0]
    set_module(net, "0", nn.Sequential(old))
    assert net[0][0] is old and not old.training and not net[0].training


def test_the_root_cannot_be_replaced():
    with pytest.raises(ValueError, match="the root cannot be replaced"):
        set_module(shared(), "", nn.Identity())


def test_a_shared_module_is_known_by_its_first_name():
    net = shared()
    assert canonical_names(net)[id(net["b"])] == "a.0"
    assert names_of(net, net["b"]) == ("a.0", "b")
    assert [name for name, _ in leaves(net)] == ["a.0", "a.1"]


def test_owners_tell_tied_weights_from_shared_modules():
    net = shared()
    net["c"] = nn.Conv2d(2, 2, 1)
    net["c"].weight = net["b"].weight
    owners = parameter_owners(net)
    assert owners[id(net["b"].weight)] == ("a.0.weight", "c.weight")
    assert owners[id(net["b"].bias)] == ("a.0.bias",)
