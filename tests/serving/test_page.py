"""The page in a browser, with the embedded model: what a user sees and keeps."""

import base64
import io
import json
import os
import shlex
import shutil
import time
from contextlib import closing

import av
import numpy as np
import pytest
import torch
from playwright.sync_api import sync_playwright

from longtake.cli import main
from longtake.generation.script import script_from
from longtake.media.mp4 import read_frames, read_record
from longtake.toy.detect import detect
from longtake.toy.scenes import TIMES, WEATHERS
from tests.serving.process import server

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None and "CI" not in os.environ:  # there, the first test that wants it fails
    pytest.skip("there is no chromium on PATH to show the page in: apt install chromium", allow_module_level=True)

PATIENCE = 120.0  # seconds, on a machine with much else to do
DAY, NIGHT = "a red ball bounces over green hills", "a red ball bounces over green hills at night in the rain"
LIGHT = """() => {
  const canvas = new OffscreenCanvas(24, 14), video = document.querySelector("video"), ink = canvas.getContext("2d");
  if (!video.videoWidth) return 0;
  ink.drawImage(video, 0, 0, 24, 14);
  return ink.getImageData(0, 0, 24, 14).data.reduce((sum, one) => sum + one, 0) / (24 * 14 * 4);
}"""
CAPTURED = """(count) => new Promise((done) => {
  const video = document.querySelector("video"), { videoWidth: width, videoHeight: height } = video;
  const canvas = Object.assign(document.createElement("canvas"), { width, height: count * height });
  let seen = 0;
  const look = () => {
    canvas.getContext("2d").drawImage(video, 0, height * seen++);
    if (seen < count) video.requestVideoFrameCallback(look); else done(canvas.toDataURL("image/png"));
  };
  video.requestVideoFrameCallback(look);
})"""
DECODED = "() => document.querySelector('video').getVideoPlaybackQuality().totalVideoFrames"
TEXT = "() => document.body.innerText"
TIME = "() => document.querySelector('video').currentTime"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with server("--keep", str(tmp_path_factory.mktemp("kept")), key="") as (_, address):
        yield f"http://{address}"


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "continuous integration needs a chromium on PATH to show the page in"
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # it has none for root
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*sandbox, "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """A stream by day, once its first pictures are decoded. Nothing on the page may fail, nor leave the server."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    troubles = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda told: troubles.append(told.text) if told.type == "error" else None)
    page.on(
        "request",
        lambda asked: None if asked.url.startswith((address, "blob:", "data:")) else troubles.append(asked.url),
    )
    with closing(context):  # whatever goes wrong: a stream that is left behind would slow all that come after it
        page.goto(address)
        page.wait_for_selector("#begin:enabled")
        page.keyboard.press("Enter")
        until(page, DECODED, lambda count: count >= 10)
        yield page
        page.click("#stop:enabled")
        page.wait_for_selector("#cover:visible")
    assert troubles == []


CLIPBOARD = """() => {
  const writeText = async (text) => { window.copied = text; };
  Object.defineProperty(navigator, "clipboard", { value: { writeText } });
}"""


def until(page, asks, holds):
    """What the page says, or is found of it, once it holds."""
    deadline = time.monotonic() + PATIENCE
    while not holds(told := asks(page) if callable(asks) else page.evaluate(asks)):
        assert time.monotonic() < deadline, f"still {told} on a page that says {page.evaluate(TEXT)!r}"
        page.wait_for_timeout(100)
    return told


def setting(page, count=24):
    """Time and weather, as the toy world's detectors read them off pictures in a row on the screen."""
    png = base64.b64decode(page.evaluate(CAPTURED, count).partition(",")[2])
    with av.open(io.BytesIO(png)) as pictures:
        tall_HWC = next(pictures.decode(video=0)).to_ndarray(format="rgb24")
    found = detect(torch.from_numpy(tall_HWC).unflatten(0, (count, -1))[None])
    return (*TIMES, "unseen")[found.time], (*WEATHERS, "unseen")[found.weather]


