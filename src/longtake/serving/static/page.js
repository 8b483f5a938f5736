// The page: asks what is served, opens one socket for each stream, feeds its fragments to the video, draws the rest.
import { Player } from "./player.js";
import { Timeline, clock } from "./timeline.js";
import { Kept } from "./kept.js";
import { commandLine, hindrance } from "./command.js";

const $ = (id) => document.getElementById(id);
const video = $("video");
const player = new Player(video);
const timeline = new Timeline($("timeline"), $("track"), { from: $("from"), now: $("now"), to: $("to") });

const kept = new Kept($("kept"), { ask, rewind, fork, download, complain });

const watching = new URLSearchParams(location.search).get("watch"); // another's session, which can only be looked at
const INVITATION = watching ? "Press to watch" : "Press start, or Enter";

let model = null; // what /v1/models tells
let key = sessionStorage.getItem("longtake-key");
let stream = null;
// { socket, seed, prompts: [{at, prompt, how}], asked: Map(id -> {prompt, how, time}), shown: pictures, made: seconds,
//   forked, rewound, words: on their way, snapped: where the last snapshot is }
// how: "" for words that change in the shot, "blend", "cut"; "back" for no new words
// Seconds of prompts are those of all that was made, dropped pictures included, so that a command line can repeat them.
let next = null; // the snapshot that a stream starts from when this one has ended

// What is served

async function ask(path, options = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) throw new NoKey();
  if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
  return answer.json();
}
class NoKey extends Error {}

async function arrive() {
  try {
    model = (await ask("v1/models")).data[0];
  } catch (error) {
    if (error instanceof NoKey) return openDoor();
    show("bad", "No connection");
    cover("The server does not answer. Trying again…");
    return setTimeout(arrive, 2000);
  }
  $("model").textContent = model.id;
  $("recipe").textContent = model.recipe;
  $("licence").textContent = `licence ${model.license}`;
  $("kept-how").textContent = model.keeps ? "Kept on the server's disk." : "Kept until the server ends.";
  $("size").textContent = `${model.width} × ${model.height}, ${model.fps} a second`;
  $("screen").style.setProperty("--shape", `${model.width} / ${model.height}`);
  $("prompt").maxLength = model.longest_prompt;
  if (!$("prompt").value) $("prompt").value = model.examples[0];
  grow();
  $("ideas").replaceChildren(...model.examples.map(idea));
  kept.meet().catch(() => complain("What is kept cannot be listed."));
  waitUntilReady();
}

async function waitUntilReady() {
  const health = await ask("health").catch(() => null);
  if (!health?.ready) {
    show("wait", "Warming up");
    return setTimeout(waitUntilReady, 500);
  }
  rest("Ready", INVITATION);
}

function idea(words) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: words });
  button.onclick = () => { $("prompt").value = words; grow(); send(); };
  return button;
}

function openDoor() {
  $("door-complaint").textContent = "That key is not right.";
  $("door-complaint").hidden = key === null;
  if (!$("door").open) $("door").showModal();
}
$("door").oncancel = (event) => event.preventDefault();
$("door").onkeydown = (event) => { if (event.key === "Escape") event.preventDefault(); }; // a second one has no cancel
$("door-form").onsubmit = () => {
  key = $("key").value;
  sessionStorage.setItem("longtake-key", key);
  $("key").value = "";
  setTimeout(arrive);
};

// A stream

