// Requests to the HTTP interface, as the signed-in browser.

const trouble = document.getElementById("trouble");
let csrfToken = "";
let scopes = [];

/** What the service answers instead of what was asked for: its status, its stable code, and words for people. */
export class Problem extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Return the answer's JSON. A GET is asked again while the service is starting or out of reach; the page says so. */
export async function get(path, signal) {
  for (;;) {
    try {
      const answer = await fetch(path, { signal });
      if (answer.status !== 503) {
        trouble.textContent = "";
        return await read(answer);
      }
      trouble.textContent = "The service is starting, or very busy. This page goes on by itself.";
    } catch (error) {
      if (error instanceof Problem || signal?.aborted) throw error;
      trouble.textContent = "The service cannot be reached. This page goes on by itself.";
    }
    await pause(2000, signal);
  }
}

/** Send a change, with a body if there is one: a FormData, or what becomes JSON. */
export async function send(method, path, body, headers = {}) {
  const form = body instanceof FormData;
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers: { "X-CSRF-Token": csrfToken, ...(body && !form ? { "Content-Type": "application/json" } : {}), ...headers },
      body: body && !form ? JSON.stringify(body) : body,
    });
  } catch {
    throw new Problem(0, "unreachable", "The service cannot be reached. Try again in a moment.");
  }
  return await read(answer);
}

/** Return who is signed in, null if nobody is. */
export async function signIn() {
  try {
    const session = await get("v1/session");
    csrfToken = session.csrf_token ?? "";
    scopes = session.scopes;
    return session;
  } catch (error) {
    if (error.status === 401) return null;
    throw error;
  }
}

/** Return whether who is signed in has a scope. */
export const may = (scope) => scopes.includes(scope);

/** Resolve after some milliseconds; reject once the signal says that nobody waits any more. */
export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

async function read(answer) {
  if (answer.ok) return answer.status === 204 ? null : await answer.json();
  if (answer.status === 401) dispatchEvent(new Event("signed-out"));
  const problem = await answer.json().catch(() => ({}));
  throw new Problem(answer.status, problem.code ?? "unexpected", problem.detail ?? answer.statusText);
}