def say(page, words):
    page.fill("#prompt", words)
    page.press("#prompt", "Enter")


WATCH = """() => {
  window.changed = [];
  const look = new MutationObserver((all) => changed.push(...all.map((one) => one.attributeName ?? one.type)));
  look.observe(document.querySelector("#track"), { subtree: true, childList: true, attributes: true });
}"""


def test_the_video_plays_and_pauses_and_the_timeline_is_not_rebuilt(page):
    first = page.evaluate(DECODED)
    page.evaluate(WATCH)
    until(page, DECODED, lambda count: count >= first + 24)
    kinds = set(page.evaluate("() => changed"))
    assert "style" in kinds and kinds <= {"style", "class"}  # words are neither taken away nor put there again
    assert page.evaluate(TIME) > 0.5
    page.click("#pause")
    page.wait_for_selector("#pause:has-text('Go on')")
    stands = page.evaluate(TIME)
    page.wait_for_timeout(1000)
    assert page.evaluate(TIME) == stands
    page.click("#pause")
    until(page, TIME, lambda now: now > stands + 0.5)


def test_words_change_the_picture_and_a_snapshot_brings_it_back(page):
    until(page, setting, lambda seen: seen == ("day", "clear"))
    day = page.evaluate(LIGHT)
    page.press("#video", "s")
    page.wait_for_selector(".kept .rewind")
    say(page, NIGHT)
    page.wait_for_selector(".part[data-state=accepted]")
    night = until(page, LIGHT, lambda light: light < 0.75 * day)
    page.wait_for_selector(".part.current[data-state=completed]")
    until(page, setting, lambda seen: seen == ("night", "rain"))
    page.click(".rewind")
    until(page, LIGHT, lambda light: light > (day + night) / 2 + 0.3 * (day - night))
    page.click("#copy")
    page.wait_for_selector("#copy-says:has-text('it was rewound')")
    say(page, NIGHT)
    until(page, LIGHT, lambda light: light < 0.75 * day)
    page.click(".fork")
    until(page, LIGHT, lambda light: light > 0.9 * day)
    page.wait_for_selector("#state:has-text('Live')")
    page.click(".remove")
    page.wait_for_selector("#kept-none:visible")


def test_words_blend_and_a_stream_goes_back_and_begins_again(page):
    until(page, setting, lambda seen: seen == ("day", "clear"))
    day = page.evaluate(LIGHT)
    assert page.is_disabled("#back")
    page.focus("#pause")
    for _ in range(3):  # held
        page.keyboard.down("S")
    page.keyboard.up("S")
    page.wait_for_selector("#back:enabled")
    page.click("label:has-text('Blend')")
    say(page, NIGHT)
    until(page, setting, lambda seen: seen == ("night", "rain"))
    page.click("#copy")
    page.wait_for_selector("#copy-says:has-text('it holds a blend')")
    page.press("[name=change][value=blend]", "b")
    assert page.locator(".kept .rewind").count() == 1
    page.wait_for_selector(f".part.current[data-state=completed]:text-is('↩ {DAY}')")
    until(page, LIGHT, lambda light: light > 0.9 * day)
    page.click("#copy")
    page.wait_for_selector("#copy-says:has-text('it was rewound')")
    page.press("#video", "0")
    page.locator(".part[data-state=completed]:has-text('↩')").nth(1).wait_for()
    assert not page.is_visible("#complaint")


