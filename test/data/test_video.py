"""What goes into the encoder comes out again: every picture, in order, at its time, from the same bytes."""

from __future__ import annotations

import io
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest

from kuavo_smolvla_ros.data.stills import StillSettings, encode_stills, split_stills
from kuavo_smolvla_ros.data.synthetic import TexturedFrames, read_number
from kuavo_smolvla_ros.data.video import PackedVideo, VideoSettings, count_frames, encode, video_info
from kuavo_smolvla_ros.errors import UsageError, UserError

SIZE = (64, 96)
FPS = 10
CODECS = [
    VideoSettings(),
    VideoSettings(gop=10),
    VideoSettings("h264", crf=26, preset="ultrafast"),
    VideoSettings("h264", crf=23, gop=15, preset="veryfast"),
]
each_codec = pytest.mark.parametrize("settings", CODECS, ids=lambda s: f"{s.codec}-g{s.gop}")


def encoded(
    length: int = 20, settings: VideoSettings = CODECS[0], first: int = 0, size: tuple[int, int] = SIZE
) -> io.BytesIO:
    sink = io.BytesIO()
    frames = TexturedFrames(length, *size, seed=first, first_number=first)
    count = encode(frames, sink, fps=FPS, size=size, settings=settings, observe=lambda step, picture: None)
    assert count == length
    return sink


