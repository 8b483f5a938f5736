"""Files that grow beside their names."""

from pathlib import Path

import pytest

from longtake.files import whole


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_takes_its_name_when_it_is_whole_and_never_before(before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    if before:
        path.write_text(before)
    with pytest.raises(RuntimeError, match="a full disk"), whole(path) as beside:
        beside.write_text("half")
        raise RuntimeError("a full disk")
    assert [p.read_text() for p in tmp_path.iterdir()] == ([before] if before else [])
    with whole(path) as beside:
        beside.write_text("new")
        assert path.exists() == bool(before)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"record.json": "new"}
