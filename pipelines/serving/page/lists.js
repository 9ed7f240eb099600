// What was made before: videos, page by page, and batches with their reports.

import { get, may, pause, send } from "./api.js";
import { confirmed } from "./confirm.js";
import { hasEnded, reasonOf, sentence, standing, when } from "./words.js";

const PAGE = 12;
const ASK_EVERY_MS = 3000;
const KINDS = { ok: "finished", rejected: "refused", failed: "failed", dead: "given up", cancelled: "cancelled" };
const STANDINGS = {
  in_progress: ["working", "In progress"], cancelling: ["working", "Stopping"], finalizing: ["working", "Writing the report"],
  completed: ["ok", "Finished"], cancelled: ["cancelled", "Cancelled"], failed: ["failed", "Failed"],
};
const $ = (id) => document.getElementById(id);
const fresh = (id) => $(id).content.cloneNode(true).firstElementChild;

/** Show the tenant's videos, the newest first; `opened` is called with the ids that are to be compared. */
export async function showVideos(signal, opened) {
  const tiles = new Map();
  let last = null;
  $("gallery").replaceChildren();
  const chosen = () => [...tiles].filter(([, tile]) => tile.querySelector("input").checked).map(([id]) => id);
  const count = () => {
    const number = chosen().length;
    $("compare").disabled = number < 2;
    $("compare").textContent = number < 2 ? "Compare" : `Compare ${number}`;
  };
  $("gallery").onchange = count;
  $("compare").onclick = () => opened(chosen());
  count();

  async function more() {
    const after = last ? `&after=${last}` : "";
    const page = await get(`v1/videos?limit=${PAGE}${after}`, signal);
    last = page.last_id ?? last;
    $("older").hidden = !page.has_more;
    for (const video of page.data) put(video);
    return page.data;
  }

  function put(video, first = false) {
    if (!tiles.has(video.id)) {
      tiles.set(video.id, fresh("tile"));
      if (first) $("gallery").prepend(tiles.get(video.id));
      else $("gallery").append(tiles.get(video.id));
    }
    fill(tiles.get(video.id), video);
    $("no-videos").hidden = true;
  }

  $("older").onclick = async () => {
    try {
      const [next] = await more();
      if (next) tiles.get(next.id).querySelector("h2 a").focus();
    } catch (error) {
      if (error.status !== 404) throw error;
      // The last one shown has been deleted elsewhere: from the start.
      dispatchEvent(new Event("hashchange"));
    }
  };
  $("no-videos").hidden = (await more()).length > 0;
  for (;;) {
    await pause(ASK_EVERY_MS, signal);
    if (document.hidden) continue;
    const { data } = await get(`v1/videos?limit=${PAGE}`, signal);
    // The oldest first, so that each new one goes to the front in its turn.
    for (const video of data.reverse()) put(video, true);
  }
}

function fill(tile, video) {
  const { look, label } = standing(video);
  tile.className = `card tile ${look}`;
  for (const link of tile.querySelectorAll("a")) link.href = `#/videos/${video.id}`;
  tile.querySelector("h2 a").textContent = video.prompt;
  tile.querySelector(".badge").textContent = label;
  tile.querySelector(".when").textContent = `${when(video.created_at)}, seed ${video.seed}`;
  tile.querySelector("input").setAttribute("aria-label", `Compare: ${video.prompt.slice(0, 80)}, seed ${video.seed}`);
  const screen = tile.querySelector(".screen");
  screen.tabIndex = -1;
  screen.setAttribute("aria-hidden", "true");
  const image = screen.querySelector("img");
  image.hidden = !video.has_content;
  if (video.has_content && !image.src) image.src = `v1/videos/${video.id}/content?variant=thumbnail`;
  const words = hasEnded(video) ? "no video" : video.status === "queued" ? "waiting" : `${video.progress} %`;
  screen.querySelector("span").textContent = video.has_content ? `${Number(video.seconds).toFixed(1)} s` : words;
}

