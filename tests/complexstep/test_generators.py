"""Random numbers of devices other than the CPU, by a stand-in for a device's module."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from imstep.complexstep.generators import Generators


def test_states_of_every_kind_of_device_are_put_back(monkeypatch):
    states = {torch.device("xpu:1"): 7, torch.device("cuda:0"): 3}
    module = SimpleNamespace(get_rng_state=lambda d: states[d], set_rng_state=lambda s, d: states.update({d: s}))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    kept = Generators([*states, torch.device("cpu"), torch.device("meta")])
    drawn = torch.rand(3)
    states.update(dict.fromkeys(states, 0))
    kept.restore()
    assert torch.equal(torch.rand(3), drawn)
    assert list(states.values()) == [7, 3]


def test_mps_has_one_device_without_a_number(monkeypatch):
    state = [5]
    module = SimpleNamespace(get_rng_state=lambda: state[0], set_rng_state=lambda s: state.__setitem__(0, s))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    kept, state[0] = Generators([torch.device("mps")]), 0
    kept.restore()
    assert state == [5]
