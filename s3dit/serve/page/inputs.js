// Pictures that are given: the start image with its mask, and references.

import {usualStrength} from "./api.js";
import {$, dropped, h, toast} from "./dom.js";
import {resize, suggest} from "./form.js";
import {paint} from "./mask.js";

let image = null, mask = null, references = [], most = 0, limits = {};

// -> {image, mask_image, reference} as files, only those that are given.
export function inputs() {
  const given = {image, mask_image: image && mask, reference: references.length ? [...references] : null};
  return Object.fromEntries(Object.entries(given).filter(([, value]) => value));
}

export async function setInputs(given) {
  references = (given.reference ?? []).slice(0, most);
  showReferences();
  await setImage(given.image ?? null, given.mask_image ?? null, false);
}

// Takes a file as the start image; its size becomes the picture's unless `fit` is false.
export async function setImage(file, itsMask = null, fit = true) {
  const bitmap = file && await createImageBitmap(file).catch(() => null);
  if (file && !bitmap) return toast(`${file.name ?? "The picture"} cannot be read; needed a PNG, JPEG or WebP file.`);
  [image, mask] = [file, itsMask];
  if (bitmap && fit) resize(...fitted(bitmap.width, bitmap.height));
  await showImage(bitmap);
}

// A size as large as the picture where that may be drawn, in whole multiples.
function fitted(width, height) {
  const {multiple = 16, pixels = Infinity, side = Infinity} = limits;
  const factor = Math.min(1, Math.sqrt(pixels / (width * height)), side / Math.max(width, height));
  return [width, height].map(length => Math.max(multiple, Math.floor(length * factor / multiple) * multiple));
}

async function showImage(bitmap) {
  $("image-drop").hidden = !!image;
  $("image-shown").hidden = !image;
  $("start-fields").hidden = $("start-fields").disabled = !image;
  $("mask-fields").hidden = $("mask-fields").disabled = !(image && mask);
  $("mask-remove").hidden = !mask;
  $("paint").textContent = mask ? "Change the mask" : "Paint a mask";
  $("start-badge").textContent = image ? mask ? "with a mask" : "on" : "";
  suggest("strength", usualStrength(mask));
  $("form").dispatchEvent(new Event("set"));
  if (!image) return;
  $("start-group").open = true;
  const canvas = $("image-thumb"), scale = Math.min(1, 640 / Math.max(bitmap.width, bitmap.height));
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height].map(length => Math.max(1, Math.round(length * scale)));
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  if (mask) tint(context, await createImageBitmap(mask));
  const name = image.name ? `${image.name}, ` : "";
  $("image-says").textContent = `${name}${bitmap.width} × ${bitmap.height}`;
}

// Tints what is white in the mask.
function tint(context, bitmap) {
  const {width, height} = context.canvas, cover = new OffscreenCanvas(width, height), over = cover.getContext("2d");
  over.drawImage(bitmap, 0, 0, width, height);
  const pixels = over.getImageData(0, 0, width, height), color = [255, 64, 129];
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data[i + 3] = pixels.data[i] * 0.6;
    for (let c = 0; c < 3; c++) pixels.data[i + c] = color[c];
  }
  over.putImageData(pixels, 0, 0);
  context.drawImage(cover, 0, 0);
}

export function addReferences(files) {
  references = [...references, ...files];
  if (references.length > most) toast(`This model looks at ${most} pictures at most; the last ones are left out.`);
  references = references.slice(0, most);
  showReferences();
}

function showReferences() {
  for (const shown of $("references").querySelectorAll("img")) URL.revokeObjectURL(shown.src);
  $("references").replaceChildren(...references.map((file, i) => h("figure", {},
    h("img", {src: URL.createObjectURL(file), alt: `reference ${i + 1}`}),
    h("button", {type: "button", "aria-label": `remove reference ${i + 1}`, onclick: () => {
      references.splice(i, 1);
      showReferences();
    }}, "×"))));
  $("reference-badge").textContent = references.length || "";
  $("reference-fields").hidden = $("reference-fields").disabled = !references.length;
  if (references.length) $("reference-group").open = true;
}

// arrived(file): told of every start image that comes from outside.
export function listen(options, arrived) {
  [most, limits] = [options.references, options.limits];
  const chosen = (id, take) => $(id).addEventListener("change", () => { take([...$(id).files]); $(id).value = ""; });
  const start = async files => {
    const old = [image, mask];
    await setImage(files[0]);
    if (old[1] && image !== old[0]) toast("The mask was of the picture before and went with it.", ["Undo", () => setImage(...old, false)]);
    await arrived(files[0]);
  };
  chosen("image-file", start);
  chosen("reference-file", addReferences);
  dropped($("start-group"), start);
  dropped($("reference-group"), addReferences);
  dropped(document.body, start);
  document.addEventListener("paste", event => {
    const files = [...event.clipboardData.files].filter(file => file.type.startsWith("image/"));
    if (!files.length) return;
    event.preventDefault();
    start(files);
  });
  $("image-remove").addEventListener("click", async () => {
    const old = [image, mask];
    await setImage(null);
    $("image-file").focus();
    toast("The start image is removed.", ["Undo", () => setImage(...old, false)]);
  });
  $("mask-remove").addEventListener("click", async () => {
    await setImage(image, null, false);
    $("paint").focus();
  });
  $("paint").addEventListener("click", async () => {
    await paint(image, mask, painted => setImage(image, painted, false));
    $("paint").focus();
  });
}
