"""Bytes that are kept on disk, whatever happens to the files."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.models.disk_cache import DiskCache, cache_home


def test_what_was_put_is_got_by_its_key_alone(tmp_path) -> None:
    cache = DiskCache(tmp_path / "new" / "folder")
    assert cache.get("one") is None
    cache.put("one", b"1")
    cache.put("two", b"")
    assert (cache.get("one"), cache.get("two"), cache.get("three")) == (b"1", b"", None)
    assert len(list(cache.folder.iterdir())) == 2


@given(damage=st.integers(0, 40), value=st.binary(min_size=1, max_size=9), cut=st.booleans())
def test_a_damaged_entry_counts_as_missing(tmp_path_factory, damage, value, cut) -> None:
    cache = DiskCache(tmp_path_factory.mktemp("cache"))
    cache.put("key", value)
    path = cache.path_of("key")
    stored = bytearray(path.read_bytes())
    place = damage % len(stored)
    stored[place] ^= 1
    path.write_bytes(stored[:place] if cut else stored)
    assert cache.get("key") is None
    cache.put("key", value)
    assert cache.get("key") == value


def test_no_two_writers_write_the_same_file(tmp_path, monkeypatch) -> None:
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda beside, path: moved.append(beside) or replace(beside, path))
    for _ in range(2):  # one process, as on two machines that share the folder and happen to have the same number
        DiskCache(tmp_path).put("key", b"value")
    assert len(set(moved)) == 2
    assert [path.name for path in tmp_path.iterdir()] == [DiskCache(tmp_path).path_of("key").name]


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot keep anything .*: let XDG_CACHE_HOME name a folder"):
        DiskCache(tmp_path / "file").put("key", b"value")


def test_caches_are_where_the_user_has_them(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path / "longtake"
