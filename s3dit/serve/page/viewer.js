// One picture large, with what made it; and two pictures over each other, with what differs between them.

import {$, h} from "./dom.js";
import * as gallery from "./gallery.js";
import {label, usual} from "./fields.js";

// Shown in this order where the metadata has them, before the rest.
const FIRST = ["seed", "num_inference_steps", "guidance_scale", "negative_prompt", "solver", "schedule", "shift", "strength"];
// Said elsewhere, or of the machine and not of the picture.
const REST = ["prompt", "width", "height", "engine"];
let shown = null, actions = {};

const text = value => typeof value === "string" ? value : JSON.stringify(value, (_, each) => typeof each === "bigint" ? String(each) : each, 1);
const name = entry => `s3dit-${entry.settings.seed}-${entry.id.split("-")[0]}.${entry.file.type.split("/")[1].replace("jpeg", "jpg")}`;

// Facts of an entry by name: its size, how long it took, its metadata; settings stand for metadata that are not there.
function facts(entry) {
  const data = entry.metadata ?? entry.settings, names = [...FIRST.filter(each => each in data), ...Object.keys(data).filter(each => !FIRST.includes(each))];
  return new Map([["Size", `${entry.width} × ${entry.height}`],
    ...names.filter(each => !REST.includes(each) && !usual(each, data[each]) && data[each] != null && data[each] !== "").map(each => [label(each), text(data[each])])]);
}

// wanted: {use(entry), start(entry), reference(entry) or null}, which the buttons of the viewer do.
export function listen(wanted) {
  actions = wanted;
  $("view-reference").hidden = !wanted.reference;
}

export function view(entry) {
  shown = entry;
  $("photo").classList.remove("whole");
  $("photo").replaceChildren(h("img", {src: gallery.url(entry), alt: entry.settings.prompt, width: entry.width, height: entry.height}));
  $("view-prompt").textContent = entry.metadata?.prompt ?? entry.settings.prompt;
  const made = new Date(entry.created).toLocaleString();
  $("view-facts").replaceChildren(...[...facts(entry), ["Drawn", `${made}, in ${entry.seconds.toFixed(1)} s`], ...entry.notes.map(note => ["Note", note])].flatMap(([term, value]) => [h("dt", {}, term), h("dd", {}, value)]));
  $("view-all").textContent = entry.metadata ? text(entry.metadata) : "The file carries none.";
  $("view-save").href = gallery.url(entry);
  $("view-save").download = name(entry);
  $("view-previous").disabled = !gallery.beside(entry, -1);
  $("view-next").disabled = !gallery.beside(entry, 1);
  if (!$("viewer").open) $("viewer").showModal();
}

function step(by) {
  const other = gallery.beside(shown, by);
  if (other) view(other);
}

const close = () => $("viewer").close();
const acting = name => () => { close(); actions[name](shown); };
$("view-use").addEventListener("click", acting("use"));
$("view-start").addEventListener("click", acting("start"));
$("view-reference").addEventListener("click", acting("reference"));
$("view-close").addEventListener("click", close);
$("view-previous").addEventListener("click", () => step(-1));
$("view-next").addEventListener("click", () => step(1));
$("view-delete").addEventListener("click", async () => {
  const other = gallery.beside(shown, 1) ?? gallery.beside(shown, -1), gone = shown;
  if (other) view(other);
  else close();
  await gallery.drop([gone]);
});
$("photo").addEventListener("click", () => $("photo").classList.toggle("whole"));
$("photo").addEventListener("keydown", event => event.key === "Enter" && $("photo").classList.toggle("whole"));
$("viewer").addEventListener("keydown", event => {
  if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "ArrowRight") step(1);
  else if (event.key === "Delete") $("view-delete").click();
});
// The focus goes back to where it came from, in the gallery to the picture that was looked at last.
$("viewer").addEventListener("close", () => { if ($("tiles").contains(document.activeElement)) gallery.focus(shown); });

export function compare(left, right) {
  const images = [left, right].map(entry => h("img", {src: gallery.url(entry), alt: entry.settings.prompt}));
  $("pair").replaceChildren(...images, h("div", {className: "divide"}));
  $("pair").style.aspectRatio = `${left.width} / ${left.height}`;
  $("pair").style.setProperty("--ratio", left.width / left.height);
  const [one, other] = [facts(left), facts(right)];
  one.set("Prompt", left.settings.prompt);
  other.set("Prompt", right.settings.prompt);
  const different = [...new Set([...one.keys(), ...other.keys()])].filter(each => one.get(each) !== other.get(each));
  const rows = different.map(each => h("tr", {}, h("th", {scope: "row"}, each), h("td", {}, one.get(each) ?? "–"), h("td", {}, other.get(each) ?? "–")));
  $("differences").replaceChildren(...(rows.length ? rows : [h("tr", {}, h("td", {colSpan: 3}, "All settings are the same."))]));
  divide(50);
  $("comparer").showModal();
}

function divide(percent) {
  $("split").value = percent;
  $("pair").style.setProperty("--split", `${percent}%`);
}

$("split").addEventListener("input", () => divide($("split").value));
for (const kind of ["pointerdown", "pointermove"]) $("pair").addEventListener(kind, event => {
  if (kind === "pointermove" && !event.buttons) return;
  if (kind === "pointerdown") $("pair").setPointerCapture(event.pointerId);
  const box = $("pair").getBoundingClientRect();
  divide(Math.round(100 * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width))));
});
$("compare-close").addEventListener("click", () => $("comparer").close());
