import os
import signal
import subprocess
import sys

import av
import numpy as np
import pytest

from longtake.media.mp4 import Mp4Writer, part_of, read_comment, read_frames

WIDTH, HEIGHT, RATE = 64, 48, 16


def flat(count: int, colour: tuple[int, int, int] = (200, 40, 90)) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (count, HEIGHT, WIDTH, 3))


def brightening(count: int) -> np.ndarray:
    """Pictures that can be told apart: each one step brighter than the last."""
    steps = np.arange(count, dtype=np.uint8) * 5
    return np.broadcast_to(steps[:, None, None, None], (count, HEIGHT, WIDTH, 3))


def write(path, frames, **options):
    with Mp4Writer(path, WIDTH, HEIGHT, RATE, **options) as writer:
        writer.write(frames)


def test_pictures_come_back_in_order_and_number(tmp_path):
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, RATE) as writer:
        for block in np.split(brightening(45), [9, 21, 33]):
            writer.write(block)
    assert writer.frames_written == 45
    levels = read_frames(tmp_path / "out.mp4").mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels, np.arange(45) * 5, atol=3)


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 160, 0), (20, 30, 230), (255, 255, 255), (120, 70, 40)])
def test_colours_come_back(tmp_path, colour):
    write(tmp_path / "out.mp4", flat(3, colour))
    np.testing.assert_allclose(read_frames(tmp_path / "out.mp4").mean(axis=(0, 1, 2)), colour, atol=4)


def test_any_player_finds_what_it_expects(tmp_path):
    write(tmp_path / "out.mp4", brightening(40))
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", RATE)
        assert (stream.width, stream.height) == (WIDTH, HEIGHT)
        assert stream.frames == 40  # one index of the whole file, not fragments
        assert container.duration == pytest.approx(40 / RATE * 1_000_000)


def test_the_final_name_appears_when_the_file_is_whole(tmp_path):
    writer = Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, RATE)
    writer.write(brightening(20))
    assert [path.name for path in tmp_path.iterdir()] == ["out.part.mp4"]
    writer.close()
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RuntimeError])
def test_what_was_written_survives_an_error(tmp_path, ending):
    with pytest.raises(ending), Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, RATE) as writer:
        writer.write(brightening(21))
        raise ending
    assert len(read_frames(tmp_path / "out.mp4")) == 21
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_a_killed_writer_leaves_a_file_that_plays(tmp_path):
    killed = os.fork()
    if killed == 0:
        Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, RATE).write(brightening(50))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(killed, 0)
    assert len(read_frames(tmp_path / "out.part.mp4")) >= 50 - 2 * RATE


def test_nothing_written_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, RATE):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_when_told_to(tmp_path):
    write(tmp_path / "out.mp4", flat(5))
    with pytest.raises(FileExistsError, match=r"out\.mp4 exists already"):
        Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, RATE)
    write(tmp_path / "out.mp4", flat(7), overwrite=True)
    assert len(read_frames(tmp_path / "out.mp4")) == 7


@pytest.mark.parametrize("width, height", [(63, 48), (64, 47), (0, 48)])
def test_odd_sizes_are_refused_with_the_numbers(tmp_path, width, height):
    with pytest.raises(ValueError, match=f"even width and height, got {width} x {height}"):
        Mp4Writer(tmp_path / "out.mp4", width, height, RATE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frames", [np.zeros((1, WIDTH, HEIGHT, 3), np.uint8), np.zeros((1, HEIGHT, WIDTH, 3))])
def test_pictures_of_another_kind_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match=f"uint8 .F, {HEIGHT}, {WIDTH}, 3"):
        write(tmp_path / "out.mp4", frames)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        Mp4Writer(tmp_path / "nowhere" / "out.mp4", WIDTH, HEIGHT, RATE)


def test_a_folder_that_cannot_be_written_is_named_at_once():
    with pytest.raises(OSError) as caught:
        Mp4Writer("/proc/out.mp4", WIDTH, HEIGHT, RATE)
    assert caught.value.filename == "/proc/out.part.mp4"


def test_a_full_disk_is_an_os_error_and_keeps_what_fitted(tmp_path):
    program = f"""
import numpy as np, resource, signal
from longtake.media.mp4 import Mp4Writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
noise = np.random.default_rng(0).integers(0, 255, (200, {HEIGHT}, {WIDTH}, 3), np.uint8)
try:
    with Mp4Writer("out.mp4", {WIDTH}, {HEIGHT}, {RATE}) as writer:
        writer.write(noise)
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert len(read_frames(tmp_path / "out.mp4")) >= RATE


def test_what_a_killed_writer_left_is_not_overwritten(tmp_path):
    left = part_of(tmp_path / "out.mp4")
    left.write_bytes(b"pictures that play")
    with pytest.raises(FileExistsError, match="move it away first"):
        Mp4Writer(tmp_path / "out.mp4", 16, 16, 8)
    assert left.read_bytes() == b"pictures that play"


def test_a_file_that_came_to_be_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "out.mp4"
    with (
        pytest.raises(FileExistsError, match="came to be while the video was made"),
        Mp4Writer(path, WIDTH, HEIGHT, RATE) as writer,
    ):
        writer.write(np.zeros((1, HEIGHT, WIDTH, 3), np.uint8))
        path.write_bytes(b"precious")
    assert path.read_bytes() == b"precious" and len(read_frames(part_of(path))) == 1


def test_a_file_carries_a_comment(tmp_path):
    comment = '{"prompt": "ein roter Ball \\"springt\\"", "lines": "a\\nb"}' * 40
    with Mp4Writer(tmp_path / "out.mp4", WIDTH, HEIGHT, RATE, comment=comment) as writer:
        writer.write(np.zeros((1, HEIGHT, WIDTH, 3), np.uint8))
    assert read_comment(tmp_path / "out.mp4") == comment
    with Mp4Writer(tmp_path / "none.mp4", WIDTH, HEIGHT, RATE) as writer:
        writer.write(np.zeros((1, HEIGHT, WIDTH, 3), np.uint8))
    assert read_comment(tmp_path / "none.mp4") == ""
