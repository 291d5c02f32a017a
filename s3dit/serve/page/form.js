// The form: what is asked for, under the names of a request's fields, and what is wrong with it.

import {$, h, toast} from "./dom.js";
import {field, label, loraField, usual} from "./fields.js";

const MAIN = ["num_inference_steps", "guidance_scale"];
const MORE = [
  "solver", "schedule", "shift", "sigmas", "preset", "convention", "target_timestep", "guidance_method",
  "guidance_interval", "cfg_normalization", "cfg_truncation", "skip_layers", "variation", "cache", "max_sequence_length",
  "upscale", "upscale_strength", "output_format", "output_compression",
];
const START = ["strength", "extend", "posterior"], MASK = ["mask_blur", "mask_mode", "composite"], REFERENCE = ["reference_area", "reference_positions"];
// What a message about one of these names is shown at.
const PLACES = {size: "size", mask: "image", mask_image: "image", true_cfg_scale: "guidance_scale", n: "count"};

const KEPT = "s3dit.settings";
const fields = new Map();
let sizes = [], multiple = 16;

// Text as a field: read, write and wrong as those of `field`.
function textField(name, element, wrong = () => "") {
  fields.set(name, {
    name, wrong, standard: undefined,
    read: () => element.value.trim() === "" ? undefined : element.value,
    write(value) {
      element.value = typeof value === "string" ? value : "";
      grow(element);
      return value === undefined || typeof value === "string";
    },
  });
}

