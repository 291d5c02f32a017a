// Painting a mask over a picture, by pointer or keys; white is drawn anew, black is kept.

import {$, slide} from "./dom.js";

// Pixels along the longer side of the canvas that is painted on; the mask is then scaled to the picture's own size.
const LARGEST = 2048;
const canvas = $("mask"), context = canvas.getContext("2d"), ring = $("ring");
let base = null, deeds = [], erasing = false, stroke = null, at = {x: 0, y: 0}, settle = () => {};

// Opens the painter; take(mask) gets a PNG of the picture's size, null where nothing is painted, before it closes.
export async function paint(image, mask, take) {
  const bitmap = await createImageBitmap(image), scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
  for (const each of [canvas, $("under")])
    [each.width, each.height] = [bitmap.width, bitmap.height].map(length => Math.max(1, Math.round(length * scale)));
  $("under").getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  $("paper").style.setProperty("--ratio", `${bitmap.width} / ${bitmap.height}`);
  $("paper").style.setProperty("--wide", bitmap.width / bitmap.height);
  base = mask && await loaded(mask);
  [deeds, stroke, at] = [[], null, {x: canvas.width / 2, y: canvas.height / 2}];
  choose(false);
  slide($("brush"), $("brush").value);
  redraw();
  $("painter").showModal();
  canvas.focus();
  place();
  if (await new Promise(resolve => { settle = resolve; })) await take(await saved(bitmap.width, bitmap.height));
  $("painter").close();
}

// White of a mask as opaque pixels, the form in which it is painted.
async function loaded(mask) {
  const layer = new OffscreenCanvas(canvas.width, canvas.height), over = layer.getContext("2d");
  over.drawImage(await createImageBitmap(mask), 0, 0, canvas.width, canvas.height);
  const pixels = over.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i];
  over.putImageData(pixels, 0, 0);
  return layer;
}

async function saved(width, height) {
  if (!context.getImageData(0, 0, canvas.width, canvas.height).data.some((value, i) => i % 4 === 3 && value > 127)) return null;
  const out = new OffscreenCanvas(width, height), over = out.getContext("2d");
  context.globalCompositeOperation = "source-in";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  over.fillRect(0, 0, width, height);
  over.drawImage(canvas, 0, 0, width, height);
  return out.convertToBlob({type: "image/png"});
}

// One deed: a stroke {erase, width, points}, or "invert", or "clear"; undo draws all but the last again.
function carry(deed) {
  const {width, height} = canvas;
  context.globalCompositeOperation = deed === "invert" ? "xor" : deed.erase ? "destination-out" : "source-over";
  context.fillStyle = context.strokeStyle = getComputedStyle(canvas).color;
  if (deed === "clear") return context.clearRect(0, 0, width, height);
  if (deed === "invert") return context.fillRect(0, 0, width, height);
  [context.lineCap, context.lineJoin, context.lineWidth] = ["round", "round", deed.width];
  context.beginPath();
  for (const {x, y} of deed.points) context.lineTo(x, y);
  // A line of no length is not drawn, not even its round ends.
  context.lineTo(deed.points.at(-1).x + 0.01, deed.points.at(-1).y);
  context.stroke();
}

function redraw() {
  context.globalCompositeOperation = "source-over";
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (base) {
    context.drawImage(base, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = getComputedStyle(canvas).color;
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
  deeds.forEach(carry);
  $("tool-undo").disabled = !deeds.length;
}

function act(deed) {
  deeds.push(deed);
  redraw();
}

function undo() {
  if (stroke) return;
  deeds.pop();
  redraw();
}

// The brush's width in pixels of the canvas: at most half of its shorter side.
const brush = () => Math.max(1, Math.min(canvas.width, canvas.height) * ($("brush").value / 200));

function begin(erase) {
  stroke = {erase, width: brush(), points: [{...at}]};
  deeds.push(stroke);
  redraw();
}

function go(point) {
  at = {x: Math.max(0, Math.min(canvas.width, point.x)), y: Math.max(0, Math.min(canvas.height, point.y))};
  if (stroke) {
    // Only the new piece is drawn: the mask is of one color, so pieces over each other are as one line.
    carry({...stroke, points: [stroke.points.at(-1), at]});
    stroke.points.push(at);
  }
  place();
}

const end = () => { stroke = null; };

// Puts the ring that shows the brush where the brush is.
function place() {
  const scale = canvas.clientWidth / canvas.width;
  for (const [name, value] of Object.entries({x: at.x * scale, y: at.y * scale, d: Math.max(6, brush() * scale)}))
    ring.style.setProperty(`--${name}`, `${value}px`);
}

function choose(eraser) {
  erasing = eraser;
  $("tool-brush").setAttribute("aria-pressed", !eraser);
  $("tool-eraser").setAttribute("aria-pressed", eraser);
  ring.classList.toggle("erasing", eraser);
}

const resized = to => { slide($("brush"), to); place(); };
const pointed = event => {
  const box = canvas.getBoundingClientRect();
  return {x: (event.clientX - box.left) * canvas.width / box.width, y: (event.clientY - box.top) * canvas.height / box.height};
};

canvas.addEventListener("pointerdown", event => {
  if (event.button !== 0 && event.button !== 5) return;
  canvas.setPointerCapture(event.pointerId);
  go(pointed(event));
  // Button 5 is the eraser of a pen.
  begin(erasing || event.button === 5);
});
canvas.addEventListener("pointermove", event => {
  const passed = event.getCoalescedEvents?.() ?? [];
  for (const each of passed.length ? passed : [event]) go(pointed(each));
});
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, end);

const MOVES = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
canvas.addEventListener("keydown", event => {
  const step = brush() * (event.shiftKey ? 1 : 0.25);
  if (event.key in MOVES) go({x: at.x + MOVES[event.key][0] * step, y: at.y + MOVES[event.key][1] * step});
  else if (event.key === " " && !event.repeat) begin(erasing);
  else if (event.key !== " ") return;
  event.preventDefault();
});
canvas.addEventListener("keyup", event => event.key === " " && end());
canvas.addEventListener("blur", end);

const KEYS = {
  b: () => choose(false), e: () => choose(true), i: () => act("invert"), "[": () => resized(Number($("brush").value) - 5), "]": () => resized(Number($("brush").value) + 5),
};
$("painter").addEventListener("keydown", event => {
  const key = event.key.toLowerCase();
  if ((event.ctrlKey || event.metaKey) && key === "z") undo();
  else if (event.ctrlKey || event.metaKey || event.altKey) return;
  else if (key in KEYS) KEYS[key]();
  else if (key === "enter" && event.target.tagName !== "BUTTON") settle(true);
  else return;
  event.preventDefault();
});
$("painter").addEventListener("cancel", event => { event.preventDefault(); settle(false); });
$("paint-done").addEventListener("click", () => settle(true));
$("paint-cancel").addEventListener("click", () => settle(false));
$("tool-brush").addEventListener("click", () => choose(false));
$("tool-eraser").addEventListener("click", () => choose(true));
$("tool-undo").addEventListener("click", undo);
$("tool-invert").addEventListener("click", () => act("invert"));
$("tool-clear").addEventListener("click", () => act("clear"));
$("brush").addEventListener("input", () => resized($("brush").value));
window.addEventListener("resize", () => $("painter").open && place());
