// Which words were shown when: a part for each, hatched from asked until its first picture is made.

const SPAN = 30; // seconds in sight

export class Timeline {
  constructor(whole, track, labels) {
    Object.assign(this, { whole, track, labels });
    this.parts = [];
  }

  begin(words) {
    this.parts = [{ id: null, words, at: 0, state: "shown" }];
    this.whole.hidden = false;
    this.draw(0, 0);
  }

  ask(id, words) { this.parts.push({ id, words, at: Infinity, state: "sent" }); }
  accept(id) { this.#find(id, (part) => (part.state = "accepted")); }
  activate(id, at) { this.#find(id, (part) => Object.assign(part, { at, state: "active" })); }
  forget(id) { this.parts = this.parts.filter((part) => part.id !== id); }
  #find(id, act) { this.parts.filter((part) => part.id === id).forEach(act); }

  // now: the second on the screen. made: how many there are.
  draw(now, made) {
    const end = Math.max(SPAN, made + 4);
    const begin = end - SPAN;
    const place = (second) => `${(100 * (Math.min(second, end) - begin)) / SPAN}%`;
    const known = this.parts.filter((part) => part.at < Infinity).sort((a, b) => a.at - b.at);
    const items = known.map((part, number) => {
      const until = known[number + 1]?.at ?? made;
      const state = part.at > now ? "coming" : until > now || number === known.length - 1 ? "on screen" : "was shown";
      return until > begin ? item(part.words, place(Math.max(part.at, begin)), place(until), state) : null;
    });
    this.parts.filter((part) => part.at === Infinity).forEach((part) => {
      items.push(item(part.words, place(made), place(end), part.state === "accepted" ? "accepted" : "asked", "asked"));
    });
    this.track.replaceChildren(...items.filter(Boolean), needle(place(Math.max(now, begin))));
    this.labels.from.textContent = clock(begin);
    this.labels.now.textContent = clock(now);
    this.labels.to.textContent = clock(end);
  }
}

function item(words, left, right, state, kind = "") {
  const part = document.createElement("div");
  part.className = `part ${kind}`;
  part.style.left = left;
  part.style.right = `calc(100% - ${right})`;
  part.textContent = words;
  part.title = `${words} (${state})`;
  part.setAttribute("role", "listitem");
  part.setAttribute("aria-label", part.title);
  return part;
}

function needle(left) {
  const line = document.createElement("div");
  line.className = "needle";
  line.style.left = left;
  line.setAttribute("aria-hidden", "true");
  return line;
}

function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
}