def decoded(video: Path | io.BytesIO) -> list[tuple[float, np.ndarray]]:
    if isinstance(video, io.BytesIO):
        video.seek(0)
    with av.open(str(video) if isinstance(video, Path) else video) as container:
        return [
            (float(frame.pts * frame.time_base), frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]


@each_codec
def test_every_picture_comes_out_once_in_order_and_on_time(settings: VideoSettings) -> None:
    seen = decoded(encoded(33, settings))
    assert [read_number(picture) for _, picture in seen] == list(range(33))
    assert [time for time, _ in seen] == [pytest.approx(step / FPS) for step in range(33)]


@each_codec
def test_pictures_look_like_what_was_recorded(settings: VideoSettings) -> None:
    errors = [
        np.mean((picture.astype(float) - original) ** 2)
        for (_, picture), original in zip(
            decoded(encoded(12, settings)), TexturedFrames(12, *SIZE), strict=True
        )
    ]
    assert 10 * np.log10(255**2 / np.mean(errors)) > 28  # dB; small pictures are mostly edges


@each_codec
def test_the_same_pictures_give_the_same_bytes(settings: VideoSettings) -> None:
    reference = encoded(25, settings).getvalue()
    with ThreadPoolExecutor(4) as threads:
        again = list(threads.map(lambda _: encoded(25, settings).getvalue(), range(4)))
    assert all(video == reference for video in again)


@each_codec
def test_episodes_lie_end_to_end_in_one_file(tmp_path: Path, settings: VideoSettings) -> None:
    video = PackedVideo(tmp_path / "packed.mp4", FPS)
    lengths = (7, 1, 20, 2)
    for number, length in enumerate(lengths):
        episode = encoded(length, settings, first=100 * number)
        assert video.accepts(episode)
        assert video.append(episode) == length
    video.close()
    seen = decoded(tmp_path / "packed.mp4")
    expected = [100 * number + step for number, length in enumerate(lengths) for step in range(length)]
    assert [read_number(picture) for _, picture in seen] == expected
    assert [time for time, _ in seen] == [pytest.approx(i / FPS) for i in range(sum(lengths))]
    assert count_frames(tmp_path / "packed.mp4") == sum(lengths)


@each_codec
def test_any_picture_of_a_packed_file_is_found_at_its_time(tmp_path: Path, settings: VideoSettings) -> None:
    from lerobot.datasets.video_utils import decode_video_frames

    video = PackedVideo(tmp_path / "packed.mp4", FPS)
    for number in range(3):
        video.append(encoded(15, settings, first=15 * number))
    video.close()
    for step in (0, 1, 14, 15, 16, 29, 30, 37, 44):
        (picture,) = decode_video_frames(tmp_path / "packed.mp4", [step / FPS], 1e-4, "pyav")
        assert read_number((picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)) == step


def test_packing_copies_bytes_and_adds_next_to_none(tmp_path: Path) -> None:
    episodes = [encoded(20, first=20 * number) for number in range(5)]
    video = PackedVideo(tmp_path / "packed.mp4", FPS)
    for episode in episodes:
        video.append(episode)
    video.close()
    assert (tmp_path / "packed.mp4").stat().st_size <= sum(len(e.getvalue()) for e in episodes)


def test_a_stream_with_another_header_is_not_accepted(tmp_path: Path) -> None:
    video = PackedVideo(tmp_path / "packed.mp4", FPS)
    video.append(encoded(3))
    assert video.accepts(encoded(3))
    assert not video.accepts(encoded(3, size=(64, 64)))
    video.close()


def test_pictures_are_taken_one_by_one_and_let_go() -> None:
    alive: set[int] = set()
    most = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal most
        for number, frame in enumerate(TexturedFrames(200, *SIZE)):
            own = frame.copy()
            alive.add(number)
            weakref.finalize(own, alive.discard, number)
            most = max(most, len(alive))
            yield own

    sink = io.BytesIO()
    encode(frames(), sink, fps=FPS, size=SIZE, settings=CODECS[0], observe=lambda step, picture: None)
    assert most <= 3


def test_each_picture_is_observed_before_it_is_encoded() -> None:
    seen: list[int] = []
    encode(
        TexturedFrames(9, *SIZE),
        io.BytesIO(),
        fps=FPS,
        size=SIZE,
        settings=CODECS[0],
        observe=lambda step, picture: seen.append(read_number(picture)),
    )
    assert seen == list(range(9))


@pytest.mark.parametrize(
    ("picture", "complaint"),
    [
        (np.zeros((480, 848, 3), np.uint8), "step 1 is 848x480 uint8, declared is 96x64"),
        (np.zeros((64, 96), np.uint8), r"step 1 is \(64, 96\) uint8"),
        (np.zeros((64, 96, 4), np.uint8), "step 1"),
        (np.zeros((64, 96, 3), np.float32), "float32"),
    ],
)
def test_a_picture_of_another_shape_is_refused(picture: np.ndarray, complaint: str) -> None:
    for run in (
        lambda frames: encode(
            frames, io.BytesIO(), fps=FPS, size=SIZE, settings=CODECS[0], observe=lambda s, p: None
        ),
        lambda frames: encode_stills(
            frames, io.BytesIO(), size=SIZE, settings=StillSettings(), observe=lambda s, p: None
        ),
    ):
        with pytest.raises(UserError, match=complaint):
            run(iter([np.zeros((64, 96, 3), np.uint8), picture]))


def test_odd_sizes_are_refused_with_a_way_out() -> None:
    with pytest.raises(UserError, match="97x64; store images instead"):
        encoded(size=(64, 97))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"codec": "mpeg2"}, "mpeg2"),
        ({"crf": 64}, r"0\.\.63"),
        ({"codec": "h264", "crf": 52}, r"0\.\.51"),
        ({"crf": -1}, "crf -1"),
        ({"gop": 0}, "gop 0"),
    ],
)
def test_settings_out_of_bounds_are_refused(arguments: dict, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        VideoSettings(**arguments)


@pytest.mark.parametrize("arguments", [{"format": "bmp"}, {"quality": 0}, {"quality": 101}])
def test_still_settings_out_of_bounds_are_refused(arguments: dict) -> None:
    with pytest.raises(UsageError):
        StillSettings(**arguments)


@each_codec
def test_the_key_frames_are_as_far_apart_as_asked(settings: VideoSettings) -> None:
    video = encoded(31, settings)
    video.seek(0)
    with av.open(video) as container:
        keys = [i for i, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    assert keys == list(range(0, 31, settings.gop))


@each_codec
def test_the_info_is_what_lerobot_reads_from_the_file(tmp_path: Path, settings: VideoSettings) -> None:
    from lerobot.datasets.video_utils import get_video_info

    path = tmp_path / "video.mp4"
    path.write_bytes(encoded(5, settings).getvalue())
    assert get_video_info(path) == video_info(settings, SIZE, FPS)


def test_a_file_whose_index_was_lost_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = PackedVideo(tmp_path / "packed.mp4", FPS)
    video.append(encoded(4))
    video.frames += 1
    with pytest.raises(OSError, match="holds 4 frames after writing 5"):
        video.close()


@pytest.mark.parametrize("settings", [StillSettings(), StillSettings("jpeg", 90)])
def test_stills_come_out_as_they_went_in(settings: StillSettings) -> None:
    import cv2

    sink = io.BytesIO()
    frames = list(TexturedFrames(6, *SIZE))
    sizes = encode_stills(frames, sink, size=SIZE, settings=settings, observe=lambda s, p: None)
    assert sum(sizes) == len(sink.getvalue())
    for start, stop in ((0, 6), (2, 5), (5, 6)):
        for number, data in enumerate(split_stills(sink, sizes, start, stop), start):
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            if settings.format == "png":
                assert (picture == frames[number]).all()
            assert read_number(picture) == number
