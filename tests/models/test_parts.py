"""Normalisations have no parameters, and groups that divide the channels."""

from __future__ import annotations

from torch import nn

import reference
from baffle.models.parts import groups, norm_of


def test_groups_divide_the_channels() -> None:
    assert {channels: groups(channels) for channels in reference.GROUPS} == reference.GROUPS
    for channels in range(1, 300):
        assert channels % groups(channels) == 0
        assert 1 <= groups(channels) <= max(2, channels // 16)


def test_norms_have_no_parameters() -> None:
    assert not list(norm_of("group", 64).parameters())
    assert isinstance(norm_of("none", 64), nn.Identity)
