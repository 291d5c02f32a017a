// Pictures that are being drawn: a card for each, and at most a few asked for at once, so that the server can join them.

import {draw, Refused} from "./api.js";
import {$, announce, h} from "./dom.js";

// A browser keeps six connections to a server open at most.
const AT_ONCE = 5;
const jobs = [];

const sleep = (seconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, 1000 * seconds);
  signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, {once: true});
});

// Adds a picture to be drawn. job: {settings, inputs, width, height, done, failed}; done({file, notes, seconds}) ->
// what opens it, failed(error) -> whether it is said elsewhere, so that the card can go.
export function add(job) {
  job.control = new AbortController();
  job.bar = h("progress", {max: 1, value: 0, "aria-label": "steps"});
  job.says = h("span", {className: "says"}, "waiting");
  job.stop = h("button", {type: "button", "aria-label": `cancel: ${job.settings.prompt}`, onclick: () => cancel(job)}, "Cancel");
  job.photo = h("div", {className: "photo waits"});
  job.photo.style.aspectRatio = `${job.width} / ${job.height}`;
  job.card = h("article", {className: "job"}, job.photo, h("div", {className: "line"}, job.says, job.stop), job.bar);
  job.card.style.setProperty("--ratio", job.width / job.height);
  job.state = "waiting";
  jobs.push(job);
  $("jobs").append(job.card);
  count();
  next();
}

// Takes cards off the stage: of all that is finished, whose pictures are in the gallery, or of some.
export function tidy(gone = jobs.filter(job => job.state === "over")) {
  for (const job of gone) {
    job.card.querySelectorAll("img").forEach(forget);
    job.card.remove();
  }
  jobs.splice(0, jobs.length, ...jobs.filter(job => !gone.includes(job)));
  count();
}

export const busy = () => jobs.filter(job => job.state !== "over").length;

export function cancel(job) {
  job.control.abort();
  if (job.state === "waiting") finish(job, "cancelled");
}

$("stop-all").addEventListener("click", () => { for (const job of [...jobs]) if (job.state !== "over") cancel(job); });

// Cancels the last picture that was asked for; -> whether there was one.
export function cancelLast() {
  const job = jobs.findLast(job => job.state !== "over");
  if (job) cancel(job);
  return !!job;
}

function next() {
  const running = jobs.filter(job => job.state === "running").length;
  for (const job of jobs.filter(job => job.state === "waiting").slice(0, AT_ONCE - running)) run(job);
}

async function run(job) {
  job.state = "running";
  job.began = performance.now();
  const {signal} = job.control;
  try {
    for (;;) {
      try {
        const {file, notes} = await draw(job.settings, job.inputs, event => hear(job, event), signal);
        show(job, file);
        const seconds = (performance.now() - job.began) / 1000;
        finish(job, [`finished in ${seconds.toFixed(1)} s`, ...notes].join(" · "), "done");
        job.says.title = notes.join("\n");
        const open = await job.done({file, notes, seconds});
        await job.shown;
        job.photo.append(h("button", {type: "button", className: "cover", "aria-label": `open: ${job.settings.prompt}`, onclick: open}));
        return;
      } catch (error) {
        // A full queue: the server says when to come again.
        if (error.status !== 429) throw error;
        say(job, `the server is busy; trying again in ${error.after ?? 5} s`);
        await sleep(error.after ?? 5, signal);
      }
    }
  } catch (error) {
    if (signal.aborted) finish(job, "cancelled");
    else {
      finish(job, error.message, "bad");
      if (job.failed(error instanceof Refused ? error : new Refused({message: String(error)}))) tidy([job]);
    }
  }
}

function hear(job, event) {
  if (event.type === "queued") say(job, event.position > 0 ? `in the queue, ${event.position} ahead` : "next in the queue");
  else if (event.type === "started") {
    job.began = performance.now();
    say(job, "reading the prompt");
  } else if (event.type === "partial") show(job, event.file);
  else if (event.type === "step") {
    [job.bar.max, job.bar.value] = [event.steps, event.step];
    say(job, event.step < event.steps ? `step ${event.step} of ${event.steps}` : "finishing", false);
    count();
  }
}

function say(job, text, aloud = true) {
  job.says.textContent = text;
  if (aloud) announce(text);
}

// Lays a picture over the one before it, in the order in which they came; the old one goes when the new one is there.
function show(job, file) {
  const image = h("img", {src: URL.createObjectURL(file), alt: job.settings.prompt});
  job.shown = Promise.all([job.shown, image.decode().catch(() => {})]).then(() => {
    const old = [...job.photo.querySelectorAll("img")];
    job.photo.classList.remove("waits");
    job.photo.append(image);
    setTimeout(() => old.forEach(forget), 400);
  });
}

function forget(image) {
  URL.revokeObjectURL(image.src);
  image.remove();
}

function finish(job, text, kind = "stopped") {
  job.state = "over";
  job.card.classList.add(kind);
  job.stop.hidden = true;
  job.photo.classList.remove("waits");
  say(job, text);
  count();
  next();
}

// The window's title says how far it is.
function count() {
  const open = jobs.filter(job => job.state !== "over"), [first] = open;
  $("empty").hidden = jobs.length > 0;
  $("stop-all").hidden = open.length < 2;
  document.title = !first ? "s3dit" : first.bar.value > 0 ? `${first.bar.value}/${first.bar.max} · s3dit` : "… · s3dit";
}
