// Videos side by side: what happens to them, and what can be done with them.

import { get, pause, send } from "./api.js";
import { confirmed } from "./confirm.js";
import { day, hasEnded, reasonOf, roughly, sentence, standing, when } from "./words.js";

// A browser has six connections to a server over HTTP/1.1, for all of its tabs: the rest is asked for in turn.
const MOST_STREAMS = 2;
const ASK_EVERY_MS = 1500;
const LAST = "The video and its record are deleted, and the photo with the last video made of it.";

const list = document.getElementById("take-cards");
const news = document.getElementById("takes-news");
const playAll = document.getElementById("play-all");

/** Show the videos of these ids until the signal; `opened` is called with all ids when another take was asked for. */
export function show(ids, signal, opened) {
  const takes = new Map(ids.map((id) => [id, new Take(id)]));
  const streams = new Map();
  list.replaceChildren(...Array.from(takes.values(), (take) => take.card));
  news.textContent = "";
  playAll.onclick = () => {
    for (const video of list.querySelectorAll("video")) {
      video.currentTime = 0;
      video.play();
    }
  };

  function put(take, video) {
    const before = take.video;
    take.put(video);
    if (before && before.status !== video.status) news.textContent = `Seed ${video.seed}: ${take.label}.`;
    if (hasEnded(video)) drop(take.id);
    arrange();
  }

  function gone(take, words) {
    drop(take.id);
    takes.delete(take.id);
    take.card.remove();
    news.textContent = words;
    if (!takes.size) list.append(Object.assign(document.createElement("li"), { className: "empty", textContent: words }));
    arrange();
  }

  function drop(id) {
    streams.get(id)?.close();
    streams.delete(id);
  }

  /** Watch those that are being made, in their order, with as many streams as one tab may hold. */
  function arrange() {
    const shown = Array.from(takes.values(), (take) => take.video);
    const prompts = new Set(shown.map((video) => video?.prompt));
    list.classList.toggle("alike", prompts.size === 1);
    document.getElementById("takes-prompt").textContent = prompts.size === 1 ? (shown[0]?.prompt ?? "") : "";
    document.querySelector("#takes h1").textContent = takes.size > 1 ? `${takes.size} takes` : "Video";
    list.classList.toggle("single", takes.size === 1);
    playAll.hidden = shown.filter((video) => video?.has_content).length < 2;
    if (document.hidden || signal.aborted) return;
    const open = Array.from(takes.values()).filter((take) => take.video && !hasEnded(take.video));
    const busyFirst = open.sort((one, other) => (other.video.status === "in_progress") - (one.video.status === "in_progress"));
    const chosen = busyFirst.slice(0, MOST_STREAMS);
    for (const id of streams.keys()) if (!chosen.some((take) => take.id === id)) drop(id);
    for (const take of chosen) if (!streams.has(take.id)) streams.set(take.id, watch(take));
  }

  function watch(take) {
    const stream = new EventSource(`v1/videos/${take.id}/events`);
    stream.addEventListener("video", (event) => put(take, JSON.parse(event.data)));
    stream.addEventListener("preview", (event) => take.preview(JSON.parse(event.data)));
    stream.addEventListener("deleted", () => gone(take, "The video was deleted."));
    stream.addEventListener("error", () => {
      // Refused, and not only interrupted: how the video stands is asked for instead.
      if (stream.readyState === EventSource.CLOSED) drop(take.id);
    });
    return stream;
  }

  async function follow() {
    for (;;) {
      const unknown = Array.from(takes.values()).filter(
        (take) => !take.video || (!hasEnded(take.video) && !streams.has(take.id)),
      );
      for (const take of unknown) {
        try {
          put(take, await get(`v1/videos/${take.id}`, signal));
        } catch (error) {
          if (error.status !== 404 && error.status !== 422) throw error;
          gone(take, "This video is not there: it was deleted.");
        }
      }
      await pause(ASK_EVERY_MS, signal);
    }
  }

  async function act(take, action) {
    if (action === "again") {
      const next = Math.max(...Array.from(takes.values(), (each) => each.video.seed)) + 1;
      const seed = take.video.status === "completed" ? next : take.video.seed;
      const { id } = await send("POST", `v1/videos/${take.id}/remix`, { prompt: take.video.prompt, seed });
      opened([...takes.keys(), id]);
      return;
    }
    drop(take.id);
    await send("DELETE", `v1/videos/${take.id}`);
    gone(take, action === "cancel" ? "Cancelled. Nothing of this video is kept." : "Deleted.");
    document.querySelector("#takes h1").focus();
    if (takes.size) opened([...takes.keys()]);
  }

  list.onclick = async (event) => {
    const button = event.target.closest("button[data-do]");
    const take = Array.from(takes.values()).find((each) => each.card.contains(button));
    if (!button || !take || take.busy) return;
    // Buttons stay enabled, because a disabled one loses the focus.
    take.busy = true;
    try {
      if (button.dataset.do !== "delete" || (await confirmed("Delete this video?", LAST))) await act(take, button.dataset.do);
    } catch (error) {
      take.complain(error);
    } finally {
      take.busy = false;
    }
  };
  document.addEventListener(
    "visibilitychange",
    () => {
      // A tab that nobody sees gives its connections back.
      if (document.hidden) for (const id of [...streams.keys()]) drop(id);
      else arrange();
    },
    { signal },
  );
  signal.addEventListener("abort", () => {
    for (const id of [...streams.keys()]) drop(id);
  });
  return follow();
}

