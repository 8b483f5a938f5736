// Snapshots and recordings of this browser, which the server keeps: a list that survives a reload of the page.
import { clock } from "./timeline.js";

const STORE = "longtake-kept";

export class Kept {
  // hands: { ask, rewind, fork, download, complain }
  constructor(list, hands) {
    Object.assign(this, { list, hands });
    this.items = [];
    this.live = false;
  }

  // Those of this browser that the server still has.
  async meet() {
    const there = new Set();
    for (const kind of ["snapshots", "recordings"]) {
      for (const one of (await this.hands.ask(`v1/${kind}`)).data) there.add(one.id);
    }
    this.items = remembered().filter((item) => there.has(item.id));
    this.#keep();
  }

  // item: { kind: "snapshot" | "recording", id, at, words, seed, picture }
  add(item) {
    this.items.unshift(item);
    this.#keep();
  }

  // live: whether there is a stream to rewind.
  allow(live) {
    this.live = live;
    for (const button of this.list.querySelectorAll(".rewind")) button.disabled = !live;
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

  #keep() {
    try { localStorage.setItem(STORE, JSON.stringify(this.items)); } catch { /* the list lives as long as the page */ }
    this.list.replaceChildren(...this.items.map((item) => this.#row(item)));
    this.list.hidden = !this.items.length;
    document.getElementById("kept-none").hidden = !!this.items.length;
    document.getElementById("kept-how").hidden = !this.items.length;
  }

  #row(item) {
    const { hands } = this;
    const row = document.createElement("li");
    const what = item.kind === "snapshot" ? `Snapshot at ${clock(item.at)}` : `Recording, ${clock(item.at)}`;
    const text = Object.assign(document.createElement("p"), { className: "what" });
    text.append(Object.assign(document.createElement("strong"), { textContent: what }));
    text.append(Object.assign(document.createElement("span"), { className: "quiet", textContent: item.words, title: item.words }));
    const acts = Object.assign(document.createElement("p"), { className: "acts" });
    if (item.kind === "snapshot") {
      acts.append(act("Rewind", "Go back to it in this stream", () => hands.rewind(item), "rewind", !this.live));
      acts.append(act("Fork", "Start another stream from it", () => hands.fork(item), "fork"));
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
