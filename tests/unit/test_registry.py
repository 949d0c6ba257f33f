"""Names to things: unknown and taken names, and packages of others that bring theirs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from progscale.errors import RegistryError
from progscale.registry import Registry

GROUP = "progscale.tests"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path that installed packages are found in."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("toy_")]:
        del sys.modules[name]


def install(folder: Path, entries: str) -> None:
    info = folder / "toy_pack-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-pack\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entries}\n")


def test_registered_things_are_found() -> None:
    things: Registry[object] = Registry("thing", GROUP)

    @things.register("one")
    def one() -> None: ...

    things.add("two", 2)
    assert things.get("one") is one
    assert things.names() == ["one", "two"]
    assert list(things.items()) == [("one", one), ("two", 2)]
    assert "two" in things
    assert "three" not in things
    things.remove("two")
    assert things.names() == ["one"]


def test_an_unknown_name_lists_the_known_and_the_nearest() -> None:
    things: Registry[int] = Registry("fruit", GROUP)
    things.add("pear", 1)
    things.add("apple", 2)
    with pytest.raises(RegistryError, match=r"^no fruit 'aple'; registered: apple, pear; did you mean 'apple'\?$") as caught:
        things.get("aple")
    assert caught.value.exit_code == 2
    with pytest.raises(RegistryError, match=r"registered: apple, pear$"):
        things.get("zzz")


def test_a_name_is_taken_once() -> None:
    things: Registry[object] = Registry("thing", GROUP)
    first = object()
    things.add("a", first)
    things.add("a", first)
    with pytest.raises(RegistryError, match="thing 'a' is registered twice; registered: a"):
        things.add("a", object())
    assert things.get("a") is first


def test_entry_points_name_a_thing_or_a_module_that_registers(package: Path) -> None:
    install(package, "seven = toy_thing:SEVEN\nmodule = toy_module")
    (package / "toy_thing.py").write_text("SEVEN = 7\n")
    things: Registry[int] = Registry("thing", GROUP)
    sys.modules["toy_registry"] = type(sys)("toy_registry")
    sys.modules["toy_registry"].THINGS = things  # type: ignore[attr-defined]
    (package / "toy_module.py").write_text("from toy_registry import THINGS\nTHINGS.add('eight', 8)\n")
    assert things.names() == ["eight", "seven"]
    assert things.get("seven") == 7


def test_a_failing_entry_point_fails_each_time_and_says_so(package: Path) -> None:
    install(package, "broken = toy_broken:THING")
    (package / "toy_broken.py").write_text("raise ImportError('no such wheel')\n")
    things: Registry[int] = Registry("thing", GROUP)
    for _ in range(2):
        with pytest.raises(ImportError, match="no such wheel"):
            things.get("broken")


def test_an_entry_point_may_not_take_a_name(package: Path) -> None:
    install(package, "a = toy_thing:OTHER")
    (package / "toy_thing.py").write_text("OTHER = 'other'\n")
    things: Registry[str] = Registry("thing", GROUP)
    things.add("a", "mine")
    with pytest.raises(RegistryError, match="'a' is registered twice"):
        things.names()