def test_a_recording_is_downloaded_plays_and_is_made_again(page, tmp_path, capsys):
    page.click("#record")
    page.wait_for_selector("#recording:visible")
    say(page, NIGHT)
    page.wait_for_selector(".part.current[data-state=completed]:has-text('night')")
    page.click("#record[aria-pressed=true]")
    page.wait_for_selector(".kept .video")
    for button, name in ((".video", "video.mp4"), (".run", "run.json")):
        with page.expect_download() as coming:
            page.click(button)
        coming.value.save_as(tmp_path / name)
    with av.open(str(tmp_path / "video.mp4")) as video:
        assert len(list(video.decode(video=0))) > 10
    record = read_record(tmp_path / "video.mp4")
    assert json.loads((tmp_path / "run.json").read_text()) == record
    assert [cue["prompt"] for cue in record["prompts"]] == [DAY, NIGHT]
    page.evaluate(CLIPBOARD)
    page.click("#copy")
    page.wait_for_selector("#copy-says:has-text('Copied')")
    program, *command = shlex.split(page.evaluate("() => copied"))
    page.click("#pause")  # what follows needs the machine
    assert main(["replay", str(tmp_path / "video.mp4")]) == 0
    assert "the same, picture by picture" in capsys.readouterr().err
    assert program == "longtake" and main([*command, "-o", str(tmp_path / "generated.mp4")]) == 0
    numbers = [number for _, begin, end in record["live"]["spans"] for number in range(begin, end)]
    shown = read_frames(tmp_path / "video.mp4").astype(int)
    made = read_frames(tmp_path / "generated.mp4").astype(int)
    assert np.abs(shown - made[numbers]).mean() < 0.7 * np.abs(shown - made[[number - 1 for number in numbers]]).mean()
    assert np.abs(shown - made[numbers]).mean() < 5  # of 255: each is coded from another picture on


def test_others_watch_the_same_stream_and_cannot_steer_it(page, browser, address):
    page.evaluate(CLIPBOARD)
    until(page, DECODED, lambda count: count >= 40)
    page.click("#share:enabled")
    link = until(page, "() => window.copied ?? ''", lambda text: text)
    assert link.startswith(f"{address}/?watch=")
    viewer = browser.new_context().new_page()
    viewer.goto(link)
    viewer.click("#begin:enabled")
    until(viewer, DECODED, lambda count: count >= 10)
    assert not viewer.is_visible("#words") and not viewer.is_visible("#pause")
    viewer.wait_for_selector("#caption:has-text('ball')", timeout=1000 * PATIENCE)
    say(page, NIGHT)
    viewer.wait_for_selector(".part.current:has-text('night')", timeout=1000 * PATIENCE)
    page.press("#prompt", "Enter")
    page.click("#stop")
    page.wait_for_selector("#cover:visible")
    assert page.locator(".part[data-state=sent], .part[data-state=accepted]").count() == 0  # it will never be shown
    viewer.wait_for_selector("#cover-text:has-text('It is over')", timeout=1000 * PATIENCE)
    viewer.click("#begin:enabled")
    viewer.wait_for_selector("#complaint:has-text('no such session: it is over')", timeout=1000 * PATIENCE)
    viewer.wait_for_selector("#cover-text:text-is('Press to watch')", timeout=1000 * PATIENCE)
    viewer.context.close()
    page.click("#begin:enabled")


def test_what_was_kept_when_the_connection_broke_is_listed_and_so_it_is_after_a_reload(browser, address):
    """A snapshot whose pictures were still to come, and a recording that the server had to end."""
    page = browser.new_context().new_page()
    page.set_default_timeout(1000 * PATIENCE)
    lines = []

    def connect(line):
        server = line.connect_to_server()
        lines.append((line, server))

    page.route_web_socket("**/v1/realtime/video*", connect)
    page.goto(address)
    for recordings, breaks in ((1, "the line"), (2, "the page")):
        page.click("#begin:enabled")
        until(page, DECODED, lambda count: count >= 10)
        page.click("#record")
        page.wait_for_selector("#recording:visible")
        page.wait_for_timeout(2000)
        page.press("#video", "s")
        page.locator(".kept .rewind").nth(recordings - 1).wait_for()
        if breaks == "the line":
            line, server = lines.pop()
            server.close(), line.close(code=4000)
            page.wait_for_selector("#complaint:has-text('connection')")
            assert page.is_visible("#cover") and not page.is_visible("#recording")
        else:
            page.reload()
        page.locator(".kept .video").nth(recordings - 1).wait_for()
        assert page.locator(".kept .rewind").count() == recordings
    with page.expect_download() as coming:
        page.locator(".video").first.click()
    with av.open(str(coming.value.path())) as video:
        assert len(list(video.decode(video=0))) >= 9  # the fewest of one chunk: a busy machine records no more
    page.route("**/run.json", lambda asked: asked.fulfill(status=404, json={"detail": "it could not be finished"}))
    page.locator(".run").first.click()
    page.wait_for_selector("#complaint:has-text('It cannot be fetched: it could not be finished.')")
    page.context.close()


