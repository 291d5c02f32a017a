// What made a picture, as its file carries it: the JSON of a PNG's text "s3dit", of an Exif description elsewhere.

import {parsed} from "./api.js";

const MARK = new TextEncoder().encode("s3dit:{");
const latin = bytes => new TextDecoder("latin1").decode(bytes);

// -> an object of JSON values, or null where the file carries none.
export async function metadataOf(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  try {
    const data = parsed(fromPng(bytes) ?? fromExif(bytes));
    return data && typeof data === "object" && !Array.isArray(data) ? data : null;
  } catch {
    return null;
  }
}

function fromPng(bytes) {
  const view = new DataView(bytes.buffer);
  if (bytes.length < 8 || view.getUint32(0) !== 0x89504e47) return null;
  for (let at = 8; at + 12 <= bytes.length; at += 12 + view.getUint32(at)) {
    const [kind, body] = [latin(bytes.subarray(at + 4, at + 8)), bytes.subarray(at + 8, at + 8 + view.getUint32(at))];
    if (kind === "tEXt" && latin(body.subarray(0, 6)) === "s3dit\0") return latin(body.subarray(6));
  }
  return null;
}

// The description stands in the Exif as plain characters that end with a zero byte.
function fromExif(bytes) {
  for (let at = bytes.indexOf(MARK[0]); at >= 0; at = bytes.indexOf(MARK[0], at + 1))
    if (MARK.every((byte, i) => bytes[at + i] === byte))
      return latin(bytes.subarray(at + MARK.length - 1, bytes.indexOf(0, at)));
  return null;
}
