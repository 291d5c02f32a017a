// Elements of the page. Texts from outside only ever become text nodes, never markup.

export const $ = id => document.getElementById(id);

// An element with properties, attributes (aria-*, data-*, for, …), listeners (on…) and children.
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

let timer;
// Says something at the foot of the page, with buttons [label, action] to do something about it.
export function toast(text, ...buttons) {
  const actions = buttons.map(([label, action]) =>
    h("button", {type: "button", onclick: () => { $("toast").hidden = true; action(); }}, label));
  const hide = () => { $("toast").hidden = true; };
  const shut = h("button", {type: "button", className: "shut", "aria-label": "close this message", onclick: hide}, "×");
  $("toast").replaceChildren(h("span", {}, text), ...actions, shut);
  $("toast").hidden = false;
  clearTimeout(timer);
  timer = setTimeout(hide, buttons.length ? 12000 : 6000);
}

// Moves a slider, and the color of its track with it.
export function slide(range, value) {
  range.value = value;
  range.style.setProperty("--filled", `${100 * (range.value - range.min) / (range.max - range.min)}%`);
}

// Tells those who listen to the page instead of looking at it.
export const announce = text => { $("live").textContent = text; };

// Takes the files that are dropped on an element, with a mark on it while they hover.
export function dropped(element, take) {
  const files = event => event.dataTransfer.types.includes("Files");
  const mark = on => event => {
    if (!files(event)) return;
    event.preventDefault();
    element.classList.toggle("over", on);
  };
  element.addEventListener("dragover", mark(true));
  element.addEventListener("dragleave", mark(false));
  element.addEventListener("drop", event => {
    mark(false)(event);
    // Text that is dragged into a field is the field's.
    if (!files(event)) return;
    event.stopPropagation();
    const pictures = [...event.dataTransfer.files].filter(file => file.type.startsWith("image/"));
    if (pictures.length) take(pictures);
    else toast("What was dropped is no picture; needed a PNG, JPEG or WebP file.");
  });
}

// Whether a key press belongs to a field that text is typed into.
export const typing = event =>
  event.target.closest?.("textarea, select, input:not([type=range], [type=checkbox], [type=file])") != null;
