"""Replacing parts of the product from a plug-in of the tests, whether they are imported by now or will be."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tests.harness import inject
from tests.harness.inject import Function


def add(module: str, path: str, make: Callable[[Function], Function]) -> None:
    """Replaces an attribute of a module, in this process and for good.

    Args:
        module: its name.
        path: of the attribute: "function", or "Class.method".
        make: makes the replacement from what is there.
    """
    inject.PATCHES.setdefault(module, []).append((path, make))
    if module not in sys.modules:
        return
    owner = sys.modules[module]
    holder, _, name = path.rpartition(".")
    target = getattr(owner, holder) if holder else owner
    original = getattr(target, name)
    inject.swap(target, name, original, make(original))