async function start(from = null) {
  if (!model || $("begin").disabled) return;
  const prompt = from ? from.words : words();
  if (!watching && (!prompt || !$("seed").checkValidity())) return complain(prompt ? "A seed is a whole number of at most 15 digits." : "Say what is to be seen.");
  complain("");
  show("wait", "Starting");
  busy(true);
  let query = "";
  try {
    if (key) query = `?token=${(await ask("v1/realtime/token", { method: "POST" })).token}`;
  } catch (error) {
    if (error instanceof NoKey) openDoor();
    else complain("The server does not answer.");
    return rest("Ready", INVITATION);
  }
  const address = new URL(`v1/realtime/video${query}`, location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(address);
  socket.binaryType = "arraybuffer";
  const own = (stream = { socket, seed: null, prompts: [], asked: new Map(), shown: 0, made: 0, error: "", forked: !!from, rewound: false, words: prompt });
  const watch = { type: "session.watch", session: watching };
  const beginning = from ? { resume_from: from.id } : { prompt, seed: Number($("seed").value) };
  const message = { type: "session.start", model: model.id, num_frames: null, ...beginning };
  socket.onopen = () => socket.send(JSON.stringify(watching ? watch : message));
  socket.onmessage = ({ data }) => stream === own && hear(data);
  socket.onclose = ({ code }) => {
    if (stream !== own) return;
    if (code !== 1000 && !own.error) complain((own.error = "The connection to the server was lost."));
    ended();
  };
}

let about = null; // the description of the bytes that follow it
let silence = 0; // looks at the page since the server was heard; it tells its owner numbers every second
const LONG = 25; // of these, 5 seconds

function hear(data) {
  if (silence >= LONG) mood();
  silence = 0;
  if (typeof data !== "string") return take(data);
  const message = JSON.parse(data);
  if (message.type === "video.start") {
    stream.seed = message.config.seed;
    stream.id = message.request_id;
    stream.words = message.config.prompt;
    stream.prompts.push({ at: 0, prompt: stream.words, how: "" });
    if (!watching) timeline.begin(stream.words);
    player.begin(message.mime, complain);
    $("cover").hidden = true;
    $("send").textContent = "Change";
    mood();
    busy(false);
  } else if (message.type === "video.chunk_metadata") about = message;
  else if (/^session\.(interaction|rewind|seek|reset)\.queued$/.test(message.type)) queued(message);
  else if (message.type === "session.snapshot.done") snapped(message);
  else if (message.type === "session.record.started") recording(message.id);
  else if (message.type === "session.record.done") recorded(message);
  else if (message.type === "session.paused" || message.type === "session.resumed") paused(message.type === "session.paused");
  else if (message.type === "stats") numbers(message);
  else if (message.type === "error") {
    const change = stream.asked.get(message.event_id);
    if (change) timeline.forget(message.event_id);
    else stream.error = message.message;
    stream.asked.delete(message.event_id);
    complain(sentence(message.message));
  }
}

function take(bytes) {
  const at = stream.shown / model.fps;
  if (watching) follow(at);
  stream.words = about.prompt;
  for (const id of about.started_event_ids) {
    const change = stream.asked.get(id);
    if (!change) continue;
    timeline.activate(id, at, change.how === "back" ? `↩ ${about.prompt}` : about.prompt);
    player.whenAt(at, () => ($("n-change").textContent = seconds((performance.now() - change.time) / 1000)));
    stream.asked.delete(id);
  }
  stream.error = ""; // what was refused did not end the stream
  stream.shown += about.num_frames;
  stream.made = about.start_seconds + about.num_frames / model.fps;
  player.feed(bytes);
}

// What the owner of the stream has it show.
function follow(at) {
  if (!stream.shown) return timeline.begin(about.prompt);
  if (about.prompt === stream.words) return;
  timeline.ask(at, about.prompt);
  timeline.activate(at, at, about.prompt);
}

function send() {
  if (!model || $("send").disabled) return;
  if (!stream) return start();
  const prompt = words();
  if (!prompt) return complain("Say what is to be seen.");
  complain("");
  const how = document.querySelector("[name=change]:checked").value;
  const id = change(how, prompt);
  tell({ type: "session.interaction", interaction: { event_id: id, event: { prompt }, ...HOW[how] } });
}
const HOW = { "": {}, blend: { transition_chunks: 4, method: "slerp" }, cut: { method: "cut" } };

function change(how, prompt) {
  const id = `e${performance.now().toFixed(0)}-${stream.asked.size}`;
  stream.asked.set(id, { prompt, how, time: performance.now() });
  timeline.ask(id, how === "back" ? `↩ ${prompt}` : prompt);
  return id;
}
function queued({ event_id: id, start_seconds: at }) {
  const { prompt, how } = stream.asked.get(id);
  if (how === "back") stream.rewound = true;
  else stream.prompts.push({ at, prompt, how });
  timeline.accept(id);
}
function tell(message) {
  if (stream?.socket.readyState === WebSocket.OPEN) stream.socket.send(JSON.stringify(message));
}

function paused(is) {
  if (is) video.pause(); else player.play();
  player.paused = is;
  pauses(!is);
  mood();
}
function pauses(does) {
  $("pause").classList.toggle("paused", !does);
  $("pause").lastElementChild.textContent = does ? "Pause" : "Go on";
}
function mood() { show(player.paused ? "wait" : "live", player.paused ? "Paused" : "Live"); }
function togglePause() {
  if (stream && !watching && !$("pause").disabled) tell({ type: player.paused ? "session.resume" : "session.pause" });
}

// What is kept

function snapshot() {
  if (stream && !watching && !$("snapshot").disabled) tell({ type: "session.snapshot" });
}
function snapped({ id, start_seconds: made }) {
  const at = stream.shown / model.fps + Math.max(0, made - stream.made); // if nothing of what is to come is dropped
  stream.snapped = made;
  busy(false);
  timeline.snapshot(at);
  kept.add({ kind: "snapshot", id, at, words: stream.words, seed: stream.seed, picture: thumbnail() });
  say("Snapshot taken");
}
function rewind(item) {
  if (!stream) return;
  tell({ type: "session.rewind", snapshot: item.id, event_id: change("back", item.words) });
}
function back() {
  if (!$("back").disabled) tell({ type: "session.seek", seconds: stream.snapped, event_id: change("back", "") });
}
function reset() {
  if (!watching && !$("reset").disabled) tell({ type: "session.reset", event_id: change("back", stream.words) });
}
function fork(item) {
  if (!stream) return start(item);
  next = item;
  tell({ type: "session.stop" });
}

let rolling = null; // the recording that goes on: { from: pictures shown before it }

function toggleRecording() {
  if (stream && !watching && !$("record").disabled) tell({ type: rolling ? "session.record.stop" : "session.record" });
}
function recording(id) {
  rolling = { from: stream.shown };
  kept.begin({ kind: "recording", id, at: 0, words: stream.words, seed: stream.seed, picture: thumbnail() });
  showRecording();
}
function recorded({ id, seconds: length, full }) {
  kept.finish(id ? length : null);
  rolling = null;
  showRecording();
  if (full) complain("The recording ended: there is no more room for it on the server.");
  else say(id ? "The recording is kept" : "Nothing was recorded");
}
function showRecording() {
  $("recording").hidden = !rolling;
  $("record").setAttribute("aria-pressed", String(!!rolling));
  $("record").lastElementChild.textContent = rolling ? "End recording" : "Record";
}

async function download(item, name) {
  try {
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const answer = await fetch(`v1/recordings/${item.id}/${name}`, { headers });
    if (!answer.ok) throw new Error((await answer.json()).detail);
    const address = URL.createObjectURL(await answer.blob());
    const file = name === "run.json" ? name : `longtake-${item.seed}-${item.id.slice(0, 6)}.mp4`;
    Object.assign(document.createElement("a"), { href: address, download: file }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
  } catch (error) {
    complain(`It cannot be fetched: ${error.message}.`);
  }
}

// What is on the screen, small.
function thumbnail() {
  if (!video.videoWidth) return null;
  const canvas = Object.assign(document.createElement("canvas"), { width: 120, height: Math.round((120 * video.videoHeight) / video.videoWidth) });
  canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.7);
}

function ended() {
  const why = stream.error;
  if (rolling) kept.cutOff((stream.shown - rolling.from) / model.fps);
  const ran = stream.prompts.length > 0;
  timeline.forgetWaiting();
  draw();
  if (ran) last = stream;
  stream = rolling = null;
  showRecording();
  player.end();
  const again = watching ? "It is over." : "The take is over. Start another?";
  rest(why && ran ? "Stopped" : "Ready", ran ? again : INVITATION);
  const from = next;
  next = null;
  if (from && !why) start(from);
}

// What is shown

let last = null; // the stream that was seen last, for the command line

function words() { return $("prompt").value.trim(); }
function seconds(value) { return `${value.toFixed(value < 10 ? 2 : 1)} s`; }
function sentence(text) { return text.charAt(0).toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : "."); }
function show(mood, text) { $("dot").className = `dot ${mood}`; $("state").textContent = text; }
function cover(text) { $("cover").hidden = false; $("cover-text").textContent = text; }
function say(text) { $("news").textContent = text; }
function complain(text) { $("complaint").textContent = text; $("complaint").hidden = !text; }
function busy(waiting) {
  $("begin").disabled = $("send").disabled = waiting;
  for (const name of ["pause", "stop", "snapshot", "reset", "record", "share"]) $(name).disabled = waiting || !stream;
  $("back").disabled = waiting || stream?.snapped === undefined;
  kept.allow(!waiting && !!stream, !waiting);
}
function rest(text, invitation) {
  show(text === "Stopped" ? "bad" : "", text);
  cover(invitation);
  $("send").textContent = "Start";
  pauses(true);
  busy(false);
}
function numbers(told) {
  $("n-first").textContent = seconds(told.ttfc_seconds);
  $("n-speed").textContent = told.realtime_factor ? `${told.realtime_factor.toFixed(1)}×` : "–";
  $("n-chunk").textContent = `${Math.round(told.chunk_p95_seconds * 1000)} / ${Math.round(told.chunk_budget_seconds * 1000)} ms`;
  $("n-buffer").textContent = seconds(player.buffered());
  $("n-waits").textContent = told.underruns ? `${told.underruns}, ${seconds(told.underrun_seconds)}` : "none";
}

