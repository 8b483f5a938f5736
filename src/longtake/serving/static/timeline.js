// Which words were shown when. A part comes for each change and stays: only its place and state are changed, so that
// readers of the page are told of what is new alone.

const SPAN = 30; // seconds in sight
const SAYS = { sent: "sent", accepted: "accepted", active: "on its way", completed: "shown" };

export class Timeline {
  constructor(whole, track, labels) {
    Object.assign(this, { whole, track, labels });
    this.parts = [];
    this.snapshots = [];
    this.needle = element("needle");
    this.needle.setAttribute("aria-hidden", "true");
  }

  begin(words) {
    this.parts = [];
    this.snapshots = [];
    this.track.replaceChildren(this.needle);
    this.whole.hidden = false;
    this.#add({ id: null, words, at: 0, state: "active" });
    put(this.parts[0].item, "0%", "0%");
  }

  ask(id, words) { this.#add({ id, words, at: Infinity, state: "sent" }); }
  accept(id) { this.#find(id, (part) => this.#become(part, "accepted")); }
  activate(id, at, words) {
    this.#find(id, (part) => {
      Object.assign(part, { at, words });
      part.item.textContent = words;
      this.#become(part, "active");
    });
  }
  forgetWaiting() { this.parts.filter((part) => part.at === Infinity).forEach((part) => this.forget(part.id)); }
  forget(id) {
    this.#find(id, (part) => part.item.remove());
    this.parts = this.parts.filter((part) => part.id !== id);
  }
  snapshot(at) {
    const mark = element("snap");
    mark.setAttribute("role", "listitem");
    mark.setAttribute("aria-label", `Snapshot at ${clock(at)}`);
    mark.title = `Snapshot at ${clock(at)}`;
    this.track.append(mark);
    this.snapshots.push({ at, item: mark });
  }

  // now: the second on the screen. made: how many there are. True where words came on the screen since.
  draw(now, made) {
    const end = Math.max(SPAN, made + 4);
    const begin = end - SPAN;
    const place = (second) => `${(100 * (Math.min(Math.max(second, begin), end) - begin)) / SPAN}%`;
    const known = this.parts.filter((part) => part.at < Infinity).sort((a, b) => a.at - b.at);
    let shown = null;
    known.forEach((part, number) => {
      part.until = known[number + 1]?.at ?? made;
      if (part.at <= now && part.state === "active") {
        this.#become(part, "completed");
        shown = part.words;
      }
      part.item.classList.toggle("current", part.at <= now && (now < part.until || number === known.length - 1));
    });
    for (const part of known) put(part.item, place(part.at), place(part.until));
    const waiting = this.parts.filter((part) => part.at === Infinity);
    const share = (end - made) / waiting.length; // of what is to come, since nobody knows when
    waiting.forEach((part, number) => put(part.item, place(made + number * share), place(made + (number + 1) * share)));
    const over = (part) => part.until < begin;
    this.parts.filter(over).forEach((part) => part.item.remove());
    this.parts = this.parts.filter((part) => !over(part));
    for (const one of this.snapshots) one.item.hidden = one.at < begin;
    for (const one of this.snapshots) one.item.style.left = place(one.at);
    this.needle.style.left = place(now);
    this.labels.from.textContent = clock(begin);
    this.labels.now.textContent = clock(now);
    this.labels.now.style.left = place(now);
    this.labels.from.style.visibility = now - begin < SPAN / 9 ? "hidden" : ""; // there is room for one of them
    this.labels.to.style.visibility = end - now < SPAN / 9 ? "hidden" : "";
    this.labels.to.textContent = clock(end);
    return shown;
  }

  #add(part) {
    part.item = element("part");
    part.item.setAttribute("role", "listitem");
    part.item.textContent = part.words;
    this.parts.push(part);
    this.#become(part, part.state);
    this.track.insertBefore(part.item, this.needle);
  }
  #become(part, state) {
    part.state = state;
    part.item.dataset.state = state;
    part.item.title = `${part.words} (${SAYS[state]})`;
    part.item.setAttribute("aria-label", part.item.title);
  }
  #find(id, act) { this.parts.filter((part) => part.id === id).forEach(act); }
}

function put(item, left, right) {
  item.style.left = left;
  item.style.right = `calc(100% - ${right})`;
}

function element(kind) { return Object.assign(document.createElement("div"), { className: kind }); }

export function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
}
