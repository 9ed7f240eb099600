// The form: a photo that is checked as soon as it is there, and what is asked of it.

import { get, Problem, send } from "./api.js";
import { reasonOf, roughly } from "./words.js";

const $ = (id) => document.getElementById(id);
const form = $("ask");
let options;
let photo = null;
let check = null;
let sending = false;
let idempotencyKey = null;

/** Fill the form with what this service offers. `opened` is called with the ids of the videos that were asked for. */
export async function prepare(opened) {
  options = await get("v1/options");
  const { defaults } = options;
  for (const [name, { width, height }] of Object.entries(options.sizes)) {
    const called = name === `${width}x${height}` ? "" : `${name}, `;
    $("size").append(new Option(`${called}${width} × ${height}`, name));
  }
  for (const count of options.num_frames) {
    $("num_frames").append(new Option(`${(count / defaults.fps).toFixed(1)} s, ${count} frames`, count));
  }
  for (const schedule of options.guidance_schedules) $("guidance_schedule").append(new Option(schedule));
  for (const option of $("tier").options) {
    option.disabled = !options.tiers.includes(option.value);
    if (option.disabled) option.text += ", not to be had here";
  }
  for (const field of form.elements) if (field.name in defaults) field.value = defaults[field.name];
  if (options.require_consent) $("consent_id").required = true;
  else document.querySelector(".more-settings summary").after($("consent-field"));
  if (options.retention_days) {
    $("retention").textContent = `Videos and photos are deleted after ${options.retention_days} days.`;
  }

  $("photo").addEventListener("change", () => take($("photo").files[0]));
  // Somebody may have chosen one before the service had said what it offers.
  if ($("photo").files.length) take($("photo").files[0]);
  for (const kind of ["dragover", "drop"]) {
    addEventListener(kind, (event) => {
      if ($("new").hidden || !event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      $("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") take(event.dataTransfer.files[0]);
    });
  }
  addEventListener("dragleave", () => $("drop").classList.remove("over"));
  addEventListener("paste", (event) => {
    if (!$("new").hidden && event.clipboardData.files.length) take(event.clipboardData.files[0]);
  });
  form.addEventListener("input", () => {
    idempotencyKey = null;
  });
  form.addEventListener("change", changed);
  $("num-takes").addEventListener("change", () => {
    const count = Number($("num-takes").value);
    $("send").textContent = count === 1 ? "Make the video" : `Make ${count} takes`;
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit(opened);
  });
}

/** Say again how long it takes, as the queue has moved on. */
export async function estimate() {
  const shape = new URLSearchParams({
    size: $("size").value, num_frames: $("num_frames").value, num_inference_steps: $("num_inference_steps").value,
  });
  let expected;
  try {
    expected = await get(`v1/estimate?${shape}`);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    $("estimate").textContent = "";
    return;
  }
  const { queue_seconds: queue, render_seconds: render } = expected;
  const takes = $("num-takes").value === "1" ? "" : " a take";
  const wait = queue === 0 ? "" : queue === null ? ", after others that wait" : `, after ${roughly(queue)} of waiting`;
  const first = "No estimate yet: nothing was made here so far.";
  const words = roughly(render ?? 0);
  $("estimate").textContent = render === null ? first : `${words.charAt(0).toUpperCase()}${words.slice(1)}${takes}${wait}.`;
}

function changed(event) {
  if (["size", "num_frames", "num_inference_steps", "num-takes"].includes(event.target.id)) estimate();
}

/** Show a photo at once, and what the service says of its face as soon as it is known. */
async function take(file) {
  if (!file) return;
  check?.abort();
  const checking = (check = new AbortController());
  photo = null;
  idempotencyKey = null;
  URL.revokeObjectURL($("seen-photo").src);
  $("seen-photo").src = URL.createObjectURL(file);
  $("seen").hidden = false;
  $("seen-face").hidden = true;
  $("seen-box").setAttribute("hidden", "");
  $("photo-words").querySelector("strong").textContent = "Choose another photo";
  judge("checking", "Looking for the face…");
  if (file.size > options.max_upload_bytes) {
    judge("rejected", ...reasonOf({ code: "too_large", message: `at most ${Math.floor(options.max_upload_bytes / 2 ** 20)} MB can be sent` }));
    return;
  }
  const body = new FormData();
  body.append("photo", file);
  try {
    const found = await send("POST", "v1/identities", body);
    if (checking.signal.aborted) return;
    if (!found.usable) {
      judge("rejected", ...reasonOf(found.refusal));
      return;
    }
    photo = file;
    showFace(found);
  } catch (error) {
    if (checking.signal.aborted || error.status === 401) return;
    judge("rejected", ...reasonOf(error));
  }
}

function showFace({ photo: { width, height }, box: [left, top, right, bottom], crop, quality }) {
  const drawing = $("seen-box");
  drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const edges = { x: left, y: top, width: right - left, height: bottom - top, rx: (right - left) / 20 };
  for (const [name, value] of Object.entries(edges)) drawing.firstChild.setAttribute(name, value);
  drawing.removeAttribute("hidden");
  $("seen-face").querySelector("img").src = crop;
  $("seen-face").hidden = false;
  const turned = Math.round(Math.abs(quality.yaw_degrees));
  const facing = turned < 5 ? "seen from the front" : `turned by ${turned}°`;
  judge("ok", `This face can be used: ${Math.round(quality.face_px)} px wide, ${facing}.`);
}

function judge(look, ...words) {
  $("photo-status").className = `verdict ${look}`;
  $("photo-status").replaceChildren(...words.flatMap((word) => (word instanceof Node ? [...word.childNodes, " "] : [word])));
}

async function submit(opened) {
  $("refusal").hidden = true;
  const prompt = $("prompt").value.trim();
  const most = options.max_prompt_characters;
  const wrong = [
    complain("prompt", !prompt ? "Say in a few sentences what happens." : prompt.length > most ? `Say it in at most ${most} characters; these are ${prompt.length}.` : ""),
    complain("consent_id", $("consent_id").required && !$("consent_id").value.trim() ? "This service asks for it." : ""),
  ];
  if (!photo && !$("photo-status").classList.contains("checking")) {
    if (!$("photo-status").textContent) judge("rejected", "Choose a photo first.");
    wrong.unshift($("photo"));
  }
  const first = wrong.find(Boolean);
  if (first) {
    first.focus();
    return;
  }
  if (!photo) {
    refuse(new Problem(0, "checking", "The photo is still being checked; press again in a moment."));
    return;
  }
  if (sending) return;
  sending = true;
  try {
    opened(await ask());
  } catch (error) {
    refuse(error);
  } finally {
    sending = false;
  }
}

/** Ask for the first take with the photo, and for the others as remixes of it with the next seeds; return all ids. */
async function ask() {
  // The same press again, after an answer that was lost, is the same videos.
  idempotencyKey ??= Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const body = new FormData(form);
  for (const name of ["consent_id", "negative_prompt", "seed", "num_inference_steps", "guidance_scale"]) {
    if (!body.get(name)) body.delete(name);
  }
  body.set("photo", photo);
  const video = await send("POST", "v1/videos", body, { "Idempotency-Key": idempotencyKey });
  const ids = [video.id];
  for (let take = 1; take < Number($("num-takes").value); take += 1) {
    const other = { prompt: video.prompt, seed: Number(body.get("seed") || options.defaults.seed) + take };
    const remixed = await send("POST", `v1/videos/${video.id}/remix`, other, { "Idempotency-Key": `${idempotencyKey}-${take}` });
    ids.push(remixed.id);
  }
  idempotencyKey = null;
  return ids;
}

function complain(id, words) {
  const field = $(id);
  field.setAttribute("aria-invalid", String(Boolean(words)));
  field.closest(".field").querySelector(".complaint").textContent = words;
  return words ? field : null;
}

function refuse(error) {
  $("refusal").replaceChildren(...reasonOf(error));
  $("refusal").hidden = false;
}
