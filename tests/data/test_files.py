"""The folders that results and caches are written to."""

import os
import pathlib

import pytest

from cheapscale.data.files import cache_folder, local_folder, read_json


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHEAPSCALE_CACHE", raising=False)
    return tmp_path


def test_the_cache_is_in_the_home_folder_or_where_it_is_asked_for(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    assert cache_folder() == here / "home" / ".cache" / "cheapscale"
    monkeypatch.setenv("CHEAPSCALE_CACHE", "~/mine")
    assert cache_folder() == here / "home" / "mine"


@pytest.mark.parametrize("name", ["/dev/null", "/dev/null/x", "gs://bucket/x"])
def test_a_cache_that_cannot_be_a_folder_names_its_variable(name, here, monkeypatch):
    monkeypatch.setenv("CHEAPSCALE_CACHE", name)
    with pytest.raises(ValueError, match=f"CHEAPSCALE_CACHE={name} .*unset it"):
        cache_folder()


@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_without_a_usable_home_folder_the_cache_is_temporary(home, here, monkeypatch):
    if home is None:  # as for a user number without an entry in the list of users
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setenv("HOME", home)
    folder = cache_folder()
    assert folder == cache_folder() and folder.is_dir() and os.access(folder, os.W_OK)
    assert not any(here.iterdir())  # no folder named "~"


@pytest.mark.parametrize("name", ["a", "a/../b", "x:y", "http", "a[1]", "c: d", "1:/2"])
def test_ordinary_names_are_folders(name, here):
    assert local_folder(name) == pathlib.Path(here, name).resolve()


@pytest.mark.parametrize(
    "content, why",
    [("", "empty"), ("{", "Expecting"), ("[]", "lacks a, b"), ('{"a": 1}', "lacks b")],
)
def test_a_damaged_json_file_is_named_with_a_remedy(content, why, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path} is damaged .*{why}.*: delete it and run"):
        read_json(path, "a", "b")
    path.write_text('{"a": 1, "b": 2}')
    assert read_json(path, "a", "b") == {"a": 1, "b": 2}