$("copy").onclick = async () => {
  const shown = stream?.prompts.length ? stream : last;
  const made = shown ?? { seed: $("seed").value, made: 0, prompts: [{ at: 0, prompt: words(), how: "" }] };
  const why = hindrance(made);
  if (why) return copySays(`Not in one command: ${why}. Any recording can be made again: longtake replay.`);
  const text = commandLine(model, made);
  const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  if (!done) window.prompt("The command line", text);
  copySays("Copied. On the same kind of device it makes the same blocks.");
};
function copySays(text) {
  $("copy-says").textContent = text;
  $("copy-says").hidden = false;
}

$("share").onclick = async () => {
  const address = new URL(`?watch=${stream.id}`, location.href).href;
  const done = await navigator.clipboard?.writeText(address).then(() => true, () => false);
  if (!done) window.prompt("The link for viewers", address);
  $("share").textContent = "Copied";
  setTimeout(() => ($("share").textContent = "Copy link for viewers"), 2000);
};

// Hands

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}
$("prompt").oninput = grow;
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!event.repeat) send();
};
$("words").onsubmit = (event) => { event.preventDefault(); send(); };
$("begin").onclick = () => start();
$("pause").onclick = togglePause;
$("snapshot").onclick = snapshot;
$("back").onclick = back;
$("reset").onclick = reset;
$("record").onclick = toggleRecording;
$("stop").onclick = () => {
  const { socket } = stream;
  tell({ type: "session.stop" });
  if (silence >= LONG) socket.onclose({ code: 1006 }), socket.close(); // nobody will answer
};
$("dice").onclick = () => ($("seed").value = Math.floor(Math.random() * 1e6));
document.addEventListener("keydown", (event) => {
  const { target, repeat, ctrlKey, metaKey, altKey } = event;
  if (repeat || ctrlKey || metaKey || altKey || target.closest?.("textarea, input:not([type=radio]), dialog")) return;
  const key = event.key.toLowerCase(); // with Caps Lock, too
  if ((key === " " || (key === "enter" && !stream)) && !target.closest?.("button, input, a")) { // which they press
    event.preventDefault();
    stream ? togglePause() : start();
  }
  if (key === "s") snapshot();
  if (key === "b") back();
  if (key === "0") reset();
  if (key === "r") toggleRecording();
  if (key === "/") { event.preventDefault(); $("prompt").focus(); $("prompt").select(); }
});
setInterval(() => tell({ type: "session.ping" }), 20000);
setInterval(draw, 200);
function draw() {
  if (stream?.prompts.length && ++silence === LONG) show("wait", "Waiting for the server");
  if (!stream?.shown) return;
  const words = timeline.draw(player.now(), stream.shown / model.fps);
  if (words) say(`On the screen: ${words}`);
  if (words && watching) Object.assign($("caption"), { textContent: words, hidden: false });
  if (rolling) $("recorded").textContent = clock((stream.shown - rolling.from) / model.fps);
}
window.addEventListener("load", grow);
document.body.classList.toggle("watching", !!watching);
arrive();
