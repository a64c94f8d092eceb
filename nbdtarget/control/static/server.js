// SPDX-License-Identifier: Apache-2.0
// Asking the server that this page comes from. A token, where one is needed, is kept for this tab only.

let token = sessionStorage.getItem("token") ?? "";
if (location.hash.startsWith("#token=")) {
  token = decodeURIComponent(location.hash.slice(7));
  sessionStorage.setItem("token", token);
  history.replaceState(null, "", location.pathname);
}

export class Refused extends Error {
  constructor(status, reason) { super(reason); this.status = status; }
}

// Whether the server lets this page change something: it says so with each answer.
export let mayChange = true;

export function useToken(text) {
  token = text;
  sessionStorage.setItem("token", text);
}

export async function ask(verb, request = {}) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  const reply = await fetch(`v1/${verb}`, { method: "POST", headers, body: JSON.stringify(request), cache: "no-store" });
  mayChange = reply.headers.get("Nbdtarget-Rights") !== "look";
  const answer = await reply.json();
  if (!reply.ok) throw new Refused(reply.status, answer.reason);
  return answer;
}