// A text area is as high as its text.
function grow(area) {
  if (area.tagName !== "TEXTAREA") return;
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

// Makes the controls that this server's options ask for.
export function build(options) {
  const schemas = {...options.fields.generations, ...options.fields.edits};
  const [width, height] = (options.defaults.size ?? "1024x1024").split("x").map(Number);
  const standards = {...options.defaults, width, height};
  ({multiple = 16} = options.limits);
  const side = {type: "integer", minimum: multiple, maximum: options.limits.side, multipleOf: multiple};
  const add = (place, names, helped = false, given = schemas) => place.append(...names.filter(name => given[name]).flatMap(name => {
    const made = field(name, given[name], standards[name], helped);
    if (made) fields.set(name, made);
    return made ? [made.element] : [];
  }));
  textField("prompt", $("prompt"), () => $("prompt").value.trim() ? "" : "needed a prompt: what to draw");
  textField("negative_prompt", $("negative_prompt"));
  textField("count", $("count"), () => $("count").checkValidity() ? "" : $("count").validationMessage);
  textField("seed", $("seed"), () => $("seed").checkValidity() ? "" : "needed a whole number, or nothing for a random one");
  add($("sides"), ["width", "height"], false, {width: side, height: side});
  $("sides").insertBefore($("swap"), $("sides").lastChild);
  add($("main-fields"), MAIN);
  add($("more-fields"), MORE, true);
  for (const [id, names] of [["start-fields", START], ["mask-fields", MASK], ["reference-fields", REFERENCE]]) add($(id), names, true);
  const loras = loraField(options.loras);
  if (options.loras.length) fields.set("lora", loras);
  $("loras").append(...loras.elements);
  $("lora-group").hidden = !options.loras.length;
  $("reference-group").hidden = !options.references;
  sizes = options.sizes.map(size => size.split("x").map(Number));
  $("shapes").append(...sizes.map(([w, h]) => shape(w, h)));
  $("form").addEventListener("set", follow);
  $("form").addEventListener("input", event => {
    clear(event.target.closest("[data-field]")?.dataset.field);
    grow(event.target);
    follow();
  });
  $("form").addEventListener("change", keep);
  $("swap").addEventListener("click", () => resize(...now("height", "width")));
  $("seed-random").addEventListener("click", () => set("seed", undefined));
  $("reset").addEventListener("click", () => {
    const {prompt, negative_prompt} = read(), old = read();
    write({prompt, negative_prompt});
    toast("Everything but the prompt is the model's own again.", ["Undo", () => write(old)]);
  });
  $("form").hidden = false;
  write(kept());
}

// A button of a size, with its outline.
function shape(width, height) {
  const outline = h("span", {className: "outline"}), longest = Math.max(width, height);
  outline.style.width = `${16 * width / longest}px`;
  outline.style.height = `${16 * height / longest}px`;
  return h("button", {type: "button", "data-size": `${width}x${height}`, onclick: () => resize(width, height)},
    h("span", {className: "frame"}, outline), `${width}×${height}`);
}

// Values as they hold: what is given, else the model's own.
const now = (...names) => names.map(name => fields.get(name)?.read() ?? fields.get(name)?.standard);

export function resize(width, height) {
  for (const [name, value] of Object.entries({width, height})) {
    const one = fields.get(name);
    one.write(value === one.standard ? undefined : value);
    clear(name);
  }
  clear("size");
  keep();
}

// What an empty field stands for, where that depends on other things than the model.
export const suggest = (name, value) => fields.get(name)?.suggest(value);

export const size = () => now("width", "height");

// Shows what follows from the values: the pressed size, the negative prompt, how many settings are not the model's.
function follow() {
  const [width, height] = size(), [guidance] = now("guidance_scale");
  for (const button of $("shapes").children)
    button.setAttribute("aria-pressed", button.dataset.size === `${width}x${height}`);
  const guided = Number(guidance) > 0;
  $("negative").hidden = $("negative").disabled = !guided;
  if (guided) grow($("negative_prompt"));
  const given = names => names.filter(name => fields.get(name)?.read() !== undefined).length || "";
  $("more-badge").textContent = given(MORE);
  $("lora-badge").textContent = fields.get("lora")?.count() || "";
}

// A field in a group that is switched off, such as strength without a start image, is not part of what is asked for.
const off = one => one.element?.closest("fieldset:disabled") || (one.name === "negative_prompt" && $("negative").disabled);

// -> the settings that are given, by the request's names.
export function read() {
  const given = [...fields.values()].filter(one => !off(one)).map(one => [one.name, one.read()]);
  return Object.fromEntries(given.filter(([, value]) => value !== undefined));
}

// Changes one setting, the others stay.
export function set(name, value) {
  fields.get(name).write(value);
  clear(name);
  follow();
  keep();
}

// Brings settings into the form, and everything else back to the model's own; -> the names that found no place.
export function write(settings) {
  for (const one of fields.values()) one.write(undefined);
  const left = Object.entries(settings).filter(([name, value]) => value != null && !fields.get(name)?.write(value));
  clear();
  follow();
  keep();
  return left.map(([name]) => name);
}

// The LoRAs of a picture by its metadata, by the names that servers give them: those of their files.
export function lorasOf(metadata) {
  const given = Array.isArray(metadata?.adapters) ? metadata.adapters : [];
  const named = given.map(one => [String(one?.file).split(/[\\/]/).pop().replace(/\.safetensors$/, ""), one?.scale]);
  const lora = {...fields.get("lora")?.resting, ...Object.fromEntries(named)};
  return Object.keys(lora).length ? lora : undefined;
}

// The metadata of a picture as settings: what differs from what this model does by itself.
export function settingsOf(metadata) {
  const quiet = ["engine", "model", "image", "mask_image", "reference", "adapters"];
  const found = Object.fromEntries(Object.entries(metadata).flatMap(([name, value]) => {
    const known = fields.get(name);
    if (quiet.includes(name) || value == null || value === known?.standard || usual(name, value)) return [];
    return [[name, ["bigint", "number"].includes(typeof value) && name === "seed" ? String(value) : value]];
  }));
  return {...found, lora: lorasOf(metadata)};
}

// Settings outlive the page where the browser lets it keep something.
const keep = () => { try { localStorage.setItem(KEPT, JSON.stringify(read())); } catch { /* then they do not */ } };

function kept() {
  try {
    return Object(JSON.parse(localStorage.getItem(KEPT)));
  } catch {
    return {};
  }
}

// What is wrong before anything is sent: [name, message].
export const faults = () => [...fields.values()].filter(one => !off(one)).map(one => [one.name, one.wrong()]).filter(([, says]) => says);

// Shows a message at the field that it is about; -> whether there is such a field.
export function show(name, message) {
  const place = PLACES[name] ?? name?.split(/[.[]/)[0];
  const element = place && $("form").querySelector(`[data-field="${CSS.escape(place)}"]`);
  if (!element || element.closest("[hidden]")) return false;
  clear(place);
  const input = element.querySelector("textarea, select, input, button"), id = `wrong-${place}`;
  element.append(h("p", {id, className: "wrong"}, message));
  element.classList.add("bad");
  input?.setAttribute("aria-invalid", "true");
  input?.setAttribute("aria-describedby", id);
  element.closest("details")?.setAttribute("open", "");
  input?.focus({preventScroll: true});
  element.scrollIntoView({block: "nearest"});
  return true;
}

// Takes messages away, of one field or of all.
export function clear(name) {
  for (const element of $("form").querySelectorAll(name ? `[data-field="${CSS.escape(name)}"].bad` : ".bad")) {
    element.classList.remove("bad");
    element.querySelector(".wrong")?.remove();
    for (const input of element.querySelectorAll("[aria-invalid]")) {
      input.removeAttribute("aria-invalid");
      input.removeAttribute("aria-describedby");
    }
  }
}

export {label};
