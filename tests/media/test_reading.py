"""Pictures that streams go on from, read out of files."""

from pathlib import Path

import numpy as np
import pytest

from longtake.media.mp4 import Mp4Writer
from longtake.media.pictures import save_png
from longtake.media.reading import read_pictures


def striped(width: int, height: int) -> np.ndarray:
    """Red in the middle half of its width, blue beside it."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 2] = 200
    picture[:, width // 4 : -(width // 4)] = (200, 0, 0)
    return picture


def write(path: Path, greys: list[int], rate: int) -> Path:
    with Mp4Writer(path, 64, 48, rate) as writer:
        writer.write(np.stack([np.full((48, 64, 3), grey, np.uint8) for grey in greys]))
    return path


@pytest.mark.parametrize("width, height", [(64, 48), (32, 48), (640, 100), (33, 97)])
def test_an_image_covers_the_size_around_its_middle(width: int, height: int, tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", striped(128, 48))
    read = read_pictures(tmp_path / "a.png", width=width, height=height, frames_per_second=16)
    assert read.shape == (1, height, width, 3) and read.dtype == np.uint8
    row = read[0, height // 2].astype(int)
    red = (row[:, 0] > row[:, 2]).nonzero()[0]
    assert abs(red.mean() - (width - 1) / 2) < 1.5, "the middle stays in the middle"
    scale = max(width / 128, height / 48)
    assert len(red) == pytest.approx(min(width, 64 * scale), abs=3), "nothing is stretched"


def test_a_video_of_the_same_rate_is_read_picture_by_picture(tmp_path: Path) -> None:
    greys = list(range(0, 250, 10))
    read = read_pictures(write(tmp_path / "a.mp4", greys, 16), width=64, height=48, frames_per_second=16)
    assert np.abs(read.mean((1, 2, 3)) - greys).max() < 6


@pytest.mark.parametrize("rate, shown", [(8, [0, 0, 1, 1, 2, 2, 3]), (32, [0, 2]), (24, [0, 1, 3])])
def test_other_rates_show_what_is_on_the_screen_at_each_time(rate: int, shown: list[int], tmp_path: Path) -> None:
    greys = [20, 90, 160, 230]
    read = read_pictures(write(tmp_path / "a.mp4", greys, rate), width=64, height=48, frames_per_second=16)
    assert read[:, 0, 0, 0].tolist() == pytest.approx([greys[number] for number in shown], abs=6)


@pytest.mark.parametrize("most", [1, 5, 7, 99])
def test_the_last_pictures_alone_are_kept(most: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", [20, 90, 160, 230], 8)
    size = {"width": 64, "height": 48, "frames_per_second": 16}
    everything = read_pictures(path, **size)
    assert np.array_equal(read_pictures(path, **size, most=most), everything[-most:])


def test_what_is_no_picture_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for path, error in ((tmp_path / "text.png", ValueError), (tmp_path / "absent.png", FileNotFoundError)):
        with pytest.raises(error, match=path.name):
            read_pictures(path, width=16, height=16, frames_per_second=16)