def test_who_waits_is_told_and_what_is_pressed_meanwhile_does_nothing_wrong(browser, address):
    """No red line in the browser's console, no fork that comes true when nobody expects it any more, and no stream that
    is called live while the server is silent."""
    page = browser.new_context().new_page()
    page.clock.install()
    page.set_default_timeout(1000 * PATIENCE)
    wrong, warm = [], []
    page.on("console", lambda told: wrong.append(told.text) if told.type == "error" else None)
    page.on("response", lambda answer: wrong.append(answer.url) if not answer.ok else None)
    page.route("**/health", lambda asked: asked.fulfill(json={"status": "ok", "ready": bool(warm)}))
    page.goto(address)
    page.wait_for_selector("#state:has-text('Warming up')")
    assert page.is_disabled("#begin") and page.is_disabled("#send")
    warm.append(True)
    page.click("#begin:enabled")
    page.click("#snapshot:enabled")
    page.wait_for_selector(".kept .fork:enabled")
    page.click("#stop:enabled")
    page.wait_for_selector("#cover:visible")
    lines = []
    page.route_web_socket("**/v1/realtime/video*", lambda line: lines.append(line))  # which never answers
    page.click("#begin:enabled")
    page.wait_for_selector("#state:has-text('Starting')")
    assert page.is_disabled(".kept .fork") and page.is_disabled(".kept .rewind")
    assert wrong == []
    lines[0].send(json.dumps(STARTED))
    page.wait_for_selector("#state:has-text('Live')")
    page.clock.run_for(6000)
    page.wait_for_selector("#state:has-text('Waiting for the server')")
    lines[0].send(json.dumps(ABOUT))
    page.wait_for_selector("#state:has-text('Live')")
    lines[0].send('{"type": "session.paused"}')
    page.wait_for_selector("#pause .on:visible")
    lines[0].send(b"\0\0\0\x08no mp4")
    page.wait_for_selector("#complaint:has-text('failed to play')")
    page.clock.run_for(6000)
    page.click("#stop")  # of which the server hears nothing
    page.wait_for_selector("#complaint:has-text('connection')")
    assert page.is_visible("#cover") and page.is_visible("#pause .bars") and page.is_hidden("#pause .on")
    page.context.close()


STARTED = {
    "type": "video.start", "request_id": "one", "mime": 'video/mp4; codecs="avc1.42c00b"',
    "config": {"prompt": DAY, "seed": 42},
}  # fmt: skip
ABOUT = {
    "type": "video.chunk_metadata", "prompt": DAY, "num_frames": 9, "start_seconds": 0, "started_event_ids": [],
}  # fmt: skip


def test_tabs_of_one_browser_list_what_each_other_keeps_and_removes(page):
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("#state:has-text('Ready')", timeout=1000 * PATIENCE)
    page.click("#snapshot")
    other.locator(".kept .fork").wait_for(timeout=1000 * PATIENCE)
    page.click("#record")
    page.wait_for_selector("#recording:visible")
    other.click(".kept .remove")
    page.wait_for_selector("#kept-none:visible")
    page.click("#record[aria-pressed=true]")  # which went on
    for tab in (page, other):
        tab.locator(".kept .video").wait_for(timeout=1000 * PATIENCE)
    other.close()


ADDED = """async () => {
  const { Kept } = await import("/kept.js");
  const ask = async (path) => {
    if (path === "v1/recordings") kept.add({ kind: "snapshot", id: "new", at: 1, words: "a ball", seed: 1 });
    return { data: [] };
  };
  const kept = new Kept(document.createElement("ul"), { ask });
  kept.items = [{ kind: "snapshot", id: "old", at: 1, words: "a ball", seed: 1 }];
  await kept.meet();
  return kept.items.map((item) => item.id);
}"""