/** Show the tenant's batches, the newest first, and start others. */
export async function showBatches(signal) {
  const cards = new Map();
  $("batch-cards").replaceChildren();

  function put(batch) {
    const written = JSON.stringify(batch);
    const shown = cards.get(batch.id);
    if (shown?.written === written) return;
    const card = batchCard(batch, put, drop);
    if (shown) shown.card.replaceWith(card);
    else $("batch-cards").prepend(card);
    cards.set(batch.id, { card, written });
    $("no-batches").hidden = true;
  }

  function drop(id) {
    cards.get(id)?.card.remove();
    cards.delete(id);
    $("no-batches").hidden = cards.size > 0;
  }

  $("start-batch").onsubmit = async (event) => {
    event.preventDefault();
    const manifest = $("manifest").value.trim();
    try {
      complain(manifest ? "" : "Say which manifest is to be rendered.");
      if (!manifest) return;
      put(await send("POST", "v1/batches", { manifest }));
      $("manifest").value = "";
    } catch (error) {
      complain(sentence(error.message));
    }
  };
  for (;;) {
    const { data } = await get("v1/batches", signal);
    $("no-batches").hidden = data.length > 0;
    for (const id of [...cards.keys()]) if (!data.some((batch) => batch.id === id)) drop(id);
    // The oldest first, so that each new one goes to the front in its turn.
    for (const batch of data.reverse()) put(batch);
    do await pause(ASK_EVERY_MS, signal);
    while (document.hidden);
  }
}

function complain(words) {
  $("manifest-error").textContent = words;
  $("manifest").setAttribute("aria-invalid", String(words !== ""));
  if (words) $("manifest").focus();
}

function batchCard(batch, put, drop) {
  const card = fresh("batch");
  const [look, label] = STANDINGS[batch.status];
  card.classList.add(look);
  card.querySelector("h2").textContent = batch.manifest;
  card.querySelector(".badge").textContent = label;
  card.querySelector(".when").textContent = `${when(batch.created_at)}, model ${batch.model}, run ${batch.id}`;
  const { total } = batch.request_counts;
  const ended = Object.entries(batch.counts).filter(([, number]) => number);
  const words = ended.map(([kind, number]) => `${number} ${KINDS[kind]}`);
  const left = total - ended.reduce((sum, [, number]) => sum + number, 0);
  if (left) words.push(`${left} to come`);
  card.querySelector(".counts").textContent = words.join(", ") || "no rows";
  drawBar(card.querySelector("svg"), ended, total, words.join(", "));
  if (batch.error) {
    card.querySelector(".reason").hidden = false;
    card.querySelector(".reason").replaceChildren(...reasonOf(batch.error));
  }
  const actions = card.querySelector(".actions");
  const views = { report: "Report", contact_sheet: "Contact sheet", table: "Results table" };
  for (const [name, text] of Object.entries(views)) {
    if (!batch.results[name]) continue;
    // Relative, because the service may lie behind a prefix.
    const link = Object.assign(document.createElement("a"), { href: batch.results[name].slice(1), textContent: text });
    link.className = name === "report" ? "button main" : "button";
    link.setAttribute("aria-label", `${text} of ${batch.manifest}`);
    actions.append(link);
  }
  const button = (text, act) => {
    const made = Object.assign(document.createElement("button"), { textContent: text });
    made.setAttribute("aria-label", `${text} ${batch.manifest}`);
    made.onclick = async () => {
      try {
        await act();
      } catch (error) {
        card.querySelector(".reason").hidden = false;
        card.querySelector(".reason").replaceChildren(...reasonOf(error));
      }
    };
    actions.append(made);
  };
  const path = `v1/batches/${batch.id}`;
  if (batch.status === "in_progress" && may("render")) {
    button("Cancel", async () => put(await send("POST", `${path}/cancel`)));
  }
  if (["completed", "cancelled", "failed"].includes(batch.status) && may("admin")) {
    button("Delete", async () => {
      if (!(await confirmed("Delete this batch?", "Its report and every video that nothing else refers to are deleted."))) return;
      await send("DELETE", path);
      drop(batch.id);
      $("batches").querySelector("h1").focus();
    });
  }
  return card;
}

function drawBar(bar, ended, total, words) {
  bar.setAttribute("aria-label", words || "no rows");
  let left = 0;
  for (const [kind, number] of ended) {
    const part = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const width = (100 * number) / total;
    part.setAttribute("class", `${kind}-fill`);
    for (const [name, value] of Object.entries({ x: left, y: 0, width, height: 14 })) part.setAttribute(name, value);
    bar.append(part);
    left += width;
  }
}
