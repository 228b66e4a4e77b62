import sys
import types
from importlib.metadata import EntryPoint

import pytest

from mas_embed import UserError, registry
from mas_embed.errors import unknown_name
from mas_embed.registry import Registry


@pytest.fixture
def fresh_entry_points(monkeypatch):
    """Replaces the installed entry points, and forgets which were loaded."""

    def install(*values):
        points = [EntryPoint(name=value, value=value, group=registry.ENTRY_POINT_GROUP) for value in values]
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        registry.load_entry_points.cache_clear()

    yield install
    registry.load_entry_points.cache_clear()


def test_names_are_taken_once_and_unknown_ones_suggest_the_nearest():
    table = Registry("method")
    table.register("mas")(dict)
    with pytest.raises(ValueError, match="method 'mas' is registered already, as dict"):
        table.register("mas")(list)
    with pytest.raises(UserError, match=r"unknown method 'maas': did you mean 'mas'\?"):
        table["maas"]
    assert "mas" in table and "maas" not in table and list(table) == ["mas"] and len(table) == 1


@pytest.mark.parametrize("name", [3, "", None, dict, ["mine"], b"mine"])
def test_a_name_that_is_no_text_is_refused(name):
    table = Registry("method")
    with pytest.raises(
        UserError, match=r"a method is registered under a name, as in register\('mine', .*, got the name "
    ):
        table.register(name)
    with pytest.raises(UserError, match=r"registered under a name, .* and provides='facts'"):
        table.register("mine", provides="facts")
    with pytest.raises(UserError, match="unknown method"):
        table[name]
    assert name not in table


def test_of_many_names_the_nearest_are_listed():
    few, many = ([f"name{number}" for number in range(count)] for count in (40, 101))
    assert str(unknown_name("loss", "nam7", few)).endswith(f"(known: {', '.join(sorted(few))})")
    message = str(unknown_name("loss", "nam7", many))
    assert message.startswith("unknown loss 'nam7': did you mean 'name7'? (known: name7, ") and message.endswith(
        " and 93 more)"
    )
    assert message.count(",") == 7
    assert len(str(unknown_name("loss", "x" * 10**6 + "\n", ["a"]))) < 200


def test_components_of_a_library_are_loaded_when_first_needed_and_give_way():
    calls = []

    def library():
        calls.append(1)
        return {"one": int, "two": str}

    table = Registry("loss", library=library)
    table.register("two")(dict)
    assert not calls
    assert (table["one"], table["two"]) == (int, dict)
    assert set(table) == {"one", "two"}
    assert calls == [1]


def test_components_of_other_packages_come_in_by_their_entry_points(fresh_entry_points, monkeypatch):
    table, module = Registry("method"), types.ModuleType("their_components")
    monkeypatch.setitem(sys.modules, "their_components", module)
    fresh_entry_points("their_components")
    table.register("here")(dict)
    assert set(table) == {"here"}


def test_a_package_that_cannot_be_imported_is_a_warning(fresh_entry_points):
    fresh_entry_points("a_package_that_is_not_there")
    with pytest.warns(
        UserWarning, match="the components 'a_package_that_is_not_there' of an installed package are missing"
    ):
        assert len(Registry("method")) == 0


def test_facts_come_in_by_the_same_door_as_everything_from_outside():
    import subprocess

    code = "import sys; from mas_embed import DATASETS; assert 'mas_embed.facts' not in sys.modules; print('facts' in DATASETS)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"
