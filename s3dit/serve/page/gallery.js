// The gallery: pictures in the order in which they were drawn, kept by the browser up to a bound.

import {$, h, toast} from "./dom.js";

const MOST = 300, MOST_BYTES = 512 * 2 ** 20;
const marked = new Set();
const entries = [], tiles = new Map();
let database = null, open = () => {}, compare = () => {}, current = null;

const promised = request => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
const store = mode => database.transaction("pictures", mode).objectStore("pictures");

async function connect() {
  const request = indexedDB.open("s3dit", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("pictures", {keyPath: "id"});
  return promised(request);
}

// Shows what the browser kept. opens(entry) shows one large, compares(entry, entry) two.
export async function start(opens, compares) {
  [open, compare] = [opens, compares];
  try {
    database = await connect();
    for (const entry of await promised(store("readonly").getAll())) place(entry);
  } catch {
    toast("This browser keeps no pictures here: the gallery is empty again when the page is closed. Download what you want to keep.");
  }
  count();
}

// entry: {id, created, file, metadata, settings, inputs, width, height, seconds, notes}; the newest comes first.
export async function add(entry) {
  place(entry);
  count();
  await keep(entry);
  let bytes = 0;
  const old = entries.filter((each, i) => (bytes += each.file.size) > MOST_BYTES || i >= MOST);
  if (old.length) {
    for (const each of old) await remove(each);
    toast(`The gallery is full; the oldest ${old.length === 1 ? "picture is" : `${old.length} pictures are`} gone.`);
  }
}

async function keep(entry) {
  if (!database) return;
  try {
    await promised(store("readwrite").put(entry));
  } catch (error) {
    toast(`The browser has no room to keep this picture (${error.name}); download it, or delete others.`);
  }
}

function place(entry) {
  const says = `${entry.settings.prompt}, ${entry.width} × ${entry.height}, seed ${entry.settings.seed}`;
  const image = h("img", {src: URL.createObjectURL(entry.file), alt: "", loading: "lazy", decoding: "async"});
  const button = h("button", {type: "button", className: "tile", title: entry.settings.prompt, "aria-label": says, tabIndex: -1,
    onclick: () => open(entry), onfocus: () => rove(entry)}, image);
  const tick = h("input", {type: "checkbox", tabIndex: -1, "aria-label": `mark ${says}`, onchange: () => mark(entry, tick.checked)});
  const tile = h("div", {className: "place"}, button, h("label", {className: "mark"}, tick));
  const at = entries.findIndex(each => each.created < entry.created);
  entries.splice(at < 0 ? entries.length : at, 0, entry);
  $("tiles").insertBefore(tile, at < 0 ? null : $("tiles").children[at]);
  tiles.set(entry, {tile, button, tick, image});
  if (entries[0] === entry) rove(entry);
}

// One tile is in the tab order; arrow keys move to others.
function rove(entry) {
  if (tiles.get(current)) tiles.get(current).button.tabIndex = -1;
  current = entry;
  if (entry) tiles.get(entry).button.tabIndex = 0;
}

export const url = entry => tiles.get(entry)?.image.src;
export const beside = (entry, by) => entries[entries.indexOf(entry) + by];
export const focus = entry => tiles.get(entry)?.button.focus();

async function remove(entry) {
  const at = entries.indexOf(entry), {tile, image} = tiles.get(entry);
  mark(entry, false);
  entries.splice(at, 1);
  tile.remove();
  URL.revokeObjectURL(image.src);
  tiles.delete(entry);
  if (current === entry) rove(entries[Math.min(at, entries.length - 1)] ?? null);
  count();
  if (database) await promised(store("readwrite").delete(entry.id)).catch(() => {});
}

// Deletes pictures, which can be taken back while the page says so.
export async function drop(gone) {
  for (const entry of gone) await remove(entry);
  if (current) focus(current);
  toast(gone.length === 1 ? "The picture is deleted." : `${gone.length} pictures are deleted.`, ["Undo", async () => {
    for (const entry of gone) { place(entry); await keep(entry); }
    count();
  }]);
}

function mark(entry, on) {
  marked[on ? "add" : "delete"](entry);
  const {tile, tick} = tiles.get(entry);
  tick.checked = on;
  tile.classList.toggle("is-marked", on);
  $("marked").hidden = !marked.size;
  $("compare").disabled = marked.size !== 2;
  $("compare").title = marked.size === 2 ? "" : "mark two pictures";
}

function count() {
  const bytes = entries.reduce((sum, entry) => sum + entry.file.size, 0);
  const size = bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
  $("gallery").hidden = !entries.length;
  $("gallery-says").textContent = `${entries.length} ${entries.length === 1 ? "picture" : "pictures"}, ${size}`;
}

$("compare").addEventListener("click", () => compare(...[...marked].sort((a, b) => a.created - b.created)));
$("delete-marked").addEventListener("click", () => drop([...marked]));
$("unmark").addEventListener("click", () => { for (const entry of [...marked]) mark(entry, false); if (current) focus(current); });
$("tiles").addEventListener("keydown", event => {
  if (!current || event.ctrlKey || event.metaKey || event.altKey) return;
  const columns = getComputedStyle($("tiles")).gridTemplateColumns.split(" ").length;
  const by = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[event.key];
  if (by && beside(current, by)) focus(beside(current, by));
  else if (event.key === "Home") focus(entries[0]);
  else if (event.key === "End") focus(entries.at(-1));
  else if (event.key === "Delete") drop([current]);
  else if (event.key.toLowerCase() === "x") mark(current, !marked.has(current));
  else if (!by) return;
  event.preventDefault();
});
