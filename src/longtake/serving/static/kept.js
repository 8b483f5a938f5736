// Snapshots and recordings of this browser, which the server keeps: a list that survives a reload of the page, and what
// was being recorded when its socket broke.
import { clock } from "./timeline.js";

const STORE = "longtake-kept";
const LOOKS = 20; // at the server, a second apart, for a recording that was cut off: it ends by itself

export class Kept {
  // hands: { ask, rewind, fork, download, complain }
  constructor(list, hands) {
    Object.assign(this, { list, hands });
    this.items = remembered();
    this.present = null; // the recording that goes on here
    this.live = this.free = false;
    addEventListener("storage", ({ key }) => key === STORE && this.#hear());
  }

  // Those of this browser that the server still has, and those of recordings cut off that it has by and by.
  async meet(looks = LOOKS) {
    const there = new Set();
    const old = new Set(this.items); // what is added meanwhile may be missing from what the server tells
    for (const kind of ["snapshots", "recordings"]) {
      for (const one of (await this.hands.ask(`v1/${kind}`)).data) there.add(one.id);
    }
    for (const item of this.items) item.going &&= !there.has(item.id);
    const stays = (item) => !old.has(item) || there.has(item.id) || item === this.present || (item.going && looks);
    this.items = this.items.filter(stays);
    this.#keep();
    this.#lookAgain(looks);
  }

  #lookAgain(looks) {
    if (!looks || !this.items.some((item) => item.going && item !== this.present)) return;
    setTimeout(() => this.meet(looks - 1).catch(() => this.#lookAgain(looks - 1)), 1000);
  }

  // item: { kind: "snapshot" | "recording", id, at, words, seed, picture }
  add(item) {
    this.items.unshift(item);
    this.#keep();
  }

  // A recording that goes on: remembered, and shown once it is whole.
  begin(item) { this.add(Object.assign((this.present = item), { going: true })); }

  // It is whole; there is nothing of it where its length in seconds is null.
  finish(seconds) {
    if (seconds === null) this.items = this.items.filter((item) => item !== this.present);
    Object.assign(this.present, { at: seconds, going: false });
    this.present = null;
    this.#keep();
  }

  // Its socket broke after so many seconds: the server ends it.
  cutOff(seconds) {
    this.present.at = seconds;
    this.present = null;
    this.#lookAgain(LOOKS);
  }

  // live: whether there is a stream to rewind. free: whether another one may start, in place of one that is there.
  allow(live, free) {
    Object.assign(this, { live, free });
    for (const button of this.list.querySelectorAll(".rewind")) button.disabled = !live;
    for (const button of this.list.querySelectorAll(".fork")) button.disabled = !free;
  }

  async #remove(item) {
    try {
      await this.hands.ask(`v1/${item.kind}s/${item.id}`, { method: "DELETE" });
    } catch (error) {
      if (!/404/.test(error.message)) return this.hands.complain("It could not be removed.");
    }
    this.items = this.items.filter((one) => one.id !== item.id);
    this.#keep();
  }

  // What another tab keeps or has removed: else the two would write over each other's.
  #hear() {
    const { present } = this;
    const others = remembered().filter((item) => item.id !== present?.id);
    this.items = present ? [present, ...others] : others;
    this.#show();
  }

  #keep() {
    try { localStorage.setItem(STORE, JSON.stringify(this.items)); } catch { /* the list lives as long as the page */ }
    this.#show();
  }

  #show() {
    const whole = this.items.filter((item) => !item.going);
    this.list.replaceChildren(...whole.map((item) => this.#row(item)));
    this.list.hidden = !whole.length;
    document.getElementById("kept-none").hidden = !!whole.length;
    document.getElementById("kept-how").hidden = !whole.length;
  }

  #row(item) {
    const { hands } = this;
    const row = document.createElement("li");
    const what = item.kind === "snapshot" ? `Snapshot at ${clock(item.at)}` : item.at ? `Recording, ${clock(item.at)}` : "Recording";
    const text = Object.assign(document.createElement("p"), { className: "what" });
    text.append(Object.assign(document.createElement("strong"), { textContent: what }));
    text.append(Object.assign(document.createElement("span"), { className: "quiet", textContent: item.words, title: item.words }));
    const acts = Object.assign(document.createElement("p"), { className: "acts" });
    if (item.kind === "snapshot") {
      acts.append(act("Rewind", "Go back to it in this stream", () => hands.rewind(item), "rewind", !this.live));
      acts.append(act("Fork", "Start another stream from it", () => hands.fork(item), "fork", !this.free));
    } else {
      acts.append(act("Video", "Download the mp4", () => hands.download(item, "video.mp4"), "video"));
      acts.append(act("run.json", "Download what it was made of", () => hands.download(item, "run.json"), "run"));
    }
    acts.append(act("Remove", `Remove: ${what}`, () => this.#remove(item), "remove"));
    if (item.picture) row.append(Object.assign(new Image(), { src: item.picture, alt: "" }));
    row.append(text, acts);
    return row;
  }
}

function act(text, says, does, kind, disabled = false) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text, title: says, className: kind, disabled });
  button.onclick = does;
  return button;
}

function remembered() {
  try { return JSON.parse(localStorage.getItem(STORE)) ?? []; } catch { return []; }
}
