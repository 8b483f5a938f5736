// The page: asks what is served, opens one socket for each stream, feeds its fragments to the video, draws the rest.
import { Player } from "./player.js";
import { Timeline } from "./timeline.js";

const $ = (id) => document.getElementById(id);
const video = $("video");
const player = new Player(video);
const timeline = new Timeline($("timeline"), $("track"), { from: $("from"), now: $("now"), to: $("to") });

let model = null; // what /v1/models tells
let key = sessionStorage.getItem("longtake-key");
let stream = null;
// { socket, seed, prompts: [{at, prompt, cut}], asked: Map(id -> {prompt, cut, time}), shown: pictures, made: seconds }
// Seconds of prompts are those of all that was made, dropped pictures included, so that a command line can repeat them.

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
  $("licence").textContent = `licence ${model.license}`;
  $("recipe").textContent = model.recipe;
  $("size").textContent = `${model.width} × ${model.height}, ${model.fps} a second`;
  $("screen").style.setProperty("--shape", `${model.width} / ${model.height}`);
  $("prompt").maxLength = model.longest_prompt;
  if (!$("prompt").value) $("prompt").value = model.examples[0];
  $("ideas").replaceChildren(...model.examples.map(idea));
  waitUntilReady();
}

async function waitUntilReady() {
  const answer = await fetch("readyz").catch(() => null);
  if (!answer?.ok) {
    show("wait", "Warming up");
    return setTimeout(waitUntilReady, 500);
  }
  rest("Ready", "Press start, or Enter");
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
$("door-form").onsubmit = () => {
  key = $("key").value;
  sessionStorage.setItem("longtake-key", key);
  $("key").value = "";
  setTimeout(arrive);
};

// A stream

async function start() {
  if (!model || $("begin").disabled) return;
  const prompt = words();
  if (!prompt || !$("seed").checkValidity()) return complain(prompt ? "A seed is a whole number." : "Say what is to be seen.");
  complain("");
  show("wait", "Starting");
  busy(true);
  let query = "";
  try {
    if (key) query = `?token=${(await ask("v1/realtime/token", { method: "POST" })).token}`;
  } catch (error) {
    if (error instanceof NoKey) openDoor();
    else complain("The server does not answer.");
    return rest("Ready", "Press start, or Enter");
  }
  const address = new URL(`v1/realtime/video${query}`, location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(address);
  socket.binaryType = "arraybuffer";
  const own = (stream = { socket, seed: null, prompts: [], asked: new Map(), shown: 0, made: 0, error: "" });
  const message = { type: "session.start", model: model.id, prompt, seed: Number($("seed").value), num_frames: null };
  socket.onopen = () => socket.send(JSON.stringify(message));
  socket.onmessage = ({ data }) => stream === own && hear(data, prompt);
  socket.onclose = ({ code }) => {
    if (stream !== own) return;
    if (code !== 1000 && !own.error) complain((own.error = "The connection to the server was lost."));
    ended();
  };
}

let about = null; // the description of the bytes that follow it

function hear(data, first) {
  if (typeof data !== "string") return take(data);
  const message = JSON.parse(data);
  if (message.type === "video.start") {
    stream.seed = message.config.seed;
    stream.prompts.push({ at: 0, prompt: first, cut: false });
    timeline.begin(first);
    player.begin(message.mime, complain);
    $("cover").hidden = true;
    $("send").textContent = "Change";
    show("live", "Live");
    busy(false);
  } else if (message.type === "video.chunk_metadata") about = message;
  else if (message.type === "session.interaction.queued") queued(message.event_id);
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
  for (const id of about.started_event_ids) {
    const change = stream.asked.get(id);
    if (!change) continue;
    if (stream.prompts.at(-1)?.at === about.start_seconds) stream.prompts.pop(); // overtaken, and never seen
    stream.prompts.push({ at: about.start_seconds, prompt: change.prompt, cut: change.cut });
    timeline.activate(id, at);
    player.whenAt(at, () => ($("n-change").textContent = seconds((performance.now() - change.time) / 1000)));
    stream.asked.delete(id);
  }
  stream.shown += about.num_frames;
  stream.made = about.start_seconds + about.num_frames / model.fps;
  player.feed(bytes);
}

function send() {
  if (!model || $("send").disabled) return;
  if (!stream) return start();
  const prompt = words();
  if (!prompt) return complain("Say what is to be seen.");
  complain("");
  const cut = document.querySelector("[name=change]:checked").value === "cut";
  const id = `e${performance.now().toFixed(0)}-${stream.asked.size}`;
  stream.asked.set(id, { prompt, cut, time: performance.now() });
  timeline.ask(id, prompt);
  tell({ type: "session.interaction", interaction: { event_id: id, event: { prompt }, ...(cut && { method: "cut" }) } });
}
function queued(id) { timeline.accept(id); }
function tell(message) {
  if (stream?.socket.readyState === WebSocket.OPEN) stream.socket.send(JSON.stringify(message));
}

function paused(is) {
  if (is) video.pause(); else player.play();
  player.paused = is;
  $("pause").textContent = is ? "Go on" : "Pause";
  show(is ? "wait" : "live", is ? "Paused" : "Live");
}
function togglePause() {
  if (stream && !$("pause").disabled) tell({ type: player.paused ? "session.resume" : "session.pause" });
}

function ended() {
  const why = stream.error;
  const ran = stream.prompts.length > 0;
  if (ran) last = stream;
  stream = null;
  player.end();
  rest(why && ran ? "Stopped" : "Ready", ran ? "The take is over. Start another?" : "Press start, or Enter");
}

// What is shown

let last = null; // the stream that was seen last, for the command line

function words() { return $("prompt").value.trim(); }
function seconds(value) { return `${value.toFixed(value < 10 ? 2 : 1)} s`; }
function sentence(text) { return text.charAt(0).toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : "."); }
function show(mood, text) { $("dot").className = `dot ${mood}`; $("state").textContent = text; }
function cover(text) { $("cover").hidden = false; $("cover-text").textContent = text; }
function complain(text) { $("complaint").textContent = text; $("complaint").hidden = !text; }
function busy(waiting) {
  $("begin").disabled = $("send").disabled = waiting;
  $("pause").disabled = $("stop").disabled = waiting || !stream;
}
function rest(text, invitation) {
  show(text === "Stopped" ? "bad" : "", text);
  cover(invitation);
  $("send").textContent = "Start";
  $("pause").textContent = "Pause";
  busy(false);
}
function numbers(told) {
  $("n-first").textContent = seconds(told.ttfc_seconds);
  $("n-speed").textContent = told.realtime_factor ? `${told.realtime_factor.toFixed(1)}×` : "–";
  $("n-chunk").textContent = `${Math.round(told.chunk_p95_seconds * 1000)} / ${Math.round(told.chunk_budget_seconds * 1000)} ms`;
  $("n-buffer").textContent = seconds(player.buffered());
  $("n-waits").textContent = told.underruns ? `${told.underruns}, ${seconds(told.underrun_seconds)}` : "none";
}

function down(value) { return Math.floor(value * 1e4) / 1e4; } // never past the block that it begins with

function commandLine() {
  const shown = stream?.prompts.length ? stream : last;
  const prompts = shown?.prompts ?? [{ at: 0, prompt: words() }];
  const text = prompts.map(({ at, prompt }, number) => (number ? `${down(at)}s: ${prompt}` : prompt)).join(" | ");
  const length = shown ? ` --seconds ${down(shown.made)}` : "";
  const quoted = `'${text.replaceAll("'", `'\\''`)}'`;
  return `longtake generate ${quoted} --model ${model.id} --recipe ${model.recipe} --seed ${shown?.seed ?? $("seed").value}${length}`;
}

$("copy").onclick = async () => {
  const text = commandLine();
  const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  if (!done) window.prompt("The command line", text);
  const cuts = (stream ?? last)?.prompts.some((one) => one.cut);
  $("copy").textContent = cuts ? "Copied; cuts became changes" : "Copied";
  setTimeout(() => ($("copy").textContent = "Copy as command line"), 2000);
};

// Hands

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}
$("prompt").oninput = grow;
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
};
$("words").onsubmit = (event) => { event.preventDefault(); send(); };
$("begin").onclick = start;
$("pause").onclick = togglePause;
$("stop").onclick = () => tell({ type: "session.stop" });
$("dice").onclick = () => ($("seed").value = Math.floor(Math.random() * 1e6));
document.addEventListener("keydown", (event) => {
  if (event.target.closest?.("input, textarea, button, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " ") { event.preventDefault(); stream ? togglePause() : start(); }
  if (event.key === "/") { event.preventDefault(); $("prompt").focus(); $("prompt").select(); }
});
setInterval(() => tell({ type: "session.ping" }), 20000);
setInterval(() => stream?.prompts.length && timeline.draw(video.currentTime, stream.shown / model.fps), 200);
window.addEventListener("load", grow);
arrive();