class Take {
  constructor(id) {
    this.id = id;
    this.video = null;
    this.busy = false;
    this.card = document.getElementById("take").content.cloneNode(true).firstElementChild;
    this.card.querySelector("details").addEventListener("toggle", () => this.#showRecord());
  }

  #part(selector) {
    return this.card.querySelector(selector);
  }

  put(video) {
    const first = !this.video || hasEnded(video) !== hasEnded(this.video);
    this.video = video;
    const { look, label } = standing(video);
    this.label = label;
    this.card.className = `card take ${look}`;
    this.#part("h2").textContent = `Seed ${video.seed}`;
    this.#part(".badge").textContent = label;
    this.#part(".prompt").textContent = video.prompt;
    this.#part(".progress").hidden = hasEnded(video);
    if (!hasEnded(video)) this.#putProgress(video);
    if (!first) return;
    const screen = this.#part(".screen");
    const [width, height] = video.size.split("x");
    screen.style.aspectRatio = `${width} / ${height}`;
    screen.hidden = video.status === "failed" && !video.has_content;
    if (video.has_content) screen.replaceChildren(this.#player(width, height));
    this.#part(".reason").hidden = !video.error;
    if (video.error) this.#part(".reason").replaceChildren(...reasonOf(video.error));
    this.#part("details").hidden = !video.has_content;
    const download = this.#part('[data-do="download"]');
    download.hidden = !video.has_content;
    download.href = `v1/videos/${video.id}/content`;
    download.download = `echovideo-seed-${video.seed}.mp4`;
    const again = this.#part('[data-do="again"]');
    again.hidden = !hasEnded(video) || look === "rejected";
    again.textContent = video.status === "completed" ? "Another take" : "Try again";
    this.#part('[data-do="cancel"]').hidden = hasEnded(video);
    this.#part('[data-do="delete"]').hidden = !hasEnded(video);
    for (const action of ["download", "cancel", "delete"]) {
      const button = this.#part(`[data-do="${action}"]`);
      button.setAttribute("aria-label", `${button.textContent} seed ${video.seed}`);
    }
  }

  preview({ step, jpeg }) {
    if (hasEnded(this.video ?? { status: "queued" })) return;
    const screen = this.#part(".screen");
    const image = screen.querySelector("img") ?? new Image();
    image.src = jpeg;
    image.alt = `What the video looks like after step ${step}`;
    if (!image.isConnected) screen.replaceChildren(image);
  }

  complain(error) {
    this.#part(".reason").hidden = false;
    this.#part(".reason").replaceChildren(...reasonOf(error));
  }

  #putProgress(video) {
    const bar = this.#part("progress");
    bar.value = video.progress;
    bar.setAttribute("aria-label", `Progress of seed ${video.seed}`);
    const eta = video.eta_seconds === null ? "" : `, ${roughly(video.eta_seconds)} left`;
    const ahead = video.queue_position;
    const turn = !ahead ? "Next in turn" : ahead === 1 ? "One video goes first" : `${ahead} videos go first`;
    this.#part(".progress p").textContent =
      video.status === "queued" ? `${turn}${eta}` : video.step ? `Step ${video.step} of ${video.steps}${eta}` : `Reading the photo and the prompt${eta}`;
  }

  #player(width, height) {
    const player = document.createElement("video");
    Object.assign(player, {
      controls: true, loop: true, playsInline: true, preload: "metadata", width, height,
      poster: `v1/videos/${this.id}/content?variant=thumbnail`, src: `v1/videos/${this.id}/content`,
    });
    player.setAttribute("aria-label", `Video of seed ${this.video.seed}: ${this.video.prompt.slice(0, 160)}`);
    return player;
  }

  async #showRecord() {
    const place = this.#part(".record");
    if (!this.#part("details").open || place.childElementCount) return;
    try {
      place.replaceChildren(...recordOf(this.video, await get(`v1/videos/${this.id}/record`)));
    } catch (error) {
      place.textContent = sentence(error.message);
    }
  }
}

function recordOf(video, record) {
  const asked = record.request;
  const facts = {
    prompt: asked.prompt,
    "not shown": asked.negative_prompt,
    size: `${video.size}, ${video.num_frames} frames at ${video.fps} a second`,
    steps: `${video.num_inference_steps}, guidance ${video.guidance_scale} (${video.guidance_schedule})`,
    seed: video.seed,
    tier: video.tier,
    consent: video.consent_id,
    "face similarity": video.face_similarity?.toFixed(3),
    model: `${record.model.name}, ${record.model.licence}`,
    asked: when(video.created_at),
    kept: video.expires_at && `until ${day(video.expires_at)}`,
    video: video.id,
  };
  const entries = document.createElement("dl");
  entries.className = "facts";
  for (const [name, value] of Object.entries(facts)) {
    if (value === "" || value === null || value === undefined) continue;
    entries.append(Object.assign(document.createElement("dt"), { textContent: name }));
    entries.append(Object.assign(document.createElement("dd"), { textContent: value }));
  }
  const people = document.createElement("div");
  people.className = "person";
  for (const [variant, words] of [["photo", "photo given"], ["face", "face used"]]) {
    const figure = document.createElement("figure");
    const image = Object.assign(new Image(), { src: `v1/videos/${video.id}/content?variant=${variant}`, alt: words });
    figure.append(image, Object.assign(document.createElement("figcaption"), { textContent: words }));
    people.append(figure);
  }
  const whole = document.createElement("details");
  const text = Object.assign(document.createElement("pre"), { textContent: JSON.stringify(record, null, 1), tabIndex: 0 });
  whole.append(Object.assign(document.createElement("summary"), { textContent: "The whole record" }), text);
  return [people, entries, whole];
}
