// The page: asks the server what it draws, then brings form, pictures that are given, jobs and gallery together.

import {key, options, Refused} from "./api.js";
import {$, toast, typing} from "./dom.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as given from "./inputs.js";
import * as jobs from "./jobs.js";
import {metadataOf} from "./metadata.js";
import * as viewer from "./viewer.js";

let lastSeed = null;

// Seeds that the page draws by lot have 32 bits, as the program's own.
const randomSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);

function drawAll() {
  form.clear();
  const wrong = form.faults();
  // The last message shown has the focus, so the first fault comes last.
  if (wrong.length) return wrong.reverse().forEach(([name, message]) => form.show(name, message));
  const {count = 1, ...settings} = form.read(), [width, height] = form.size(), first = BigInt(settings.seed ?? randomSeed());
  jobs.tidy();
  for (let i = 0; i < Number(count); i++) {
    const job = {settings: {...settings, width, height, seed: String(first + BigInt(i))}, inputs: given.inputs(), width, height};
    jobs.add({...job, done: drawn => finished(job, drawn), failed});
  }
  const box = $("stage").getBoundingClientRect();
  if (box.top > innerHeight - 200 || box.bottom < 100) $("stage").scrollIntoView({block: "start"});
}

async function finished(job, drawn) {
  lastSeed = job.settings.seed;
  $("seed-keep").disabled = false;
  const metadata = await metadataOf(drawn.file), created = Date.now();
  const id = `${created}-${randomSeed()}`;
  const entry = {...job, ...drawn, id, created, metadata};
  await gallery.add(entry);
  return () => viewer.view(entry);
}

function failed(error) {
  if (error.status === 401) askKey("The server does not take this key.");
  else if (!form.show(error.param, error.message)) trouble(error.message);
  return error.status >= 400 && error.status < 500;
}

function trouble(text, again) {
  $("trouble").replaceChildren(text);
  const button = document.createElement("button");
  [button.type, button.textContent] = ["button", again ? "Try again" : "Close"];
  button.addEventListener("click", () => { $("trouble").hidden = true; again?.(); });
  $("trouble").append(button);
  $("trouble").hidden = false;
}

function askKey(wrong = "") {
  $("key-wrong").textContent = wrong;
  $("key-wrong").hidden = !wrong || !key.get();
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

// Brings a picture's settings and the pictures that it was drawn from back into the form.
async function use(entry) {
  // LoRAs that act by themselves may be others now than then: the metadata says which there were.
  const settings = entry.metadata ? {...entry.settings, lora: form.lorasOf(entry.metadata)} : entry.settings;
  const left = form.write(settings);
  await given.setInputs(entry.inputs);
  $("draw").focus();
  toast(left.length ? `Taken over, but for what this server does not draw with: ${left.map(form.label).join(", ")}.` :
    "Its settings and seed are in the form.");
}

// A picture that comes from outside may carry settings too.
async function arrived(file) {
  const metadata = await metadataOf(file);
  if (!metadata?.prompt) return;
  toast("This picture says what it was drawn with.", ["Use its settings", () => use({settings: form.settingsOf(metadata), inputs: {}})]);
}

let started = false;
async function begin() {
  let offered;
  try {
    offered = await options();
  } catch (error) {
    if (error instanceof Refused && error.status === 401) return askKey("The server does not take this key.");
    return trouble(error.message, begin);
  }
  if (started) return;
  started = true;
  $("ask-key").hidden = !key.get();
  $("model").textContent = offered.model;
  document.documentElement.dataset.variant = offered.variant;
  $("note").textContent = offered.note ?? "";
  $("note").hidden = !offered.note;
  $("example").textContent = `Try: ${offered.example}`;
  $("example").hidden = !offered.example;
  $("example").addEventListener("click", () => { form.set("prompt", offered.example); $("prompt").focus(); });
  given.listen(offered, arrived);
  form.build(offered);
  viewer.listen({use, start: entry => given.setImage(entry.file), reference: offered.references ? entry => given.addReferences([entry.file]) : null});
  await gallery.start(viewer.view, viewer.compare);
}

$("draw-key").textContent = /mac|iphone|ipad/i.test(navigator.platform) ? "⌘ ⏎" : "Ctrl ⏎";
$("form").addEventListener("submit", event => { event.preventDefault(); drawAll(); });
$("seed-keep").addEventListener("click", () => form.set("seed", lastSeed));
$("ask-key").addEventListener("click", () => askKey());
$("ask-keys").addEventListener("click", () => $("keys").showModal());
$("key-cancel").addEventListener("click", () => { $("key-dialog").close(); if (!started) trouble("This server asks for its API key.", () => askKey()); });
$("key-form").addEventListener("submit", () => { key.set($("key").value); begin(); });
document.addEventListener("keydown", event => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) drawAll();
  else if (event.key === "Escape" && jobs.cancelLast()) event.preventDefault();
  else if (typing(event) || event.ctrlKey || event.metaKey || event.altKey) return;
  else if (event.key === "/") $("prompt").focus();
  else if (event.key === "?") $("keys").showModal();
  else return;
  event.preventDefault();
});
window.addEventListener("beforeunload", event => jobs.busy() && event.preventDefault());
begin();
