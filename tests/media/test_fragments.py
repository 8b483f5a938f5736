import io
import struct

import av
import numpy as np
import pytest

from longtake.media.fragments import FragmentWriter

WIDTH, HEIGHT, RATE = 64, 48, 16
CHUNKS = [9, 12, 12, 1, 5]


def brightening(count: int) -> np.ndarray:
    steps = np.arange(count, dtype=np.uint8) * 5
    return np.broadcast_to(steps[:, None, None, None], (count, HEIGHT, WIDTH, 3))


def decoded(data: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(video=0))


def boxes(data: bytes) -> list[str]:
    names, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        names.append(data[at + 4 : at + 8].decode())
        at += size
    return names


@pytest.fixture(scope="module")
def written() -> tuple[FragmentWriter, list[bytes]]:
    writer = FragmentWriter(WIDTH, HEIGHT, RATE)
    ends = np.cumsum(CHUNKS)[:-1]
    return writer, [writer.fragment(chunk) for chunk in np.split(brightening(sum(CHUNKS)), ends)]


def test_header_and_fragments_in_a_row_are_the_very_pictures_at_their_times(written):
    writer, fragments = written
    frames = decoded(writer.header + b"".join(fragments))
    assert len(frames) == writer.pictures == sum(CHUNKS)
    assert [frame.time for frame in frames] == pytest.approx([number / RATE for number in range(sum(CHUNKS))])
    levels = [frame.to_ndarray(format="rgb24").mean() for frame in frames]
    np.testing.assert_allclose(levels, np.arange(sum(CHUNKS)) * 5, atol=3)


def test_each_fragment_is_whole_at_once_and_plays_alone_behind_the_header(written):
    writer, fragments = written
    for number, (fragment, pictures) in enumerate(zip(fragments, CHUNKS, strict=True)):
        assert boxes(fragment) == ["moof", "mdat"]
        frames = decoded(writer.header + fragment)
        assert len(frames) == pictures
        assert frames[0].key_frame and not any(frame.key_frame for frame in frames[1:])
        assert frames[0].time == pytest.approx(sum(CHUNKS[:number]) / RATE)


def test_the_header_is_a_header_and_names_its_codec(written):
    writer, _ = written
    assert boxes(writer.header) == ["ftyp", "moov"]
    assert writer.codec.startswith("avc1.42")  # the baseline profile
    with av.open(io.BytesIO(writer.header)) as container:
        assert container.streams.video[0].codec_context.extradata[1:4].hex() == writer.codec.removeprefix("avc1.")


def test_others_pictures_are_refused():
    writer = FragmentWriter(WIDTH, HEIGHT, RATE)
    for wrong in (brightening(0), brightening(2)[:, :-2], brightening(2).astype(np.float32), brightening(1)[0]):
        with pytest.raises(ValueError, match="pictures must be uint8"):
            writer.fragment(wrong)
    with pytest.raises(ValueError, match="even"):
        FragmentWriter(63, 48, RATE)
