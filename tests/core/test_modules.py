"""Modules and parameters by name, where one object has several names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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


def test_hooks_go_to_what_takes_a_modules_place_and_their_handles_still_remove_them():
    net, seen = nn.Sequential(nn.Linear(2, 2)), []
    handles: list[Any] = [
        net[0].register_forward_pre_hook(lambda m, args, kwargs: seen.append("pre"), with_kwargs=True),
        net[0].register_forward_hook(lambda m, args, y: seen.append("post") or y + 1, always_call=True),
        net[0].register_full_backward_hook(lambda m, dx, dy: seen.append("back")),
        net[0].register_state_dict_post_hook(lambda m, state, prefix, meta: seen.append("state")),
        net[0].register_load_state_dict_pre_hook(lambda m, *args: seen.append(type(m).__name__)),
    ]
    set_module(net, "0", nn.Identity())
    x = torch.zeros(1, 2, requires_grad=True)
    y = net(x)
    y.sum().backward()
    net.load_state_dict(net.state_dict())
    assert y.tolist() == [[1.0, 1.0]] and seen == ["pre", "post", "back", "state", "Identity"]
    for handle in handles:
        handle.remove()
    assert net(x).tolist() == [[0.0, 0.0]] and len(seen) == 5
    assert not net[0]._forward_hooks_always_called and not net[0]._forward_pre_hooks_with_kwargs


def test_a_module_that_is_put_back_has_its_hooks_and_those_of_the_new_one_are_kept():
    net, new = nn.Sequential(nn.Identity()), nn.Identity()
    old = net[0]
    old.register_forward_hook(lambda m, args, y: y + 1)
    new.register_forward_hook(lambda m, args, y: 10 * y)
    set_module(net, "0", new)
    assert net(torch.ones(1)).item() == 20.0 and old(torch.ones(1)).item() == 1.0
    set_module(net, "0", old)
    assert net(torch.ones(1)).item() == 20.0


def test_a_wrapped_module_keeps_its_hooks():
    net = nn.Sequential(nn.Identity())
    net[0].register_forward_hook(lambda m, args, y: y + 1)
    set_module(net, "0", nn.Sequential(net[0], nn.ReLU()))
    assert net(-torch.ones(1)).item() == 0.0


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
