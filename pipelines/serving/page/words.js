// Documents of the HTTP interface in words.

const LABELS = {
  queued: "Waiting", working: "In progress", ok: "Finished", rejected: "Refused", failed: "Failed", dead: "Given up",
};
const dates = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
const days = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "long", year: "numeric" });

/** Return a date and a time of seconds since 1970. */
export const when = (seconds) => dates.format(seconds * 1000);

/** Return a day of seconds since 1970. */
export const day = (seconds) => days.format(seconds * 1000);

/** Return a duration as roughly as it is known. */
export function roughly(seconds) {
  if (seconds < 5) return "a few seconds";
  if (seconds < 90) return `about ${seconds < 20 ? Math.round(seconds) : Math.round(seconds / 5) * 5} s`;
  if (seconds < 5400) return `about ${Math.round(seconds / 60)} min`;
  return `about ${Math.round(seconds / 360) / 10} h`;
}

/** Return how a video stands, as the report names outcomes: a style's name and a label. */
export function standing(video) {
  const look = {
    queued: () => "queued",
    in_progress: () => "working",
    completed: () => "ok",
    failed: () => (video.error.code === "dead" ? "dead" : advised(video.error.code) ? "rejected" : "failed"),
  }[video.status]();
  return { look, label: LABELS[look] };
}

export const hasEnded = (video) => video.status === "completed" || video.status === "failed";

/** Return what is said of a refusal: advice, if there is any, and the service's own words with the measurement. */
export function reasonOf({ code, message }) {
  const advice = advised(code);
  const said = document.createElement("p");
  said.textContent = sentence(message);
  if (!advice) return [said];
  const first = document.createElement("p");
  first.append(advice.content.cloneNode(true));
  said.className = "said";
  return [first, said];
}

/** Return a message as a sentence. */
export function sentence(message) {
  const whole = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

function advised(code) {
  return document.querySelector(`template[data-advice="${CSS.escape(code)}"]`);
}
