import numpy as np
import pytest

from longtake.media.mp4 import read_frames
from longtake.media.pictures import contact_sheet, save_png


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, (count, 6, 8, 3), np.uint8)


def test_a_sheet_reads_as_text_does():
    frames = pictures(5)
    sheet = contact_sheet(frames, columns=3)
    assert sheet.shape == (6 + 2 + 6, 8 + 2 + 8 + 2 + 8, 3)
    assert np.array_equal(sheet[:6, 20:], frames[2])
    assert np.array_equal(sheet[8:, :8], frames[3])
    assert (sheet[8:, 20:] == 255).all()


def test_a_sheet_is_no_wider_than_its_pictures():
    assert np.array_equal(contact_sheet(pictures(1), columns=9), pictures(1)[0])


def test_a_sheet_needs_pictures_and_columns():
    with pytest.raises(ValueError, match="0 pictures"):
        contact_sheet(pictures(0), columns=3)
    with pytest.raises(ValueError, match="0 columns"):
        contact_sheet(pictures(2), columns=0)


def test_png_is_exact(tmp_path):
    picture = pictures(1)[0]
    save_png(tmp_path / "one.png", picture)
    assert np.array_equal(read_frames(tmp_path / "one.png")[0], picture)


def test_png_refuses_what_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        save_png(tmp_path / "one.png", np.zeros((6, 8, 3)))
