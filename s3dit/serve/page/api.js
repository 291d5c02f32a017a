// Calls to the server, by OpenAI's protocol of pictures with server-sent events; s3dit/serve/api.py says what they are.

const KEY = "s3dit.key";

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: value => sessionStorage.setItem(KEY, value),
};

// What the server says is wrong: status (0: no answer), param (the field), after (seconds to wait).
export class Refused extends Error {
  constructor(error, status = 0, after = null) {
    super(error?.message ?? `the server answered ${status}`);
    Object.assign(this, {status, param: error?.param ?? null, after});
  }
}

async function call(path, init = {}) {
  const headers = key.get() ? {...init.headers, Authorization: `Bearer ${key.get()}`} : init.headers;
  let answer;
  try {
    answer = await fetch(path, {...init, headers, cache: "no-store", credentials: "omit"});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused({message: "The server does not answer. Is it still running?"});
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Refused(body?.error, answer.status, Number(answer.headers.get("Retry-After")) || null);
}

// Whole numbers beyond what JavaScript counts exactly, such as large seeds, as BigInt.
export const parsed = text => JSON.parse(text, (_, value, at) =>
  Number.isInteger(value) && !Number.isSafeInteger(value) && at?.source ? BigInt(at.source) : value);

export const options = async () => parsed(await (await call("v1/options")).text());

function broken(error) {
  if (error?.name === "AbortError") throw error;
  throw new Refused({message: "The connection ended before the picture was there; draw it again."});
}

// The events of an answer: the JSON of each `data:` line.
async function* events(answer) {
  let rest = "";
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const {value, done} = await reader.read().catch(broken);
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter(line => line.startsWith("data:")).map(line => line.slice(5)).join("\n");
      if (data) yield parsed(data);
    }
  }
}

function picture(event) {
  const text = atob(event.b64_json), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return new Blob([bytes], {type: `image/${event.output_format}`});
}

// JSON of fields with the seed as it is written, which may be larger than JavaScript's numbers are exact.
const json = ({seed, ...fields}) => JSON.stringify(fields).slice(0, -1) + (seed ? `,"seed":${seed}}` : "}");

function form(fields, inputs) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields))
    body.append(name, typeof value === "string" ? value : JSON.stringify(value));
  for (const [name, blobs] of Object.entries(inputs))
    for (const blob of [blobs].flat()) body.append(name, blob, blob.name ?? `${name}.png`);
  return body;
}

// How much of a start image is redrawn where nobody says it: all of what a mask or margins ask for.
export const usualStrength = (mask, extend) => mask || extend ? 1 : 0.6;

// Draws one picture: settings under the request's names, inputs {image, mask_image, reference: […]} as Blobs.
// Calls on({type: "queued", position} | {type: "step", step, steps} | {type: "partial", file}); -> {file, notes}, of which the last
// are texts that a user should know.
export async function draw(settings, inputs, on, signal) {
  const {width, height, lora, ...rest} = settings;
  const fields = {...rest, n: 1, stream: true, partial_images: 3, progress: true};
  if (width) fields.size = `${width}x${height}`;
  // Said always: without it a model that looks at references takes the start image for one.
  if (inputs.image) fields.strength ??= usualStrength(inputs.mask_image, fields.extend);
  if (lora) fields.lora = Object.entries(lora).map(([name, scale]) => ({name, scale}));
  const edit = Object.keys(inputs).length > 0;
  const answer = await call(`v1/images/${edit ? "edits" : "generations"}`, {
    method: "POST", signal, body: edit ? form(fields, inputs) : json(fields),
    headers: edit ? {} : {"Content-Type": "application/json"},
  });
  for await (const event of events(answer)) {
    if (event.error) throw new Refused(event.error, 500);
    if (event.type.endsWith(".partial_image")) on({type: "partial", file: picture(event)});
    else if (event.type.endsWith(".completed")) return {file: picture(event), notes: event.notes ?? []};
    else on({...event, type: event.type.replace("s3dit.", "")});
  }
  return broken();
}
