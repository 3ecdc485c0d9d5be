"""What the tests of attacks share. `make attack` sets ATTACK=1: all cases. Otherwise each test
tries some of them, in seconds."""

import os
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from model.errors import UserError

ALL = os.environ.get("ATTACK") == "1"
T = TypeVar("T")


def some(cases: Sequence[T], count: int) -> list[T]:
    """All cases of an attack, or so many of them, the same ones each time."""
    return list(cases) if ALL else random.Random(0).sample(list(cases), min(count, len(cases)))


def is_refused(read: Callable[..., Any], *args: Any, **settings: Any) -> str:
    """What a UserError says, or "" if the file is read; anything else ends the test."""
    try:
        read(*args, **settings)
    except UserError as error:
        assert str(error)
        return str(error)
    return ""