def test_what_is_kept_while_the_server_is_asked_what_it_has_stays_in_the_list(browser, address):
    page = browser.new_page()
    page.goto(address)
    assert page.evaluate(ADDED) == ["new"]
    page.close()


def test_words_to_begin_with_are_all_in_sight_on_a_phone(browser, address):
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto(address)
    until(page, "() => document.querySelector('#prompt').value", lambda words: words)
    hidden = page.evaluate(
        "() => { const box = document.querySelector('#prompt'); return box.scrollHeight - box.clientHeight; }"
    )
    assert hidden <= 0
    page.close()


def test_a_seed_that_a_browser_would_round_is_refused(browser, address):
    page = browser.new_page()
    page.goto(address)
    valid = "seed => { const box = document.querySelector('#seed'); box.value = seed; return box.checkValidity(); }"
    assert [page.evaluate(valid, str(seed)) for seed in (42, 10**15 - 1, 2**53 + 1)] == [True, True, False]
    page.close()


def test_the_door_stays_until_a_key_is_given_that_could_be_right(browser, address):
    page = browser.new_page()
    page.route("**/v1/models", lambda asked: asked.fulfill(status=401))
    page.goto(address)
    page.wait_for_selector("#door[open]")
    for _ in range(3):
        page.keyboard.press("Escape")
    page.fill("#key", "ключ")  # which no header can carry
    page.press("#key", "Enter")
    assert page.is_visible("#door") and page.evaluate("() => sessionStorage.length") == 0
    page.fill("#key", "sesame")
    page.press("#key", "Enter")
    page.wait_for_selector("#door-complaint:has-text('not right')")
    page.close()


SAID = """async (streams) => {
  const { commandLine, hindrance } = await import("/command.js");
  const model = { id: "a model", recipe: "one:past=6", levels: 4, codec: null, dtype: "float32", device: "cpu" };
  return streams.map((stream) => hindrance(stream) || commandLine(model, stream));
}"""
NASTY = [
    "a ball", "it's \"$HOME\" `x` \\ !", "two\nlines", "über 日本",
    "a | b", "5s: b", "[0s:5s] b", "-x", "--seed", "[ 10% : 20% ] a",
]  # fmt: skip


def test_a_command_line_is_read_as_it_was_meant_or_refused(browser, address):
    page = browser.new_page()
    page.goto(address)
    streams = [
        {"seed": 7, "made": 9.5, "prompts": [{"at": 0, "prompt": first}, {"at": 2.0625, "prompt": second}]}
        for first in NASTY
        for second in NASTY
    ]
    read = 0
    for stream, said in zip(streams, page.evaluate(SAID, streams), strict=True):
        if not said.startswith("longtake"):
            continue
        words = shlex.split(said)
        options = dict(zip(words[3::2], words[4::2], strict=True))
        assert options == {
            "--model": "a model", "--recipe": "one:past=6", "--levels": "4", "--dtype": "float32", "--device": "cpu",
            "--seed": "7", "--seconds": "9.5",
        }  # fmt: skip
        cues = [{"at": cue.at, "prompt": cue.prompt} for cue in script_from(words[2]).cues]
        assert cues == stream["prompts"] and not words[2].startswith("-")
        read += 1
    assert read == 4 * 7  # as first words 4 of them can be said, as later ones those that begin like options, too
    for more in ({"rewound": True}, {"forked": True}, {"asked": {"size": 1}}):
        assert not page.evaluate(SAID, [streams[0] | more])[0].startswith("longtake")
    for at, how in ((2.0625, "cut"), (2.0625, "blend"), (0, "")):
        prompts = [{"at": 0, "prompt": "a"}, {"at": at, "prompt": "b", "how": how}]
        assert not page.evaluate(SAID, [streams[0] | {"prompts": prompts}])[0].startswith("longtake")
    page.context.close()
