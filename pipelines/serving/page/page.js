// Which view is shown: #/ the form, #/videos all videos, #/videos/ID,ID those side by side, #/batches the batches.

import { send, signIn } from "./api.js";
import { showBatches, showVideos } from "./lists.js";
import * as form from "./new.js";
import * as takes from "./takes.js";
import { sentence } from "./words.js";

const $ = (id) => document.getElementById(id);
const VIDEO_IDS = /^#\/videos\/(video_[0-9a-f]{24}(?:,video_[0-9a-f]{24})*)$/;
let current = null;
let shown = null;

const open = (ids) => {
  location.hash = `#/videos/${ids.join(",")}`;
};

/** Put a change of the shown videos into the address, without a step in the browser's history. */
const reopen = (ids) => {
  history.replaceState(null, "", `#/videos/${ids.join(",")}`);
  route();
};

async function route() {
  // A link within the page, such as the one that skips the navigation.
  if (location.hash && !location.hash.startsWith("#/")) return;
  current?.abort();
  current = new AbortController();
  const { signal } = current;
  const ids = VIDEO_IDS.exec(location.hash)?.[1].split(",");
  const name = ids ? "takes" : { "#/videos": "videos", "#/batches": "batches" }[location.hash] ?? "new";
  if (name !== shown) reveal(name);
  for (const link of $("pages").children) {
    const here = link.hash === (ids ? "#/videos" : location.hash || "#/");
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  try {
    if (ids) await takes.show([...new Set(ids)], signal, reopen);
    else if (name === "videos") await showVideos(signal, open);
    else if (name === "batches") await showBatches(signal);
    else await form.estimate();
  } catch (error) {
    if (!signal.aborted && error.status !== 401) $("trouble").textContent = sentence(error.message);
  }
}

function reveal(name) {
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== name;
  const title = $(name).querySelector("h1");
  document.title = `${name === "takes" ? "Video" : title.textContent} - EchoVideo`;
  // What had the focus is hidden now; but a page that has just been loaded is read from its top.
  if (shown) title.focus();
  shown = name;
}

function showSignedOut() {
  current?.abort();
  removeEventListener("hashchange", route);
  $("pages").hidden = $("sign-out").hidden = true;
  $("links-address").textContent = new URL("v1/sign-in-links", location.href).href;
  reveal("signed-out");
}

addEventListener("signed-out", showSignedOut);
$("sign-out").onclick = async () => {
  await send("DELETE", "v1/session");
  showSignedOut();
};
if (await signIn()) {
  await form.prepare(open);
  $("pages").hidden = $("sign-out").hidden = false;
  addEventListener("hashchange", route);
  route();
}
