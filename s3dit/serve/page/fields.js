// One control for each field of a request, made from the JSON schema that the server gives of it.
// A field that is left empty is not sent: the model's own value holds, which the control shows in gray.

import {h, slide} from "./dom.js";

const LABELS = {
  num_inference_steps: "Steps", guidance_scale: "Guidance", width: "Width", height: "Height", shift: "Shift",
  strength: "Strength", mask_blur: "Mask blur", mask_mode: "Mask mode", output_format: "File format",
  output_compression: "Compression", cfg_normalization: "CFG normalization", cfg_truncation: "CFG truncation",
  lora: "LoRA", adapters: "LoRAs",
};
// Where a slider is of use: from, to, step. The box beside it takes whatever the schema allows.
const SLIDERS = {
  num_inference_steps: [1, 50, 1], guidance_scale: [0, 10, 0.1], strength: [0.05, 1, 0.05], mask_blur: [0, 64, 1],
  output_compression: [0, 100, 1],
};

// What the metadata of every picture say where nobody asks for something else.
const USUAL = {
  cfg_normalization: false, cfg_truncation: 1, mask_mode: "inpaint", mask_blur: 0, composite: true, posterior: "mode",
  reference_positions: "released", base_weight: 0, convention: "own", max_sequence_length: 512, num_images_per_prompt: 1,
};
export const usual = (name, value) => USUAL[name] === value;

export const label = name => Object.hasOwn(LABELS, name) ? LABELS[name] : (name.charAt(0).toUpperCase() + name.slice(1)).replaceAll("_", " ");
const shown = value => value === true ? "yes" : value === false ? "no" : value ?? "";

// Of a schema with several forms, the one that a control can hold.
const simple = schema => (schema.anyOf ?? schema.oneOf ?? [schema]).find(one => "enum" in one ||
  ["integer", "number", "boolean", "string"].includes(one.type) || ["integer", "number"].includes(one.items?.type));

// -> {name, element, read, write, wrong, standard}, or null for what no simple control can hold, such as regions.
// standard: the value that holds where it is empty · helped: whether the schema's description stands below.
// read() -> the value, undefined where it is empty; wrong() -> what the browser says of it, "" where it can be sent.
export function field(name, schema, standard, helped = false) {
  const form = simple(schema);
  if (!form || "const" in form) return null;
  const number = ["integer", "number"].includes(form.type), words = form.enum ?? (form.type === "boolean" ? [true, false] : null);
  const list = form.type === "array";
  const id = `field-${name}`, help = schema.description ?? "";
  const input = words
    ? h("select", {id}, h("option", {value: ""}, standard == null ? "default" : `${shown(standard)} (default)`),
      ...words.filter(word => word !== standard).map(word => h("option", {value: JSON.stringify(word)}, shown(word))))
    : h("input", {id, type: number ? "number" : "text", placeholder: standard ?? "", autocomplete: "off"});
  if (number) {
    input.step = form.multipleOf ?? (form.type === "integer" ? 1 : "any");
    input.min = form.minimum ?? form.exclusiveMinimum ?? "";
    input.max = form.maximum ?? form.exclusiveMaximum ?? "";
  }
  if (list) input.pattern = "\\s*-?[0-9.]+(\\s*,\\s*-?[0-9.]+)*\\s*";
  const element = h("div", {className: "field", "data-field": name, title: helped ? "" : help},
    h("div", {className: "line"}, h("label", {htmlFor: id}, label(name)), input));
  const follow = number && name in SLIDERS ? slider(name, input) : () => {};
  if (follow.element) element.append(follow.element);
  if (helped) element.append(h("p", {className: "help"}, help));
  const changed = () => { follow(); element.dispatchEvent(new Event("set", {bubbles: true})); };
  input.addEventListener("input", changed);
  return {
    name, element, standard,
    // Another value than the model's holds where it is empty.
    suggest: value => { input.placeholder = value; follow(); },
    read: () => input.value === "" ? undefined : number ? Number(input.value) : words ? JSON.parse(input.value) :
      list ? input.value.split(",").map(Number) : input.value,
    wrong: () => input.checkValidity() ? "" : list ? "needed numbers with commas between them" : input.validationMessage,
    // Returns whether the control can hold the value; where not, it is empty.
    write(value) {
      const fits = value === undefined || typeof value !== "object" || (list && Array.isArray(value));
      const empty = !fits || value === undefined || (words && value === standard);
      const text = empty ? "" : words ? JSON.stringify(value) : String(value);
      input.value = text;
      changed();
      // A select takes no word that it does not have, a number box no text.
      return fits && input.value === text;
    },
  };
}

// A slider that moves with a number box; returns the function that moves it after the box.
function slider(name, input) {
  const [min, max, step] = SLIDERS[name];
  const range = h("input", {type: "range", min, max, step, tabIndex: -1, "aria-hidden": "true"});
  range.addEventListener("input", () => { input.value = range.value; input.dispatchEvent(new Event("input")); });
  const follow = () => slide(range, input.value || input.placeholder || min);
  follow();
  return Object.assign(follow, {element: range});
}

// Rows of LoRAs with a tick and a scale each; -> a field whose value is {name: scale} of what is not as it is by itself.
// loras: [{name, scale, on}], on those that the server draws with where it is asked for none.
export function loraField(loras) {
  const rows = loras.map(({name, scale, on = false}) => {
    const tick = h("input", {type: "checkbox"});
    const input = h("input", {type: "number", step: "any", min: -10, max: 10, required: true, "aria-label": `scale of ${name}`});
    const range = h("input", {type: "range", min: -2, max: 2, step: 0.05, tabIndex: -1, "aria-hidden": "true"});
    const element = h("div", {className: "lora"},
      h("div", {className: "line"}, h("label", {className: "tick"}, tick, h("span", {}, name)), input), range);
    const changed = () => element.dispatchEvent(new Event("set", {bubbles: true}));
    const move = value => { slide(range, value); tick.checked = true; changed(); };
    tick.addEventListener("change", changed);
    range.addEventListener("input", () => { input.value = range.value; move(range.value); });
    input.addEventListener("input", () => move(input.value));
    return {
      name, element, standard: on ? scale : 0,
      read: () => tick.checked ? Number(input.value) : 0,
      wrong: () => tick.checked ? input.validationMessage : "",
      write(value) {
        tick.checked = value !== 0;
        slide(range, input.value = value || scale);
        changed();
      },
    };
  });
  return {
    name: "lora", elements: rows.map(row => row.element),
    resting: Object.fromEntries(rows.filter(row => row.standard !== 0).map(row => [row.name, 0])),
    read() {
      const own = rows.filter(row => row.read() !== row.standard).map(row => [row.name, row.read()]);
      return own.length ? Object.fromEntries(own) : undefined;
    },
    wrong: () => rows.map(row => row.wrong()).find(Boolean) ?? "",
    count: () => rows.filter(row => row.read() !== 0).length,
    // Returns whether this server has all that are asked for.
    write(value = {}) {
      for (const row of rows) row.write(Object.hasOwn(value, row.name) ? value[row.name] : row.standard);
      return Object.keys(value).every(name => rows.some(row => row.name === name && row.read() === value[name]));
    },
  };
}
