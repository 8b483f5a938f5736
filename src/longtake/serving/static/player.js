// Feeds fragments to a video element as they come, and keeps it near the newest picture.

const BEHIND = 3; // seconds that the picture may lag before it jumps
const KEEP = 20; // seconds of video kept behind the picture

export class Player {
  constructor(video) {
    this.video = video;
    this.waiting = [];
    this.marks = [];
    video.addEventListener("timeupdate", () => this.#pass());
    video.addEventListener("waiting", () => this.#follow());
  }

  begin(mime, complain) {
    this.paused = false;
    this.over = false;
    this.waiting = [];
    this.marks = [];
    this.buffer = null;
    this.origin = null; // the second that the first picture has: who comes late does not begin at 0
    const Kind = window.ManagedMediaSource ?? window.MediaSource; // iPhones have the first alone
    if (!Kind?.isTypeSupported(mime)) return complain("This browser cannot play the stream: it lacks Media Source Extensions for H.264.");
    this.video.onerror = () => complain("This browser failed to play on. The stream goes on: stop it, or take a snapshot and fork it.");
    this.video.disableRemotePlayback = true;
    const source = (this.source = new Kind());
    this.video.src = URL.createObjectURL(source);
    source.addEventListener("sourceopen", () => {
      URL.revokeObjectURL(this.video.src); // else it holds what was fed for as long as the page is open
      this.buffer = source.addSourceBuffer(mime);
      this.buffer.addEventListener("updateend", () => this.#next());
      this.#next();
    }, { once: true });
  }

  feed(bytes) {
    this.waiting.push(bytes);
    this.#next();
  }

  // Seconds that are here and not played yet.
  buffered() {
    const ranges = this.video.buffered;
    return ranges.length ? Math.max(0, ranges.end(ranges.length - 1) - this.video.currentTime) : 0;
  }

  // Seconds of the video that are played.
  now() { return Math.max(0, this.video.currentTime - (this.origin ?? 0)); }

  // Calls back when the picture at that second is on the screen.
  whenAt(second, act) { this.marks.push({ second, act }); }

  play() { this.video.play().catch(() => {}); }

  end() { this.over = true; this.#next(); }

  #next() {
    if (!this.buffer || this.buffer.updating || this.source.readyState !== "open") return;
    if (this.origin === null && this.buffer.buffered.length) {
      this.origin = this.buffer.buffered.start(0);
      if (this.video.currentTime < this.origin) this.video.currentTime = this.origin;
    }
    const played = this.video.currentTime;
    if (this.waiting.length) {
      this.buffer.appendBuffer(this.waiting.shift());
      if (this.video.paused && !this.paused) this.play();
    } else if (played > 2 * KEEP && this.buffer.buffered.length && this.buffer.buffered.start(0) < played - 2 * KEEP) {
      this.buffer.remove(0, played - KEEP); // a stream never ends, but memory does
    } else if (this.over) this.source.endOfStream();
    this.#follow();
  }

  // A tab that slept is far behind, and after a gap the picture stands still: both go on at what is here.
  #follow() {
    const ranges = this.video.buffered;
    if (!ranges.length || this.paused) return;
    const end = ranges.end(ranges.length - 1);
    if (end - this.video.currentTime > BEHIND && !this.over) this.video.currentTime = end - 0.5;
  }

  #pass() {
    const now = this.now();
    this.marks = this.marks.filter((mark) => mark.second > now || (mark.act(), false));
  }
}
