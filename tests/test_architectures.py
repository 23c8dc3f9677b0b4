"""The registry of architectures."""

import pytest

from mal.architectures import ARCHITECTURES, DEFAULT, get_architecture
from mal.errors import SpecError


def test_thirteen_with_default() -> None:
    assert len(ARCHITECTURES) == 13
    assert get_architecture(DEFAULT).width == 768
    assert all(a.width % a.heads == 0 for a in ARCHITECTURES.values())


def test_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(SpecError, match=r"'vit-mae-base'.*vit-mae-base/16"):
        get_architecture("vit-mae-base")
